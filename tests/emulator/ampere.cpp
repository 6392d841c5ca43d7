// ldmatrix, mma.sync and cp.async of sm_80. test_emulator.py compares their fragment layouts with the formulas of the
// PTX ISA, element by element. Products are exact and summed in float from k = 0 up, onto the accumulator; tensor cores
// add in an order and with a rounding that NVIDIA does not publish.
#include <algorithm>

#include "state.hpp"

namespace emu {

static std::atomic<unsigned long> conflicts{0};
static void count_conflicts(const std::uint16_t* const (&rows)[8]) {
  int used[8] = {}, most = 0;  // 8 rows of 16 bytes take one pass when they fall on different banks
  for (const std::uint16_t* r : rows) most = std::max(most, ++used[reinterpret_cast<std::uintptr_t>(r) / 16 % 8]);
  conflicts += most - 1;
}

void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, bool transposed) {
  struct Lane {
    std::uint32_t* r;
    const std::uint16_t* row;
  } mine{r, static_cast<const std::uint16_t*>(row)};
  void* pc = __builtin_return_address(0);
  if (!cur->block->shared.has(row, 16) || reinterpret_cast<std::uintptr_t>(row) % 16)
    fail("ldmatrix: a row is misaligned or outside shared memory [%s]", place(pc).c_str());
  if (checking) check_access(row, 16, Kind::warp_read, pc);
  collective(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", mine, Where{"PTX", 0}, [transposed](Lane** lanes) {
    for (int m = 0; m < 4; ++m) {
      const std::uint16_t* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = lanes[m * 8 + i]->row;
      count_conflicts(rows);
      for (int i = 0; i < 32; ++i) {
        const int g = i / 4, c = i % 4 * 2;
        const std::uint16_t low = transposed ? rows[c][g] : rows[g][c];
        const std::uint16_t high = transposed ? rows[c + 1][g] : rows[g][c + 1];
        lanes[i]->r[m] = low | std::uint32_t(high) << 16;
      }
    }
  });
}

static const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> v(65536);
    for (unsigned i = 0; i < 65536; ++i) v[i] = __half2float(__half(__half_raw{static_cast<unsigned short>(i)}));
    return v;
  }();
  return values.data();
}

// d += a b with K = 8 or 16 columns of a; registers in the order of the PTX ISA's fragments.
template <int K>
static void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16) {
  struct Lane {
    float* d;
    const std::uint32_t *a, *b;
  } mine{d, a, b};
  static constexpr const char* names[2][2] = {{"mma.m16n8k8 f16", "mma.m16n8k8 bf16"},
                                              {"mma.m16n8k16 f16", "mma.m16n8k16 bf16"}};
  collective(~0u, names[K == 16][bf16], mine, Where{"PTX", 0}, [bf16](Lane** lanes) {
    const float* half = bf16 ? nullptr : half_values();
    auto value = [half](std::uint32_t x) { return half ? half[x & 0xffff] : bits<float>(x << 16); };
    float A[16][K], B[K][8], D[16][8];
    for (int i = 0; i < 32; ++i) {
      const Lane& l = *lanes[i];
      const int g = i / 4, t = i % 4 * 2;
      for (int r = 0; r < K / 4; ++r)
        for (int e = 0; e < 2; ++e) A[g + r % 2 * 8][t + r / 2 * 8 + e] = value(l.a[r] >> 16 * e);
      for (int r = 0; r < K / 8; ++r)
        for (int e = 0; e < 2; ++e) B[t + r * 8 + e][g] = value(l.b[r] >> 16 * e);
      for (int r = 0; r < 4; ++r) D[g + r / 2 * 8][t + r % 2] = l.d[r];
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
    for (int i = 0; i < 32; ++i)
      for (int r = 0; r < 4; ++r) lanes[i]->d[r] = D[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
  });
}
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, bool bf16) {
  const std::uint32_t b[2] = {b0, b1};
  mma<16>(d, a, b, bf16);
}
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b, bool bf16) { mma<8>(d, a, &b, bf16); }

// The destination becomes NaN at once, and the copy is made at the wait that covers it: in between neither the old nor
// the new content may be relied on.
void cp_async_issue(void* dst, const void* src, int bytes) {
  void* pc = __builtin_return_address(0);
  if (!cur->block->shared.has(dst, 16)) fail("cp.async to outside shared memory [%s]", place(pc).c_str());
  if ((reinterpret_cast<std::uintptr_t>(dst) | (bytes ? reinterpret_cast<std::uintptr_t>(src) : 0)) % 16)
    fail("misaligned cp.async [%s]", place(pc).c_str());
  if (checking) {
    if (bytes) check_access(src, bytes, Kind::read, pc);
    check_access(dst, 16, Kind::write, pc);
    mark_in_flight(dst, 16);
  }
  std::memset(dst, 0xff, 16);
  cur->queue.copies.push_back({dst, src, bytes});
}
void cp_async_commit() { cur->queue.commit(); }
void cp_async_wait(int keep) {
  const std::size_t n = cur->queue.due(keep);
  for (std::size_t i = 0; i < n; ++i) {
    const AsyncCopy& c = cur->queue.copies[i];
    std::memset(c.dst, 0, 16);
    std::memcpy(c.dst, c.src, c.bytes);
    if (checking) mark_written(c.dst, 16);
  }
  cur->queue.drop(n);
}

}  // namespace emu

// Extra passes over shared memory that ldmatrix needed since the last call.
extern "C" unsigned long emu_bank_conflicts() { return emu::conflicts.exchange(0); }
