// Row kernels: a group of threads works on one row at a time, in windows of 8 elements that are aligned in memory,
// whatever the row's length.
//
// Window boundaries are the multiples of 8 elements, counted from the tensor's start. A row that starts between two
// of them begins inside its first window, `shift` elements late; only its first and last window are loaded and
// stored element by element. The block's rows are a multiple of 8 rows apart, so that a thread meets the same columns
// in all of them: weights stay in registers, and the sums over rows that become weight gradients too.
//
// `Held` rows, of up to 5120 elements, have a window per thread, which stays in registers from pass to pass. Longer
// ones are read again in each pass, from the caches.
#pragma once
#include <type_traits>

#include "../launch.hpp"
#include "primitives.cuh"

namespace ek {
constexpr int kWindow = 8;
constexpr int kMaxThreads = 640;  // of a block, which leaves each 96 registers: blockDim.x on a row, blockDim.y rows
constexpr int kMaxWarps = kMaxThreads / 32;

// The columns of a row that this thread works on: its window i begins at column(i). `Aligned`: rows are multiples of
// 8 long.
template <bool Aligned>
struct Row {
  int width, shift;

  EK_DEVICE Row(long long start, int width) : width(width), shift(Aligned ? 0 : int(start % kWindow)) {}
  EK_DEVICE int column(int i) const { return (threadIdx.x + i * blockDim.x) * kWindow - shift; }
  EK_DEVICE bool whole(int i) const {
    return Aligned ? column(i) < width : column(i) >= 0 && column(i) + kWindow <= width;
  }
  EK_DEVICE bool has(int i, int e) const {
    return Aligned ? column(i) < width : unsigned(column(i) + e) < unsigned(width);
  }
  // Calls f(i) for each of this thread's windows; when held, for the first, which may be empty.
  template <bool Held, class F>
  EK_DEVICE void windows(F&& f) const {
    if constexpr (Held)
      f(0);
    else
      for (int i = 0; column(i) < width; ++i) f(i);
  }
};

// Eight neighbouring elements as they lie in memory.
template <class T>
struct alignas(16) Window {
  static constexpr int kVectors = sizeof(T) * kWindow / 16;
  T at[kWindow];
  EK_DEVICE float operator[](int e) const { return to_float(at[e]); }
};

template <class T>
EK_DEVICE void forget(Window<T>& x) {
#pragma unroll
  for (int k = 0; k < 4 * Window<T>::kVectors; ++k) forget(reinterpret_cast<std::uint32_t*>(x.at)[k]);
}

template <class T>
EK_DEVICE bool aligned_16(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// `row` points at column 0. Elements that the row does not have are zero.
template <class T, bool Aligned>
EK_DEVICE void load(Window<T>& x, const T* row, const Row<Aligned>& r, int i) {
  const T* from = row + r.column(i);
  const bool vector = r.whole(i) && (Aligned || aligned_16(from));
  uint4* to = reinterpret_cast<uint4*>(x.at);
#pragma unroll
  for (int k = 0; k < Window<T>::kVectors; ++k)
    to[k] = vector ? __ldg(reinterpret_cast<const uint4*>(from) + k) : uint4{0, 0, 0, 0};
  if (!Aligned && !vector) {
#pragma unroll
    for (int e = 0; e < kWindow; ++e)
      if (r.has(i, e)) x.at[e] = from[e];
  }
}

template <class T, bool Aligned>
EK_DEVICE void store(const Window<T>& x, T* row, const Row<Aligned>& r, int i) {
  T* to = row + r.column(i);
  if (r.whole(i) && (Aligned || aligned_16(to))) {
#pragma unroll
    for (int k = 0; k < Window<T>::kVectors; ++k)
      reinterpret_cast<uint4*>(to)[k] = reinterpret_cast<const uint4*>(x.at)[k];
  } else if (!Aligned) {
#pragma unroll
    for (int e = 0; e < kWindow; ++e)
      if (r.has(i, e)) to[e] = x.at[e];
  }
}

// One value per column, of a dtype known at run time, read as float; `otherwise` where there is none (null).
struct Columns {
  const void* values;
  Dtype dtype;
  float otherwise;

  template <bool Aligned>
  EK_DEVICE void operator()(float (&out)[kWindow], const Row<Aligned>& r, int i) const {
    if (!values) {
#pragma unroll
      for (int e = 0; e < kWindow; ++e) out[e] = otherwise;
    } else if (dtype == Dtype::float32) {
      read<float>(out, r, i);
    } else if (dtype == Dtype::bfloat16) {
      read<bf16>(out, r, i);
    } else {
      read<half>(out, r, i);
    }
  }

 private:
  template <class T, bool Aligned>
  EK_DEVICE void read(float (&out)[kWindow], const Row<Aligned>& r, int i) const {
    Window<T> x;
    load(x, static_cast<const T*>(values), r, i);
#pragma unroll
    for (int e = 0; e < kWindow; ++e) out[e] = x[e];
  }
};

// Columns that stay in registers from row to row, where the row is held.
template <bool Held, bool Aligned>
struct RowWeights {
  Columns columns;
  float held[kWindow];

  EK_DEVICE RowWeights(const Columns& columns, const Row<Aligned>& r) : columns(columns) {
    if constexpr (Held) columns(held, r, 0);
  }
  EK_DEVICE void operator()(float (&out)[kWindow], const Row<Aligned>& r, int i) const {
    if constexpr (Held) {
#pragma unroll
      for (int e = 0; e < kWindow; ++e) out[e] = held[e];
    } else {
      columns(out, r, i);
    }
  }
};

// Pairwise, as everything here is summed: it is as exact as PyTorch's own sums, and shorter than one after another.
EK_DEVICE float sum_of(const float (&x)[kWindow]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Sums of N values at once over the threads of a row; every thread gets them. All rows of a block sum together.
// Two buffers in turn: whoever writes one has passed the barrier after which nobody reads it any more.
template <int N>
struct RowSum {
  struct Storage {
    float at[2][kMaxWarps][N];
  };
  Storage& storage;
  int turn = 0;

  EK_DEVICE explicit RowSum(Storage& storage) : storage(storage) {}
  EK_DEVICE void operator()(float (&x)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
    const int warps = blockDim.x / 32;
    if (warps == 1) return;
    float(*mine)[N] = storage.at[turn] + threadIdx.y * warps;
    turn ^= 1;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) mine[threadIdx.x / 32][n] = x[n];
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = warp_sum(lane < warps ? mine[lane][n] : 0.0f);
  }
};

// 1 / sqrt(x), rounded: one Newton step after the GPU's approximation, whose error would show in every element of a row.
EK_DEVICE float inverse_root(float x) {
  const float y = rsqrtf(x);
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y);
}

// How many threads and rows a block of a kernel over `rows` rows of `width` elements takes, and the most blocks of it.
struct RowPlan {
  bool held, aligned;
  int threads, groups, blocks;
};
inline RowPlan row_plan(long long rows, int width, bool aligned, int multiprocessors, bool may_hold = true) {
  RowPlan plan;
  plan.aligned = aligned && width % kWindow == 0;
  const int windows = plan.aligned ? width / kWindow : (width + 2 * kWindow - 2) / kWindow;  // of the most shifted row
  plan.held = may_hold && windows <= kMaxThreads;
  plan.threads = !plan.held && windows > 512 ? 512 : (windows + 31) / 32 * 32;
  plan.groups = plan.held && plan.threads < 256 ? 256 / plan.threads : 1;  // else shared memory is one row's
  const int size = plan.threads * plan.groups;
  const long long most = (long long)multiprocessors * (size < 1024 ? 1024 / size : 1);
  const long long enough = (rows + plan.groups - 1) / plan.groups;
  plan.blocks = int(enough < most ? enough : (most + 7) / 8 * 8);
  return plan;
}

// Blocks last until all rows are done, so there are as many as the GPU has at once: one more would only begin when the
// others end. Where rows are not aligned, a multiple of 8.
template <class... P>
int row_blocks(const RowPlan& plan, int multiprocessors, void (*kernel)(P...), size_t shared) {
  int blocks = multiprocessors * resident_blocks(kernel, plan.threads * plan.groups, shared);
  if (!plan.aligned) blocks = blocks < 8 ? 8 : blocks / 8 * 8;
  return blocks < plan.blocks ? blocks : plan.blocks;
}

// Calls `go(Held, Aligned)` with the plan's choices as constants; there is one kernel for all rows that are not held.
template <class F>
Status with_plan(const RowPlan& plan, F&& go) {
  if (!plan.held) return go(std::false_type{}, std::false_type{});
  return plan.aligned ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
}
}  // namespace ek
