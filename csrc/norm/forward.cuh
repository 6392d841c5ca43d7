// The forward pass of the four norm functions: one group of threads per row.
#pragma once
#include "../common/rows.cuh"
#include "norm.hpp"

namespace ek {
struct NormForwardStorage {
  RowSum<1>::Storage sum;
};

template <NormKind kKind, class Wide, class Narrow, bool Held, bool Aligned>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_forward_kernel(const NormForward p) {
  using X = std::conditional_t<kKind == NormKind::norm, Wide, Narrow>;
  using Y = std::conditional_t<kKind == NormKind::norm_add, Wide, Narrow>;

  const long long stride = (long long)gridDim.x * blockDim.y;
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  const Row<Aligned> r(row * p.width, p.width);
  const RowWeights<Held, Aligned> weight({p.weight, p.weight_dtype, 1}, r), bias({p.bias, p.bias_dtype, 0}, r);
  const Columns layer_scale{p.layer_scale, p.layer_scale_dtype, 1};
  RowSum<1> row_sum(shared_storage<NormForwardStorage>().sum);

  struct Fetched {
    Window<X> x;
    Window<Wide> residual;
  } now{}, next{};
  auto fetch = [&](Fetched& to, long long row, int i) {
    if (row >= p.rows) return;
    load(to.x, static_cast<const X*>(p.x) + row * p.width, r, i);
    if constexpr (kKind != NormKind::norm) load(to.residual, static_cast<const Wide*>(p.residual) + row * p.width, r, i);
  };
  if constexpr (Held) fetch(now, row, 0);

  // All groups of a block go round together: they meet at barriers.
  for (long long first = row - threadIdx.y; first < p.rows; first += stride, row += stride) {
    if constexpr (Held) fetch(next, row + stride, 0);  // under way while this row is reduced
    const bool live = row < p.rows;
    const float row_scale = live && p.row_scale ? p.row_scale[row / p.rows_per_sample] : 1;

    // What is normalised.
    auto value = [&](int i, float (&v)[kWindow]) {
      if constexpr (!Held) fetch(now, row, i);
      float scale[kWindow];
      if constexpr (kKind == NormKind::add_norm) layer_scale(scale, r, i);
#pragma unroll
      for (int e = 0; e < kWindow; ++e) {
        v[e] = now.x[e];
        if constexpr (kKind == NormKind::add_norm)
          v[e] = to_float(from_float<Wide>(now.residual[e] + row_scale * (scale[e] * v[e])));
      }
    };

    float total[1] = {0}, v[kWindow];
    if (kKind == NormKind::add_norm || !p.rms) r.template windows<Held>([&](int i) {
      value(i, v);
      if constexpr (kKind == NormKind::add_norm) {
        Window<Wide> sum;
#pragma unroll
        for (int e = 0; e < kWindow; ++e) sum.at[e] = from_float<Wide>(v[e]);
        if (live) store(sum, static_cast<Wide*>(p.sum) + row * p.width, r, i);
      }
      total[0] += sum_of(v);
    });
    float mean = 0;
    if (!p.rms) {
      row_sum(total);
      mean = total[0] / p.width;
    }
    total[0] = 0;
    r.template windows<Held>([&](int i) {
      value(i, v);
#pragma unroll
      for (int e = 0; e < kWindow; ++e) v[e] = r.has(i, e) ? (v[e] - mean) * (v[e] - mean) : 0;
      total[0] += sum_of(v);
    });
    row_sum(total);
    const float rstd = inverse_root(total[0] / p.width + p.eps);

    r.template windows<Held>([&](int i) {
      value(i, v);
      float w[kWindow], b[kWindow], scale[kWindow];
      weight(w, r, i);
      bias(b, r, i);
      if constexpr (kKind == NormKind::norm_add) layer_scale(scale, r, i);
      Window<Y> y;
#pragma unroll
      for (int e = 0; e < kWindow; ++e) {
        float normed = (v[e] - mean) * rstd * w[e] + b[e];
        if constexpr (kKind == NormKind::norm_add) normed = now.residual[e] + row_scale * (scale[e] * normed);
        y.at[e] = from_float<Y>(normed);
      }
      if (live) store(y, static_cast<Y*>(kKind == NormKind::norm_add ? p.sum : p.y) + row * p.width, r, i);
    });
    if (live && threadIdx.x == 0) {
      if (!p.rms) p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    if constexpr (Held) now = next;
  }
}
}  // namespace ek
