// The backward pass by keys: a warp has 16 keys and keeps their dk and dv in registers while the queries pass by, 32 at a
// time. What a warp needs of the others are the gradients of their scores; these cross through shared memory, and the
// warps share the product with the keys that makes dq. So a tile takes five products, nothing is added to global memory,
// and the order of every sum is fixed.
//
// Where the warps of a block do not hold all keys, they make several passes, and dq is summed in shared memory. Where
// that does not fit either, each block makes one pass, without dq, which is left to backward_queries.cuh.
#pragma once
#include "config.hpp"
#include "gradient.cuh"

namespace ek {
// dq += gradients^T keys, over the keys from 0 to `end`, for the 16 queries of block m and the two chunks of block i;
// dq begins at 0 unless `more`. `gradients` is (keys, queries).
template <class T, int D>
EK_DEVICE void add_to_dq(const Tile<float, D>& dq, const Tile<T, kQueries>& gradients, const Tile<T, D>& keys, int m,
                         int i, int end, bool more, int lane) {
  constexpr int kChunks = D / kChunk;
  float sum[2][2][4] = {};  // of every other block of keys: their products do not wait for each other
  auto each = [&](auto&& f) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (2 * i + n < kChunks) {
          float* at = dq.chunk(m * kBlock + lane / 4 + 8 * half, 2 * i + n) + lane % 4 * 2;
          f(*reinterpret_cast<float2*>(at), n, 2 * half);
        }
  };
  if (more) each([&](const float2& x, int n, int e) { sum[0][n][e] = x.x, sum[0][n][e + 1] = x.y; });
  for (int row = 0; row < end; row += 2 * kBlock) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h && row + kBlock >= end) break;
      std::uint32_t x[4], y[4];
      load_block<true>(x, gradients, row + h * kBlock, m);
      load_block<true>(y, keys, row + h * kBlock, i);
      const std::uint32_t a[4] = {x[0], x[2], x[1], x[3]};  // x is ordered for a product with queries as columns
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<T>(sum[h][n], a, y[2 * n], y[2 * n + 1]);
    }
  }
  each([&](float2& x, int n, int e) { x = {sum[0][n][e] + sum[1][n][e], sum[0][n][e + 1] + sum[1][n][e + 1]}; });
}

