// What both passes share: the columns of a row, and the sigmoid.
#pragma once
#include "../common/rows.cuh"
#include "swiglu.hpp"

namespace ek {
// The columns of a row that lie in memory, and those of them that count. Windows are aligned where gate lies; a tensor
// whose rows lie otherwise is read and written element by element. `Aligned`: all rows of all tensors lie alike, and
// memory is whole windows, so that padding costs nothing but its bytes.
template <bool Aligned>
struct PaddedRow {
  Row<Aligned> memory;
  Row<false> logical;

  template <class T>
  EK_DEVICE PaddedRow(const T* gate, const SwigluShape& shape)
      : memory(place(gate), shape.padded), logical(Aligned ? 0 : place(gate), shape.width) {}

  // Pad columns hold anything, NaN included. Few warps have any.
  template <class T>
  EK_DEVICE void zero_pad(T (&x)[kWindow], int i) const {
    if (logical.whole(i)) return;
#pragma unroll
    for (int e = 0; e < kWindow; ++e)
      if (!logical.has(i, e)) x[e] = T{};
  }

 private:
  template <class T>
  EK_DEVICE static long long place(const T* p) {
    return reinterpret_cast<std::uintptr_t>(p) / sizeof(T);
  }
};

// sum / width, rounded, without a division.
EK_DEVICE float row_mean(float sum, const SwigluShape& s) {
  const float mean = sum * s.per_width;
  return fmaf(fmaf(-mean, float(s.width), sum), s.per_width, mean);
}

// Of an element of type T: as exact as T can show.
template <class T>
EK_DEVICE float sigmoid(float x) {
  return sizeof(T) == 4 ? 1 / (1 + expf(-x)) : fast_reciprocal(1 + fast_exp2(-1.44269504f * x));
}
}  // namespace ek
