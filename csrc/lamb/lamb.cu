#include "lamb.hpp"

#include <algorithm>
#include <cstring>

#include "lamb.cuh"

namespace ek {
namespace {
int blocks(long long threads) { return int((threads + kLambThreads - 1) / kLambThreads); }

Status write_table(const Lamb& p, Stream stream) {
  const long long count = 7ll * p.tensors + 7ll * p.groups + 5ll * p.pieces;
  for (long long first = 0; first < count; first += kLambWords) {
    const int size = int(std::min<long long>(count - first, kLambWords));
    LambWords words;
    std::memcpy(words.at, p.words + first, size * sizeof(std::int64_t));
    if (Status s = launch(lamb_table_kernel, blocks(size), kLambThreads, 0, stream, words, p.table + first, size);
        !s.ok())
      return s;
  }
  return {};
}
}  // namespace

Status lamb_step(const Lamb& p, Stream stream) {
  if (Status s = write_table(p, stream); !s.ok()) return s;

  LambTable table{};
  table.tensors = reinterpret_cast<const LambTensor*>(p.table);
  table.groups = reinterpret_cast<const LambGroup*>(table.tensors + p.tensors);
  table.pieces = reinterpret_cast<const LambPiece*>(table.groups + p.groups);
  table.tensor_count = p.tensors, table.piece_count = p.pieces;
  table.rules = p.rules, table.partials = p.partials, table.factor = p.factor, table.found_inf = p.found_inf;

  // One block per chunk; nothing where there is none.
  const auto over = [&](int chunks, void (*kernel)(LambTable, int), int chunk) {
    return chunks ? launch(kernel, chunks, kLambThreads, sizeof(LambStorage), stream, table, chunk) : Status{};
  };
  const int chunks = p.bounds[p.batches];
  if (p.max_grad_norm > 0)
    if (Status s = over(chunks, lamb_norm_kernel, 0); !s.ok()) return s;
  if (Status s = launch(lamb_rule_kernel, 1 + blocks(p.tensors), kLambThreads, sizeof(LambStorage), stream, table,
                        chunks, p.correction, p.max_grad_norm, p.lrs, p.grad_scale, p.total);
      !s.ok())
    return s;
  if (Status s = over(p.bounds[0], lamb_moments_kernel<false>, 0); !s.ok()) return s;
  for (int i = 0; i < p.batches; ++i) {
    const int first = p.bounds[i], end = p.bounds[i + 1];
    if (Status s = over(end - first, lamb_moments_kernel<true>, first); !s.ok()) return s;
    if (Status s = over(end - first, lamb_weights_kernel, end); !s.ok()) return s;
  }
  return {};
}

}  // namespace ek
