// What both backward kernels make of a query and a key: the weight p = exp(score - lse), as in the forward pass, and
// the gradient of the score, p * (dout . value - delta), where delta = dout . out is a number per query.
#pragma once
#include "stage.cuh"

namespace ek {

// Per query: log2(e) lse, and delta; both 0 where there is none, whose dout is 0 too.
struct Statistics {
  float* lse_log2;
  int rows;

  EK_DEVICE float* delta() const { return lse_log2 + rows; }
  EK_DEVICE float* end() const { return delta() + rows; }

  // Fills in rows from `from` on, a multiple of 8, by `warps` warps of which this is number `warp`; row 0 is query
  // `first`.
  template <class T, int D>
  EK_DEVICE void fill(const AttentionBackward& p, const Place& place, int first, int from, int warp, int warps) const {
    const int lane = anew(place.lane()), part = lane % 4, tokens = p.shape.tokens;
    for (int base = from + 8 * warp; base < rows; base += 8 * warps) {
      const int row = base + lane / 4, token = first + row;
      const bool exists = place.live() && token < tokens;
      float sum = 0;
      if (exists) {
        const T *a = place.row<T>(p.dout, token), *b = place.row<T>(p.out, token);
        for (int c = part; c < D / kChunk; c += 4) {
          alignas(16) T x[kChunk], y[kChunk];
          copy_elements<kChunk>(x, a + c * kChunk), copy_elements<kChunk>(y, b + c * kChunk);
#pragma unroll
          for (int e = 0; e < kChunk; ++e) sum += to_float(x[e]) * to_float(y[e]);
        }
      }
      sum = quad_sum(sum);
      if (part) continue;
      delta()[row] = sum;
      lse_log2[row] = exists ? kLog2e * p.lse[place.index(token, tokens)]
                        : 0;
    }
  }
};

// The weight of one score, and in place of dout . value the gradient of the score.
EK_DEVICE void differentiate(float& score, float& gradient, float scale_log2, float lse_log2, float delta,
                             bool hidden) {
  score = hidden ? 0 : fast_exp2(fmaf(score, scale_log2, -lse_log2));
  gradient = score * (gradient - delta);
}
}  // namespace ek
