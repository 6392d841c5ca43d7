// Softmax over keys that arrive a few at a time: what is kept of a row is the largest score so far, the sum of the
// exponentials of the scores less that, and the output weighted with the same. When the largest grows, both are scaled.
// To let it lag, and scale hardly ever, was tried: where one key has most of the weight, its weight is then no longer
// 1, and its rounding shows.
#pragma once
#include "../common/primitives.cuh"

namespace ek {

// Of the two rows of a block, 8 apart, of which this lane holds elements.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // `sum` of this lane's elements alone

  // Turns the scores of 16 S keys into weights, exp2(scale * (score - top)); `out` are the weighted sums so far.
  // All lanes of a warp call it.
  template <int S, int C>
  EK_DEVICE void operator()(float (&score)[S][2][4], float (&out)[C][4], float scale) {
    float now[2];
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = top[r];
      each(score, r, [&](float x) { now[r] = fmaxf(now[r], x); });
      now[r] = quad_max(now[r]);
      grows |= now[r] > top[r];
    }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shrink = fast_exp2((top[r] - now[r]) * scale);
        top[r] = now[r], sum[r] *= shrink;
#pragma unroll
        for (int c = 0; c < C; ++c) out[c][2 * r] *= shrink, out[c][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float less = top[r] * scale;
      float total = 0;
      each(score, r, [&](float& x) { total += x = fast_exp2(fmaf(x, scale, -less)); });
      sum[r] += total;
    }
  }

 private:
  template <int S, class F>
  EK_DEVICE static void each(float (&score)[S][2][4], int r, F&& f) {
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int n = 0; n < 2; ++n) f(score[s][n][2 * r]), f(score[s][n][2 * r + 1]);
  }
};
}  // namespace ek
