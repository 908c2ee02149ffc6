// The integer types, and the limits of floating point, for host compilers, nvcc and NVRTC, which has no system headers.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

#if defined(__CUDACC__)
#define RLHF_FAST_HD __host__ __device__
#define RLHF_FAST_INLINE_HD __host__ __device__ __forceinline__
#else
#define RLHF_FAST_HD
#define RLHF_FAST_INLINE_HD inline __attribute__((always_inline))
#endif
