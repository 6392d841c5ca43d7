// From what is known at run time, dtype and head dimension, to the template arguments of the attention kernels.
#pragma once
#include <type_traits>

#include "../common/primitives.cuh"
#include "attention.hpp"

namespace ek {
// Calls `go(D)` with the head dimension as a constant.
template <class F>
Status with_head_dim(int head_dim, F&& go) {
  using std::integral_constant;
  switch (head_dim) {
    case 64: return go(integral_constant<int, 64>{});
    case 88: return go(integral_constant<int, 88>{});
#ifndef EVAKERNELS_FEW_KERNELS  // defined to compile quickly (tests/emulator/plant.py)
    case 32: return go(integral_constant<int, 32>{});
    case 72: return go(integral_constant<int, 72>{});
    case 80: return go(integral_constant<int, 80>{});
    case 96: return go(integral_constant<int, 96>{});
    case 104: return go(integral_constant<int, 104>{});
    case 112: return go(integral_constant<int, 112>{});
    case 128: return go(integral_constant<int, 128>{});
#endif
  }
  return {-1, "attention: there is no kernel for this head dimension"};
}

// Calls `go(first_sample, samples)` for so many samples at a time as a grid takes.
template <class F>
Status for_samples(int batch, F&& go) {
#ifdef EVAKERNELS_EMULATED
  constexpr int kMost = 3;  // so that tests meet a second launch
#else
  constexpr int kMost = 65535;
#endif
  Status status;
  for (int first = 0; first < batch && status.ok(); first += kMost) status = go(first, std::min(batch - first, kMost));
  return status;
}

// Each in a source of its own, so that they compile side by side.
template <class T>
Status launch_attention_forward(AttentionForward, int shared_memory, Stream);
template <class T>
Status launch_attention_backward(AttentionBackward, int shared_memory, Stream);
}  // namespace ek
