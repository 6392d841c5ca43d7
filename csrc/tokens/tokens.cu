// Picks and launches the kernels of token dropping.
#include "tokens.hpp"

#include "rows.cuh"
#include "sample.cuh"

namespace ek {
namespace {

constexpr long long kMost = 0x7fffffff;

// Calls `go(Unit)` with the largest unit, up to 16 bytes, that divides all addresses, strides and sizes or-ed together.
template <class F>
Status with_unit(unsigned long long bits, F&& go) {
  if (bits % 16 == 0) return go(uint4{});
  if (bits % 8 == 0) return go(uint2{});
  if (bits % 4 == 0) return go(std::uint32_t{});
  if (bits % 2 == 0) return go(std::uint16_t{});
  return go(std::uint8_t{});
}

unsigned long long address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// As many threads along a row as it has units, a power of two up to `most`; the rest of the block lies beside them.
dim3 copy_block(long long units, unsigned most) {
  unsigned lanes = 1;
  while (lanes < most && lanes < units) lanes *= 2;
  return dim3(lanes, kCopyThreads / lanes);
}

// Splits `total` into equal pieces of at most `most`: how many each one has.
int split(int total, int most) {
  const int pieces = (total + most - 1) / most;
  return (total + pieces - 1) / pieces;
}

long long patches(const Patchify& p) { return (long long)p.grid_rows * p.grid_columns; }

Status too_large(const char* function) {
  return {-1, std::string(function) + ": more than 2^31 - 1 rows, or 2^30 bytes in a row, are too many"};
}

}  // namespace

Status sample_kept_tokens(const SampleKeptTokens& p, Stream stream) {
  if (p.batch == 0) return {};
  if (p.batch > kMost) return too_large("sample_kept_tokens");
  const int threads = min((p.patches + 127) / 128 * 32, kSampleThreads);
  return launch(sample_kept_tokens_kernel, dim3(unsigned(p.batch)), dim3(threads), sizeof(SampleStorage), stream, p);
}

Status gather_tokens(const GatherTokens& p, Stream stream) {
  const long long rows = p.batch * (p.prefix + p.kept.count);
  if (rows == 0 || p.row == 0) return {};
  if (rows > kMost || p.row > kMost / 2) return too_large("gather_tokens");
  return with_unit(address(p.from) | address(p.to) | p.batch_stride | p.token_stride | p.row, [&](auto unit) {
    const dim3 block = copy_block(p.row / sizeof(unit), 32);
    const dim3 grid(unsigned((rows + block.y - 1) / block.y));
    return launch(gather_tokens_kernel<decltype(unit)>, grid, block, 0, stream, p);
  });
}

Status gather_tokens_backward(const GatherTokens& p, Stream stream) {
  if (p.batch == 0 || p.tokens == 0 || p.row == 0) return {};
  const int each = split(p.tokens, 64);
  const long long blocks = p.batch * ((p.tokens + each - 1) / each);
  if (blocks > kMost || p.row > kMost / 2) return too_large("gather_tokens_backward");
  return with_unit(address(p.from) | address(p.to) | p.batch_stride | p.token_stride | p.row, [&](auto unit) {
    return launch(gather_tokens_backward_kernel<decltype(unit)>, dim3(unsigned(blocks)),
                  copy_block(p.row / sizeof(unit), 32), sizeof(Sources), stream, p, each);
  });
}

Status patchify(const Patchify& p, Stream stream) {
  const long long rows = p.batch * p.kept.count, bytes = (long long)p.channels * p.rows * p.columns;
  if (rows == 0 || bytes == 0) return {};
  if (rows > kMost || bytes > kMost / 2 || patches(p) > kMost) return too_large("patchify");
  const auto strides = p.strides[0] | p.strides[1] | p.strides[2];
  return with_unit(address(p.from) | address(p.to) | strides | p.columns, [&](auto unit) {
    const dim3 block = copy_block(bytes / sizeof(unit), 32);
    const dim3 grid(unsigned((rows + block.y - 1) / block.y));
    return launch(patchify_kernel<decltype(unit)>, grid, block, 0, stream, p);
  });
}

Status patchify_backward(const Patchify& p, Stream stream) {
  const long long grid_rows = p.batch * p.grid_rows, bytes = (long long)p.channels * p.rows * p.columns;
  if (grid_rows == 0 || p.grid_columns == 0 || bytes == 0) return {};
  const int each = split(p.grid_columns, kMostSources);
  const long long blocks = grid_rows * ((p.grid_columns + each - 1) / each);
  if (blocks > kMost || bytes > kMost / 2 || patches(p) > kMost) return too_large("patchify_backward");
  return with_unit(address(p.from) | address(p.to) | p.strides[0] | p.strides[1] | p.columns, [&](auto unit) {
    const dim3 block = copy_block((long long)each * p.columns / sizeof(unit), kCopyThreads);
    return launch(patchify_backward_kernel<decltype(unit)>, dim3(unsigned(blocks)), block, sizeof(Sources), stream, p,
                  each);
  });
}

}  // namespace ek
