// Runs CUDA C++ kernels on a CPU, for tests: what kernels see of the emulator. csrc/ includes this file in place of the
// CUDA runtime when it is compiled with g++ -DEVAKERNELS_EMULATED.
//
// Every GPU thread is a fiber; a block stays on one OS thread. Emulated: thread indices, shared memory (NaN at the
// start of a block), __syncthreads, __syncwarp, shuffles and votes with any mask, atomics, fences, ldmatrix, mma,
// cp.async and the scalar intrinsics below. float, bf16 and half arithmetic is the host's.
//
// Environment, read at each launch:
//   EMU_SEED     the order in which threads run: seed % 4 = 0 ascending, 1 descending (blocks too), 2 and 3 random
//   EMU_THREADS  OS threads, default 2; with 1, the same seed repeats the same order
//
// Not emulated, so neither seen: weak memory ordering, the approximation errors of device functions, the order in which
// tensor cores add, registers, speed, and the PTX text itself. A kernel that spins on memory hangs. Static __shared__,
// named barriers, cooperative groups, clusters, and device-only functions of cuda_fp16.h and cuda_bf16.h (__hfma2) do
// not compile. checks.cpp says what the checked build reports.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly; it runs on no other architecture"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#undef __shared__
#define __shared__ _Pragma("GCC error \"shared memory is had through ek::shared_storage<Storage>()\"")
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emu {

struct Where {
  const char* file;
  int line;
};
// The last two parameters of a function: where it is called.
#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_HERE \
  ::emu::Where { file, line }

// --- scheduler.cpp ---------------------------------------------------------------------------------------------------
uint3 thread_index();
uint3 block_index();
dim3 block_shape();
dim3 grid_shape();
unsigned lane_index();
void* dynamic_shared();
void barrier(Where);
void fence();
// Joins a warp collective. The last lane of `mask` to arrive gets the lanes' arguments and must call release(); every
// other lane blocks until then and gets nullptr.
void** arrive(unsigned mask, const char* op, void* args, Where);
void release(unsigned mask);
void order_warp(unsigned mask);  // a __syncwarp() orders memory accesses of the warp
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// *p = update(*p, operand), atomically, on the bits of 4 or 8 bytes; returns the old bits.
using Update = std::uint64_t (*)(std::uint64_t old, std::uint64_t operand);
std::uint64_t atomic(void* p, unsigned bytes, Update update, std::uint64_t operand);
void run(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* args,
         std::size_t args_bytes);

// --- ampere.cpp ------------------------------------------------------------------------------------------------------
void cp_async_issue(void* dst, const void* src, int bytes);
void cp_async_commit();
void cp_async_wait(int keep);
void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, bool bf16);
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b, bool bf16);

// --- templates -------------------------------------------------------------------------------------------------------
template <class... P, class... A>
inline void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>{static_cast<P>(args)...}};
  auto body = [](void* p) {
    auto& c = *static_cast<Call*>(p);
    std::apply(c.kernel, c.args);
  };
  run(reinterpret_cast<const void*>(kernel), grid, block, shared, body, &call, sizeof call);
}

template <class To, class From>
inline To bits(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(from) < sizeof(to) ? sizeof(from) : sizeof(to));
  return to;
}
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }  // .ftz

template <class Lane, class Op>
inline void collective(unsigned mask, const char* name, Lane& mine, Where where, Op op) {
  if (void** lanes = arrive(mask, name, &mine, where)) {
    op(reinterpret_cast<Lane**>(lanes));
    release(mask);
  }
}

template <class T>
struct Shuffled {
  T in, out;
  unsigned source;
};
// `source` maps a lane, its position in its group of `width` lanes and `width` to the lane it reads.
template <class T, class Source>
inline T shuffle(unsigned mask, T value, int width, const char* name, Where where, Source source) {
  static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s (%s:%d): width %d is no power of two up to 32", name, where.file, where.line, width);
  const unsigned lane = lane_index();
  Shuffled<T> mine{value, value, unsigned(source(lane, lane & (width - 1u), unsigned(width)))};
  collective(mask, name, mine, where, [mask](Shuffled<T>** lanes) {
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      const unsigned s = lanes[i]->source;
      if (!(mask >> s & 1)) fail("lane %u shuffles from lane %u, which is not in mask %08x", i, s, mask);
      lanes[i]->out = lanes[s]->in;
    }
  });
  return mine.out;
}

