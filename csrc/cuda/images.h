// The device images that the build embeds: csrc/building/cuda.py writes the definitions.
#pragma once

namespace rlhf_fast::cuda {

struct Arch {
  int capability;  // ten times the major number plus the minor one
  char suffix;     // 'a': this capability alone, 'f': its family, 0: any
  bool ptx;        // compiled by the driver, for this capability and later ones
};

// A fat binary with the kernels of one source file, for every Arch.
struct Image {
  const char* source;
  const void* data;
};

extern const Arch kArches[];
extern const int kArchCount;
extern const Image kImages[];
extern const int kImageCount;
extern const char kArchList[];    // "8.0 9.0 12.0+PTX"
extern const char kToolkit[];     // CUDA version of the compiler, "13.0"
extern const int kDriverNeeded;   // as cuDriverGetVersion counts: 13000
extern const char kDriverName[];  // NVIDIA's number for the oldest such driver, "580"

}  // namespace rlhf_fast::cuda
