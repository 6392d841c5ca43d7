// The backward pass by keys: a warp has 16 keys and keeps their dk and dv in registers while the queries pass by, 32 at
// a time. What a warp needs of the others are the gradients of their scores; these cross through shared memory, and the
// warps share the product with the keys that makes dq. So a tile takes five products, nothing is added to global
// memory, and the order of every sum is fixed.
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
  constexpr int kChunks = D / kChunk, kSums = BackwardConfig<D>::kSums;
  float sum[kSums][2][4] = {};
  auto each = [&](auto&& f) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (2 * i + n < kChunks) {
          f(dq.pair(m * kBlock + lane / 4 + 8 * half, 2 * i + n, lane % 4), n, 2 * half);
        }
  };
  if (more) each([&](const float2& x, int n, int e) { sum[0][n][e] = x.x, sum[0][n][e + 1] = x.y; });
  for (int row = 0; row < end; row += kSums * kBlock) {
#pragma unroll
    for (int h = 0; h < kSums; ++h) {
      if (h && row + kBlock >= end) break;
      std::uint32_t x[4], y[4];
      load_block<true>(x, gradients, row + h * kBlock, m, lane);
      load_block<true>(y, keys, row + h * kBlock, i, lane);
      const std::uint32_t a[4] = {x[0], x[2], x[1], x[3]};  // x is ordered for a product with queries as columns
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (2 * i + n < kChunks) mma_m16n8k16<T>(sum[h][n], a, y[2 * n], y[2 * n + 1]);
    }
  }
#pragma unroll
  for (int h = 1; h < kSums; ++h)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][n][e] += sum[h][n][e];
  each([&](float2& x, int n, int e) { x = {sum[0][n][e], sum[0][n][e + 1]}; });
}

