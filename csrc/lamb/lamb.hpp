// The LAMB step over tables of tensors (docs/lamb.md).
#pragma once

#include <cstdint>

#include "../launch.hpp"

namespace ek {

// The records of the table. evakernels/ops/lamb/cuda.py writes them, as words of 64 bits.
struct LambTensor {
  float* weight;  // the parameter where it is float32, otherwise its master
  void* param;    // what is rounded from the master; null for a float32 parameter
  const void* grad;
  float *exp_avg, *exp_avg_sq, *step;
  int group;
  std::int16_t grad_dtype, param_dtype;  // Dtype
};
struct LambGroup {
  double lr, beta1, beta2, eps, weight_decay, low, high;
};
// Consecutive elements of one tensor that share a trust ratio, in chunks of `length`. The chunks of all pieces are
// numbered one after another; those of a ratio are [ratio_first, ratio_end).
struct LambPiece {
  std::int32_t first_chunk, tensor;
  long long first, size;
  std::int32_t length, ratio_first, ratio_end, unused;
};
// What a step does to the elements of a tensor; written and read on the device.
struct LambRule {
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float root, eps;                   // u = m / (root sqrt(v) + eps) + weight_decay p
  float weight_decay, rate, low, high;
};
static_assert(sizeof(LambTensor) == 7 * 8 && sizeof(LambGroup) == 7 * 8 && sizeof(LambPiece) == 5 * 8);
static_assert(sizeof(LambRule) == 10 * 4);

enum class LambCorrection : int { none = 0, update = 1, step_size = 2 };

struct Lamb {
  const std::int64_t* words;  // on the host: tensors, groups, pieces
  int tensors, groups, pieces;
  const int* bounds;  // on the host: chunks [0, bounds[0]) have no trust ratio; then one bound per batch, the last at
  int batches;        // bounds[batches], of whole ratios
  LambCorrection correction;
  double max_grad_norm;  // 0: no limit
  const double* lrs;     // on the device; null: those of the groups
  const float *grad_scale, *found_inf;
  float* total;  // the norm of all gradients, where it is limited
  // Workspaces on the device.
  std::int64_t* table;  // as many words as on the host
  LambRule* rules;      // one per tensor
  float* partials;      // two per chunk
  float* factor;        // one
};

// Changes nothing but `total` and the workspaces where *found_inf is not 0.
Status lamb_step(const Lamb&, Stream);

}  // namespace ek
