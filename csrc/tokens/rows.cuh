// Copies of rows and patches, by a unit of 1 to 16 bytes; each byte of the destination is written once.
#pragma once
#include "../common/kept_ids.cuh"
#include "tokens.hpp"

namespace ek {

constexpr int kCopyThreads = 256;
constexpr int kInFlight = 4;       // loads of a thread before its first store
constexpr int kMostSources = 256;  // tokens, or patches of a grid row, whose gradient one block writes

template <class Unit>
EK_DEVICE const Unit* at_byte(const void* p, long long offset) {
  return reinterpret_cast<const Unit*>(static_cast<const char*>(p) + offset);
}

// `units` consecutive units by the threads of a row of the block; zeros where `from` is null.
template <class Unit>
EK_DEVICE void copy_row(Unit* __restrict__ to, const Unit* __restrict__ from, int units) {
  const int lanes = blockDim.x;
  for (int start = threadIdx.x; start < units; start += kInFlight * lanes) {
    Unit unit[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (from && start + k * lanes < units) unit[k] = from[start + k * lanes];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (start + k * lanes < units) to[start + k * lanes] = unit[k];
  }
}

// Forward: a row of the block per row of the output.
template <class Unit>
__global__ void __launch_bounds__(kCopyThreads) gather_tokens_kernel(const GatherTokens p) {
  const unsigned rows = p.prefix + p.kept.count;
  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned sample = row / rows;
  const int place = row % rows, units = p.row / sizeof(Unit);
  if (sample >= p.batch) return;
  long long token = place;
  if (place >= p.prefix)
    token = p.prefix + read_id(p.kept, sample * (long long)p.kept.count + place - p.prefix, p.tokens - p.prefix);
  copy_row(static_cast<Unit*>(p.to) + row * (long long)units,
           at_byte<Unit>(p.from, sample * p.batch_stride + token * p.token_stride), units);
}

// Backward: the row in which the gradient of a token or patch lies, -1 for a dropped one.
struct Sources {
  int row[kMostSources];
};

// Fills in `count` of them from `first` on. The first `prefix` tokens are always kept.
EK_DEVICE void find_sources(Sources& sources, const KeptIds& kept, long long sample, int patches, int first, int count,
                            int prefix) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < count; i += kCopyThreads) sources.row[i] = first + i < prefix ? first + i : -1;
  __syncthreads();
  for (int k = thread; k < kept.count; k += kCopyThreads) {
    const long long i = prefix + read_id(kept, sample * kept.count + k, patches) - first;
    if (0 <= i && i < count) atomicMax(&sources.row[i], prefix + k);
  }
  __syncthreads();
}

// A block writes the gradient of `each` tokens of a sample.
template <class Unit>
__global__ void __launch_bounds__(kCopyThreads) gather_tokens_backward_kernel(const GatherTokens p, int each) {
  Sources& sources = shared_storage<Sources>();
  const int pieces = (p.tokens + each - 1) / each;
  const long long sample = blockIdx.x / pieces;
  const int first = blockIdx.x % pieces * each, count = min(each, p.tokens - first);
  find_sources(sources, p.kept, sample, p.tokens - p.prefix, first, count, p.prefix);
  const int units = p.row / sizeof(Unit);
  for (int i = threadIdx.y; i < count; i += blockDim.y) {
    const int row = sources.row[i];
    const Unit* from = row < 0 ? nullptr : at_byte<Unit>(p.from, sample * p.batch_stride + row * p.token_stride);
    copy_row(static_cast<Unit*>(p.to) + (sample * p.tokens + first + i) * units, from, units);
  }
}

// Forward: a row of the block per patch. The output is written in order; `channel`, `row` and `column` (in units) of
// the image count along as the digits of a number, which is cheaper than to divide.
template <class Unit>
__global__ void __launch_bounds__(kCopyThreads) patchify_kernel(const Patchify p) {
  const unsigned index = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned sample = index / p.kept.count;
  if (sample >= p.batch) return;
  const int id = read_id(p.kept, index, p.grid_rows * p.grid_columns);
  const Unit* from = at_byte<Unit>(p.from, sample * p.strides[0] + id / p.grid_columns * p.rows * p.strides[2] +
                                               id % p.grid_columns * (long long)p.columns);
  const int columns = p.columns / sizeof(Unit), units = p.channels * p.rows * columns, lanes = blockDim.x;
  Unit* to = static_cast<Unit*>(p.to) + index * (long long)units;

  const int step_column = lanes % columns, step_row = lanes / columns % p.rows, step_channel = lanes / columns / p.rows;
  const int lane = threadIdx.x;
  int column = lane % columns, row = lane / columns % p.rows, channel = lane / columns / p.rows;
  for (int start = lane; start < units; start += kInFlight * lanes) {
    Unit unit[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (start + k * lanes < units) unit[k] = at_byte<Unit>(from, channel * p.strides[1] + row * p.strides[2])[column];
      column += step_column, row += step_row, channel += step_channel;
      if (column >= columns) column -= columns, ++row;
      if (row >= p.rows) row -= p.rows, ++channel;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (start + k * lanes < units) to[start + k * lanes] = unit[k];
  }
}

// A block writes the pixels of up to `each` neighbouring patches of a grid row, image row by image row; blockIdx.x
// counts (sample, grid row, piece of it). A thread stays in its column, so that it has one source.
template <class Unit>
__global__ void __launch_bounds__(kCopyThreads) patchify_backward_kernel(const Patchify p, int each) {
  Sources& sources = shared_storage<Sources>();
  const int pieces = (p.grid_columns + each - 1) / each;
  const int first = blockIdx.x % pieces * each, count = min(each, p.grid_columns - first);
  const int grid_row = blockIdx.x / pieces % p.grid_rows;
  const long long sample = blockIdx.x / pieces / p.grid_rows;
  const int first_id = grid_row * p.grid_columns + first;
  const bool all = p.kept.type == IdType::all;
  if (!all) find_sources(sources, p.kept, sample, p.grid_rows * p.grid_columns, first_id, count, 0);

  const int columns = p.columns / sizeof(Unit), width = p.grid_columns * columns, height = p.grid_rows * p.rows;
  for (int x = threadIdx.x; x < count * columns; x += blockDim.x) {
    const int patch = x / columns, source = all ? first_id + patch : sources.row[patch];
    const Unit* from = at_byte<Unit>(p.from, sample * p.strides[0] + source * p.strides[1]) + x % columns;
    for (int channel = 0; channel < p.channels; ++channel) {
      Unit* to = static_cast<Unit*>(p.to) + ((sample * p.channels + channel) * height + grid_row * p.rows) * width +
                 first * columns + x;
      for (int start = threadIdx.y; start < p.rows; start += kInFlight * blockDim.y) {
        Unit unit[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int row = start + k * blockDim.y;
          if (source >= 0 && row < p.rows) unit[k] = from[(channel * p.rows + row) * columns];
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int row = start + k * blockDim.y;
          if (row < p.rows) to[row * (long long)width] = unit[k];
        }
      }
    }
  }
}

}  // namespace ek
