// The host launchers for Python, over the shim or over whatever else runs kernels: rlhf_fast_call takes the fields of
// an argument struct by position, as the real module does.
#include <utility>

#include "cuda/driver.h"
#include "cuda/ops.h"
#include "simt.hpp"

namespace {

using Hook = int (*)(const char* name, unsigned blocks, unsigned threads, const void* argument);

int processors = 4;
int launches = 0;
Hook hook = nullptr;

}  // namespace

namespace rlhf_fast::cuda {

int launch(const char* name, Dim grid, unsigned threads, unsigned, void*, void** arguments) {
  ++launches;
  if (hook) return hook(name, grid.x, threads, arguments[0]);
  const auto found = simt::kernels().find(name);
  if (found == simt::kernels().end()) {
    fprintf(stderr, "SIMT ERROR: no kernel is called %s\n", name);
    return 500;  // CUDA_ERROR_NOT_FOUND
  }
  if (threads > found->second.threads) return 1;  // CUDA_ERROR_INVALID_VALUE
  simt::launch({grid.x, grid.y, grid.z}, {threads, 1, 1}, [run = found->second.run, arguments] { run(arguments); });
  return 0;
}

int multiprocessors() { return processors; }

}  // namespace rlhf_fast::cuda

namespace {

using namespace rlhf_fast::cuda;

// A number or an address from Python; converts to whatever type the struct's field has.
struct Field {
  int64_t integer;
  double real;

  template <class T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(integer);
    else if constexpr (std::is_same_v<T, bool>)
      return integer != 0;
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(real);
    else
      return static_cast<T>(integer);
  }
};

template <class T, class = void, class... F>
struct CountFields : std::integral_constant<size_t, sizeof...(F) - 1> {};
template <class T, class... F>
struct CountFields<T, std::void_t<decltype(T{std::declval<F>()...})>, F...> : CountFields<T, void, F..., Field> {};

template <class Args, size_t... I>
int64_t run(int64_t (*launcher)(const Args&), const Field* fields, int count, std::index_sequence<I...>) {
  if (count != static_cast<int>(sizeof...(I))) {
    fprintf(stderr, "got %d fields, expected %zu\n", count, sizeof...(I));
    return -1;
  }
  return launcher(Args{fields[I]...});
}

}  // namespace

extern "C" int64_t rlhf_fast_call(const char* name, const Field* fields, int count) {
#define CALL(op, Args) \
  if (!strcmp(name, #op)) return run<Args>(op, fields, count, std::make_index_sequence<CountFields<Args>::value>());
  RLHF_FAST_CUDA_KERNELS(CALL)
#undef CALL
  return -2;
}

// The order of warps and blocks from here on, the multiprocessors that launchers see; returns the launches so far.
extern "C" int rlhf_fast_shim(unsigned seed, int multiprocessors) {
  simt::order.seed(seed);
  processors = multiprocessors;
  return launches;
}

// What launches from here on; null: the shim.
extern "C" void rlhf_fast_hook(Hook other) { hook = other; }
