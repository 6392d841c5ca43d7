// Ids of the patches that were kept, as they come from Python.
#pragma once

namespace ek {

// Codes of evakernels/native.py.
enum class IdType : int { uint8 = 0, int8 = 1, int16 = 2, int32 = 3, int64 = 4, all = 5 };

// Patch ids (batch, count), contiguous; an id outside 0 ... patches - 1 counts as the nearest of them.
struct KeptIds {
  const void* data;
  IdType type;  // all: every patch, in order, and no data
  int count;
};

}  // namespace ek
