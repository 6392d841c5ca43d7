// Checks of every memory access of kernels that are compiled with -fsanitize=thread,alignment,bounds and linked without
// the sanitizer libraries: the hooks that the compiler calls are at the end of this file.
//
// Reported, with the place in the source:
//   * shared memory: outside the launch's size; uninitialised; written or read while a cp.async to it has not been
//     waited for; two threads of which one writes, with nothing between them that orders, unless both operate
//     atomically. __syncthreads() orders the block and a __syncwarp() of the whole warp orders the warp; shuffles, mma,
//     ldmatrix and atomic operations order nothing.
//   * global memory, once a range was tracked: outside all of them; between blocks, a write or read of what another
//     block has written in this launch, unless that block passed __threadfence() and then an atomic operation, and this
//     block an atomic operation after that.
//   * misaligned accesses, and indices outside arrays of constant size.
//
// Not seen: conflicts within a block in global memory; global writes after another block's reads; a far overrun that
// lands in another tracked range; accesses that the compiler removed, or made by libc functions. A __syncwarp() of part
// of a warp orders nothing here, which may report a race that is none.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "state.hpp"

namespace emu {

bool checking = false;

constexpr unsigned kMany = 0xffffffffu, kInFlight = 0xfffffffeu;
struct Access {
  unsigned by = 0, warp = 0;      // rank + 1, kMany or kInFlight; rank / 32 or kMany
  unsigned epoch = 0, order = 0;  // Block::epoch, Warp::order
  // Whether nothing orders it before what another thread does now.
  bool races(const Access& now) const {
    return epoch == now.epoch && (by != now.by || by == kMany) && !(warp == now.warp && order < now.order);
  }
  // Becomes one access by all who have made it since the last barrier; not by those who come before this one anyway.
  void join(const Access& now) {
    const bool first = epoch != now.epoch || (warp == now.warp && order < now.order);
    *this = {first || by == now.by ? now.by : kMany, first || warp == now.warp ? now.warp : kMany, now.epoch, now.order};
  }
};
struct Cell {
  Access write, read, atomic;
};
Cells::Cells() : at(new Cell[kMaxShared / 2]) {}
Cells::~Cells() { delete[] at; }

namespace {

// Who wrote two bytes of global memory: launch, block and the launch's clock.
std::uint64_t stamp(const Launch& l, unsigned long block) {
  return (l.number & 0xfffff) << 44 | (block & 0xffffff) << 20 | (l.clock & 0xfffff);
}
struct Buffer : Range {  // global memory that kernels may touch
  int number = 0;        // in order of tracking
  std::unique_ptr<std::atomic<std::uint64_t>, decltype(&std::free)> writers{nullptr, &std::free};
  void allocate() {  // calloc: pages that no kernel touches cost nothing
    writers.reset(static_cast<std::atomic<std::uint64_t>*>(std::calloc(bytes / 2 + 2, sizeof(std::uint64_t))));
  }
};
std::vector<Buffer> tracked;  // disjoint, ascending
int tracked_so_far = 0;
std::vector<Range> image;  // this module: constants

Cell* cells_of(Block& b, const void* p) { return b.cells.at + (static_cast<const char*>(p) - b.shared.begin) / 2; }

void check_shared(Block& b, Fiber& f, const void* p, std::size_t bytes, Kind kind, void* pc) {
  const Access now{kind == Kind::warp_read ? kMany : f.rank + 1, f.rank / 32, b.epoch, f.warp->order};
  const bool write = kind == Kind::write, atomic = kind == Kind::atomic;
  const char* name = write ? "write" : atomic ? "atomic" : "read";
  auto stop = [&](const std::string& what, unsigned other = 0) {
    char who[32] = "";
    if (other && other < kInFlight) std::snprintf(who, sizeof who, " by thread %u", other - 1);
    fail("%s%s: %zu-byte %s of shared memory at offset %ld [%s]", what.c_str(), who, bytes, name,
         static_cast<long>(static_cast<const char*>(p) - b.shared.begin), place(pc).c_str());
  };
  auto order = [&](const char* before, const Access& access) {
    if (access.races(now)) stop(std::string("race: ") + name + " after " + before, access.by);
  };
  Cell* c = cells_of(b, p);
  for (std::size_t i = 0; i < (bytes + 1) / 2; ++i, ++c) {
    const bool written = c->write.epoch >= b.first_epoch;
    if (written && c->write.by == kInFlight) stop("an asynchronous copy to this place has not been waited for");
    if (!write && !written) stop("uninitialised");
    order("write", c->write);
    if (!atomic) order("atomic", c->atomic);
    if (write || atomic) order("read", c->read);
    if (write)
      c->write = now;
    else
      (atomic ? c->atomic : c->read).join(now);
  }
}

void check_global(Block& b, const void* p, std::size_t bytes, Kind kind, void* pc) {
  const char* what = kind == Kind::write ? "write" : kind == Kind::atomic ? "atomic" : "read";
  const char* at = static_cast<const char*>(p);
  auto next = std::upper_bound(tracked.begin(), tracked.end(), at,
                               [](const char* a, const Buffer& r) { return a < r.begin; });
  if (next != tracked.begin() && (next - 1)->has(p, bytes)) {
    const Buffer& r = *(next - 1);
    const Launch& l = *b.launch;
    const std::uint64_t me = stamp(l, b.number), block = ~0xfffffull;
    const std::size_t offset = at - r.begin;
    for (std::size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
      std::atomic<std::uint64_t>& writer = r.writers.get()[i];
      const std::uint64_t old = kind == Kind::write ? writer.exchange(me, std::memory_order_relaxed)
                                                    : writer.load(std::memory_order_relaxed);
      if (old >> 44 != me >> 44 || (old & block) == (me & block)) continue;
      const unsigned other = old >> 20 & 0xffffff, released = l.released[other];
      if (released > (old & 0xfffff) && b.acquired >= released) continue;
      fail("race between blocks: %zu-byte %s of what block %u wrote, at offset %zu of tensor #%d [%s]", bytes, what,
           other, offset, r.number, place(pc).c_str());
    }
    return;
  }
  if (kind == Kind::read) {  // kernel parameters, the emulator's own lists, constants
    const Range warps{reinterpret_cast<char*>(b.warps.data()), b.warps.size() * sizeof(Warp)};
    if (b.launch->args.has(p) || warps.has(p)) return;
    for (const Range& r : image)
      if (r.has(p)) return;
  }
  auto near = next;  // of the ranges before and after, the closer one
  if (next == tracked.end()) --near;
  else if (next != tracked.begin() && at - ((next - 1)->begin + (next - 1)->bytes) < next->begin - at) --near;
  fail("out of bounds: %zu-byte %s at offset %ld of tensor #%d of %zu bytes [%s]", bytes, what,
       static_cast<long>(at - near->begin), near->number, near->bytes, place(pc).c_str());
}

inline void hook(const void* p, std::size_t bytes, Kind kind, void* pc, bool aligned) {
  if (!cur || cur->block->stacks.has(p)) return;
  check_access(p, bytes, kind, pc, aligned);
}

}  // namespace

void check_access(const void* p, std::size_t bytes, Kind kind, void* pc, bool aligned) {
  Fiber& f = *cur;
  Block& b = *f.block;
  if (aligned && reinterpret_cast<std::uintptr_t>(p) % bytes)
    fail("misaligned %zu-byte access [%s]", bytes, place(pc).c_str());
  if (b.shared.has(p, bytes)) return check_shared(b, f, p, bytes, kind, pc);
  const long at = static_cast<const char*>(p) - b.shared.begin;
  if (at > -static_cast<long>(kGuard) && at < static_cast<long>(kMaxShared + kGuard))
    fail("out of bounds: %zu-byte access at offset %ld of %zu bytes of shared memory [%s]", bytes, at, b.shared.bytes,
         place(pc).c_str());
  if (!tracked.empty()) check_global(b, p, bytes, kind, pc);
}

void mark_in_flight(void* shared, int bytes) {
  Cell* c = cells_of(*cur->block, shared);
  for (int i = 0; i < bytes / 2; ++i) c[i].write = {kInFlight, kMany, cur->block->epoch, 0};
}

void mark_written(void* shared, int bytes) {
  Cell* c = cells_of(*cur->block, shared);
  const Access now{cur->rank + 1, cur->rank / 32, cur->block->epoch, cur->warp->order};
  for (int i = 0; i < bytes / 2; ++i) c[i].write = now;
}

std::string place(void* pc) {
  Dl_info module;
  if (!dladdr(pc, &module)) return "?";
  std::string command = std::string("addr2line -i -s -e '") + module.dli_fname + "'";
  auto add = [&](void* address) {
    char text[32];
    std::snprintf(text, sizeof text, " %#zx",
                  static_cast<std::size_t>(static_cast<char*>(address) - static_cast<char*>(module.dli_fbase)) - 1);
    command += text;
  };
  add(pc);
  bool above = false;  // the frame that `pc` returns to; its callers follow
  void** frame = static_cast<void**>(__builtin_frame_address(0));
  for (; cur && cur->block->stacks.has(frame, 2 * sizeof *frame); frame = static_cast<void**>(frame[0])) {
    if (above) add(frame[1]);
    above |= frame[1] == pc;
  }
  std::string lines;
  if (std::FILE* f = popen((command + " 2>/dev/null").c_str(), "r")) {
    char text[512];
    while (std::fgets(text, sizeof text, f)) {
      text[std::strcspn(text, " \n")] = 0;
      if (std::strstr(text, ".cu")) lines += (lines.empty() ? "" : " < ") + std::string(text);  // not our own headers
    }
    pclose(f);
  }
  return lines.empty() ? "no line: is addr2line (binutils) installed?" : lines;
}

}  // namespace emu

