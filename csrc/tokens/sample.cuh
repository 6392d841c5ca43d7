// Draws the kept patches of a sample: one block finds the keep-th smallest (sort key, id) by its digits and compacts.
#pragma once
#include "../common/philox.cuh"
#include "tokens.hpp"

namespace ek {

constexpr int kSampleThreads = 1024;  // at most; a thread draws the keys of four patches at a time
constexpr int kDigitBits = 8, kBins = 1 << kDigitBits;
constexpr int kIdBits = 16, kPairBits = 32 + kIdBits;  // of a pair (sort key, id) as one number: no two are equal

struct SampleStorage {
  unsigned bins[kBins];
  unsigned digit, rank, in_bin;
  unsigned kept[kSampleThreads / 32];  // by each warp
};

// The sum over the lanes up to this one.
EK_DEVICE unsigned warp_inclusive_sum(unsigned x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned below = __shfl_up_sync(0xffffffffu, x, distance);
    if (threadIdx.x % 32 >= distance) x += below;
  }
  return x;
}

// One warp: finds the bin that holds the rank-th smallest pair, its rank there, and empties the bins.
EK_DEVICE void find_digit(SampleStorage& s, unsigned rank) {
  constexpr int kEach = kBins / 32;
  const int first = threadIdx.x * kEach;
  unsigned count[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    sum += count[i] = s.bins[first + i];
    s.bins[first + i] = 0;
  }
  unsigned below = warp_inclusive_sum(sum) - sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (below < rank && rank <= below + count[i]) s.digit = first + i, s.rank = rank - below, s.in_bin = count[i];
    below += count[i];
  }
}

__global__ void __launch_bounds__(kSampleThreads) sample_kept_tokens_kernel(const SampleKeptTokens p) {
  SampleStorage& s = shared_storage<SampleStorage>();
  const int thread = threadIdx.x, threads = blockDim.x;
  const std::uint64_t row = std::uint64_t(p.offset) + (p.offset_at ? std::uint64_t(*p.offset_at) : 0) + blockIdx.x;
  auto draw = [&](int block) {
    return philox({{std::uint32_t(block), 0, std::uint32_t(row), std::uint32_t(row >> 32)}}, p.seed);
  };
  // The keys of the first 4096 patches stay in registers; where there are more, those are drawn again at each use.
  const PhiloxWords first = draw(thread);
  auto keys = [&](int block) { return block == thread ? first : draw(block); };
  auto pair = [](std::uint32_t key, int id) { return std::uint64_t(key) << kIdBits | unsigned(id); };

  for (int i = thread; i < kBins; i += threads) s.bins[i] = 0;
  __syncthreads();

  // `top`: the leading digits of the largest pair that is kept. Often two digits tell it from all others.
  std::uint64_t top = 0;
  unsigned rank = p.keep;
  int shift = kPairBits;
  do {
    shift -= kDigitBits;
    for (int block = thread; 4 * block < p.patches; block += threads) {
      const PhiloxWords words = keys(block);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint64_t digits = pair(words.at[i], 4 * block + i) >> shift;
        if (4 * block + i < p.patches && digits >> kDigitBits == top) atomicAdd(&s.bins[digits % kBins], 1u);
      }
    }
    __syncthreads();
    if (thread < 32) find_digit(s, rank);
    __syncthreads();
    top = top << kDigitBits | s.digit;
    rank = s.rank;
  } while (shift && rank < s.in_bin);  // else the whole bin is kept; with all digits it holds one pair

  std::int16_t* kept = p.kept + blockIdx.x * (long long)p.keep;
  for (int start = 0; 4 * start < p.patches; start += threads) {
    const int block = start + thread;
    const PhiloxWords words = keys(block);
    bool keep[4];
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int id = 4 * block + i;
      count += keep[i] = id < p.patches && pair(words.at[i], id) >> shift <= top;
    }
    const unsigned up_to_here = warp_inclusive_sum(count);
    if (thread % 32 == 31) s.kept[thread / 32] = up_to_here;
    __syncthreads();
    unsigned place = up_to_here - count, total = 0;
    for (int warp = 0; warp < threads / 32; ++warp) {
      if (warp < thread / 32) place += s.kept[warp];
      total += s.kept[warp];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (keep[i]) kept[place++] = std::int16_t(4 * block + i);
    kept += total;
    __syncthreads();  // before the next round counts
  }
}

}  // namespace ek
