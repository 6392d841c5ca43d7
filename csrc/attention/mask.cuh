// Which keys a query sees: those that exist and, where attention is causal, none after itself.
#pragma once
#include "../common/tile.cuh"
#include "attention.hpp"

namespace ek {
struct Mask {
  int tokens;
  bool causal;

  // Whether a key is hidden from a query.
  EK_DEVICE bool hides(int query, int key) const { return key >= tokens || (causal && key > query); }
  // Whether it hides anything from queries that begin at `query`, of keys that end before `end`.
  EK_DEVICE bool touches(int query, int end) const { return end > tokens || (causal && end > query + 1); }
  // Up to where queries that end before `end` see keys.
  EK_DEVICE int keys(int end) const { return causal ? min(end, tokens) : tokens; }

  // Hides scores of 16 queries from `query` on with the keys from `key` on.
  template <int S>
  EK_DEVICE void hide(float (&score)[S][2][4], int query, int key) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (hides(query + lane / 4 + e / 2 * 8, key + s * kBlock + n * 8 + lane % 4 * 2 + e % 2))
            score[s][n][e] = -INFINITY;
  }
};
}  // namespace ek
