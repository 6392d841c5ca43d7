// What the files of the emulator share. Kernels do not see it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_on_cpu.hpp"

namespace emu {

constexpr std::size_t kMaxShared = 163 << 10;  // of a block on sm_80, the smallest of the GPUs we build for
constexpr std::size_t kGuard = 64 << 10;       // mapped before and after shared memory

struct Range {
  char* begin = nullptr;
  std::size_t bytes = 0;
  bool has(const void* p, std::size_t n = 1) const {
    const std::size_t at = static_cast<std::size_t>(static_cast<const char*>(p) - begin);
    return at < bytes && n <= bytes - at;
  }
};

struct AsyncCopy {
  void* dst;
  const void* src;
  int bytes;  // the rest of the 16 destination bytes becomes 0
};

// The asynchronous copies of a thread, in order of issue, and the ends of its committed groups.
struct CopyQueue {
  std::vector<AsyncCopy> copies;
  std::vector<std::size_t> groups;
  void commit() { groups.push_back(copies.size()); }
  std::size_t due(int keep) const {  // how many copies have to be done to leave `keep` groups
    return static_cast<int>(groups.size()) > keep ? groups[groups.size() - keep - 1] : 0;
  }
  void drop(std::size_t n) {
    copies.erase(copies.begin(), copies.begin() + n);
    std::size_t done = 0;
    while (done < groups.size() && groups[done] <= n) ++done;
    groups.erase(groups.begin(), groups.begin() + done);
    for (std::size_t& end : groups) end -= n;
  }
  void clear() { copies.clear(), groups.clear(); }
};

struct Warp;
struct Block;

struct Fiber {  // a GPU thread
  void* sp = nullptr;
  uint3 tid{};
  unsigned rank = 0, lane = 0;  // rank: linear index in the block
  Warp* warp = nullptr;
  Block* block = nullptr;
  const char* waits_for = nullptr;  // nullptr: ready or finished
  Where where{};
  CopyQueue queue;
};

struct Collective {  // lanes that have arrived at one warp operation
  unsigned mask = 0, arrived = 0;
  const char* op = nullptr;
  Where where{};
};

struct Warp {
  unsigned first = 0, exists = 0, ready = 0;  // rank of lane 0; lanes as bits
  unsigned order = 0;                         // __syncwarp() passed
  Collective pending[32];                     // the first `in_flight`, with disjoint masks
  unsigned in_flight = 0;
  void* lanes[32];
};

struct Launch {
  dim3 grid, block;
  std::uint64_t number = 0;
  std::size_t shared = 0;
  void (*body)(void*) = nullptr;
  Range args;
  std::atomic<unsigned long> next{0};  // block
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  // For data handed from block to block by __threadfence() and an atomic operation: a clock that each such release
  // advances, and for each block the time of its last release.
  std::atomic<unsigned> clock{0};
  std::unique_ptr<std::atomic<unsigned>[]> released;
};

struct Cell;  // what the checks remember of two bytes of shared memory
struct Cells {
  Cells();
  ~Cells();
  Cell* at;
};

struct Block {  // the state of an OS thread, which runs one block at a time
  Launch* launch = nullptr;
  uint3 index{};
  unsigned long number = 0;  // of the block in the grid
  void* main_sp = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Range stacks, shared;
  Cells cells;
  unsigned threads = 0, live = 0, at_barrier = 0, warps_ready = 0, policy = 0;
  unsigned epoch = 1, first_epoch = 1;  // __syncthreads() passed by all blocks so far, and before this one
  std::uint64_t random = 0;
  Where barrier_where{};
  bool fenced = false;    // a thread has passed __threadfence()
  unsigned acquired = 0;  // Launch::clock after the block's last atomic operation

  Block();
  ~Block();
  void prepare(Launch&);
  void run(unsigned long number, unsigned seed);
  void wait(Fiber&, const char* what, Where);  // until wake()
  void wake(Warp&, unsigned lanes);
  void yield(Fiber&);
  unsigned pick(unsigned set);
  void set_error(const std::string&);
  void report_deadlock();
};
extern __thread Fiber* cur;

// --- checks.cpp ------------------------------------------------------------------------------------------------------
extern bool checking;  // the kernels are compiled with -fsanitize=thread
enum class Kind { read, warp_read, write, atomic };  // warp_read: the data goes to all lanes
std::string place(void* pc);                         // of a return address: its line < its caller's line < ...
void check_access(const void*, std::size_t bytes, Kind, void* pc, bool aligned = false);
void mark_in_flight(void* shared, int bytes);  // written by a copy that nobody has waited for
void mark_written(void* shared, int bytes);    // visible to this thread

}  // namespace emu