template <class T, int D>
__global__ void __launch_bounds__(32 * BackwardConfig<D>::kWarps, 1)
    attention_backward_keys_kernel(const AttentionBackward p, const int passes, const bool whole,
                                   const int head_bytes) {
  using Rows = Tile<T, D>;
  constexpr int R = kQueries;
  const int tokens = p.shape.tokens, all = (tokens + R - 1) / R * R;
  const Place place{p.first_sample, p.shape.heads};
  const Mask mask{tokens, p.shape.causal};

  // Asked for again each time, like all that follows from the pass: registers are for dk and dv.
  auto held = [&] { return place.warps() * kBlock; };  // keys of a pass
  auto own = [&] { return place.warp * kBlock; };      // where those of the warp lie
  // Shared memory of a head: two stages of queries and dout; keys and values of a pass; the statistics; for dq, the
  // gradients of a stage's scores and, where there are several passes, the sum.
  auto stages = [&] {
    return Rows{reinterpret_cast<T*>(shared_storage<SharedBytes>().at + anew(threadIdx.y) * head_bytes)};
  };
  auto keys = [&] { return stages().below(4 * R); };
  auto values = [&] { return keys().below(held()); };
  auto statistics = [&] { return Statistics{reinterpret_cast<float*>(values().below(held()).at), all}; };
  auto gradients = [&] { return Tile<T, R>{reinterpret_cast<T*>(statistics().end())}; };
  auto sums = [&] { return Tile<float, D>{reinterpret_cast<float*>(gradients().below(held()).at)}; };

  auto stage_of = [&](int query) { return stages().below(query / R % 2 * 2 * R); };  // queries, then dout
  // Where the dq of a stage's queries lies: when there is one pass, where these and dout lay.
  auto dq_of = [&](int query) {
    return passes > 1 ? sums().below(query) : Tile<float, D>{reinterpret_cast<float*>(stage_of(query).at)};
  };
  auto fetch = [&](int query) {
    const int exist = place.exist(query, R, tokens), thread = anew(threadIdx.x);
    const Rows stage = stage_of(query);
    copy_rows(stage, place.row<T>(p.q, query), p.q.token, R, exist, thread, place.threads());
    copy_rows(stage.below(R), place.row<T>(p.dout, query), p.dout.token, R, exist, thread, place.threads());
    cp_async_commit();
  };
  auto store_dq = [&](int query, int rows) {
    store_rows(place.row<T>(p.dq, query), p.dq.token, dq_of(query), p.shape.scale, p.rope, place.sample(), query,
               place.exist(query, rows, tokens), anew(threadIdx.x), place.threads());
  };

  const int from = mask.causal ? int(blockIdx.z) * held() / R * R : 0;  // no pass needs queries before
  statistics().template fill<T, D>(p, place, 0, from, place.warp, place.warps());
  for (int pass = blockIdx.z; pass < passes; pass += gridDim.z) {
    auto first = [&] { return anew(pass) * held(); };  // key of the pass
    auto key = [&] { return first() + own(); };        // the first of the warp
    auto exist = [&] { return place.exist(first(), held(), tokens); };
    auto begin = [&] { return mask.causal ? first() / R * R : 0; };  // the first queries that see any key of the pass
    copy_rows(keys(), place.row<T>(p.k, first()), p.k.token, held(), exist(), anew(threadIdx.x), place.threads());
    copy_rows(values(), place.row<T>(p.v, first()), p.v.token, held(), exist(), anew(threadIdx.x), place.threads());
    fetch(begin());

    float dk[1][Rows::kChunks][4] = {}, dv[1][Rows::kChunks][4] = {};
    int query = begin();
    for (; query < tokens; query += R) {
      const Rows q = stage_of(query), dout = q.below(R);
      cp_async_wait<0>();
      __syncthreads();  // the stage is there, and so is the dq of the last
      if (whole && passes == 1 && query) store_dq(query - R, R);
      if (query == begin())
        turn_rows(keys(), p.rope, place.sample(), first(), exist(), anew(threadIdx.x), place.threads());
      turn_rows(q, p.rope, place.sample(), query, place.exist(query, R, tokens), anew(threadIdx.x), place.threads());
      __syncthreads();
      if (query + R < tokens) fetch(query + R);

      const int blocks = query + kBlock < tokens ? 2 : 1;
      if (key() < mask.keys(query + R)) {
#pragma unroll 1
        for (int m = 0; m < blocks; ++m) {
          float weight[1][2][4] = {}, gradient[1][2][4] = {};
          const Rows k = keys(), v = values();
          const int lane = anew(place.lane()), mine = own();
          auto load_key = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, k, mine, i, lane); };
          auto load_value = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, v, mine, i, lane); };
          add_products<1>([&](int) -> float(&)[2][4] { return weight[0]; }, load_key, q, m * kBlock, 1, lane);
          add_products<1>([&](int) -> float(&)[2][4] { return gradient[0]; }, load_value, dout, m * kBlock, 1, lane);

          const Statistics of = statistics();
          const int row = query + m * kBlock, column = key();
          const bool edge = mask.touches(row, column + kBlock);
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int at = row + 8 * n + lane % 4 * 2 + e % 2;
              differentiate(weight[0][n][e], gradient[0][n][e], p.shape.scale_log2, of.lse_log2[at],
                            of.delta()[at], edge && mask.hides(at, column + lane / 4 + e / 2 * 8));
            }

          std::uint32_t a[1][4];
          pack_block<T>(a[0], weight[0]);
          add_weighted_rows(dv, a, dout, m * kBlock, 1, anew(lane));
          pack_block<T>(a[0], gradient[0]);
          add_weighted_rows(dk, a, q, m * kBlock, 1, anew(lane));
          if (whole) {
            const Tile<T, R> to = gradients();
#pragma unroll
            for (int r = 0; r < 4; ++r)
              to.pair(own() + lane / 4 + r % 2 * 8, 2 * m + r / 2, lane % 4) = a[0][r];
          }
        }
      }
      if (!whole) continue;
      __syncthreads();  // the gradients are there, and nobody reads the stage any more
      const int end = min(mask.keys(query + R) - first(), held());
      for (int unit = place.warp; unit < blocks * Rows::kBlocks; unit += place.warps())
        add_to_dq(dq_of(query), gradients(), keys(), unit / Rows::kBlocks, unit % Rows::kBlocks, end, pass > 0,
                  anew(place.lane()));
    }

    __syncthreads();  // nobody reads the keys any more, and dq is there
    if (whole && pass == passes - 1) passes > 1 ? store_dq(0, tokens) : store_dq(query - R, R);
    if (place.live() && key() < tokens) {
      const int lane = anew(place.lane());
      store_block(place.row<T>(p.dv, key()), p.dv.token, dv[0], values().below(own()), tokens - key(), lane);
      store_turned_block(place.row<T>(p.dk, key()), p.dk.token, dk[0], keys().below(own()), p.shape.scale, p.rope,
                         place.sample(), key(), tokens - key(), lane);
    }
    if (pass + 1 < passes) __syncthreads();  // before the next keys
  }
}
}  // namespace ek
