// Picks and launches the backward kernels.
#include "backward.cuh"
#include "select.hpp"

namespace ek {
namespace {
// Registers do not hold a third sum beside the windows of rows that are not aligned.
RowPlan plan_of(long long rows, int width, bool layer_scale, int multiprocessors) {
  return row_plan(rows, width, true, multiprocessors, !layer_scale || width % kWindow == 0);
}
}  // namespace

int norm_blocks(long long rows, int width, bool layer_scale, int multiprocessors) {
  return plan_of(rows, width, layer_scale, multiprocessors).blocks;
}

Status norm_backward(const NormBackward& p, int multiprocessors, Stream stream) {
  const RowPlan plan = plan_of(p.rows, p.width, p.layer_scale, multiprocessors);
  const int side_by_side = plan.held ? 1 : p.layer_scale ? 3 : 2;  // see the kernel
  const size_t shared =
      sizeof(NormBackwardStorage) + side_by_side * ColumnSum<true, true>::shared_bytes(plan, p.width);
  int blocks = 0;
  const Status status = with_kind(p.kind, [&](auto kind) {
    return with_types(p.wide, p.narrow, [&](auto wide, auto narrow) {
      return with_plan(plan, [&](auto held, auto aligned) {
        auto go = [&](auto kernel) {
          blocks = row_blocks(plan, multiprocessors, kernel, shared);
          return launch(kernel, dim3(blocks), dim3(plan.threads, plan.groups), shared, stream, p);
        };
        using W = decltype(wide);
        using N = decltype(narrow);
        if constexpr (kind() != NormKind::norm && (aligned() || !held())) {
          if (p.layer_scale) return go(norm_backward_kernel<kind(), W, N, held(), aligned(), true>);
        }
        return go(norm_backward_kernel<kind(), W, N, held(), aligned(), false>);
      });
    });
  });
  if (!status.ok()) return status;
  const ColumnSums sums{p.partial,
                        {p.dweight, p.dbias, p.dlayer_scale},
                        {p.weight_dtype, p.weight_dtype, p.layer_scale_dtype},
                        ColumnSums::kMost};
  return sum_partials(sums, blocks, p.width, stream);
}
}  // namespace ek
