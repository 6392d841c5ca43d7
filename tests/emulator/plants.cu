// Small kernels with planted bugs, for tests of the emulator. Plant 0 is correct in each kernel.
#include <exception>
#include <string>

#include "common/primitives.cuh"
#include "launch.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace ek;

enum Bug {
  kNone, kBarrierBeforeRead, kBarrierBeforeWrite, kSyncwarp, kSharedOverrun, kGlobalOverrun, kUninitialised,
  kTwoBarriers, kEarlyReturn, kHalfShuffle, kMixedCollectives, kOutsideMask, kOwnMask, kBarrierInOneWarp, kNoWait,
  kWrongGroup, kNoCommit, kWaitWithoutBarrier, kMisaligned, kArrayIndex, kNoFence, kPlainAdd, kTwoWriters, kSharedSize,
  kWriteAfterRead, kReadAndAtomic, kWriteAndAtomic,
};

struct Storage {
  float a[64];
  alignas(16) unsigned char bytes[1024];
};

// One block of 64 threads.
__global__ void threads_kernel(float* out, const float* in, int n, int bug) {
  Storage& s = shared_storage<Storage>();
  const int t = threadIdx.x, lane = t % 32;
  s.a[t] = t;
  if (bug == kSharedOverrun) reinterpret_cast<float*>(&s)[t + sizeof(Storage) / 4 - 63] = 1;
  if (bug != kBarrierBeforeRead) __syncthreads();
  float x = s.a[63 - t];
  if (bug != kBarrierBeforeWrite) __syncthreads();
  s.a[t] = x;
  if (bug != kSyncwarp) __syncwarp();
  x += s.a[t ^ 1];
  if (bug == kUninitialised) x += reinterpret_cast<float*>(s.bytes)[t];
  if (bug == kEarlyReturn && t == 5) return;
  if (bug == kTwoBarriers) {
    if (t < 32)
      __syncthreads();
    else
      __syncthreads();
  }
  __syncthreads();
  if (bug == kWriteAfterRead) {
    if (t >= 32)
      x += s.a[63 - t];
    else
      s.a[t] = x;
  }
  if (bug == kHalfShuffle && lane < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);
  if (bug == kMixedCollectives) {
    if (lane < 16)
      x += __shfl_xor_sync(0xffffffffu, x, 1);
    else
      __syncwarp();
  }
  if (bug == kOutsideMask && lane < 16) x += __shfl_xor_sync(0xffffu, x, 16);
  if (bug == kOwnMask) x += __shfl_xor_sync(0xffffu, x, 1);
  if (bug == kBarrierInOneWarp && t < 32) __syncthreads();
  if (lane < 16)  // legal: each half names itself
    x += __shfl_xor_sync(0xffffu, x, 1);
  else
    x += __shfl_xor_sync(0xffff0000u, x, 2);
  __syncthreads();
  cp_async_16(s.bytes + t * 16, in + t * 4, true);
  if (bug != kNoCommit) cp_async_commit();
  if (bug == kWrongGroup) cp_async_wait<1>();
  if (bug != kWrongGroup && bug != kNoWait) cp_async_wait<0>();
  if (bug != kWaitWithoutBarrier) __syncthreads();
  x += *reinterpret_cast<float*>(s.bytes + (t ^ 63) * 16);
  if (bug == kMisaligned) x += __ldg(reinterpret_cast<const float4*>(in + 1)).x;
  if (bug == kArrayIndex) {
    float four[4] = {x, x, x, x};
    for (int i = 0; i <= n / 15; ++i) x += four[i];
  }
  if (bug == kGlobalOverrun || t < n) out[t] = x;
}

// Threads without work exit first, a whole warp and part of another; nothing after that needs them.
__global__ void exit_kernel(float* out, int n) {
  const int t = threadIdx.x;
  if (t >= n) return;
  const unsigned mask = t < 32 ? 0xffffffffu : (1u << (n - 32)) - 1;
  out[t] = __shfl_sync(mask, float(t), 0);
}

// The largest of the threads' numbers.
__global__ void atomic_kernel(int* out, int bug) {
  int& most = shared_storage<int>();
  const int t = threadIdx.x;
  if (t == 0) most = -1;
  __syncthreads();
  if (t < 32)
    atomicMax(&most, t);
  else if (bug == kWriteAndAtomic && t == 63)
    most = t;
  else if (bug == kReadAndAtomic)
    out[t] = most;
  else
    atomicMax(&most, t);
  __syncthreads();
  out[t] = most;
}

// The last block to finish adds what all blocks have written.
__global__ void blocks_kernel(float* sum, float* partial, unsigned* finished, int bug) {
  int& last = shared_storage<int>();
  if (threadIdx.x == 0) {
    partial[bug == kTwoWriters ? 0 : blockIdx.x] = blockIdx.x + 1;
    if (bug == kPlainAdd) *sum += 1;
    if (bug != kNoFence) __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  *sum = total;
  *finished = 0;
}

}  // namespace

extern "C" void emu_track(void*, std::size_t);
extern "C" void emu_untrack_all();

// Runs `go` with memory in which only the given tensors may be touched; returns what was reported.
template <class Go>
static const char* reported(Go go) {
  static std::string words;
  words.clear();
  try {
    if (const Status status = go(); !status.ok()) words = status.sentence;
  } catch (const std::exception& error) {
    words = error.what();
  }
  emu_untrack_all();
  return words.c_str();
}

EXPORT const char* plant_threads(float* out, float* in, int n, int bug) {
  return reported([&] {
    emu_track(in, 256 * sizeof(float)), emu_track(out, n * sizeof(float));
    const std::size_t shared = bug == kSharedSize ? 164 << 10 : sizeof(Storage);
    return launch(threads_kernel, 1, 64, shared, nullptr, out, in, n, bug);
  });
}
EXPORT const char* plant_exit(float* out, int n, int threads) {
  return reported([&] {
    emu_track(out, n * sizeof(float));
    return launch(exit_kernel, 1, threads, 0, nullptr, out, n);
  });
}
EXPORT const char* plant_atomic(int* out, int threads, int bug) {
  return reported([&] {
    emu_track(out, threads * sizeof(int));
    return launch(atomic_kernel, 1, threads, sizeof(int), nullptr, out, bug);
  });
}
EXPORT const char* plant_blocks(float* sum, float* partial, unsigned* finished, int blocks, int bug) {
  return reported([&] {
    emu_track(sum, 4), emu_track(partial, blocks * sizeof(float)), emu_track(finished, 4);
    return launch(blocks_kernel, blocks, 64, sizeof(int), nullptr, sum, partial, finished, bug);
  });
}
