// How kernels read the ids of kept patches.
#pragma once
#include <cstdint>

#include "kept_ids.hpp"
#include "primitives.cuh"

namespace ek {

// The id at place `at` of (batch, count), within 0 ... patches - 1 whatever memory holds.
EK_DEVICE long long read_id(const KeptIds& kept, long long at, int patches) {
  long long id = 0;
  switch (kept.type) {
    case IdType::uint8: id = static_cast<const std::uint8_t*>(kept.data)[at]; break;
    case IdType::int8: id = static_cast<const std::int8_t*>(kept.data)[at]; break;
    case IdType::int16: id = static_cast<const std::int16_t*>(kept.data)[at]; break;
    case IdType::int32: id = static_cast<const std::int32_t*>(kept.data)[at]; break;
    case IdType::int64: id = static_cast<const std::int64_t*>(kept.data)[at]; break;
    case IdType::all: id = unsigned(at) % unsigned(kept.count); break;
  }
  return max(0ll, min(id, patches - 1ll));
}

}  // namespace ek
