// What host functions share: a status, a stream, the codes of element types, and launch().
//
// Three compilers read this file. nvcc sees a launch on the GPU; g++ with EVAKERNELS_EMULATED sees a launch on the CPU
// (tests/emulator); any other compiler, of bindings, sees the types alone and needs no CUDA header.
#pragma once

#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#elif defined(EVAKERNELS_EMULATED)
#include "cuda_on_cpu.hpp"
#endif

struct CUstream_st;

namespace ek {

using Stream = CUstream_st*;  // cudaStream_t

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };  // evakernels/native.py has the same codes

// What a host function returns: 0, a cudaError_t, or -1 where it refuses its arguments; and why, in a sentence.
struct [[nodiscard]] Status {
  int code = 0;
  std::string sentence;
  bool ok() const { return code == 0; }
};

#if defined(__CUDACC__)

// Lets a kernel have `shared` bytes of dynamic shared memory, of which it has 48 KiB unasked. What it was let have once
// it keeps: a captured launch may still want it, and the occupancy of the same launch is always the same.
inline cudaError_t allow(const void* function, std::size_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  cudaFuncAttributes now{};
  if (const cudaError_t error = cudaFuncGetAttributes(&now, function); error != cudaSuccess) return error;
  if (now.maxDynamicSharedSizeBytes >= static_cast<int>(shared)) return cudaSuccess;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

// How many blocks of a kernel a multiprocessor has at once.
template <class... P>
int resident_blocks(void (*kernel)(P...), int threads, std::size_t shared) {
  int blocks = 0;
  const void* function = reinterpret_cast<const void*>(kernel);
  // 0 blocks have more shared memory than the kernel may.
  if (allow(function, shared) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared) != cudaSuccess)
    cudaGetLastError();  // launch() says what is wrong
  return blocks > 0 ? blocks : 1;
}

// Launches `kernel` with `shared` bytes of dynamic shared memory; arguments are converted to the kernel's parameters.
template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Stream stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument per parameter of the kernel");
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow(function, shared);
  if (error == cudaSuccess) {
    // Not <<<>>> and cudaGetLastError(), which would report what an earlier call of someone else left behind.
    std::tuple<P...> values{static_cast<P>(args)...};
    void* addresses[sizeof...(P) + 1];
    std::apply([&](auto&... value) { int i = 0; ((addresses[i++] = &value), ...); }, values);
    error = cudaLaunchKernel(function, grid, block, addresses, shared, stream);
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error is returned; it must not be found again
  return {static_cast<int>(error), std::string("the CUDA kernel was not launched: ") + cudaGetErrorString(error)};
}

#elif defined(EVAKERNELS_EMULATED)

template <class... P>
int resident_blocks(void (*)(P...), int threads, std::size_t) {
  return 1024 / threads;
}

// Runs the kernel to its end. Throws std::runtime_error where a GPU would fail, or would compute by luck.
template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument per parameter of the kernel");
  emu::launch(kernel, grid, block, shared, static_cast<A&&>(args)...);
  return {};
}

#endif

}  // namespace ek
