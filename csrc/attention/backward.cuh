// Launches the backward kernels.
#pragma once
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "select.hpp"

namespace ek {
template <class T>
Status launch_attention_backward(AttentionBackward p, int shared_memory, Stream stream) {
  const auto& s = p.shape;
  return with_head_dim(s.head_dim, [&](auto d) -> Status {
    const BackwardPlan plan = backward_plan<d>(s.tokens, s.heads, shared_memory);
    const QueryPlan queries = backward_query_plan<d>(s.tokens, shared_memory);
    if (!plan.warps || !queries.warps)
      return {-1, "attention: the backward kernels have no room for so many tokens in shared memory"};
    return for_samples(s.batch, [&](int first, int samples) {
      p.first_sample = first;
      const dim3 keys_grid((s.heads + plan.heads - 1) / plan.heads, samples, plan.whole ? 1 : plan.passes);
      Status status = launch(attention_backward_keys_kernel<T, d>, keys_grid, dim3(32 * plan.warps, plan.heads),
                             std::size_t(plan.heads) * plan.head_bytes, stream, p, plan.passes, plan.whole,
                             plan.head_bytes);
      if (plan.whole || !status.ok()) return status;
      return launch(attention_backward_queries_kernel<T, d>, dim3(s.heads, samples, queries.blocks),
                    dim3(32 * queries.warps), queries.shared, stream, p);
    });
  });
}
}  // namespace ek
