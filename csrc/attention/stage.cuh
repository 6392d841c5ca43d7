// Rows of a head on their way from global to shared memory.
#pragma once
#include "../common/rope.cuh"
#include "mask.cuh"

namespace ek {
struct alignas(128) SharedBytes {
  unsigned char at[128];
};

// The head that this row of threads of the block works on. Blocks are (threads of a head, heads), grids (blocks of
// heads, samples, blocks that share a head).
struct Place {
  int first_sample, heads;
  // The same in all lanes, and by way of a shuffle the compiler knows it: what depends on it does not diverge.
  int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0);

  // Functions, so that none of them has to be held in a register.
  EK_DEVICE int lane() const { return threadIdx.x % 32; }
  EK_DEVICE int sample() const { return first_sample + blockIdx.y; }
  EK_DEVICE int head() const { return blockIdx.x * blockDim.y + threadIdx.y; }
  EK_DEVICE int threads() const { return blockDim.x; }
  EK_DEVICE int warps() const { return blockDim.x / 32; }
  EK_DEVICE bool live() const { return head() < heads; }  // else its threads only meet the others at barriers

  template <class T>
  EK_DEVICE T* row(const Heads& x, int token) const {
    return static_cast<T*>(x.data) + anew(sample()) * x.batch + anew(head()) * x.head + token * x.token;
  }
  // The index of a token in (batch, heads, tokens).
  EK_DEVICE long long index(int token, int tokens) const {
    return ((long long)anew(sample()) * heads + anew(head())) * tokens + token;
  }
  // How many of `rows` tokens from `first` on exist.
  EK_DEVICE int exist(int first, int rows, int tokens) const { return live() ? max(0, min(tokens - first, rows)) : 0; }
};

// Keys, turned, and values: all that a head has, or one of two stages of it.
template <class T, int D>
struct StagedKeys {
  const Heads &k, &v;
  const Rope& rope;
  const Place& place;
  int tokens;
  int staged, next;  // keys that lie here at a time, and where the next stage begins; where streamed, a power of 2
  Tile<T, D> keys, values;

  EK_DEVICE static int rows(int tokens, int staged) { return staged < tokens ? 2 * staged : staged; }

  // All threads of a head call these.
  EK_DEVICE void fetch(int first, int slot) const {
    const int valid = place.exist(first, staged, tokens), thread = anew(threadIdx.x);
    copy_rows(keys.below(slot), place.row<T>(k, first), k.token, staged, valid, thread, place.threads());
    copy_rows(values.below(slot), place.row<T>(v, first), v.token, staged, valid, thread, place.threads());
    cp_async_commit();
  }
  EK_DEVICE void turn(int first, int slot) const {
    turn_rows(keys.below(slot), rope, place.sample(), first, place.exist(first, staged, tokens), anew(threadIdx.x),
              place.threads());
  }
  EK_DEVICE bool streamed() const { return staged < tokens; }

  // Where streamed, and `key` is where the next stage begins: waits for it, has the one after it fetched unless keys
  // end at `last`, and returns the row in which `key` lies.
  EK_DEVICE int bring(int key, int last) {
    const int slot = key & staged;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the other stage any more
    next = key + staged;
    if (next < last) fetch(next, next & staged);
    turn(key, slot);
    __syncthreads();
    return slot;
  }
};
}  // namespace ek
