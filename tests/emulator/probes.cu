// Every primitive by itself, with values from the test in every lane and element; for the emulator and for a GPU.
#include <exception>
#include <string>

#include "common/primitives.cuh"
#include "launch.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace ek;

struct Matrices {
  alignas(16) std::uint16_t at[4][8][8];
};

template <bool Transposed>
__global__ void ldmatrix_kernel(std::uint32_t* out, const std::uint16_t* in) {
  Matrices& s = shared_storage<Matrices>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s.at[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncthreads();
  std::uint32_t r[4];
  ldmatrix_x4<Transposed>(r, s.at[lane / 8][lane % 8]);
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

// Fragments come and go as each lane holds them: a is [lane][K / 4], b [lane][K / 8], d [lane][4].
template <class T, int K>
__global__ void mma_kernel(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  const int lane = threadIdx.x;
  float sum[4];
  std::uint32_t fragment[K / 4];
  for (int i = 0; i < 4; ++i) sum[i] = d[lane * 4 + i];
  for (int i = 0; i < K / 4; ++i) fragment[i] = a[lane * (K / 4) + i];
  if constexpr (K == 16)
    mma_m16n8k16<T>(sum, fragment, b[lane * 2], b[lane * 2 + 1]);
  else
    mma_m16n8k8<T>(sum, fragment, b[lane]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// Two groups in flight; lane i copies 16 bytes in each, where bit i of the group's word is set.
__global__ void cp_async_kernel(std::uint32_t* out, const std::uint32_t* in, unsigned first, unsigned second) {
  struct Storage {
    alignas(16) std::uint32_t at[2][32][4];
  };
  Storage& s = shared_storage<Storage>();
  const int lane = threadIdx.x;
  cp_async_16(s.at[0][lane], in + lane * 4, first >> lane & 1);
  cp_async_commit();
  cp_async_16(s.at[1][lane], in + 128 + lane * 4, second >> lane & 1);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = s.at[0][31 - lane][i];
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[128 + lane * 4 + i] = s.at[1][31 - lane][i];
}

// out: [5][lane] of shuffles of the lane's number, votes in the row after them.
__global__ void shuffle_kernel(unsigned* out, int operand, int width, unsigned votes) {
  const unsigned lane = threadIdx.x, all = 0xffffffffu;
  out[lane] = __shfl_sync(all, lane, operand, width);
  out[32 + lane] = __shfl_xor_sync(all, lane, operand, width);
  out[64 + lane] = __shfl_down_sync(all, lane, operand, width);
  out[96 + lane] = __shfl_up_sync(all, lane, operand, width);
  const int mine = votes >> lane & 1;
  out[128 + lane] = __ballot_sync(all, mine) ^ (__any_sync(all, mine) ? 0 : 1) ^ (__all_sync(all, mine) ? 2 : 0);
}

// Every thread of every block adds its rank in the grid.
__global__ void atomic_kernel(float* f, unsigned* u, unsigned long long* wide, int* largest) {
  const unsigned rank = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(f, float(rank));
  atomicAdd(u, rank);
  atomicAdd(wide, (static_cast<unsigned long long>(rank) << 32) + rank);
  atomicMax(largest, int(rank));
}

__global__ void scalar_kernel(float* out, const float* in, unsigned* high, const unsigned* a, const unsigned* b) {
  const int i = threadIdx.x;
  out[i] = fast_exp2(in[i]);
  out[32 + i] = to_float(from_float<bf16>(in[i]));
  out[64 + i] = to_float(from_float<half>(in[i]));
  out[96 + i] = warp_sum(in[i]);
  high[i] = __umulhi(a[i], b[i]);
  high[32 + i] = pack2<bf16>(in[i], in[31 - i]);
  high[64 + i] = pack2<half>(in[i], in[31 - i]);
}

template <class Go>
const char* reported(Go go) {
  static std::string words;
  words.clear();
  try {
    if (const Status status = go(); !status.ok()) words = status.sentence;
  } catch (const std::exception& error) {
    words = error.what();
  }
  return words.c_str();
}

}  // namespace

EXPORT const char* probe_ldmatrix(std::uint32_t* out, const std::uint16_t* in, int transposed) {
  return reported([&] {
    auto kernel = transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>;
    return launch(kernel, 1, 32, sizeof(Matrices), nullptr, out, in);
  });
}
EXPORT const char* probe_mma(float* d, const std::uint32_t* a, const std::uint32_t* b, int k, int is_bf16) {
  return reported([&] {
    auto go = [&](auto kernel) { return launch(kernel, 1, 32, 0, nullptr, d, a, b); };
    if (k == 16) return is_bf16 ? go(mma_kernel<bf16, 16>) : go(mma_kernel<half, 16>);
    return is_bf16 ? go(mma_kernel<bf16, 8>) : go(mma_kernel<half, 8>);
  });
}
EXPORT const char* probe_cp_async(std::uint32_t* out, const std::uint32_t* in, unsigned first, unsigned second) {
  return reported([&] { return launch(cp_async_kernel, 1, 32, 1024, nullptr, out, in, first, second); });
}
EXPORT const char* probe_shuffle(unsigned* out, int operand, int width, unsigned votes) {
  return reported([&] { return launch(shuffle_kernel, 1, 32, 0, nullptr, out, operand, width, votes); });
}
EXPORT const char* probe_atomic(float* f, unsigned* u, unsigned long long* wide, int* largest) {
  return reported([&] { return launch(atomic_kernel, 5, 96, 0, nullptr, f, u, wide, largest); });
}
EXPORT const char* probe_scalar(float* out, const float* in, unsigned* high, const unsigned* a, const unsigned* b) {
  return reported([&] { return launch(scalar_kernel, 1, 32, 0, nullptr, out, in, high, a, b); });
}
