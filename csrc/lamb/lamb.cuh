// LAMB: the norm of all gradients; then for each batch of trust ratios the moments with partial sums of both norms, and
// the parameters. The update is not stored: both passes compute it from the moments.
//
// Sums run in float32 within a chunk and in float64 over chunks, always in the same order.
#pragma once
#include <type_traits>

#include "../common/primitives.cuh"
#include "lamb.hpp"

namespace ek {
constexpr int kLambThreads = 256, kLambWarps = kLambThreads / 32;
// Kernels take 32764 bytes of arguments since CUDA 12.1, before 4096.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kLambWords = 4000;
#else
constexpr int kLambWords = 500;
#endif

// What every kernel finds its work in.
struct LambTable {
  const LambTensor* tensors;
  const LambGroup* groups;
  const LambPiece* pieces;
  int tensor_count, piece_count;
  LambRule* rules;
  float* partials;
  float* factor;  // of the gradients
  const float* found_inf;

  EK_DEVICE bool skips() const { return found_inf != nullptr && *found_inf != 0; }
};

struct LambStorage {
  double sums[2][kLambWarps];
};

// Sums two numbers over the block; the same order, so the same bits, in every thread and block. Once per kernel.
template <class T>
EK_DEVICE void lamb_block_sum(T a, T b, double& sum_a, double& sum_b) {
  LambStorage& shared = shared_storage<LambStorage>();
  a = warp_sum(a), b = warp_sum(b);
  if (threadIdx.x % 32 == 0) shared.sums[0][threadIdx.x / 32] = a, shared.sums[1][threadIdx.x / 32] = b;
  __syncthreads();
  sum_a = 0, sum_b = 0;
#pragma unroll
  for (int i = 0; i < kLambWarps; ++i) sum_a += shared.sums[0][i], sum_b += shared.sums[1][i];
}

// Four elements from a multiple of four on; of the first and last ones of a chunk some may lie outside of it.
struct LambWindow {
  long long at;
  int from, to;
  bool vector;  // all are inside, and every array is aligned
  EK_DEVICE bool has(int e) const { return from <= e && e < to; }
};

// The elements of a tensor that a block works on.
struct LambChunk {
  LambPiece piece;
  LambTensor tensor;
  long long first, end;
  bool aligned;

  EK_DEVICE LambChunk(const LambTable& table, int chunk) {
    int low = 0, high = table.piece_count;  // the last piece that does not begin behind this chunk
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (table.pieces[middle].first_chunk <= chunk ? low : high) = middle;
    }
    piece = table.pieces[low];
    tensor = table.tensors[piece.tensor];
    const long long offset = (long long)(chunk - piece.first_chunk) * piece.length;
    first = piece.first + offset;
    end = piece.first + min(piece.size, offset + piece.length);
    const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const int grad_bytes = Dtype(tensor.grad_dtype) == Dtype::float32 ? 16 : 8;
    aligned = (at(tensor.weight) | at(tensor.exp_avg) | at(tensor.exp_avg_sq)) % 16 == 0 &&
              at(tensor.grad) % grad_bytes == 0 && at(tensor.param) % 8 == 0;
  }

  EK_DEVICE long long start() const { return first / 4 * 4 + threadIdx.x * 4; }
  EK_DEVICE LambWindow window(long long at) const {
    const int from = int(max(first - at, 0ll)), to = int(min(end - at, 4ll));
    return {at, from, to, aligned && from == 0 && to == 4};
  }
};

