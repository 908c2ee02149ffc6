// Small kernels with one mistake each, PLANTED, which the shim or a sanitizer has to find; 0 is none.
//   1 no barrier        2 one element too many       3 vectors at any address    4 a barrier that some threads skip
//   5 two blocks at one element    6 a shuffle from a lane that is not in its mask    7 no __syncwarp
//   8 a shared array too short     9 barriers of two sites that meet             10 a warp operation after some have
//   left
#include "simt.hpp"

#ifndef PLANTED
#define PLANTED 0
#endif

struct Arguments {
  const float* from;
  float* to;
  int n;
};

// to[i] = from[i] + from of the mirrored thread in the block, by vectors, through shared memory.
SIMT_KERNEL(planted, 64, 1, Arguments) {
  SIMT_SHARED(float, kept, [PLANTED == 8 ? 63 : 64]);
  const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int i = static_cast<int>(blockIdx.x) * (PLANTED == 5 ? width - 1 : width) + thread;
  kept[thread] = i < a.n ? a.from[i] : 0;
  if (PLANTED == 7) {  // within a warp, and without telling
    a.to[i < a.n ? i : 0] = kept[thread ^ 1];
    return;
  }
  if (PLANTED == 4) {
    if (thread < 32) __syncthreads();
  } else if (PLANTED == 9) {
    if (thread < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (PLANTED != 1) {
    __syncthreads();
  }
  float x = kept[63 - thread];
  if (PLANTED == 6) {
    x += __shfl_sync(thread < 32 ? 0xffffu : ~0u, x, thread < 32 ? 20 : 0);
  } else if (PLANTED == 10) {
    if (thread % 2) return;
    x += __shfl_xor_sync(~0u, x, 1);
  } else {
    x += __shfl_xor_sync(~0u, x, 1);
  }
  if (i < a.n + (PLANTED == 2)) a.to[i] = x;
  if (thread != 0 || blockIdx.x != 0) return;
  const float* first = PLANTED == 3 ? a.from + 1 : a.from;
  const uint4 v = *reinterpret_cast<const uint4*>(first);
  if (v.x == 0x7fc00000u) a.to[0] = 0;
}

int main() {
  const int n = 190;  // 64 threads a block: the last one has two too many
  float* from = static_cast<float*>(aligned_alloc(16, (n + 2) * sizeof(float)));
  float* to = static_cast<float*>(malloc(n * sizeof(float)));
  for (int i = 0; i < n + 2; ++i) from[i] = static_cast<float>(i);
  Arguments a = {from, to, n};
  void* arguments[] = {&a};
  simt::launch({3, 1, 1}, {64, 1, 1}, [&] { simt::kernels().at("planted").run(arguments); });
  if (PLANTED == 0)
    for (int i = 0; i < 128; ++i)
      if (to[i] != from[i / 64 * 64 + 63 - i % 64] + from[i / 64 * 64 + 63 - (i % 64 ^ 1)]) return 3;
  free(from);
  free(to);
  puts("done");
}
