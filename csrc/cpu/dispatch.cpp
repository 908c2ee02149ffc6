// Which instruction set runs: read from CPUID and XGETBV once, best first, or forced by name.
// Compiled for the baseline processor; no SIMD here.
#include <string.h>

#include <atomic>

#include "ops.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rlhf_fast {
namespace {

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!osxsave) return;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;  // saved by the operating system
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && fma && f16c && (b & (1u << 5));
    const unsigned f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    avx512 = avx2 && zmm && (b & f_dq_bw_vl) == f_dq_bw_vl;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = avx512 && (a & (1u << 5));
  }
  static constexpr bool scalar = true;
};
#else
struct Features {
  static constexpr bool scalar = true;
};
#endif

#define RLHF_FAST_ENTRY(name, Args) RLHF_FAST_NAMESPACE::name,
#define RLHF_FAST_NAMESPACE scalar
constexpr KernelTable table_scalar = {RLHF_FAST_KERNELS(RLHF_FAST_ENTRY)};
#undef RLHF_FAST_NAMESPACE
#if defined(__x86_64__)
#define RLHF_FAST_NAMESPACE avx2
constexpr KernelTable table_avx2 = {RLHF_FAST_KERNELS(RLHF_FAST_ENTRY)};
#undef RLHF_FAST_NAMESPACE
#define RLHF_FAST_NAMESPACE avx512
constexpr KernelTable table_avx512 = {RLHF_FAST_KERNELS(RLHF_FAST_ENTRY)};
#undef RLHF_FAST_NAMESPACE
constexpr KernelTable table_avx512bf16 = [] {
  KernelTable table = table_avx512;
#define RLHF_FAST_OWN(name, Args) table.name = avx512bf16::name;
  RLHF_FAST_BF16_KERNELS(RLHF_FAST_OWN)
#undef RLHF_FAST_OWN
  return table;
}();
#endif

std::atomic<const Isa*> active{nullptr};

}  // namespace

const Isa* isas(int* count) {
  static const Features cpu;
#define RLHF_FAST_ROW(isa) {#isa, &table_##isa, cpu.isa},
  static const Isa rows[] = {RLHF_FAST_ISAS(RLHF_FAST_ROW)};
#undef RLHF_FAST_ROW
  *count = sizeof(rows) / sizeof(rows[0]);
  return rows;
}

const Isa* active_isa() {
  if (const Isa* isa = active.load(std::memory_order_acquire)) return isa;
  int count;
  const Isa* isa = isas(&count);
  while (!isa->supported) ++isa;  // the last one, scalar, always is
  active.store(isa, std::memory_order_release);
  return isa;
}

bool select_isa(const char* name) {
  int count;
  const Isa* rows = isas(&count);
  for (int i = 0; i < count; ++i) {
    if (strcmp(rows[i].name, name) == 0 && rows[i].supported) {
      active.store(&rows[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace rlhf_fast
