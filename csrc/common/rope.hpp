// The angles of two-dimensional rotary embedding.
#pragma once
#include "kept_ids.hpp"

namespace ek {

// Tables (size, D / 4, 2) of cos and sin, 16-byte aligned; tokens of the prefix are not turned.
struct Rope {
  const float *rows, *columns;  // null: nothing is turned
  int height, width;            // at most 2^20 patches
  float per_width;              // 1 / width
  int prefix;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + D / 2)
  KeptIds positions;  // (batch, tokens - prefix)
};

}  // namespace ek