// Loads a window as float, 0 outside of the chunk. What is not read again soon is `Streamed` past the caches.
template <bool Streamed = false, class T>
EK_DEVICE void lamb_load(float (&x)[4], const T* from, const LambWindow& w) {
  using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  if (w.vector) {
    const Word* at = reinterpret_cast<const Word*>(from + w.at);
    const Word word = Streamed ? __ldcs(at) : *at;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = to_float(reinterpret_cast<const T*>(&word)[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = w.has(e) ? to_float(from[w.at + e]) : 0.0f;
  }
}

template <class T>
EK_DEVICE void lamb_store(const float (&x)[4], T* to, const LambWindow& w) {
  using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  if (w.vector) {
    Word word;
#pragma unroll
    for (int e = 0; e < 4; ++e) reinterpret_cast<T*>(&word)[e] = from_float<T>(x[e]);
    *reinterpret_cast<Word*>(to + w.at) = word;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (w.has(e)) to[w.at + e] = from_float<T>(x[e]);
  }
}

EK_DEVICE void lamb_load_grad(float (&g)[4], const LambTensor& x, const LambWindow& w) {
  switch (Dtype(x.grad_dtype)) {
    case Dtype::float32: return lamb_load<true>(g, static_cast<const float*>(x.grad), w);
    case Dtype::bfloat16: return lamb_load<true>(g, static_cast<const bf16*>(x.grad), w);
    case Dtype::float16: return lamb_load<true>(g, static_cast<const half*>(x.grad), w);
  }
}

// Writes p to the parameter, and to its master where it has one.
EK_DEVICE void lamb_store_weight(const float (&p)[4], const LambTensor& x, const LambWindow& w) {
  lamb_store(p, x.weight, w);
  if (x.param == nullptr) return;
  if (Dtype(x.param_dtype) == Dtype::bfloat16)
    lamb_store(p, static_cast<bf16*>(x.param), w);
  else
    lamb_store(p, static_cast<half*>(x.param), w);
}

EK_DEVICE float lamb_direction(float p, float m, float v, const LambRule& rule) {
  return m / (rule.root * sqrtf(v) + rule.eps) + rule.weight_decay * p;
}

struct LambWords {
  std::int64_t at[kLambWords];
};

// Copies words from the kernel's arguments to memory: a captured graph keeps them, and needs no memory of the host.
__global__ void __launch_bounds__(kLambThreads)
    lamb_table_kernel(const __grid_constant__ LambWords words, std::int64_t* table, int count) {
  const int i = blockIdx.x * kLambThreads + threadIdx.x;
  if (i < count) table[i] = words.at[i];
}

// The squares of each chunk of the gradients, summed.
__global__ void __launch_bounds__(kLambThreads) lamb_norm_kernel(LambTable table, int first_chunk) {
  const LambChunk chunk(table, first_chunk + blockIdx.x);
  float g2 = 0;
  for (long long at = chunk.start(); at < chunk.end; at += kLambThreads * 4) {
    float g[4];
    lamb_load_grad(g, chunk.tensor, chunk.window(at));
#pragma unroll
    for (int e = 0; e < 4; ++e) g2 += g[e] * g[e];
  }
  double sum, none;
  lamb_block_sum(g2, 0.0f, sum, none);
  if (threadIdx.x == 0) table.partials[first_chunk + blockIdx.x] = float(sum);
}

// Block 0: the factor of the gradients, from `chunks` sums of squares. The others: a rule per tensor, and its step.
__global__ void __launch_bounds__(kLambThreads)
    lamb_rule_kernel(LambTable table, int chunks, LambCorrection correction, double max_grad_norm, const double* lrs,
                     const float* grad_scale, float* total) {
  if (blockIdx.x == 0) {
    double factor = grad_scale == nullptr ? 1.0 : 1.0 / *grad_scale;
    if (max_grad_norm > 0) {
      double squares = 0, sum, none;
      for (int i = threadIdx.x; i < chunks; i += kLambThreads) squares += table.partials[i];
      lamb_block_sum(squares, 0.0, sum, none);
      const double norm = sqrt(sum) * factor;
      if (norm > max_grad_norm) factor *= max_grad_norm / norm;
      if (threadIdx.x == 0) *total = float(norm);
    }
    if (threadIdx.x == 0) *table.factor = float(factor);
    return;
  }
  const int i = (blockIdx.x - 1) * kLambThreads + threadIdx.x;
  if (i >= table.tensor_count || table.skips()) return;
  const LambTensor tensor = table.tensors[i];
  const LambGroup group = table.groups[tensor.group];
  const float step = *tensor.step + 1;
  *tensor.step = step;
  const double c1 = 1 - pow(group.beta1, double(step)), c2 = 1 - pow(group.beta2, double(step));
  double rate = lrs == nullptr ? group.lr : lrs[tensor.group], root = 1, eps = group.eps;
  if (correction == LambCorrection::update) root = c1 / sqrt(c2), eps *= c1;
  if (correction == LambCorrection::step_size) rate *= sqrt(c2) / c1;
  table.rules[i] = {float(group.beta1),        float(1 - group.beta1), float(group.beta2), float(1 - group.beta2),
                    float(root),               float(eps),             float(group.weight_decay),
                    float(rate),               float(group.low),       float(group.high)};
}

// The moments. `Adapted`: the sums |p|^2 and |u|^2 of the chunk; otherwise p as well.
template <bool Adapted>
__global__ void __launch_bounds__(kLambThreads, 4) lamb_moments_kernel(LambTable table, int first_chunk) {
  if (table.skips()) return;
  const LambChunk chunk(table, first_chunk + blockIdx.x);
  const LambTensor& x = chunk.tensor;
  const LambRule rule = table.rules[chunk.piece.tensor];
  const float factor = *table.factor;
  float p2 = 0, u2 = 0;
  for (long long at = chunk.start(); at < chunk.end; at += kLambThreads * 4) {
    const LambWindow w = chunk.window(at);
    float g[4], p[4], m[4], v[4];
    lamb_load_grad(g, x, w);
    lamb_load(p, x.weight, w);
    lamb_load(m, x.exp_avg, w);
    lamb_load(v, x.exp_avg_sq, w);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      g[e] *= factor;
      m[e] = rule.beta1 * m[e] + rule.rest1 * g[e];
      v[e] = rule.beta2 * v[e] + rule.rest2 * g[e] * g[e];
      const float u = lamb_direction(p[e], m[e], v[e], rule);
      if (!Adapted) {
        p[e] -= rule.rate * u;
      } else if (w.has(e)) {  // outside, u may be 0 / 0
        p2 += p[e] * p[e];
        u2 += u * u;
      }
    }
    lamb_store(m, x.exp_avg, w);
    lamb_store(v, x.exp_avg_sq, w);
    if (!Adapted) lamb_store_weight(p, x, w);
  }
  if constexpr (Adapted) {
    double sum_p2, sum_u2;
    lamb_block_sum(p2, u2, sum_p2, sum_u2);
    if (threadIdx.x == 0) {
      float* partial = table.partials + 2ll * (first_chunk + blockIdx.x);
      partial[0] = float(sum_p2), partial[1] = float(sum_u2);
    }
  }
}

// The parameters, from trust ratios that every block sums from the partials. Backwards: what the pass before has read
// last is in the L2 cache.
__global__ void __launch_bounds__(kLambThreads, 4) lamb_weights_kernel(LambTable table, int end_chunk) {
  if (table.skips()) return;
  const LambChunk chunk(table, end_chunk - 1 - blockIdx.x);
  const LambTensor& x = chunk.tensor;
  const LambRule rule = table.rules[chunk.piece.tensor];
  double p2 = 0, u2 = 0, sum_p2, sum_u2;
  for (int i = chunk.piece.ratio_first + threadIdx.x; i < chunk.piece.ratio_end; i += kLambThreads)
    p2 += table.partials[2ll * i], u2 += table.partials[2ll * i + 1];
  lamb_block_sum(p2, u2, sum_p2, sum_u2);
  float ratio = 1;
  if (sum_p2 > 0 && sum_u2 > 0) ratio = fminf(fmaxf(float(sqrt(sum_p2 / sum_u2)), rule.low), rule.high);
  const float rate = rule.rate * ratio;
  for (long long at = chunk.start(); at < chunk.end; at += kLambThreads * 4) {
    const LambWindow w = chunk.window(at);
    float p[4], m[4], v[4];
    lamb_load<true>(p, x.weight, w);
    lamb_load<true>(m, x.exp_avg, w);
    lamb_load<true>(v, x.exp_avg_sq, w);
#pragma unroll
    for (int e = 0; e < 4; ++e) p[e] -= rate * lamb_direction(p[e], m[e], v[e], rule);
    lamb_store_weight(p, x, w);
  }
}
}  // namespace ek
