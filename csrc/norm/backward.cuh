// The backward pass of the four norm functions. With d the gradient of norm(x) and g = d * weight,
//   dx = rstd * (g - mean(g) - normed * mean(g * normed)),   dweight = sum(d * normed),   dbias = sum(d),
// the means over the row (mean(g) is 0 for RMSNorm) and the sums over all rows.
#pragma once
#include "../common/column_sums.cuh"
#include "norm.hpp"

namespace ek {
struct NormBackwardStorage {
  RowSum<2>::Storage sum;  // then the shared memory of the column sums
};

template <NormKind kKind, class Wide, class Narrow, bool Held, bool Aligned, bool LayerScale>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_backward_kernel(const NormBackward p) {
  using X = std::conditional_t<kKind == NormKind::norm_add, Narrow, Wide>;
  using D = std::conditional_t<kKind == NormKind::norm_add, Wide, Narrow>;
  constexpr bool kRoom = Held && !LayerScale;  // registers hold the weight and the next row, or a third sum
  constexpr bool kAddNorm = kKind == NormKind::add_norm, kNormAdd = kKind == NormKind::norm_add;

  const long long stride = (long long)gridDim.x * blockDim.y;
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  const Row<Aligned> r(row * p.width, p.width);
  const RowWeights<kRoom, Aligned> weight({p.weight, p.weight_dtype, 1}, r);
  const Columns bias{p.bias, p.bias_dtype, 0}, layer_scale{p.layer_scale, p.layer_scale_dtype, 1};

  auto& storage = shared_storage<NormBackwardStorage>();
  RowSum<2> row_sum(storage.sum);
  // Held rows use the shared memory of the column sums one after the other, at the end; others side by side.
  float* shared = reinterpret_cast<float*>(&storage + 1);
  const int apart = Held ? 0 : p.width;
  ColumnSum<Held, Aligned> dweight(shared, r), dbias(shared + apart, r), dscale(shared + (LayerScale ? 2 : 0) * apart, r);

  struct Fetched {
    Window<D> d;
    Window<X> x;
  } now{}, next{};
  auto fetch = [&](Fetched& to, long long row, int i) {
    if (row >= p.rows) return;
    load(to.d, static_cast<const D*>(p.dy) + row * p.width, r, i);
    load(to.x, static_cast<const X*>(p.x) + row * p.width, r, i);
  };
  if constexpr (kRoom) fetch(now, row, 0);

  for (long long first = row - threadIdx.y; first < p.rows; first += stride, row += stride) {
    if constexpr (Held) fetch(kRoom ? next : now, kRoom ? row + stride : row, 0);
    const bool live = row < p.rows;
    const float mean = live && !p.rms ? p.mean[row] : 0, rstd = live ? p.rstd[row] : 0;
    const float row_scale = live && p.row_scale ? p.row_scale[row / p.rows_per_sample] : 1;

    // The gradient d of the norm's output, and g.
    float normed[kWindow], d[kWindow], g[kWindow], scale[kWindow];
    auto gradient = [&](int i) {
      if constexpr (!Held) fetch(now, row, i);
      float w[kWindow];
      weight(w, r, i);
      if constexpr (kNormAdd) layer_scale(scale, r, i);
#pragma unroll
      for (int e = 0; e < kWindow; ++e) {
        normed[e] = r.has(i, e) ? (now.x[e] - mean) * rstd : 0;
        d[e] = kNormAdd ? row_scale * (scale[e] * now.d[e]) : now.d[e];
        g[e] = d[e] * w[e];
      }
    };

    float sums[2] = {0, 0};  // of g and of g * normed
    r.template windows<Held>([&](int i) {
      gradient(i);
      sums[0] += sum_of(g);
#pragma unroll
      for (int e = 0; e < kWindow; ++e) g[e] *= normed[e];
      sums[1] += sum_of(g);
    });
    Window<Wide> dsum{};
    Window<Narrow> branch{};
    auto fetch_rest = [&](int i) {
      if (!live) return;
      if (kAddNorm && p.dsum) load(dsum, static_cast<const Wide*>(p.dsum) + row * p.width, r, i);
      if (kAddNorm && LayerScale) load(branch, static_cast<const Narrow*>(p.branch) + row * p.width, r, i);
    };
    if constexpr (kRoom) fetch_rest(0);
    row_sum(sums);
    const float mean_g = p.rms ? 0 : sums[0] / p.width, mean_gn = sums[1] / p.width;

    if (live) r.template windows<Held>([&](int i) {
      gradient(i);
      if constexpr (!kRoom) fetch_rest(i);
      dbias.add(d, r, i);
      float out[kWindow], term[kWindow];
#pragma unroll
      for (int e = 0; e < kWindow; ++e) {
        term[e] = d[e] * normed[e];
        out[e] = rstd * (g[e] - mean_g - normed[e] * mean_gn);
        if constexpr (kAddNorm) out[e] += dsum[e];
      }
      dweight.add(term, r, i);
      if constexpr (LayerScale && kNormAdd) {
        float w[kWindow], b[kWindow];
        weight(w, r, i);
        bias(b, r, i);
#pragma unroll
        for (int e = 0; e < kWindow; ++e) term[e] = row_scale * now.d[e] * (normed[e] * w[e] + b[e]);
        dscale.add(term, r, i);
      }
      Window<X> dx;
#pragma unroll
      for (int e = 0; e < kWindow; ++e) dx.at[e] = from_float<X>(out[e]);
      store(dx, static_cast<X*>(p.dx) + row * p.width, r, i);
      if constexpr (kAddNorm) {
        if constexpr (LayerScale) {
          layer_scale(scale, r, i);
#pragma unroll
          for (int e = 0; e < kWindow; ++e) term[e] = row_scale * out[e] * branch[e];
          dscale.add(term, r, i);
        }
        Window<Narrow> dbranch;
#pragma unroll
        for (int e = 0; e < kWindow; ++e)
          dbranch.at[e] = from_float<Narrow>(row_scale * (LayerScale ? scale[e] * out[e] : out[e]));
        if (p.dbranch) store(dbranch, static_cast<Narrow*>(p.dbranch) + row * p.width, r, i);
      }
    });
    if constexpr (kRoom) {
      now = next;  // it was under way while this row was reduced
      forget(now.d), forget(now.x);  // or the compiler copies, and so waits for the loads, before the reduction
    }
  }

  float* partial = p.partial + (long long)blockIdx.x * ColumnSums::kMost * p.width;
  dweight.finish(partial, r);
  dbias.finish(partial + p.width, r);
  if constexpr (LayerScale) dscale.finish(partial + 2 * p.width, r);
}
}  // namespace ek
