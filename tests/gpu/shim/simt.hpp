// Runs CUDA C++ kernels as host C++: one fiber per CUDA thread, all on one OS thread, warps and blocks in shuffled
// order.
//
//   g++ -std=c++17 -O2                                                            numbers
//   g++ ... -g -fsanitize=address,undefined -fno-sanitize-recover=all             out of bounds, misaligned vectors
//   g++ ... -g -fsanitize=thread                                                  missing barriers, races between
//   blocks
//
// It replaces nvcc's headers: qualifiers, vector types and the intrinsics that the kernels use. Every shared array is a
// block of the heap of its own, so that AddressSanitizer has red zones around it, and starts as NaN. The shim itself
// stops with a message at a barrier that some threads never reach, at two different barriers that meet, at a warp
// operation whose mask names a lane that is gone or elsewhere, and at a shuffle from a lane outside its mask.
//
// ThreadSanitizer is told of the fibers: a switch orders nothing, __syncthreads and __syncwarp do, shuffles do not (as
// on a GPU). So every thread of every block counts as concurrent with all others, whatever order they ran in. Limits:
// x86-64; races between the same thread of two blocks are not seen, since blocks take turns on the fibers.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

#define SIMT_UNWATCHED __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#if !defined(__x86_64__)
#error "simt_switch is written for x86-64"
#endif
// Saves the registers that a call preserves (System V), and continues where `load` was saved.
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
.weak simt_switch
.type simt_switch,@function
simt_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size simt_switch,.-simt_switch
)");

namespace simt {

constexpr size_t kStack = 128 << 10;
constexpr int kShared = 64;  // shared arrays of a kernel
#if defined(__SANITIZE_THREAD__)
constexpr int kCrews = 4;  // sets of fibers that take turns: a block must not look like the one before it
#else
constexpr int kCrews = 1;
#endif

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };
enum class Operation : uint8_t { kSync, kShuffle, kVote };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kReady;
  Operation operation = Operation::kSync;
  unsigned mask = 0;
  const void* site = nullptr;  // where it waits
  uint64_t given = 0, taken = 0;
  int source = 0, lane = 0, warp = 0;
  uint3 index{};
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  unsigned syncs = 0;
};

struct SharedArray {
  const void* key;
  void* memory;
};

struct Block {
  std::vector<Thread> threads;
  dim3 grid, size;
  uint3 index{};
  SharedArray shared[kShared];
  int shared_count = 0;
  const std::function<void()>* body = nullptr;
  void* main_stack_pointer = nullptr;
  void* main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  Thread* current = nullptr;
  char* sync_objects = nullptr;  // fresh memory for every block: no order between blocks

  ~Block() {
    for (Thread& t : threads) free(t.stack);
  }
};

inline Block* block = nullptr;
inline std::mt19937 order{1};  // of warps and blocks
inline char launched, finished;

[[noreturn]] inline void stop(const char* what, const Thread& t) {
  fprintf(stderr, "SIMT ERROR: %s: block (%u,%u,%u) thread (%u,%u,%u) warp %d lane %d\n", what, block->index.x,
          block->index.y, block->index.z, t.index.x, t.index.y, t.index.z, t.warp, t.lane);
  fflush(stderr);
  _Exit(99);
}

inline void* sync_object(int kind, int i) { return block->sync_objects + (kind * kShared + i) * 8; }

SIMT_UNWATCHED inline void to_scheduler(Thread& t) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(t.state == State::kDone ? nullptr : &t.fake_stack, block->main_stack,
                                 block->main_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->main_tsan, 1);
#endif
  simt_switch(&t.stack_pointer, block->main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake_stack, &block->main_stack, &block->main_stack_size);
#endif
}

SIMT_UNWATCHED inline void to_thread(Thread& t) {
  block->current = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, t.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(t.tsan, 1);
#endif
  simt_switch(&block->main_stack_pointer, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// The life of a fiber: one thread of one block after another.
SIMT_UNWATCHED inline void fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->main_stack, &block->main_stack_size);
#endif
  for (;;) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&launched);  // what the host wrote before the launch, and nothing else
    (*block->body)();
    __tsan_release(&finished);
#else
    (*block->body)();
#endif
    block->current->state = State::kDone;
    to_scheduler(*block->current);
  }
}

