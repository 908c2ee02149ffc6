// The native core's interface: one plain argument struct per kernel, and one line per kernel in the list below.
//
// Pointers are raw; (n, m) are shapes in elements; "wide" buffers are float, or double when `f64` is set. Optional pointers are
// null. Python fills the structs by position (csrc/bindings.cpp), so the order of the fields is part of the ABI:
// changing it means raising kAbi here and ABI in rlhf_fast/_native.py.
//
// Every kernel returns -1, or the index of the first row it refuses (a token id out of range).
#pragma once

#include <stdint.h>

namespace rlhf_fast {

constexpr int kAbi = 1;

struct GaeArgs {
  const void* rewards;         // (rows, length) or (cu_seqlens[rows],), wide
  const void* values;          // as rewards
  const uint8_t* mask;         // as rewards, or null: all real
  const void* bootstrap;       // (rows,) or null, wide
  const int64_t* cu_seqlens;   // (rows + 1,) or null: padded
  void* advantages;            // as rewards
  void* returns;               // as rewards
  int64_t rows, length;
  double gamma, lam;
  bool decay_gaps, f64;
  int threads;
};

struct GaeBackwardArgs {
  const void* grad_advantages;  // (rows, length) or (cu_seqlens[rows],), wide
  const void* grad_returns;     // as grad_advantages
  const uint8_t* mask;          // as grad_advantages, or null
  const int64_t* cu_seqlens;    // (rows + 1,) or null
  void* grad_rewards;           // as grad_advantages
  void* grad_values;            // as grad_advantages
  void* grad_bootstrap;         // (rows,)
  int64_t rows, length;
  double gamma, lam;
  bool decay_gaps, f64;
  int threads;
};

}  // namespace rlhf_fast

// KERNEL(name, argument struct)
#define RLHF_FAST_KERNELS(KERNEL)       \
  KERNEL(gae, GaeArgs)                  \
  KERNEL(gae_backward, GaeBackwardArgs)

// ISA(name): the variants every kernel is compiled for, best first; build and run-time choice follow this list.
#if defined(__x86_64__) || defined(_M_X64)
#define RLHF_FAST_ISAS(ISA) ISA(avx512bf16) ISA(avx512) ISA(avx2) ISA(scalar)
#else
#define RLHF_FAST_ISAS(ISA) ISA(scalar)
#endif

namespace rlhf_fast {
#define RLHF_FAST_DECLARE(name, Args) int64_t name(const Args&);
#define RLHF_FAST_DECLARE_ISA(isa)             \
  namespace isa {                              \
  RLHF_FAST_KERNELS(RLHF_FAST_DECLARE)         \
  }
RLHF_FAST_ISAS(RLHF_FAST_DECLARE_ISA)
#undef RLHF_FAST_DECLARE_ISA
#undef RLHF_FAST_DECLARE

struct KernelTable {
#define RLHF_FAST_POINTER(name, Args) int64_t (*name)(const Args&);
  RLHF_FAST_KERNELS(RLHF_FAST_POINTER)
#undef RLHF_FAST_POINTER
};

struct Isa {
  const char* name;
  const KernelTable* kernels;
  bool supported;  // by the processor and the operating system
};

// All variants in this build, best first; `count` receives how many.
const Isa* isas(int* count);
// The variant in use. The first call picks the best one the processor supports.
const Isa* active_isa();
// False when the name is unknown or the processor lacks it.
bool select_isa(const char* name);

}  // namespace rlhf_fast
