// The forward pass: one group of threads per row; the product p = silu(gate) * up is never stored.
#pragma once
#include "product.cuh"

namespace ek {
struct SwigluForwardStorage {
  RowSum<1>::Storage sum;
};

template <class T, bool Norm, bool Held, bool Aligned>
__global__ void __launch_bounds__(kMaxThreads, 1) swiglu_forward_kernel(const SwigluForward a) {
  const SwigluShape& s = a.shape;
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  const long long stride = (long long)gridDim.x * blockDim.y;
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  const PaddedRow<Aligned> r(gate + row * s.gate_pitch, s);
  const RowWeights<Held, false> weight({a.weight, a.weight_dtype, 1}, r.logical);
  const RowWeights<Held, false> bias({a.bias, a.bias_dtype, 0}, r.logical);
  RowSum<1> row_sum(shared_storage<SwigluForwardStorage>().sum);

  struct Fetched {
    Window<T> gate, up;
  } now{}, next{};
  auto fetch = [&](Fetched& to, long long row, int i) {
    if (row >= s.rows) return;
    load(to.gate, gate + row * s.gate_pitch, r.memory, i);
    load(to.up, up + row * s.up_pitch, r.memory, i);
  };
  if constexpr (Held) fetch(now, row, 0);

  // All groups of a block go round together: they meet at barriers.
  for (; row - threadIdx.y < s.rows; row += stride) {
    if constexpr (Held) fetch(next, row + stride, 0);  // under way while this row is reduced
    const bool live = row < s.rows;

    float p[kWindow];
    auto product = [&](int i) {
      if constexpr (!Held) fetch(now, row, i);
#pragma unroll
      for (int e = 0; e < kWindow; ++e) p[e] = now.gate[e] * sigmoid<T>(now.gate[e]) * now.up[e];
      r.zero_pad(p, i);
    };
    if constexpr (Held) product(0);

    float mean = 0, rstd = 1;
    if constexpr (Norm) {
      float total[1] = {0};
      r.logical.template windows<Held>([&](int i) {
        if constexpr (!Held) product(i);
        total[0] += sum_of(p);
      });
      row_sum(total);
      mean = row_mean(total[0], s);
      total[0] = 0;
      r.logical.template windows<Held>([&](int i) {
        if constexpr (!Held) product(i);
        float squares[kWindow];
#pragma unroll
        for (int e = 0; e < kWindow; ++e) squares[e] = (p[e] - mean) * (p[e] - mean);
        r.zero_pad(squares, i);
        total[0] += sum_of(squares);
      });
      row_sum(total);
      rstd = inverse_root(row_mean(total[0], s) + a.eps);
      if (live && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
    }

    if (live) r.memory.template windows<Held>([&](int i) {
      if constexpr (!Held) product(i);
      float w[kWindow], b[kWindow];
      if constexpr (Norm) weight(w, r.logical, i), bias(b, r.logical, i);
      Window<T> y;
#pragma unroll
      for (int e = 0; e < kWindow; ++e) y.at[e] = from_float<T>(Norm ? (p[e] - mean) * rstd * w[e] + b[e] : p[e]);
      r.zero_pad(y.at, i);
      store(y, static_cast<T*>(a.y) + row * s.padded, r.memory, i);
    });
    if constexpr (Held) {
      now = next;
      forget(now.gate), forget(now.up);  // do not wait for them before this row is done
    }
  }
}
}  // namespace ek