SIMT_UNWATCHED inline void wait(State state, Operation operation, unsigned mask, const void* site) {
  Thread& t = *block->current;
  t.state = state;
  t.operation = operation;
  t.mask = mask;
  t.site = site;
#if defined(__SANITIZE_THREAD__)
  void* object = operation != Operation::kSync ? nullptr
                 : state == State::kAtWarp     ? sync_object(1 + (t.syncs & 1), t.warp)
                                               : sync_object(0, t.syncs & 1);
  if (object) __tsan_release(object);
#endif
  to_scheduler(t);
#if defined(__SANITIZE_THREAD__)
  if (object) {
    __tsan_acquire(object);
    t.syncs++;
  }
#endif
}

SIMT_UNWATCHED inline void* shared_memory(const void* key, size_t bytes) {
  for (int i = 0; i < block->shared_count; ++i)
    if (block->shared[i].key == key) return block->shared[i].memory;
  if (block->shared_count == kShared) stop("too many shared arrays", *block->current);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->main_tsan, 1);  // the host allocates, so that the allocation is no race
#endif
  void* memory = malloc(bytes);
  memset(memory, 0xff, bytes);
  block->shared[block->shared_count++] = {key, memory};
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&launched);
  __tsan_switch_to_fiber(block->current->tsan, 1);
#endif
  return memory;
}

template <class T>
SIMT_UNWATCHED T& shared_array(const void* key) {
  void* memory = shared_memory(key, sizeof(T));
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&launched);
#endif
  return *static_cast<T*>(memory);
}

// Lets the lanes of a warp go on that are all at the same operation. False when there are none.
SIMT_UNWATCHED inline bool resolve_warp(int warp) {
  const int first = warp * 32, count = std::min(32, static_cast<int>(block->threads.size()) - first);
  Thread* const lanes = &block->threads[first];
  bool any = false;
  for (int i = 0; i < count; ++i) {
    Thread& t = lanes[i];
    if (t.state != State::kAtWarp) continue;
    const unsigned mask = t.mask;
    const Operation operation = t.operation;
    if (!(mask >> i & 1)) stop("a lane is not in the mask of its own warp operation", t);
    bool together = true;
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      if (l >= count) stop("the mask of a warp operation names a lane that the block does not have", t);
      const Thread& other = lanes[l];
      if (other.state == State::kDone) stop("a warp operation waits for a lane that has exited", t);
      together &= other.state == State::kAtWarp && other.mask == mask && other.operation == operation;
    }
    if (!together) continue;
    any = true;
    unsigned votes = 0;
    for (int l = 0; l < count; ++l)
      if ((mask >> l & 1) && lanes[l].given) votes |= 1u << l;
    for (int l = 0; l < count; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& to = lanes[l];
      if (operation == Operation::kShuffle) {
        if (!(mask >> to.source & 1)) stop("a shuffle reads a lane outside its mask", to);
        to.taken = lanes[to.source].given;
      } else {
        to.taken = votes;
      }
    }
    for (int l = 0; l < count; ++l)
      if (mask >> l & 1) lanes[l].state = State::kReady;
  }
  return any;
}

SIMT_UNWATCHED inline void run_block() {
  const int count = static_cast<int>(block->threads.size()), warps = (count + 31) / 32;
  std::vector<int> turn(warps);
  for (int i = 0; i < warps; ++i) turn[i] = i;
  for (Thread& t : block->threads) t.state = State::kReady;
  for (;;) {
    bool progress = false;
    std::shuffle(turn.begin(), turn.end(), order);
    for (const int warp : turn) {
      do {
        for (int i = warp * 32; i < std::min(count, warp * 32 + 32); ++i) {
          if (block->threads[i].state != State::kReady) continue;
          to_thread(block->threads[i]);
          progress = true;
        }
      } while (resolve_warp(warp));
    }
    int done = 0, waiting = 0;
    const Thread* at_barrier = nullptr;
    for (const Thread& t : block->threads) {
      done += t.state == State::kDone;
      if (t.state != State::kAtBarrier) continue;
      if (at_barrier && at_barrier->site != t.site) stop("threads meet at different __syncthreads()", t);
      at_barrier = &t;
      ++waiting;
    }
    if (done == count) return;
    if (waiting == count) {
      for (Thread& t : block->threads) t.state = State::kReady;
      continue;
    }
    if (waiting && waiting + done == count)
      stop("a __syncthreads() is not reached by threads that exited", *at_barrier);
    if (progress) continue;
    for (const Thread& t : block->threads)
      if (t.state != State::kDone)
        stop(t.state == State::kAtWarp ? "deadlock at a warp operation" : "deadlock at a divergent __syncthreads()", t);
  }
}

