// How many products a second mma.sync makes, and how many exponentials ex2.approx: each alone, on registers, by the
// same functions as the attention kernels. rates.py compiles and times this.
#include "../csrc/common/primitives.cuh"

namespace {
constexpr int kThreads = 512;   // 16 warps of a block, 4 for each quarter of a multiprocessor
constexpr int kProducts = 4;    // of a warp that do not wait for each other; with 4 warps 16, which hide the latency
constexpr int kExponentials = 8;

// Factors as bits: bf16 numbers between 1 and 2, of either sign, that differ from lane to lane. Zeros would draw less
// power and leave the clock higher than real work does.
__device__ std::uint32_t factor(int i) {
  const std::uint32_t noise = (threadIdx.x * 4 + i) * 2654435761u;
  return 0x3f803f80u | (noise & 0x807f807fu);
}

__global__ void __launch_bounds__(kThreads) products_kernel(int iterations, float* out) {
  const std::uint32_t a[4] = {factor(0), factor(1), factor(2), factor(3)}, b[2] = {factor(4), factor(5)};
  float sum[kProducts][4] = {};
#pragma unroll 4
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (auto& d : sum) ek::mma_m16n8k16<ek::bf16>(d, a, b[0], b[1]);
  float total = 0;  // stored, lest the compiler leave the work out
  for (auto& d : sum) total += d[0] + d[1] + d[2] + d[3];
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) exponentials_kernel(int iterations, float* out) {
  float x[kExponentials];
#pragma unroll
  for (int k = 0; k < kExponentials; ++k) x[k] = threadIdx.x * 0.001f + k;
#pragma unroll 4
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (float& y : x) y = ek::fast_exp2(-y);  // the sign is part of the instruction, and keeps y between 0 and 1
  float total = 0;
  for (float y : x) total += y;
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}
}  // namespace

// Each starts one block per multiprocessor, `blocks` in all, on a stream; `out` holds kThreads floats of each block.
// `*work` becomes the FLOPs, or the exponentials, of the whole. The result is a cudaError_t.
extern "C" int products(int blocks, int iterations, float* out, cudaStream_t stream, double* work) {
  *work = 2.0 * 16 * 8 * 16 * kProducts * iterations * blocks * (kThreads / 32);
  products_kernel<<<blocks, kThreads, 0, stream>>>(iterations, out);
  return cudaGetLastError();
}

extern "C" int exponentials(int blocks, int iterations, float* out, cudaStream_t stream, double* work) {
  *work = 1.0 * kExponentials * iterations * blocks * kThreads;
  exponentials_kernel<<<blocks, kThreads, 0, stream>>>(iterations, out);
  return cudaGetLastError();
}

extern "C" int threads() { return kThreads; }
