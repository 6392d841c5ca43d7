// The forward pass. A block has one head, or several short ones; its keys and values stay in shared memory where they
// fit, and pass through two stages of it where not. A warp takes 16 or 32 queries at a time, all by itself.
#pragma once
#include "config.hpp"
#include "select.hpp"
#include "softmax.cuh"
#include "stage.cuh"

namespace ek {
template <class T, int D>
__global__ void __launch_bounds__(32 * ForwardConfig<D>::kWarps, 1)
    attention_forward_kernel(const AttentionForward p, const int staged) {
  constexpr int M = ForwardConfig<D>::kTiles, S = ForwardConfig<D>::kStep / kBlock;
  using Rows = Tile<T, D>;
  const int tokens = p.shape.tokens;
  const Place place{p.first_sample, p.shape.heads};
  const Mask mask{tokens, p.shape.causal};

  // Shared memory of a head: keys, values, then the queries of each warp.
  const int kept = StagedKeys<T, D>::rows(tokens, staged), queries_of_warp = M * kBlock;
  const Rows shared{reinterpret_cast<T*>(&shared_storage<SharedBytes>())};
  const Rows keys = shared.below(threadIdx.y * (2 * kept + place.warps() * queries_of_warp)), values = keys.below(kept);
  const Rows queries = values.below(kept + place.warp * queries_of_warp);
  StagedKeys<T, D> stage{p.k, p.v, p.rope, place, tokens, staged, 0, keys, values};
  auto fetch_queries = [&](int first) {
    copy_rows(queries, place.row<T>(p.q, first), p.q.token, M * kBlock, place.exist(first, M * kBlock, tokens),
              anew(place.lane()), 32);
    cp_async_commit();
  };

  int first = (blockIdx.z * place.warps() + place.warp) * queries_of_warp;  // of the warp's queries
  const int block_end = (blockIdx.z + 1) * place.warps() * queries_of_warp;
  stage.fetch(0, 0);
  fetch_queries(first);
  if (!stage.streamed()) {
    cp_async_wait<0>();
    __syncthreads();
    stage.turn(0, 0);
    __syncthreads();
  }
  if (!stage.streamed() && (!place.live() || first >= tokens)) return;
  do {  // where keys are streamed once, by all warps of the block together
    cp_async_wait<0>();
    __syncwarp();
    turn_rows(queries, p.rope, place.sample(), first, place.exist(first, M * kBlock, tokens), anew(place.lane()), 32);
    __syncwarp();
    std::uint32_t q[M][Rows::kBlocks][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < Rows::kBlocks; ++i) load_block(q[m][i], queries, m * kBlock, i, place.lane());
    auto load_q = [&](std::uint32_t(&x)[4], int m, int i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) x[r] = q[m][i][r];
    };

    OnlineSoftmax softmax[M];
    float out[M][Rows::kChunks][4] = {};
    // Asked for again each time: registers are for queries, scores and outputs.
    auto count = [&] { return (tokens - anew(first) + kBlock - 1) / kBlock; };  // blocks of the warp that have queries
    auto end = [&] { return mask.keys(anew(first) + M * kBlock); };             // of the keys that its queries see
    const int last = stage.streamed() ? mask.keys(block_end) : end();           // of those that the block goes through
    for (int key = 0, row = 0; key < last; key += S * kBlock, row += S * kBlock) {
      if (stage.streamed() && key == stage.next) row = stage.bring(key, last);
      const int blocks = count(), seen = end(), lane = anew(place.lane());
      if (blocks <= 0 || key >= seen) continue;
      float score[M][S][2][4] = {};
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (s && key + s * kBlock >= seen) break;
        auto score_of = [&](int m) -> float(&)[2][4] { return score[m][s]; };
        add_products<M>(score_of, load_q, keys, row + s * kBlock, blocks, anew(lane));
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (m && m >= blocks) break;
        if (mask.touches(first + m * kBlock, key + S * kBlock)) mask.hide(score[m], first + m * kBlock, key);
        softmax[m](score[m], out[m], p.shape.scale_log2);
      }
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (s && key + s * kBlock >= seen) break;
        std::uint32_t weight[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) pack_block<T>(weight[m], score[m][s]);
        add_weighted_rows(out, weight, values, row + s * kBlock, blocks, anew(lane));
      }
    }

    const int lane = anew(place.lane());
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (m >= count()) break;
      const int query = first + m * kBlock;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(softmax[m].sum[r]), inverse = fast_reciprocal(sum);
#pragma unroll
        for (int c = 0; c < Rows::kChunks; ++c) out[m][c][2 * r] *= inverse, out[m][c][2 * r + 1] *= inverse;
        const int token = query + lane / 4 + 8 * r;
        if (lane % 4 == 0 && token < tokens)
          p.lse[place.index(token, tokens)] = softmax[m].top[r] * p.shape.scale + logf(sum);
      }
      store_block(place.row<T>(p.out, query), p.out.token, out[m], queries.below(m * kBlock), tokens - query, lane);
    }
    first += place.warps() * queries_of_warp;
    __syncwarp();  // nobody reads the queries' memory any more
    if (!stage.streamed() && first < tokens) fetch_queries(first);
  } while (!stage.streamed() && first < tokens);
}

template <class T>
Status launch_attention_forward(AttentionForward p, int shared_memory, Stream stream) {
  return with_head_dim(p.shape.head_dim, [&](auto d) {
    const ForwardPlan plan = forward_plan<d>(p.shape.tokens, p.shape.heads, shared_memory);
    return for_samples(p.shape.batch, [&](int first, int samples) {
      p.first_sample = first;
      const dim3 grid((p.shape.heads + plan.heads - 1) / plan.heads, samples, plan.query_blocks);
      return launch(attention_forward_kernel<T, d>, grid, dim3(32 * plan.warps, plan.heads), plan.shared, stream, p,
                    plan.staged);
    });
  });
}
}  // namespace ek