template <class T, int D>
__global__ void __launch_bounds__(32 * BackwardConfig<D>::kWarps, 1)
    attention_backward_keys_kernel(const AttentionBackward p, const int passes, const bool whole,
                                   const int head_bytes) {
  using Rows = Tile<T, D>;
  constexpr int R = kQueries;
  const int tokens = p.shape.tokens, all = (tokens + R - 1) / R * R;
  const Place place(p.first_sample, p.shape.heads);
  const Mask mask{tokens, p.shape.causal};
  const int held = place.warps * kBlock, own = place.warp * kBlock;  // keys of a pass, and the first row of the warp's

  // Shared memory of a head: the statistics; keys and values of a pass; two stages of queries and dout; for dq, the
  // gradients of a stage's scores and, where there are several passes, the sum.
  unsigned char* const shared = shared_storage<SharedBytes>().at + threadIdx.y * head_bytes;
  const Statistics statistics{reinterpret_cast<float*>(shared), all};
  const Rows keys{reinterpret_cast<T*>(statistics.end())}, values = keys.below(held), stages = values.below(held);
  const Tile<T, R> gradients{stages.below(4 * R).at};
  const Tile<float, D> sums{reinterpret_cast<float*>(gradients.below(held).at)};

  auto stage_of = [&](int query) { return stages.below(query / R % 2 * 2 * R); };  // queries, then dout
  // Where the dq of a stage's queries lies: when there is one pass, where these and dout lay.
  auto dq_of = [&](int query) {
    return passes > 1 ? sums.below(query) : Tile<float, D>{reinterpret_cast<float*>(stage_of(query).at)};
  };
  auto fetch = [&](int query) {
    const int exist = place.exist(query, R, tokens), thread = anew(threadIdx.x);
    const Rows stage = stage_of(query);
    copy_rows(stage, place.row<T>(p.q, query), p.q.token, R, exist, thread, place.threads);
    copy_rows(stage.below(R), place.row<T>(p.dout, query), p.dout.token, R, exist, thread, place.threads);
    cp_async_commit();
  };
  auto store_dq = [&](int query, int rows) {
    store_rows(place.row<T>(p.dq, query), p.dq.token, dq_of(query), p.shape.scale, p.rope, place.sample, query,
               place.exist(query, rows, tokens), anew(threadIdx.x), place.threads);
  };

  statistics.fill<T, D>(p, place, 0, place.warp, place.warps);
  for (int pass = blockIdx.z; pass < passes; pass += gridDim.z) {
    const int first = pass * held, key = first + own;      // of the pass, and of the warp
    const int begin = p.shape.causal ? first / R * R : 0;  // the first queries that see any of its keys
    const int exist = place.exist(first, held, tokens);
    copy_rows(keys, place.row<T>(p.k, first), p.k.token, held, exist, anew(threadIdx.x), place.threads);
    copy_rows(values, place.row<T>(p.v, first), p.v.token, held, exist, anew(threadIdx.x), place.threads);
    fetch(begin);

    float dk[1][Rows::kChunks][4] = {}, dv[1][Rows::kChunks][4] = {};
    int query = begin;
    for (; query < tokens; query += R) {
      const Rows q = stage_of(query), dout = q.below(R);
      cp_async_wait<0>();
      __syncthreads();  // the stage is there, and so is the dq of the last
      if (whole && passes == 1 && query) store_dq(query - R, R);
      if (query == begin) turn_rows(keys, p.rope, place.sample, first, exist, anew(threadIdx.x), place.threads);
      turn_rows(q, p.rope, place.sample, query, place.exist(query, R, tokens), anew(threadIdx.x), place.threads);
      __syncthreads();
      if (query + R < tokens) fetch(query + R);

      const int blocks = query + kBlock < tokens ? 2 : 1, seen = mask.keys(query + R);
      if (key < seen) {
#pragma unroll 1
        for (int m = 0; m < blocks; ++m) {
          float weight[1][2][4] = {}, gradient[1][2][4] = {};
          auto load_key = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, keys, own, i); };
          auto load_value = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, values, own, i); };
          add_products<1>([&](int) -> float(&)[2][4] { return weight[0]; }, load_key, q, m * kBlock, 1);
          add_products<1>([&](int) -> float(&)[2][4] { return gradient[0]; }, load_value, dout, m * kBlock, 1);

          const int here = query + m * kBlock + place.lane % 4 * 2, key_here = key + place.lane / 4;
          const bool edge = mask.touches(query + m * kBlock, key + kBlock);
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int at = here + 8 * n + e % 2;
              differentiate(weight[0][n][e], gradient[0][n][e], p.shape.scale * kLog2e, statistics.lse[at],
                            statistics.delta()[at], edge && mask.hides(at, key_here + e / 2 * 8));
            }

          std::uint32_t a[1][4];
          pack_block<T>(a[0], weight[0]);
          add_weighted_rows(dv, a, dout, m * kBlock, 1);
          pack_block<T>(a[0], gradient[0]);
          add_weighted_rows(dk, a, q, m * kBlock, 1);
          if (whole) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
              *reinterpret_cast<std::uint32_t*>(gradients.chunk(own + place.lane / 4 + r % 2 * 8, 2 * m + r / 2) +
                                                place.lane % 4 * 2) = a[0][r];
          }
        }
      }
      if (!whole) continue;
      __syncthreads();  // the gradients are there, and nobody reads the stage any more
      for (int unit = place.warp; unit < blocks * Rows::kBlocks; unit += place.warps)
        add_to_dq(dq_of(query), gradients, keys, unit / Rows::kBlocks, unit % Rows::kBlocks, min(seen - first, held),
                  pass > 0, anew(place.lane));
    }

    __syncthreads();  // nobody reads the keys any more, and dq is there
    if (whole && pass == passes - 1) passes > 1 ? store_dq(0, tokens) : store_dq(query - R, R);
    if (place.live && key < tokens) {
      const int lane = anew(place.lane);
      store_block(place.row<T>(p.dv, key), p.dv.token, dv[0], values.below(own), tokens - key, lane);
      store_turned_block(place.row<T>(p.dk, key), p.dk.token, dk[0], keys.below(own), p.shape.scale, p.rope,
                         place.sample, key, tokens - key, lane);
    }
    if (pass + 1 < passes) __syncthreads();  // before the next keys
  }
}
}  // namespace ek
