// Two-dimensional rotary embedding of rows in shared memory.
//
// Pair i of the D / 2 of a head turns by the angle of its patch's row for i < D / 4, else of its column. Work is cut
// into units of 4 pairs: 8 neighbouring channels, or, where pairs are not neighbours, 4 channels of either half.
#pragma once
#include "kept_ids.cuh"
#include "rope.hpp"
#include "tile.cuh"

namespace ek {

// Where the angles of one token lie.
template <int D>
struct Angles {
  const float *row = nullptr, *column = nullptr;  // null: it is not turned

  EK_DEVICE Angles(const Rope& rope, int sample, int token) {
    const int place = token - rope.prefix;
    if (!rope.rows || place < 0) return;
    const KeptIds& kept = rope.positions;
    const int id = kept.type == IdType::all
                       ? place
                       : int(read_id(kept, (long long)sample * kept.count + place, rope.height * rope.width));
    const int r = int((float(id) + 0.5f) * rope.per_width);  // exact for ids below 2^20, without a division
    row = rope.rows + r * (D / 2);
    column = rope.columns + (id - r * rope.width) * (D / 2);
  }
  EK_DEVICE explicit operator bool() const { return row; }
  // cos and sin of pair i, which is even, and of the next.
  EK_DEVICE float4 two(int i) const {
    return __ldg(reinterpret_cast<const float4*>(i < D / 4 ? row + 2 * i : column + 2 * (i - D / 4)));
  }
};

// Copies N neighbours, all at once or by 16 bytes.
template <int N, class T>
EK_DEVICE void copy_elements(T* to, const T* from) {
  using Vector = std::conditional_t<N * sizeof(T) % 16 == 0, uint4, uint2>;
#pragma unroll
  for (int k = 0; k < int(N * sizeof(T) / sizeof(Vector)); ++k)
    reinterpret_cast<Vector*>(to)[k] = reinterpret_cast<const Vector*>(from)[k];
}

// Unit u of a row of D elements, of which `at(e)` is the address of element e and the next 3.
template <bool Interleaved, int D, class T, class F>
EK_DEVICE void load_unit(T (&x)[8], F&& at, int u) {
  if constexpr (Interleaved)
    copy_elements<8>(x, at(8 * u));
  else
    copy_elements<4>(x, at(4 * u)), copy_elements<4>(x + 4, at(D / 2 + 4 * u));
}
template <bool Interleaved, int D, class T, class F>
EK_DEVICE void store_unit(F&& at, const T (&x)[8], int u) {
  if constexpr (Interleaved)
    copy_elements<8>(at(8 * u), x);
  else
    copy_elements<4>(at(4 * u), x), copy_elements<4>(at(D / 2 + 4 * u), x + 4);
}

// (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for the pairs of unit u; `direction` is -1 to turn them back.
template <bool Interleaved, int D>
EK_DEVICE void turn(float (&x)[8], const Angles<D>& angles, int u, float direction) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float4 a = angles.two(4 * u + 2 * k);
#pragma unroll
    for (int p = 2 * k; p < 2 * k + 2; ++p) {
      const float cos = p % 2 ? a.z : a.x, sin = direction * (p % 2 ? a.w : a.y);
      float &x0 = x[Interleaved ? 2 * p : p], &x1 = x[Interleaved ? 2 * p + 1 : p + 4];
      const float turned = x0 * cos - x1 * sin;
      x1 = x1 * cos + x0 * sin, x0 = turned;
    }
  }
}

// Turns the first `rows` rows of a tile, which are the tokens `first`, `first` + 1 ..., rounding each element once; by
// `threads` threads, of which this is number `thread`.
template <class T, int D>
EK_DEVICE void turn_rows(const Tile<T, D>& tile, const Rope& rope, int sample, int first, int rows, int thread,
                         int threads) {
  auto all = [&](auto interleaved) {
#pragma unroll 1
    for (int i = thread; i < rows * tile.kChunks; i += threads) {
      const int row = i / tile.kChunks, u = i % tile.kChunks;
      const Angles<D> angles(rope, sample, first + row);
      if (!angles) continue;
      auto at = [&](int e) { return tile.chunk(row, e / kChunk) + e % kChunk; };
      alignas(16) T x[8];
      float wide[8];
      load_unit<interleaved, D>(x, at, u);
#pragma unroll
      for (int e = 0; e < 8; ++e) wide[e] = to_float(x[e]);
      turn<interleaved>(wide, angles, u, 1);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = from_float<T>(wide[e]);
      store_unit<interleaved, D>(at, x, u);
    }
  };
  if (rope.rows) rope.interleaved ? all(std::true_type{}) : all(std::false_type{});
}

// Stores rows of float32 in shared memory to rows of global memory, `stride` elements apart: scaled, turned back where
// there is a rope, rounded once.
template <class T, int D>
EK_DEVICE void store_rows(T* to, long long stride, const Tile<float, D>& tile, float scale, const Rope& rope,
                          int sample, int first, int rows, int thread, int threads) {
  auto all = [&](auto interleaved) {
#pragma unroll 1
    for (int i = thread; i < rows * tile.kChunks; i += threads) {
      const int row = i / tile.kChunks, u = i % tile.kChunks;
      const Angles<D> angles(rope, sample, first + row);
      alignas(16) float wide[8];
      alignas(16) T x[8];
      load_unit<interleaved, D>(wide, [&](int e) { return tile.chunk(row, e / kChunk) + e % kChunk; }, u);
#pragma unroll
      for (int e = 0; e < 8; ++e) wide[e] *= scale;
      if (angles) turn<interleaved>(wide, angles, u, -1);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = from_float<T>(wide[e]);
      store_unit<interleaved, D>([&](int e) { return to + row * stride + e; }, x, u);
    }
  };
  !rope.rows || rope.interleaved ? all(std::true_type{}) : all(std::false_type{});
}

// As store_block, but scaled and turned back, in float32 until the only rounding; 8 rows at a time, through as much
// shared memory as 16 rows of T take.
template <class T, int D>
EK_DEVICE void store_turned_block(T* to, long long stride, const float (&sum)[D / kChunk][4], const Tile<T, D>& through,
                                  float scale, const Rope& rope, int sample, int first, int rows, int lane) {
  const Tile<float, D> wide{reinterpret_cast<float*>(through.at)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < wide.kChunks; ++c)
      wide.pair(lane / 4, c, lane % 4) = {sum[c][2 * half], sum[c][2 * half + 1]};
    __syncwarp();
    const int row = 8 * half;
    store_rows(to + row * stride, stride, wide, scale, rope, sample, first + row, min(rows - row, 8), lane, 32);
  }
}
}  // namespace ek
