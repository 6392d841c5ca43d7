// The instructions that CUDA C++ cannot spell, each with two definitions side by side: PTX for the GPU, and a call of
// the emulator (tests/emulator) for tests on a CPU. Kernels include this file and contain nothing specific to either.
//
// Rules that let one source serve both: PTX here alone; launches by ek::launch; shared memory by shared_storage()
// alone; arithmetic in float; __syncwarp(), shuffles and votes with masks that name every lane taking part.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#elif defined(EVAKERNELS_EMULATED)
#include "cuda_on_cpu.hpp"
#else
#error "primitives.cuh is for kernels: compile it with nvcc, or with -DEVAKERNELS_EMULATED"
#endif

#ifdef __CUDACC__
#define EK_DEVICE __device__ __forceinline__
#else
#define EK_DEVICE inline  // forced inlining doubles the time that g++ takes
#endif

namespace ek {

using bf16 = __nv_bfloat16;
using half = __half;

// --- shared memory ---------------------------------------------------------------------------------------------------

// The dynamic shared memory of the block, laid out as Storage, aligned to 128 bytes; launch() gets its size, which is
// sizeof(Storage) or, where Storage ends in a flexible region, more. Its content is undefined when a block starts.
template <class Storage>
EK_DEVICE Storage& shared_storage() {
  static_assert(alignof(Storage) <= 128, "shared memory is aligned to 128 bytes");
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char ek_shared[];
  return *reinterpret_cast<Storage*>(ek_shared);
#else
  return *static_cast<Storage*>(emu::dynamic_shared());
#endif
}

#ifdef __CUDACC__
EK_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// --- tensor cores ----------------------------------------------------------------------------------------------------
//
// Fragments, with g = lane / 4 and t = lane % 4; two 16-bit elements per register, the lower column or row in the lower
// half (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8"):
//   a (16x16): a[0] row g,     columns 2t, 2t+1      a[1] row g + 8, columns 2t, 2t+1
//              a[2] row g,     columns 2t+8, 2t+9    a[3] row g + 8, columns 2t+8, 2t+9     (16x8: a[0] and a[1] alone)
//   b (16x8):  b0 rows 2t, 2t+1 of column g          b1 rows 2t+8, 2t+9 of column g         (8x8: b0 alone)
//   d (16x8):  d[0], d[1] row g, columns 2t, 2t+1    d[2], d[3] row g + 8, columns 2t, 2t+1

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane i passes the address, 16-byte aligned, of row
// i % 8 of matrix i / 8. r[m] has the elements 2t, 2t+1 of row g of matrix m; Transposed: of column g.
template <bool Transposed = false>
EK_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
  emu::ldmatrix_x4(r, row, Transposed);
#endif
}

// d += a b, where a is 16x16, b 16x8 and d 16x8; T is bf16 or half, d is float.
template <class T>
EK_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>, "the elements are bf16 or half");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emu::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, bf16>);
#endif
}

// d += a b, where a is 16x8, b 8x8 and d 16x8.
template <class T>
EK_DEVICE void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>, "the elements are bf16 or half");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  emu::mma_m16n8k8(d, a, b, std::is_same_v<T, bf16>);
#endif
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

// Copies 16 bytes from global to shared memory in the background, both 16-byte aligned; where not `valid`, writes zeros
// and does not read. A thread's copies join a group at its next commit; after wait<Keep> at most Keep of its newest
// groups are in flight. A wait is for the thread's own copies: others see them after a barrier that follows the wait.
EK_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  emu::cp_async_issue(shared, global, valid ? 16 : 0);
#endif
}

EK_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}

template <int Keep>
EK_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Keep) : "memory");
#else
  emu::cp_async_wait(Keep);
#endif
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// 2^x with a relative error of about 2^-22; results below the normal floats become 0.
EK_DEVICE float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emu::flush(exp2f(emu::flush(x)));
#endif
}

// 1 / x with a relative error of about 2^-23; results below the normal floats become 0.
EK_DEVICE float fast_reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emu::flush(1.0f / emu::flush(x));
#endif
}

// Hides from the compiler where a value comes from: what depends on it is computed from here on, neither earlier (where
// it would wait for a load) nor held in registers from an earlier time.
EK_DEVICE void forget([[maybe_unused]] std::uint32_t& x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
}
EK_DEVICE void forget([[maybe_unused]] float& x) {
#ifdef __CUDACC__
  asm volatile("" : "+f"(x));
#endif
}

// The same number, from which addresses are computed here and now, rather than before a loop that has better use for
// the registers.
EK_DEVICE int anew(int x) {
  std::uint32_t bits = x;
  forget(bits);
  return bits;
}

EK_DEVICE float to_float(float x) { return x; }
EK_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
EK_DEVICE float to_float(half x) { return __half2float(x); }

// Rounds to the nearest, ties to even.
template <class T>
EK_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, half>)
    return __float2half_rn(x);
  else
    return x;
}

// Two 16-bit elements in a register, `low` in the lower half.
template <class T>
EK_DEVICE std::uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>, "the elements are bf16 or half");
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

// The sum over a whole warp, bitwise the same in every lane.
template <class T>
EK_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The largest, or the sum, over the four lanes that hold a row of a product.
EK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
EK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace ek
