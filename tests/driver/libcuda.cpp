// A driver for tests: does nothing, prints every call, and behaves as the variables FAKE_* say. Without -DOLD it has
// the functions of CUDA 12, with it those of CUDA 11 alone.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <set>
#include <string>

namespace {

int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

// "cuLaunchKernel=700" makes that function fail with that code, "cuLaunchKernel=700x2" its first two calls.
int code_of(const char* function) {
  const char* rule = getenv("FAKE_FAIL");
  const size_t length = strlen(function);
  if (!rule || strncmp(rule, function, length) != 0 || rule[length] != '=') return 0;
  static std::atomic<int> calls{0};
  const char* times = strchr(rule, 'x');
  return times && calls.fetch_add(1) >= atoi(times + 1) ? 0 : atoi(rule + length + 1);
}

thread_local void* context = nullptr;
thread_local bool asked = false;
thread_local int mode = 0;
void* const kPrimary = reinterpret_cast<void*>(0x1000);

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) {
  *version = number("FAKE_VERSION", 13000);
  return 0;
}

int cuInit(unsigned) {
  printf("cuInit\n");
  return code_of("cuInit");
}

int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 222 ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : nullptr;
  return *name ? 0 : 1;
}

int cuGetErrorString(int code, const char** words) {
  *words = code == 700 ? "an illegal memory access was encountered" : nullptr;
  return *words ? 0 : 1;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = number("FAKE_CAPABILITY", 90);
  *value = attribute == 16 ? 132 : attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** found, int device) {
  printf("cuDevicePrimaryCtxRetain %d\n", device);
  *found = kPrimary;
  return 0;
}

int cuCtxGetCurrent(void** found) {
  if (!asked && !getenv("FAKE_NO_CONTEXT")) context = kPrimary;
  asked = true;
  *found = context;
  return 0;
}

int cuCtxSetCurrent(void* wanted) {
  printf("cuCtxSetCurrent %p\n", wanted);
  context = wanted;
  return 0;
}

int cuCtxGetDevice(int* device) {
  if (!context) return 201;
  *device = number("FAKE_DEVICE", 0);
  return 0;
}

int cuStreamGetCtx(void* stream, void** found) {
  printf("cuStreamGetCtx %p\n", stream);
  *found = reinterpret_cast<void*>(0x2000);
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* other) {
  const int before = mode;
  mode = *other;
  *other = before;
  return 0;
}

#ifndef OLD
// An image is "kernel kernel ...": a library is its text, a kernel a pointer to its name.
int cuLibraryLoadData(void** library, const void* data, int*, void**, unsigned, int*, void**, unsigned) {
  printf("cuLibraryLoadData %s mode=%d\n", static_cast<const char*>(data), mode);
  *library = const_cast<void*>(data);
  return code_of("cuLibraryLoadData");
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  static std::set<std::string> names;
  const std::string text = std::string(" ") + static_cast<const char*>(library) + " ";
  if (text.find(std::string(" ") + name + " ") == std::string::npos) return 500;
  *kernel = const_cast<char*>(names.insert(name).first->c_str());
  return 0;
}

int cuKernelGetFunction(void** function, void* kernel) {
  printf("cuKernelGetFunction %s mode=%d\n", static_cast<const char*>(kernel), mode);
  *function = kernel;
  return code_of("cuKernelGetFunction");
}

int cuKernelGetAttribute(int* value, int, void*, int) {
  *value = 49152;
  return 0;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  printf("cuKernelSetAttribute %d=%d %s %d\n", attribute, value, static_cast<const char*>(kernel), device);
  return 0;
}

int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void**) {
  printf("cuLaunchKernel %s grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p argument=%d mode=%d\n",
         static_cast<const char*>(kernel), gx, gy, gz, bx, by, bz, shared, stream, *static_cast<int*>(arguments[0]),
         mode);
  return code_of("cuLaunchKernel");
}
#endif

}  // extern "C"
