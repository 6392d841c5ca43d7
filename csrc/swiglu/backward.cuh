// The backward pass. With p = silu(gate) * up computed again, normed = (p - mean) * rstd and g = dy * weight,
//   dp = rstd * (g - mean(g) - normed * mean(g * normed)),   dweight = sum(dy * normed),   dbias = sum(dy),
// the means over the row and the sums over all rows; without a norm, dp = dy.
#pragma once
#include "../common/column_sums.cuh"
#include "product.cuh"

namespace ek {
struct SwigluBackwardStorage {
  RowSum<2>::Storage sum;  // then the shared memory of the column sums
};

// Registers decide how much is on its way from memory. A row of 2730 takes 11 warps: at 80 registers, which a bound of
// 768 threads leaves each, two blocks fit a multiprocessor; at 96, which kMaxThreads would leave, one does.
template <bool Held>
constexpr int kSwigluBackwardBound = Held ? 768 : kMaxThreads;

// The same elements, of which compilers do not know it: what follows from them is computed again after the reduction,
// because registers do not hold it until then. (After forget() ptxas still finds that the expressions are equal.)
template <class T>
EK_DEVICE void anew(Window<T>& x, std::uint32_t zero) {
#pragma unroll
  for (int k = 0; k < 4 * Window<T>::kVectors; ++k) reinterpret_cast<std::uint32_t*>(x.at)[k] ^= zero;
}

template <class T, bool Norm, bool Held, bool Aligned>
__global__ void __launch_bounds__(kSwigluBackwardBound<Held>, 1)
    swiglu_backward_kernel(const SwigluBackward a) {
  constexpr bool kPrefetch = Held && (sizeof(T) == 2 || !Norm);  // registers do not hold two rows of float and the sums
  const SwigluShape& s = a.shape;
  const T *dy = static_cast<const T*>(a.dy), *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  const long long stride = (long long)gridDim.x * blockDim.y;
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  const PaddedRow<Aligned> r(gate + row * s.gate_pitch, s);
  const RowWeights<Held, false> weight({a.weight, a.weight_dtype, 1}, r.logical);

  auto& storage = shared_storage<SwigluBackwardStorage>();
  RowSum<2> row_sum(storage.sum);
  // Held rows use the shared memory of the column sums one after the other, at the end; others side by side.
  float* shared = reinterpret_cast<float*>(&storage + 1);
  using Sum = ColumnSum<Held || !Norm, false>;  // without a norm there is none, and no memory for it
  Sum dweight(shared, r.logical), dbias(shared + (Held ? 0 : s.width), r.logical);

  struct Fetched {
    Window<T> d, gate, up;
    float mean, rstd;
  } now{}, next{};
  auto fetch = [&](Fetched& to, long long row, int i) {
    to.d = {};  // which adds nothing to the sums
    if (row >= s.rows) return;
    load(to.d, dy + row * a.dy_pitch, r.memory, i);
    load(to.gate, gate + row * s.gate_pitch, r.memory, i);
    load(to.up, up + row * s.up_pitch, r.memory, i);
    if constexpr (Norm) to.mean = a.mean[row], to.rstd = a.rstd[row];
  };
  if constexpr (kPrefetch) fetch(now, row, 0);

  for (; row - threadIdx.y < s.rows; row += stride) {
    if constexpr (kPrefetch)
      fetch(next, row + stride, 0);  // under way while this row is reduced
    else if constexpr (Held)
      fetch(now, row, 0);
    auto ready = [&](int i) {
      if constexpr (!Held) fetch(now, row, i);
      r.zero_pad(now.d.at, i), r.zero_pad(now.gate.at, i), r.zero_pad(now.up.at, i);
    };
    auto normed = [&](int e, float sig) { return (now.gate[e] * sig * now.up[e] - now.mean) * now.rstd; };
    if constexpr (Held) ready(0);

    float sums[2] = {0, 0};  // of g and of g * normed
    if constexpr (Norm) {
      r.logical.template windows<Held>([&](int i) {
        if constexpr (!Held) ready(i);
        float w[kWindow];
        weight(w, r.logical, i);
#pragma unroll
        for (int e = 0; e < kWindow; ++e) {
          const float d = now.d[e], n = normed(e, sigmoid<T>(now.gate[e]));
          sums[0] += d * w[e];
          sums[1] += d * w[e] * n;
          dweight.add(e, d * n, r.logical, i);
          dbias.add(e, d, r.logical, i);
        }
      });
      row_sum(sums);
      if constexpr (Held) anew(now.d, s.zero), anew(now.gate, s.zero), anew(now.up, s.zero);
    }
    const float mean_g = row_mean(sums[0], s), mean_gn = row_mean(sums[1], s);

    if (row < s.rows) r.memory.template windows<Held>([&](int i) {
      if constexpr (!Held) ready(i);
      float w[kWindow];
      if constexpr (Norm) weight(w, r.logical, i);
      Window<T> dgate, dup;
#pragma unroll
      for (int e = 0; e < kWindow; ++e) {
        const float d = now.d[e], x = now.gate[e], sig = sigmoid<T>(x);
        float dp = d;
        if constexpr (Norm) {
          const float n = normed(e, sig);
          dp = now.rstd * (d * w[e] - mean_g - n * mean_gn);
        }
        dgate.at[e] = from_float<T>(dp * now.up[e] * (sig * (1 + x * (1 - sig))));
        dup.at[e] = from_float<T>(dp * (x * sig));
      }
      r.zero_pad(dgate.at, i), r.zero_pad(dup.at, i);
      store(dgate, static_cast<T*>(a.dgate) + row * a.gradient_pitch, r.memory, i);
      store(dup, static_cast<T*>(a.dup) + row * a.gradient_pitch, r.memory, i);
    });
    if constexpr (kPrefetch) {
      now = next;
      // Do not wait for them before this row is done.
      forget(now.d), forget(now.gate), forget(now.up), forget(now.mean), forget(now.rstd);
    }
  }

  if constexpr (Norm) {
    float* partial = a.partial + (long long)blockIdx.x * 2 * s.width;
    dweight.finish(partial, r.logical);
    dbias.finish(partial + s.width, r.logical);
  }
}
}  // namespace ek
