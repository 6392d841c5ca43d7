// Attention with two-dimensional rotary embedding: what the host functions take.
#pragma once
#include "../common/rope.hpp"
#include "../launch.hpp"

namespace ek {

// (batch, tokens, heads, D) of 16-bit elements: D side by side, everything else strided, in elements; what begins a row
// is aligned to 16 bytes.
struct Heads {
  void* data;
  long long batch, token, head;
};

constexpr float kLog2e = 1.44269504f;  // exp(x) = exp2(x log2(e))

struct AttentionShape {
  Dtype dtype;  // bfloat16 or float16
  int batch, tokens, heads, head_dim;
  float scale;       // of the scores, positive
  float scale_log2;  // scale log2(e)
  bool causal;
};

struct AttentionForward {
  AttentionShape shape;
  Rope rope;
  Heads q, k, v, out;
  float* lse;        // (batch, heads, tokens)
  int first_sample;  // of a launch; a grid has at most 65535 samples
};

struct AttentionBackward {
  AttentionShape shape;
  Rope rope;
  Heads q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  int first_sample;
};

// How many bytes of shared memory a block may have decides what stays there: `shared_memory`, the device's opt-in
// limit.
Status attention_forward(const AttentionForward&, int shared_memory, Stream);
Status attention_backward(const AttentionBackward&, int shared_memory, Stream);
}  // namespace ek
