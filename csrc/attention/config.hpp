// What is chosen per head dimension and length, and why.
//
// A multiprocessor has 64 Ki registers in four parts, so what a kernel may use per thread depends on how many warps a
// part is to hold: 255 for 2 (8 warps in all), 168 for 3 (12 warps), 128 for 4 (16 warps).
#pragma once
#include <algorithm>
#include <cstddef>

#include "../launch.hpp"

namespace ek {
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kMaxHeads = 4;       // of one block
constexpr int kStreamedKeys = 64;  // of a stage, where keys do not stay in shared memory; a power of 2

template <int D>
struct ForwardConfig {
  // Blocks of 16 queries that a warp takes at a time. Two share each load of keys and values, which halves what is read
  // from shared memory; beyond D = 64 their outputs and queries alone would take 3/2 D registers, 108 and more.
  static constexpr int kTiles = D <= 64 ? 2 : 1;
  // Keys between two looks at the maximum of a row. More cost registers, 8 for 16 keys, times kTiles; at D = 128 all
  // are taken.
  static constexpr int kStep = D < 128 ? 32 : 16;
  // Outputs and queries take 3/4 D registers for 16 rows; 128 in all suffice for D = 72, and 168 always.
  static constexpr int kWarps = kTiles == 1 && D <= 72 ? 16 : 12;
};

// How a forward kernel is launched.
struct ForwardPlan {
  int warps;         // of a head in a block
  int heads;         // of a block
  int staged;        // keys that lie in shared memory at a time: all, or those of one of two stages
  int query_blocks;  // blocks that share a head
  std::size_t shared;
};

template <int D>
constexpr ForwardPlan forward_plan(int tokens, int heads, int shared_memory) {
  using Config = ForwardConfig<D>;
  const int row = 2 * D, queries = 16 * Config::kTiles;
  const int padded = ceil_div(tokens, 16) * 16, units = ceil_div(tokens, queries);
  ForwardPlan best{};
  int most = 0, busy = 0;
  // All keys in shared memory: of the numbers of warps, the one that has most units of queries in progress on a
  // multiprocessor, in several blocks rather than in one, so that one loads while another computes.
  for (int warps = 1; warps <= std::min(units, Config::kWarps); ++warps) {
    const int shared = (2 * padded + warps * queries) * row;
    if (shared > shared_memory) break;
    const int blocks = std::min((shared_memory + 1024) / (shared + 1024), Config::kWarps / warps);
    const int progress = blocks * units * 64 / ceil_div(units, warps);  // in 64ths of a unit at a time
    if (progress > most) most = progress, busy = blocks * warps, best = {warps, 1, padded, 1, std::size_t(shared)};
  }
  // Where that leaves room for less than half of the warps, keys pass through two stages, and blocks share a head.
  if (busy < std::min(units, Config::kWarps / 2)) {
    const int room = (shared_memory / row - 4 * kStreamedKeys) / queries;
    best.query_blocks = ceil_div(units, std::min(room, Config::kWarps)), best.staged = kStreamedKeys, best.heads = 1;
    best.warps = ceil_div(units, best.query_blocks);
    best.shared = std::size_t(4 * kStreamedKeys + best.warps * queries) * row;
  } else if (best.warps == units && units < kMaxHeads) {
    best.heads = std::min({heads, kMaxHeads / units, shared_memory / int(best.shared)}), best.shared *= best.heads;
  }
  return best;
}

constexpr int kQueries = 32;  // of a stage of the backward kernel by keys

template <int D>
struct BackwardConfig {
  // D registers hold the dk and dv of a warp's 16 keys, and about 60 more what is made of a tile.
  static constexpr int kWarps = D <= 64 ? 16 : D <= 112 ? 12 : 8;
  // Of the product for dq, sums that do not wait for each other: two, where registers hold them.
  static constexpr int kSums = (kWarps == 16 ? 128 : kWarps == 12 ? 168 : 255) - D > 80 ? 2 : 1;
};

// How the backward kernels are launched.
struct BackwardPlan {
  int warps;        // of a head in a block
  int heads;        // of a block
  int passes;       // over the keys
  bool whole;       // one block makes all passes, and dq; else a block makes one, and a second kernel makes dq
  int head_bytes;
};

template <int D>
constexpr BackwardPlan backward_plan(int tokens, int heads, int shared_memory) {
  const int row = 2 * D, blocks = ceil_div(tokens, 16), all = ceil_div(tokens, kQueries) * kQueries;
  // Fewest passes first: each streams the queries and dout again, though not from far, and has barriers of its own.
  // Five would cost more than the two products of seven that a second kernel makes again.
  for (bool whole : {true, false})
    for (int passes = 1; passes <= (whole ? 4 : blocks); ++passes) {
      const int warps = ceil_div(blocks, passes);
      const int for_dq = whole ? warps * 16 * 2 * kQueries + (passes > 1 ? all * 2 * row : 0) : 0;
      const int bytes = 2 * 4 * all + (2 * 16 * warps + 4 * kQueries) * row + for_dq;
      if (warps > BackwardConfig<D>::kWarps || bytes > shared_memory) continue;
      const bool alone = !whole || passes > 1 || warps >= kMaxHeads;
      const int together = alone ? 1 : std::min({heads, kMaxHeads / warps, shared_memory / bytes});
      return {warps, together, ceil_div(blocks, warps), whole, bytes};
    }
  return {};
}

constexpr int kBackwardQueryWarps = 12;  // 168 registers hold 16 queries' dq, of D / 2, and what is made of a tile

struct QueryPlan {
  int warps, blocks;  // of a head
  std::size_t shared;
};

template <int D>
constexpr QueryPlan backward_query_plan(int tokens, int shared_memory) {
  const int row = 2 * D, stages = 4 * kStreamedKeys * row, warp = 32 * row + 32 * 4, units = ceil_div(tokens, 16);
  QueryPlan plan{};
  const int room = std::min((shared_memory - stages) / warp, kBackwardQueryWarps);
  if (room < 1) return plan;
  plan.blocks = ceil_div(units, room), plan.warps = ceil_div(units, plan.blocks);
  plan.shared = std::size_t(stages + plan.warps * warp);
  return plan;
}
}  // namespace ek
