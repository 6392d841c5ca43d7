// Fibers, their order, barriers, warp collectives and atomics; and what is checked in every build: threads of a block
// at different __syncthreads(), lanes at different warp operations or with different masks, masks that name a lane that
// does not exist, shuffles from outside the mask, copies never waited for, launches that no GPU would take, and
// deadlock, which includes a barrier after some threads of the block have exited.
#include <dlfcn.h>
#include <sys/mman.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "state.hpp"

namespace emu {

__thread Fiber* cur = nullptr;

namespace {

constexpr std::size_t kStack = 128 << 10, kPage = 4096;

// Saves the callee-saved registers and the stack pointer, and continues on another stack.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

char* map(std::size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: mmap failed");
  return static_cast<char*>(p);
}

unsigned option(const char* name, unsigned otherwise) {
  const char* s = std::getenv(name);
  return s ? static_cast<unsigned>(std::strtoul(s, nullptr, 0)) : otherwise;
}

void fiber_main() {
  Fiber& f = *cur;
  Block& b = *f.block;
  b.launch->body(b.launch->args.begin);
  if (!f.queue.copies.empty()) fail("the thread exits without having waited for its asynchronous copies");
  --b.live;
  b.wait(f, nullptr, {});
  __builtin_unreachable();
}

std::string where_text(Where w) { return std::string(w.file) + ":" + std::to_string(w.line); }

}  // namespace

Block::Block() { shared.begin = map(kMaxShared + 2 * kGuard) + kGuard; }
Block::~Block() {
  munmap(shared.begin - kGuard, kMaxShared + 2 * kGuard);
  if (stacks.begin) munmap(stacks.begin, stacks.bytes);
}

// Threads run in order of index, backwards, or at random.
unsigned Block::pick(unsigned set) {
  if (policy == 0) return __builtin_ctz(set);
  if (policy == 1) return 31 - __builtin_clz(set);
  random ^= random << 13, random ^= random >> 7, random ^= random << 17;
  for (unsigned n = static_cast<unsigned>(random >> 32) % __builtin_popcount(set); n; --n) set &= set - 1;
  return __builtin_ctz(set);
}

void Block::wake(Warp& w, unsigned lanes) {
  w.ready |= lanes;
  warps_ready |= 1u << (&w - warps.data());
}

void Block::wait(Fiber& f, const char* what, Where where) {
  f.waits_for = what, f.where = where;
  f.warp->ready &= ~(1u << f.lane);
  if (!f.warp->ready) warps_ready &= ~(1u << (f.warp - warps.data()));
  yield(f);
  f.waits_for = nullptr;
}

// Runs another thread. A warp runs as far ahead of the others as it can, so that a missing __syncthreads() lets it read
// what they have not written, or overwrite what they still need.
void Block::yield(Fiber& f) {
  Warp* w = f.warp;
  if (policy > 1 && warps_ready && random % 8 == 0) w = &warps[pick(warps_ready)];
  if (!w->ready) {
    if (!warps_ready) return switch_stack(&f.sp, main_sp);
    w = &warps[pick(warps_ready)];
  }
  Fiber& to = fibers[w->first + pick(w->ready)];
  if (&to == &f) return;
  cur = &to;
  switch_stack(&f.sp, to.sp);
}

void Block::prepare(Launch& l) {
  launch = &l;
  shared.bytes = l.shared;
  const unsigned n = l.block.x * l.block.y * l.block.z;
  if (threads == n) return;
  threads = n;
  fibers = std::vector<Fiber>(n);
  warps = std::vector<Warp>((n + 31) / 32);
  if (stacks.begin) munmap(stacks.begin, stacks.bytes);
  stacks.begin = map(stacks.bytes = n * kStack);
  for (unsigned i = 0; i < n; ++i) mprotect(stacks.begin + i * kStack, kPage, PROT_NONE);
}

void Block::run(unsigned long n, unsigned seed) {
  const dim3 g = launch->grid, d = launch->block;
  number = n;
  index = {static_cast<unsigned>(n % g.x), static_cast<unsigned>(n / g.x % g.y), static_cast<unsigned>(n / g.x / g.y)};
  policy = seed % 4;
  random = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (n + 1) * 0xd1b54a32d192ed03ull;
  std::memset(shared.begin, 0xff, shared.bytes);  // NaN as float, bf16 and half
  live = threads;
  at_barrier = warps_ready = 0;
  fenced = false, acquired = 0;
  first_epoch = ++epoch;
  for (unsigned i = 0; i < warps.size(); ++i) {
    warps[i] = Warp{};
    warps[i].first = i * 32;
    warps[i].exists = threads - i * 32 >= 32 ? ~0u : (1u << (threads - i * 32)) - 1;
    wake(warps[i], warps[i].exists);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.tid = {i % d.x, i / d.x % d.y, i / d.x / d.y};
    f.rank = i, f.lane = i % 32, f.warp = &warps[i / 32], f.block = this;
    f.waits_for = nullptr;
    f.queue.clear();
    void** top = reinterpret_cast<void**>(stacks.begin + (i + 1) * kStack) - 2;  // fiber_main() starts at rsp % 16 == 8
    *top = reinterpret_cast<void*>(&fiber_main);
    f.sp = top - 6;
    top[-1] = nullptr;  // rbp: the end of the chain of frames
  }
  Warp& w = warps[pick(warps_ready)];
  cur = &fibers[w.first + pick(w.ready)];
  switch_stack(&main_sp, cur->sp);
  if (live && !launch->failed) report_deadlock();
  cur = nullptr;
}

void Block::set_error(const std::string& text) {
  std::lock_guard<std::mutex> lock(launch->mutex);
  if (!launch->failed.exchange(true)) launch->error = text;
}

void Block::report_deadlock() {
  std::string s = "deadlock in block (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
                  std::to_string(index.z) + "): " + std::to_string(threads - live) + " of " + std::to_string(threads) +
                  " threads have exited";
  for (unsigned i = 0, j; i < threads; i = j) {  // runs of threads that wait at the same place
    const Fiber& a = fibers[i];
    for (j = i + 1; j < threads && fibers[j].waits_for == a.waits_for && fibers[j].where.line == a.where.line;) ++j;
    if (a.waits_for)
      s += "; threads " + std::to_string(i) + "-" + std::to_string(j - 1) + " wait at " + a.waits_for + " (" +
           where_text(a.where) + ")";
  }
  set_error(s);
}

uint3 thread_index() { return cur->tid; }
unsigned lane_index() { return cur->lane; }
uint3 block_index() { return cur->block->index; }
dim3 block_shape() { return cur->block->launch->block; }
dim3 grid_shape() { return cur->block->launch->grid; }
void* dynamic_shared() { return cur->block->shared.begin; }
void fence() { cur->block->fenced = true; }

void fail(const char* format, ...) {
  Fiber& f = *cur;
  Block& b = *f.block;
  char text[700], head[128];
  va_list v;
  va_start(v, format);
  std::vsnprintf(text, sizeof text, format, v);
  va_end(v);
  std::snprintf(head, sizeof head, "block (%u,%u,%u) thread (%u,%u,%u): ", b.index.x, b.index.y, b.index.z, f.tid.x,
                f.tid.y, f.tid.z);
  b.set_error(std::string(head) + text);
  switch_stack(&f.sp, b.main_sp);  // abandons all threads of the block
  __builtin_unreachable();
}

void barrier(Where where) {
  Fiber& f = *cur;
  Block& b = *f.block;
  if (b.at_barrier++ == 0) b.barrier_where = where;
  if (b.barrier_where.line != where.line || std::strcmp(b.barrier_where.file, where.file))
    fail("divergent __syncthreads: here %s:%d, another thread of the block is at %s:%d", where.file, where.line,
         b.barrier_where.file, b.barrier_where.line);
  if (b.at_barrier < b.threads) return b.wait(f, "__syncthreads", where);
  b.at_barrier = 0;
  ++b.epoch;
  for (Warp& w : b.warps) b.wake(w, w.exists);
}

void** arrive(unsigned mask, const char* op, void* args, Where where) {
  Fiber& f = *cur;
  Warp& w = *f.warp;
  if (!(mask >> f.lane & 1))
    fail("%s (%s:%d): lane %u is not in its own mask %08x", op, where.file, where.line, f.lane, mask);
  if (op == std::string_view("__syncwarp") && mask == ~0u) mask = w.exists;
  if (mask & ~w.exists) fail("%s (%s:%d): mask %08x names threads that do not exist", op, where.file, where.line, mask);
  Collective* c = w.pending;  // the one in flight that shares lanes with `mask`, or else a new one
  while (c < w.pending + w.in_flight && !(c->mask & mask)) ++c;
  if (c == w.pending + w.in_flight) *c = {mask, 0, op, where}, ++w.in_flight;
  if (c->mask != mask || c->op != std::string_view(op) || c->where.line != where.line)
    fail("divergent warp collective: here %s mask %08x (%s:%d), another lane is at %s mask %08x (%s:%d)", op, mask,
         where.file, where.line, c->op, c->mask, c->where.file, c->where.line);
  w.lanes[f.lane] = args;
  c->arrived |= 1u << f.lane;
  if (c->arrived == mask) {
    *c = w.pending[--w.in_flight];
    return w.lanes;
  }
  f.block->wait(f, op, where);
  return nullptr;
}

void release(unsigned mask) { cur->block->wake(*cur->warp, mask & cur->warp->exists); }

void order_warp(unsigned mask) {
  if ((mask & cur->warp->exists) == cur->warp->exists) ++cur->warp->order;
}

template <class T>
static std::uint64_t exchange_loop(void* p, Update update, std::uint64_t operand) {
  T old = __atomic_load_n(static_cast<T*>(p), __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(static_cast<T*>(p), &old, static_cast<T>(update(old, operand)), false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

std::uint64_t atomic(void* p, unsigned bytes, Update update, std::uint64_t operand) {
  Block& b = *cur->block;
  Launch& l = *b.launch;
  if (reinterpret_cast<std::uintptr_t>(p) % bytes)
    fail("misaligned %u-byte atomic [%s]", bytes, place(__builtin_return_address(0)).c_str());
  if (checking) {
    check_access(p, bytes, Kind::atomic, __builtin_return_address(0), true);
    if (b.fenced) l.released[b.number] = ++l.clock;
  }
  const auto loop = bytes == 8 ? exchange_loop<std::uint64_t> : exchange_loop<std::uint32_t>;
  const std::uint64_t old = loop(p, update, operand);
  b.acquired = l.clock;
  return old;
}

static std::vector<std::array<std::size_t, 3>>* record = nullptr;

void run(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* args,
         std::size_t args_bytes) {
  if (record) {
    Dl_info module;
    if (!dladdr(kernel, &module)) throw std::runtime_error("a kernel lies in no module");
    const std::size_t offset = static_cast<const char*>(kernel) - static_cast<const char*>(module.dli_fbase);
    return record->push_back({offset, std::size_t(block.x) * block.y * block.z, shared});
  }
  if (shared > kMaxShared)
    throw std::runtime_error("launch with " + std::to_string(shared) + " bytes of shared memory; sm_80 has 166912");
  const unsigned long threads = 1ul * block.x * block.y * block.z, total = 1ul * grid.x * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    throw std::runtime_error("launch with " + std::to_string(threads) + " threads in a block; a GPU takes 1 to 1024");
  if (total == 0 || grid.x >= 1u << 31 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("launch with a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " x " + std::to_string(grid.z) + " blocks; a GPU takes at least 1, at most " +
                             "2147483647 x 65535 x 65535");
  static std::mutex idle_mutex;
  static std::vector<std::unique_ptr<Block>> idle;
  static std::atomic<unsigned> launches{0};
  Launch l;
  l.number = ++launches;
  l.grid = grid, l.block = block, l.shared = shared, l.body = body;
  l.args.begin = static_cast<char*>(args), l.args.bytes = args_bytes;
  if (checking) l.released = std::make_unique<std::atomic<unsigned>[]>(total);
  const unsigned seed = option("EMU_SEED", 0);
  auto work = [&] {
    std::unique_ptr<Block> b;
    {
      std::lock_guard<std::mutex> lock(idle_mutex);
      if (!idle.empty()) b = std::move(idle.back()), idle.pop_back();
    }
    if (!b) b = std::make_unique<Block>();
    b->prepare(l);
    for (unsigned long n; !l.failed && (n = l.next++) < total;) b->run(seed % 4 == 1 ? total - 1 - n : n, seed);
    std::lock_guard<std::mutex> lock(idle_mutex);
    idle.push_back(std::move(b));
  };
  const unsigned want = option("EMU_THREADS", 2);
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < want && i < total; ++i) helpers.emplace_back(work);
  work();
  for (auto& t : helpers) t.join();
  if (l.failed) throw std::runtime_error(l.error);
}

}  // namespace emu

// From now on launches are written here and do not run: where the kernel is in its module, threads of a block, bytes of
// shared memory. Null: they run again.
extern "C" void emu_record(std::vector<std::array<std::size_t, 3>>* launches) { emu::record = launches; }
