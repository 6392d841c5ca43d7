// The backward pass by queries, for heads too long for one block: a warp has 16 queries and keeps their dq in registers
// while the keys stream by. It makes two of its three products a second time, after backward_keys.cuh.
#pragma once
#include "config.hpp"
#include "gradient.cuh"

namespace ek {
template <class T, int D>
__global__ void __launch_bounds__(32 * kBackwardQueryWarps, 1)
    attention_backward_queries_kernel(const AttentionBackward p) {
  using Rows = Tile<T, D>;
  const int tokens = p.shape.tokens;
  const Place place{p.first_sample, p.shape.heads};
  const Mask mask{tokens, p.shape.causal};

  // Shared memory: keys and values; the queries and the dout of each warp; its statistics.
  const Rows keys{reinterpret_cast<T*>(&shared_storage<SharedBytes>())}, values = keys.below(2 * kStreamedKeys);
  const Rows own = values.below(2 * kStreamedKeys), queries = own.below(place.warp * 2 * kBlock);
  const Rows dout = queries.below(kBlock);
  float* const after = reinterpret_cast<float*>(own.below(place.warps() * 2 * kBlock).at);
  const Statistics statistics{after + place.warp * 2 * kBlock, kBlock};
  StagedKeys<T, D> stage{p.k, p.v, p.rope, place, tokens, kStreamedKeys, 0, keys, values};

  const int first = (blockIdx.z * place.warps() + place.warp) * kBlock;  // of the warp's queries
  const int last = mask.keys((blockIdx.z + 1) * place.warps() * kBlock), end = mask.keys(first + kBlock);
  const int exist = place.exist(first, kBlock, tokens);
  stage.fetch(0, 0);
  copy_rows(queries, place.row<T>(p.q, first), p.q.token, kBlock, exist, place.lane(), 32);
  copy_rows(dout, place.row<T>(p.dout, first), p.dout.token, kBlock, exist, place.lane(), 32);
  cp_async_commit();
  statistics.fill<T, D>(p, place, first, 0, 0, 1);
  cp_async_wait<0>();
  __syncwarp();
  turn_rows(queries, p.rope, place.sample(), first, exist, place.lane(), 32);
  __syncwarp();
  float lse_log2[2], delta[2];  // of the rows of which this lane holds elements
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = place.lane() / 4 + 8 * r;
    lse_log2[r] = statistics.lse_log2[at], delta[r] = statistics.delta()[at];
  }

  float dq[1][Rows::kChunks][4] = {};
  for (int key = 0, row = 0; key < last; key += kBlock, row += kBlock) {
    if (key == stage.next) row = stage.bring(key, last);
    if (!exist || key >= end) continue;
    float weight[1][2][4] = {}, gradient[1][2][4] = {};
    auto load_query = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, queries, 0, i, place.lane()); };
    auto load_dout = [&](std::uint32_t(&x)[4], int, int i) { load_block(x, dout, 0, i, place.lane()); };
    add_products<1>([&](int) -> float(&)[2][4] { return weight[0]; }, load_query, keys, row, 1, place.lane());
    add_products<1>([&](int) -> float(&)[2][4] { return gradient[0]; }, load_dout, values, row, 1, place.lane());
    const bool edge = mask.touches(first, key + kBlock);
    const int query_here = first + place.lane() / 4, key_here = key + place.lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        differentiate(weight[0][n][e], gradient[0][n][e], p.shape.scale_log2, lse_log2[e / 2], delta[e / 2],
                      edge && mask.hides(query_here + e / 2 * 8, key_here + n * 8 + e % 2));
    std::uint32_t a[1][4];
    pack_block<T>(a[0], gradient[0]);
    add_weighted_rows(dq, a, keys, row, 1, place.lane());
  }
  if (exist)
    store_turned_block(place.row<T>(p.dq, first), p.dq.token, dq[0], queries, p.shape.scale, p.rope, place.sample(),
                       first, tokens - first, anew(place.lane()));
}
}  // namespace ek
