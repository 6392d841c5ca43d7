// From what is known at run time, kinds, dtypes and plans, to the template arguments of the norm kernels.
#pragma once
#include "../common/rows.cuh"
#include "norm.hpp"

namespace ek {
// Calls `go(Wide, Narrow)` with the types of the dtypes; the second is the first, or the first is float.
template <class F>
Status with_types(Dtype wide, Dtype narrow, F&& go) {
  if (narrow == Dtype::float32 && wide == Dtype::float32) return go(float{}, float{});
#ifndef EVAKERNELS_FEW_KERNELS  // defined to compile a few kernels quickly (tests/emulator/plant.py)
  if (narrow == Dtype::bfloat16 && wide == Dtype::bfloat16) return go(bf16{}, bf16{});
  if (narrow == Dtype::bfloat16 && wide == Dtype::float32) return go(float{}, bf16{});
  if (narrow == Dtype::float16 && wide == Dtype::float16) return go(half{}, half{});
  if (narrow == Dtype::float16 && wide == Dtype::float32) return go(float{}, half{});
#endif
  return {-1, "norm: the residual must have the dtype of the branch, or be float32"};
}

template <class F>
Status with_kind(NormKind kind, F&& go) {
  using std::integral_constant;
  if (kind == NormKind::norm) return go(integral_constant<NormKind, NormKind::norm>{});
  if (kind == NormKind::add_norm) return go(integral_constant<NormKind, NormKind::add_norm>{});
  return go(integral_constant<NormKind, NormKind::norm_add>{});
}
}  // namespace ek
