// Picks and launches the forward kernels.
#include "forward.cuh"
#include "select.hpp"

namespace ek {
Status norm_forward(const NormForward& p, int multiprocessors, Stream stream) {
  const RowPlan plan = row_plan(p.rows, p.width, true, multiprocessors);
  return with_kind(p.kind, [&](auto kind) {
    return with_types(p.wide, p.narrow, [&](auto wide, auto narrow) {
      return with_plan(plan, [&](auto held, auto aligned) {
        const auto kernel = norm_forward_kernel<kind(), decltype(wide), decltype(narrow), held(), aligned()>;
        const int blocks = row_blocks(plan, multiprocessors, kernel, sizeof(NormForwardStorage));
        return launch(kernel, dim3(blocks), dim3(plan.threads, plan.groups), sizeof(NormForwardStorage), stream, p);
      });
    });
  });
}
}  // namespace ek