// An atomic operation on a T, with `Op::of(old, operand)`.
template <class Op, class T>
inline T atomic_update(T* p, T operand) {
  auto update = [](std::uint64_t a, std::uint64_t b) { return bits<std::uint64_t>(Op::of(bits<T>(a), bits<T>(b))); };
  return bits<T>(atomic(p, sizeof(T), Update(update), bits<std::uint64_t>(operand)));
}
struct Add {
  template <class T>
  static T of(T a, T b) { return a + b; }
};
struct Max {
  template <class T>
  static T of(T a, T b) { return a < b ? b : a; }
};
struct Min {
  template <class T>
  static T of(T a, T b) { return b < a ? b : a; }
};
struct Exchange {
  template <class T>
  static T of(T, T b) { return b; }
};
struct Increment {  // and back to 0 after `b`
  static unsigned of(unsigned a, unsigned b) { return a >= b ? 0 : a + 1; }
};

}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_shape())
#define gridDim (::emu::grid_shape())
#define warpSize 32

// --- barriers, votes and shuffles ------------------------------------------------------------------------------------
inline void __syncthreads(EMU_WHERE) { emu::barrier(EMU_HERE); }
inline void __syncwarp(unsigned mask = ~0u, EMU_WHERE) {
  char none = 0;
  emu::collective(mask, "__syncwarp", none, EMU_HERE, [mask](char**) { emu::order_warp(mask); });
}
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, width, "__shfl_sync", EMU_HERE,
                      [=](unsigned lane, unsigned at, unsigned n) { return lane - at + (unsigned(source) & (n - 1)); });
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, width, "__shfl_xor_sync", EMU_HERE, [=](unsigned lane, unsigned at, unsigned n) {
    const unsigned source = lane ^ unsigned(x);
    return source < lane - at + n && source < 32 ? source : lane;
  });
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, width, "__shfl_down_sync", EMU_HERE,
                      [=](unsigned lane, unsigned at, unsigned n) { return at + d < n ? lane + d : lane; });
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, width, "__shfl_up_sync", EMU_HERE,
                      [=](unsigned lane, unsigned at, unsigned) { return at >= d ? lane - d : lane; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_WHERE) {
  emu::Shuffled<unsigned> mine{predicate != 0, 0, 0};
  emu::collective(mask, "__ballot_sync", mine, EMU_HERE, [mask](emu::Shuffled<unsigned>** lanes) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) votes |= lanes[i]->in << i;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes[i]->out = votes;
  });
  return mine.out;
}
inline int __any_sync(unsigned m, int p, EMU_WHERE) { return __ballot_sync(m, p, file, line) != 0; }
inline int __all_sync(unsigned m, int p, EMU_WHERE) { return __ballot_sync(m, p, file, line) == m; }

// --- atomics on global and shared memory: int, unsigned, unsigned long long, float, double ---------------------------
template <class T>
inline T atomicAdd(T* p, std::common_type_t<T> v) {
  return emu::atomic_update<emu::Add>(p, v);
}
template <class T>
inline T atomicMax(T* p, std::common_type_t<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has atomicMax of integers alone");
  return emu::atomic_update<emu::Max>(p, v);
}
template <class T>
inline T atomicMin(T* p, std::common_type_t<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has atomicMin of integers alone");
  return emu::atomic_update<emu::Min>(p, v);
}
template <class T>
inline T atomicExch(T* p, std::common_type_t<T> v) {
  return emu::atomic_update<emu::Exchange>(p, v);
}
inline unsigned atomicInc(unsigned* p, unsigned last) { return emu::atomic_update<emu::Increment>(p, last); }

// --- loads and stores with cache hints -------------------------------------------------------------------------------
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcg(T* p, std::common_type_t<T> v) {
  *p = v;
}
template <class T>
inline void __stcs(T* p, std::common_type_t<T> v) {
  *p = v;
}

// --- scalar functions ------------------------------------------------------------------------------------------------
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((std::uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
