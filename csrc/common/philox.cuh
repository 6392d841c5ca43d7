// Philox4x32-10, the counter-based generator of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once
#include "primitives.cuh"

namespace ek {

struct PhiloxWords {
  std::uint32_t at[4];
};

// The four random words of a counter under a 64-bit key.
EK_DEVICE PhiloxWords philox(PhiloxWords counter, std::uint64_t key) {
  std::uint32_t(&c)[4] = counter.at;
  std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t(0xD2511F53u) * c[0], b = std::uint64_t(0xCD9E8D57u) * c[2];
    c[0] = std::uint32_t(b >> 32) ^ c[1] ^ k0;
    c[1] = std::uint32_t(b);
    c[2] = std::uint32_t(a >> 32) ^ c[3] ^ k1;
    c[3] = std::uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace ek
