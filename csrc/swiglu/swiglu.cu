// Picks and launches the SwiGLU kernels.
#include "swiglu.hpp"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "backward.cuh"
#include "forward.cuh"

namespace ek {
namespace {
RowPlan plan_of(const SwigluShape& s, std::initializer_list<const void*> tensors, long long other_pitches,
                int multiprocessors) {
  std::uintptr_t bytes = 0;
  for (const void* tensor : tensors) bytes |= reinterpret_cast<std::uintptr_t>(tensor);
  const bool aligned = bytes % 16 == 0 && (s.gate_pitch | s.up_pitch | other_pitches) % kWindow == 0;
  return row_plan(s.rows, s.padded, aligned, multiprocessors);
}
RowPlan plan_of(const SwigluForward& p, int multiprocessors) {
  return plan_of(p.shape, {p.gate, p.up, p.y}, 0, multiprocessors);
}
RowPlan plan_of(const SwigluBackward& p, int multiprocessors) {
  const std::initializer_list<const void*> tensors{p.dy, p.gate, p.up, p.dgate, p.dup};
  return plan_of(p.shape, tensors, p.dy_pitch | p.gradient_pitch, multiprocessors);
}

// Calls `go(T, Norm, Held, Aligned)` with a value of the element type, and the choices as constants.
template <class F>
Status with_kernel(Dtype dtype, bool norm, const RowPlan& plan, F&& go) {
  auto with = [&](auto t, auto norm) {
    return with_plan(plan, [&](auto held, auto aligned) { return go(t, norm, held, aligned); });
  };
  auto with_norm = [&](auto t) { return norm ? with(t, std::true_type{}) : with(t, std::false_type{}); };
  if (dtype == Dtype::float32) return with_norm(float{});
#ifndef EVAKERNELS_FEW_KERNELS  // defined to compile a few kernels quickly (tests/emulator/plant.py)
  if (dtype == Dtype::bfloat16) return with_norm(bf16{});
  if (dtype == Dtype::float16) return with_norm(half{});
#endif
  return {-1, "swiglu: there is no kernel for this dtype"};
}
}  // namespace

int swiglu_blocks(long long rows, int padded, int multiprocessors) {
  const int aligned = row_plan(rows, padded, true, multiprocessors).blocks;
  return std::max(aligned, row_plan(rows, padded, false, multiprocessors).blocks);
}

Status swiglu_forward(const SwigluForward& p, int multiprocessors, Stream stream) {
  const RowPlan plan = plan_of(p, multiprocessors);
  return with_kernel(p.shape.dtype, p.weight, plan, [&](auto t, auto norm, auto held, auto aligned) {
    const auto kernel = swiglu_forward_kernel<decltype(t), norm(), held(), aligned()>;
    const int blocks = row_blocks(plan, multiprocessors, kernel, sizeof(SwigluForwardStorage));
    return launch(kernel, dim3(blocks), dim3(plan.threads, plan.groups), sizeof(SwigluForwardStorage), stream, p);
  });
}

Status swiglu_backward(const SwigluBackward& p, int multiprocessors, Stream stream) {
  const RowPlan plan = plan_of(p, multiprocessors);
  size_t shared = sizeof(SwigluBackwardStorage);
  const int side_by_side = plan.held ? 1 : 2;  // see the kernel
  if (p.weight) shared += side_by_side * ColumnSum<true, false>::shared_bytes(plan, p.shape.width);
  int blocks = 0;
  const Status status = with_kernel(p.shape.dtype, p.weight, plan, [&](auto t, auto norm, auto held, auto aligned) {
    const auto kernel = swiglu_backward_kernel<decltype(t), norm(), held(), aligned()>;
    blocks = row_blocks(plan, multiprocessors, kernel, shared);
    return launch(kernel, dim3(blocks), dim3(plan.threads, plan.groups), shared, stream, p);
  });
  if (!status.ok() || !p.weight) return status;
  const ColumnSums sums{p.partial, {p.dweight, p.dbias}, {p.weight_dtype, p.weight_dtype}, 2};
  return sum_partials(sums, blocks, p.shape.width, stream);
}
}  // namespace ek
