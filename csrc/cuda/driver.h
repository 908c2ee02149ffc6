// Launches the kernels of the device images in this library, through the CUDA driver alone. libcuda.so.1 is opened at
// the first launch: the library itself needs no driver, no CUDA runtime, and no header of a toolkit.
#pragma once

namespace rlhf_fast::cuda {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Launches the extern "C" kernel `name` on the current device and on `stream`, without waiting for it. `arguments`
// points to one value per parameter of the kernel. A grid without blocks launches nothing, and needs no driver. Returns
// 0, or a code for error_text().
int launch(const char* name, Dim grid, unsigned threads, unsigned shared_bytes, void* stream, void** arguments);

// 0 when kernels can be launched on the current device, or a code for error_text().
int check();

// Of the current device; 1 where there is none, which the launch that follows reports.
int multiprocessors();

// What went wrong, in words, for the code that the last call in this thread returned. Valid until the thread's next
// call.
const char* error_text(int code);

}  // namespace rlhf_fast::cuda
