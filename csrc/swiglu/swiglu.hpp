// silu(gate) * up, alone or with the LayerNorm that follows it: what the host functions take.
#pragma once
#include <cstdint>

#include "../launch.hpp"

namespace ek {
// (rows, width) elements of one dtype. A row lies in `padded` columns; those from `width` on hold anything where they
// are read, and become zero where they are written. Pitches are elements from row to row.
struct SwigluShape {
  Dtype dtype;
  long long rows, gate_pitch, up_pitch;
  int width, padded;
  float per_width;         // 1 / width
  std::uint32_t zero = 0;  // at run time alone: the backward kernel hides behind it what the compiler must not reuse
};

struct SwigluForward {
  SwigluShape shape;
  const void *gate, *up;
  const void *weight, *bias;  // null without a norm; bias may be null
  Dtype weight_dtype, bias_dtype;
  void* y;             // (rows, padded)
  float *mean, *rstd;  // (rows,), of silu(gate) * up; unused without a norm
  float eps;
};

struct SwigluBackward {
  SwigluShape shape;
  const void *dy, *gate, *up;
  const void* weight;  // null without a norm; then all that follows from it is unused
  Dtype weight_dtype;
  const float *mean, *rstd;
  void *dgate, *dup;
  long long dy_pitch, gradient_pitch;
  void *dweight, *dbias;  // (width,) in the dtype of weight; dbias may be null
  float* partial;         // (blocks, 2, width), see swiglu_blocks
};

int swiglu_blocks(long long rows, int padded, int multiprocessors);  // of the backward kernel, at most
Status swiglu_forward(const SwigluForward&, int multiprocessors, Stream);
Status swiglu_backward(const SwigluBackward&, int multiprocessors, Stream);
}  // namespace ek
