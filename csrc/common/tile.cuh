// Rows of 16-bit elements in shared memory, laid out for ldmatrix, and the products of tensor cores on them.
//
// A row of D elements is D / 8 chunks of 8, without padding. ldmatrix reads one chunk of 8 consecutive rows at a time;
// that these lie on different banks for every D, chunk c of row r lies where chunk c ^ flip(r) would.
//
// Operands are blocks of 16 rows by 2 chunks. One load gives what mma takes as a, 16 x 16; or as b for two tiles of 8
// columns which are the block's rows; or, Transposed, as b for two tiles of columns which are the block's chunks.
#pragma once
#include "primitives.cuh"

namespace ek {
constexpr int kChunk = 8;   // elements
constexpr int kBlock = 16;  // rows

template <class T, int D>
struct Tile {
  static_assert(D % kChunk == 0, "rows are whole chunks");
  static constexpr int kChunks = D / kChunk, kBlocks = (kChunks + 1) / 2;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  T* at;

  EK_DEVICE static int flip(int row) { return row / (8 / kPeriod) % kPeriod; }
  EK_DEVICE T* chunk(int row, int c) const { return at + (row * kChunks + (c ^ flip(row))) * kChunk; }
  // Two neighbours of a chunk, as a lane holds them of a product: in the elements' width, or packed.
  EK_DEVICE auto& pair(int row, int c, int i) const {
    using Pair = std::conditional_t<sizeof(T) == 4, float2, std::uint32_t>;
    return *reinterpret_cast<Pair*>(chunk(row, c) + 2 * i);
  }
  EK_DEVICE Tile below(int rows) const { return {at + rows * D}; }  // `rows` is a multiple of 8
};

// Copies `rows` rows in the background, by `threads` threads of which this is number `thread`. Rows from `valid` on
// become zero, and are not read.
template <class T, int D>
EK_DEVICE void copy_rows(const Tile<T, D>& to, const T* from, long long stride, int rows, int valid, int thread,
                         int threads) {
#pragma unroll 1  // which saves registers, and costs nothing: nobody waits for the copies here
  for (int i = thread; i < rows * to.kChunks; i += threads) {
    const int row = i / to.kChunks, c = i % to.kChunks;
    cp_async_16(to.chunk(row, c), from + (row < valid ? row * stride + c * kChunk : 0), row < valid);
  }
}

// r[0], r[1]: rows 0-7 and 8-15 of chunk 2i; r[2], r[3]: of chunk 2i + 1, or of 2i again where there is no other.
template <bool Transposed = false, class T, int D>
EK_DEVICE void load_block(std::uint32_t (&r)[4], const Tile<T, D>& tile, int row, int i, int lane) {
  const int mine = row + lane % 16, second = 2 * i + 1 < tile.kChunks ? lane / 16 : 0;
  // This is tile.chunk(mine, 2 * i + second), so that as little as can be depends on both the lane and i.
  const int low = 2 * i % tile.kPeriod, c = ((second ^ tile.flip(mine)) ^ low) + 2 * i - low;
  ldmatrix_x4<Transposed>(r, tile.at + (mine * tile.kChunks + c) * kChunk);
}

// s(m) += a(m) b^T over channels, for 16 rows of b and up to M blocks of 16 rows, of which `count` exist: s(m)[n] has
// as columns the rows 8n to 8n + 7 of b. load_a(x, m, i) loads block i of the channels of a(m).
template <int M, class T, int D, class S, class A>
EK_DEVICE void add_products(S&& s, A&& load_a, const Tile<T, D>& b, int row, int count, int lane) {
#pragma unroll
  for (int i = 0; i < b.kBlocks; ++i) {
    std::uint32_t y[4];
    load_block(y, b, row, i, lane);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m && m >= count) break;
      std::uint32_t x[4];
      load_a(x, m, i);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (2 * i + 1 < b.kChunks)
          mma_m16n8k16<T>(s(m)[n], x, y[n], y[n + 2]);
        else
          mma_m16n8k8<T>(s(m)[n], {x[0], x[1]}, y[n]);
    }
  }
}

// s as the operand a of the next product, rounded to T.
template <class T>
EK_DEVICE void pack_block(std::uint32_t (&a)[4], const float (&s)[2][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = pack2<T>(s[r / 2][r % 2 * 2], s[r / 2][r % 2 * 2 + 1]);
}

// sum[m] += a[m] b over 16 rows of b: sum[m][j] has chunk j of b as its columns.
template <class T, int D, int M>
EK_DEVICE void add_weighted_rows(float (&sum)[M][D / kChunk][4], const std::uint32_t (&a)[M][4], const Tile<T, D>& b,
                                 int row, int count, int lane) {
#pragma unroll
  for (int i = 0; i < b.kBlocks; ++i) {
    std::uint32_t y[4];
    load_block<true>(y, b, row, i, lane);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m && m >= count) break;
      mma_m16n8k16<T>(sum[m][2 * i], a[m], y[0], y[1]);
      if (2 * i + 1 < b.kChunks) mma_m16n8k16<T>(sum[m][2 * i + 1], a[m], y[2], y[3]);
    }
  }
}

// Stores the first `rows` of 16 rows of accumulators, rounded, to rows `stride` apart; through as many rows of shared
// memory of the warp's own, whose content the warp has done with. All lanes of a warp call it.
template <class T, int D>
EK_DEVICE void store_block(T* to, long long stride, const float (&sum)[D / kChunk][4], const Tile<T, D>& through,
                           int rows, int lane) {
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < through.kChunks; ++c)
      through.pair(lane / 4 + 8 * half, c, lane % 4) = pack2<T>(sum[c][2 * half], sum[c][2 * half + 1]);
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < min(rows, kBlock) * through.kChunks; i += 32) {
    const int row = i / through.kChunks, c = i % through.kChunks;
    *reinterpret_cast<uint4*>(to + row * stride + c * kChunk) = *reinterpret_cast<const uint4*>(through.chunk(row, c));
  }
}
}  // namespace ek
