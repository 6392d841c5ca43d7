// Token dropping: what the host functions take. Copies know bytes alone: sizes and strides are in bytes, and elements
// of any dtype are moved by the largest unit that addresses and sizes allow.
#pragma once
#include <cstdint>

#include "../common/kept_ids.hpp"
#include "../launch.hpp"

namespace ek {

struct SampleKeptTokens {
  std::int16_t* kept;             // (batch, keep), ascending in each row
  const std::int64_t* offset_at;  // added to `offset`, read by the kernel; may be null
  std::int64_t offset;            // global index of the first sample
  std::uint64_t seed;
  long long batch;
  int patches, keep;
};

// Where a kept id occurs twice in a row, the gradient is that of its last place.
//
// gather_tokens           to (batch, prefix + kept, row) = tokens of `from` (batch, tokens, row)
// gather_tokens_backward  to (batch, tokens, row) = rows of `from` (batch, prefix + kept, row), or zero
struct GatherTokens {
  const void* from;
  void* to;                              // contiguous
  long long batch_stride, token_stride;  // of `from`
  KeptIds kept;
  long long batch;
  int prefix, tokens, row;
};

// Images are (batch, channels, grid_rows * rows, grid_columns * columns), patches (batch, kept, channels * rows *
// columns).
// patchify           to = the kept patches of `from`, images
// patchify_backward  to = images, made of the patches `from` and zeros
struct Patchify {
  const void* from;
  void* to;              // contiguous
  long long strides[3];  // of `from`: images' batch, channel and row; or patches' batch and patch
  KeptIds kept;
  long long batch;
  int channels, grid_rows, grid_columns, rows;
  int columns;  // bytes of a patch's row
};

Status sample_kept_tokens(const SampleKeptTokens&, Stream);
Status gather_tokens(const GatherTokens&, Stream);
Status gather_tokens_backward(const GatherTokens&, Stream);
Status patchify(const Patchify&, Stream);
Status patchify_backward(const Patchify&, Stream);

}  // namespace ek