// The fibers for the threads of a block.
SIMT_UNWATCHED inline void prepare(Block* crew, dim3 size) {
  crew->size = size;
  crew->threads.resize(size.x * size.y * size.z);
  for (unsigned i = 0; i < crew->threads.size(); ++i) {
    Thread& t = crew->threads[i];
    t.lane = static_cast<int>(i % 32);
    t.warp = static_cast<int>(i / 32);
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    if (t.stack) continue;
    t.stack = static_cast<char*>(malloc(kStack));
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(t.stack + kStack) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    t.tsan = __tsan_create_fiber(0);
#endif
  }
}

// body() for every thread of every block.
SIMT_UNWATCHED inline void launch(dim3 grid, dim3 size, const std::function<void()>& body) {
  using Crews = std::vector<std::unique_ptr<Block>>;
  static std::map<unsigned, Crews> pool;  // fibers are kept for the next launch
  Crews& crews = pool[size.x * size.y * size.z];
  std::vector<void*> kept;  // freed when all blocks are done: reuse would look like a race
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const uint64_t b = blocks[i];
    if (crews.size() <= i % kCrews) crews.push_back(std::make_unique<Block>());
    block = crews[i % kCrews].get();
    prepare(block, size);
    block->grid = grid;
    block->body = &body;
    block->index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    block->sync_objects = static_cast<char*>(malloc(3 * kShared * 8));
#if defined(__SANITIZE_THREAD__)
    block->main_tsan = __tsan_get_current_fiber();
    for (Thread& t : block->threads) t.syncs = 0;
    __tsan_release(&launched);
#endif
    run_block();
    for (int k = 0; k < block->shared_count; ++k) kept.push_back(block->shared[k].memory);
    kept.push_back(block->sync_objects);
    block->shared_count = 0;
#if !defined(__SANITIZE_THREAD__)
    for (void* memory : kept) free(memory);
    kept.clear();
#endif
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&finished);
#endif
  for (void* memory : kept) free(memory);
}

// Kernels by name; `run` gets the addresses of the arguments, as cuLaunchKernel does.
struct Kernel {
  unsigned threads;  // at most
  void (*run)(void** arguments);
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

struct Registration {
  Registration(const char* name, unsigned threads, void (*run)(void**)) { kernels()[name] = {threads, run}; }
};

template <class T>
SIMT_UNWATCHED T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Thread& t = *block->current;
  t.given = 0;
  memcpy(&t.given, &value, sizeof(T));
  t.source = source & 31;
  wait(State::kAtWarp, Operation::kShuffle, mask, nullptr);
  memcpy(&value, &t.taken, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_SHARED(T, name, dims) \
  static char name##_key;          \
  using name##_type = T dims;      \
  name##_type& name = simt::shared_array<name##_type>(&name##_key)
#define SIMT_KERNEL(name, threads, blocks, Args)                                                       \
  static void name##_body(const Args& a);                                                              \
  static const simt::Registration name##_registration(                                                 \
      #name, threads, [](void** arguments) { name##_body(*static_cast<const Args*>(arguments[0])); }); \
  static void name##_body(const Args& a)
#define threadIdx (simt::block->current->index)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->size)
#define gridDim (simt::block->grid)

__attribute__((noinline)) inline void __syncthreads() {
  simt::wait(simt::State::kAtBarrier, simt::Operation::kSync, 0, __builtin_return_address(0));
}
__attribute__((noinline)) inline void __syncwarp(unsigned mask = ~0u) {
  simt::wait(simt::State::kAtWarp, simt::Operation::kSync, mask, nullptr);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
  return simt::shuffle(mask, value, lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle(mask, value, simt::block->current->lane ^ bits);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = simt::block->current->lane;
  return simt::shuffle(mask, value, lane + distance < 32 ? lane + distance : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = simt::block->current->lane;
  return simt::shuffle(mask, value, lane >= distance ? lane - distance : lane);
}
SIMT_UNWATCHED inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::Thread& t = *simt::block->current;
  t.given = predicate != 0;
  simt::wait(simt::State::kAtWarp, simt::Operation::kVote, mask, nullptr);
  return static_cast<unsigned>(t.taken);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline void __threadfence() {}  // one OS thread; ThreadSanitizer takes its order from the atomics
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T atomicAdd(T* p, T x) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on their order");
  return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (bits & 31));
}
