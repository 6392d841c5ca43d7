// Sums over rows, two stages and no atomics: registers over a block's rows, one partial row per block in memory, then
// the partial rows. The order is fixed by the launch, so that results repeat bit for bit.
#pragma once
#include "rows.cuh"

namespace ek {
// Where the sums go: `count` vectors of `width` values each; partial is (blocks, count, width).
struct ColumnSums {
  static constexpr int kMost = 3;
  float* partial;
  void* out[kMost];  // null: not wanted
  Dtype dtype[kMost];
  int count;
};

// The sums over this block's rows of one value per column. Held rows: in the registers of the threads that own the
// columns. Longer ones: in shared memory, each element still touched by one thread alone.
template <bool Held, bool Aligned>
struct ColumnSum {
  Window<float> sum{};
  float* shared;  // (width,) floats; needed where the row is not held or the block has several groups

  EK_DEVICE ColumnSum(float* shared, const Row<Aligned>& r) : shared(shared) {
    if constexpr (!Held) r.template windows<false>([&](int i) { each(r, i, [&](int, float& x) { x = 0; }); });
  }
  EK_DEVICE void add(const float (&x)[kWindow], const Row<Aligned>& r, int i) {
    if constexpr (Held) {
#pragma unroll
      for (int e = 0; e < kWindow; ++e) sum.at[e] += x[e];
    } else {
      each(r, i, [&](int e, float& to) { to += x[e]; });
    }
  }
  EK_DEVICE void add(int e, float x, const Row<Aligned>& r, int i) {
    if constexpr (Held)
      sum.at[e] += x;
    else if (r.has(i, e))
      shared[r.column(i) + e] += x;
  }
  // Adds up the block's groups and stores the block's partial row; all threads of the block call it.
  EK_DEVICE void finish(float* partial, const Row<Aligned>& r) {
    if (Held && blockDim.y == 1) return store(sum, partial, r, 0);
    if constexpr (Held)
      for (int group = 0; group < int(blockDim.y); ++group) {
        if (int(threadIdx.y) == group) each(r, 0, [&](int e, float& to) { to = (group ? to : 0.0f) + sum.at[e]; });
        __syncthreads();
      }
    else
      __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int c = thread; c < r.width; c += blockDim.x * blockDim.y) partial[c] = shared[c];
    __syncthreads();  // another sum may follow in the same memory
  }
  static size_t shared_bytes(const RowPlan& plan, int width) {
    return plan.held && plan.groups == 1 ? 0 : width * sizeof(float);
  }

 private:
  template <class F>
  EK_DEVICE void each(const Row<Aligned>& r, int i, F&& f) {
#pragma unroll
    for (int e = 0; e < kWindow; ++e)
      if (r.has(i, e)) f(e, shared[r.column(i) + e]);
  }
};

struct PartialStorage {
  static constexpr int kLanes = 16;
  float at[kLanes][33];
};

// Grid (columns / 32, count), block (32, 16): out[k][c] = sum of partial[b][k][c] over b.
template <int kLanes = PartialStorage::kLanes>
__global__ void __launch_bounds__(32 * kLanes) sum_partials_kernel(const ColumnSums sums, int blocks, int width) {
  auto& shared = shared_storage<PartialStorage>().at;
  const int column = blockIdx.x * 32 + threadIdx.x, k = blockIdx.y;
  // Chosen, not indexed: an index known at run time would put the parameters on the stack.
  void* const out = k == 0 ? sums.out[0] : k == 1 ? sums.out[1] : sums.out[2];
  const Dtype dtype = k == 0 ? sums.dtype[0] : k == 1 ? sums.dtype[1] : sums.dtype[2];
  if (!out) return;
  float sum = 0;
  if (column < width)
    for (long long b = threadIdx.y; b < blocks; b += kLanes)
      sum += sums.partial[(b * sums.count + k) * width + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) sum += shared[i][threadIdx.x];
  if (dtype == Dtype::float32)
    static_cast<float*>(out)[column] = sum;
  else if (dtype == Dtype::bfloat16)
    static_cast<bf16*>(out)[column] = from_float<bf16>(sum);
  else
    static_cast<half*>(out)[column] = from_float<half>(sum);
}

inline Status sum_partials(const ColumnSums& sums, int blocks, int width, Stream stream) {
  return launch(sum_partials_kernel<>, dim3((width + 31) / 32, sums.count), dim3(32, PartialStorage::kLanes),
                sizeof(PartialStorage), stream, sums, blocks, width);
}
}  // namespace ek
