// LayerNorm and RMSNorm, alone or fused with a residual step: what the host functions take.
#pragma once
#include "../launch.hpp"

namespace ek {
// norm      y = norm(x)
// add_norm  sum = residual + row_scale * layer_scale * x, rounded to its dtype;   y = norm(sum)
// norm_add  sum = residual + row_scale * layer_scale * norm(x)
enum class NormKind { norm, add_norm, norm_add };

// Tensors are contiguous, (rows, width), and start at multiples of 16 bytes. Two dtypes: `wide` of the residual, the
// sum and, for `norm`, of x; `narrow` of everything else. They are equal, or `wide` is float32.
struct NormForward {
  NormKind kind;
  Dtype wide, narrow;
  const void *x, *residual;
  const void *weight, *bias;  // bias may be null
  const void* layer_scale;    // (width,) or null
  const float* row_scale;     // (rows / rows_per_sample,) or null
  Dtype weight_dtype, bias_dtype, layer_scale_dtype;
  void *y, *sum;
  float *mean, *rstd;  // (rows,); no mean for RMSNorm
  long long rows, rows_per_sample;
  int width;
  float eps;
  bool rms;
};

struct NormBackward {
  NormKind kind;
  Dtype wide, narrow;
  const void* dy;       // narrow; for norm_add wide: the gradient of the sum
  const void* dsum;     // add_norm: wide, or null
  const void* x;        // what was normalised: wide, for norm_add narrow
  const void* branch;   // add_norm with a layer scale: narrow
  const void *weight, *bias, *layer_scale;
  const float* row_scale;
  Dtype weight_dtype, bias_dtype, layer_scale_dtype;
  const float *mean, *rstd;
  void* dx;       // norm, add_norm: wide; norm_add: narrow, the branch's
  void* dbranch;  // add_norm: narrow; null where it equals dx
  void *dweight, *dbias, *dlayer_scale;  // in the dtypes of weight, weight and layer_scale; dbias, dlayer_scale or null
  float* partial;  // (blocks, 3, width), see norm_blocks
  long long rows, rows_per_sample;
  int width;
  bool rms;
};



int norm_blocks(long long rows, int width, bool layer_scale, int multiprocessors);  // of the backward kernel, at most
Status norm_forward(const NormForward&, int multiprocessors, Stream);
Status norm_backward(const NormBackward&, int multiprocessors, Stream);
}  // namespace ek