using emu::Kind;
#define EMU_PC __builtin_return_address(0)

extern "C" {

// Memory that the next launches may access, as tensor #0, #1, ...; with none, global memory is not checked. Ranges that
// overlap become one.
void emu_track(void* p, std::size_t bytes) {
  emu::Buffer b;
  b.begin = static_cast<char*>(p), b.bytes = bytes, b.number = emu::tracked_so_far++;
  auto overlaps = [&b](const emu::Buffer& r) { return r.begin < b.begin + b.bytes && b.begin < r.begin + r.bytes; };
  for (const emu::Buffer& r : emu::tracked)
    if (overlaps(r)) {
      char* end = std::max(b.begin + b.bytes, r.begin + r.bytes);
      b.begin = std::min(b.begin, r.begin), b.bytes = end - b.begin, b.number = std::min(b.number, r.number);
    }
  auto& t = emu::tracked;
  t.erase(std::remove_if(t.begin(), t.end(), overlaps), t.end());
  b.allocate();
  t.insert(std::find_if(t.begin(), t.end(), [&b](const emu::Buffer& r) { return r.begin > b.begin; }), std::move(b));
}
void emu_untrack_all() { emu::tracked.clear(), emu::tracked_so_far = 0; }

void __tsan_init() {
  emu::checking = true;
  auto visit = [](dl_phdr_info* i, std::size_t, void*) {
    std::vector<emu::Range> own;
    bool here = false;
    for (int k = 0; k < i->dlpi_phnum; ++k)
      if (i->dlpi_phdr[k].p_type == PT_LOAD) {
        own.push_back({reinterpret_cast<char*>(i->dlpi_addr + i->dlpi_phdr[k].p_vaddr), i->dlpi_phdr[k].p_memsz});
        here |= own.back().has(reinterpret_cast<void*>(&__tsan_init));
      }
    if (here) emu::image = own;
    return 0;
  };
  dl_iterate_phdr(visit, nullptr);
}
#define EMU_HOOKS(n)                                                                     \
  void __tsan_read##n(void* p) { emu::hook(p, n, Kind::read, EMU_PC, true); }            \
  void __tsan_write##n(void* p) { emu::hook(p, n, Kind::write, EMU_PC, true); }          \
  void __tsan_unaligned_read##n(void* p) { emu::hook(p, n, Kind::read, EMU_PC, false); } \
  void __tsan_unaligned_write##n(void* p) { emu::hook(p, n, Kind::write, EMU_PC, false); }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_read_range(void* p, std::size_t n) { emu::hook(p, n, Kind::read, EMU_PC, false); }
void __tsan_write_range(void* p, std::size_t n) { emu::hook(p, n, Kind::write, EMU_PC, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }  // guards of local statics in host functions

struct UbsanPlace {
  const char* file;
  unsigned line, column;
};
static void ubsan(const UbsanPlace& p, const char* what, void* pc) {
  if (emu::cur) emu::fail("%s [%s]", what, emu::place(pc).c_str());
  std::fprintf(stderr, "%s:%u: %s\n", p.file, p.line, what), std::abort();
}
void __ubsan_handle_type_mismatch_v1(UbsanPlace* p, void*) { ubsan(*p, "misaligned access", EMU_PC); }
void __ubsan_handle_out_of_bounds(UbsanPlace* p, void*) { ubsan(*p, "array index out of bounds", EMU_PC); }
}
