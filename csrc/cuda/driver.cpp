#include "cuda/driver.h"

#include <dlfcn.h>
#include <stdint.h>

#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/images.h"

namespace rlhf_fast::cuda {
namespace {

// The driver's own codes are positive.
enum Error { kNoDriver = -1, kOldDriver = -2, kNoArch = -3, kNoKernel = -4 };

// Of cuda.h, whose values never change.
constexpr int kNotFound = 500, kNoBinary = 209, kNewPtx = 222;
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;
constexpr int kMaxDynamicShared = 8;
constexpr int kRelaxedCapture = 2;

constexpr int kMaxDevices = 64;

// FUNCTION(member, symbol, parameters): what is used of libcuda.so.1. Handles are pointers.
#define FUNCTIONS(FUNCTION)                                                                                        \
  FUNCTION(init, cuInit, (unsigned))                                                                               \
  FUNCTION(error_name, cuGetErrorName, (int, const char**))                                                        \
  FUNCTION(error_string, cuGetErrorString, (int, const char**))                                                    \
  FUNCTION(device_attribute, cuDeviceGetAttribute, (int*, int, int))                                               \
  FUNCTION(retain_primary, cuDevicePrimaryCtxRetain, (void**, int))                                                \
  FUNCTION(current_context, cuCtxGetCurrent, (void**))                                                             \
  FUNCTION(set_context, cuCtxSetCurrent, (void*))                                                                  \
  FUNCTION(context_device, cuCtxGetDevice, (int*))                                                                 \
  FUNCTION(stream_context, cuStreamGetCtx, (void*, void**))                                                        \
  FUNCTION(capture_mode, cuThreadExchangeStreamCaptureMode, (int*))                                                \
  FUNCTION(load_library, cuLibraryLoadData, (void**, const void*, int*, void**, unsigned, int*, void**, unsigned)) \
  FUNCTION(get_kernel, cuLibraryGetKernel, (void**, void*, const char*))                                           \
  FUNCTION(load_kernel, cuKernelGetFunction, (void**, void*))                                                      \
  FUNCTION(kernel_attribute, cuKernelGetAttribute, (int*, int, void*, int))                                        \
  FUNCTION(set_kernel_attribute, cuKernelSetAttribute, (int, int, void*, int))                                     \
  FUNCTION(launch_kernel, cuLaunchKernel,                                                                          \
           (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**))

struct Driver {
#define FUNCTION(member, symbol, parameters) int(*member) parameters = nullptr;
  FUNCTIONS(FUNCTION)
#undef FUNCTION
  int error = 0, version = 0;
  std::string reason;  // the system's words when it does not load

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      const char* why = dlerror();
      reason = why ? why : "libcuda.so.1 does not load";
      error = kNoDriver;
      return;
    }
    const auto get_version = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
    if (!get_version || get_version(&version) || version < kDriverNeeded) {
      error = kOldDriver;
      return;
    }
#define FUNCTION(member, symbol, parameters)                             \
  member = reinterpret_cast<int(*) parameters>(dlsym(library, #symbol)); \
  if (!member) error = kOldDriver;
    FUNCTIONS(FUNCTION)
#undef FUNCTION
    if (!error) error = init(0);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// Loading is not allowed while a stream is captured into a graph, unless the thread says that it knows what it does.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().capture_mode(&mode_); }
  ~RelaxedCapture() { driver().capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = kRelaxedCapture;
};

// The device of the thread's context. A thread that has not yet called CUDA has none: it gets that of the stream, or
// the first device's, as the CUDA runtime does.
int current_device(void* stream, int* device) {
  const Driver& d = driver();
  if (d.error) return d.error;
  void* context = nullptr;
  if (const int error = d.current_context(&context)) return error;
  if (!context) {
    const bool named = reinterpret_cast<uintptr_t>(stream) > 2;  // 0 to 2 stand for the default streams
    if (const int error = named ? d.stream_context(stream, &context) : d.retain_primary(&context, 0)) return error;
    if (const int error = d.set_context(context)) return error;
  }
  return d.context_device(device);
}

int capability_of(int device) {
  int major = 0, minor = 0;
  driver().device_attribute(&major, kMajor, device);
  driver().device_attribute(&minor, kMinor, device);
  return 10 * major + minor;
}

bool runs_on(const Arch& arch, int capability) {
  if (arch.suffix == 'a') return capability == arch.capability;
  const bool family = capability / 10 == arch.capability / 10 && capability >= arch.capability;
  if (arch.suffix == 'f') return family;
  return family || (arch.ptx && capability >= arch.capability);
}

thread_local int refused_capability = 0;

int check_arch(int device) {
  static std::atomic<int> known[kMaxDevices];  // 0: not looked at, 1: has an image, else minus the capability
  int found = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    const int capability = capability_of(device);
    found = -capability;
    for (int i = 0; i < kArchCount; ++i) {
      if (runs_on(kArches[i], capability)) found = 1;
    }
    if (device < kMaxDevices) known[device].store(found, std::memory_order_relaxed);
  }
  if (found == 1) return 0;
  refused_capability = -found;
  return kNoArch;
}

struct Kernel {
  void* handle = nullptr;            // CUkernel: one for all contexts
  std::atomic<uint64_t> devices{0};  // it is loaded on
};

class Kernels {
 public:
  int find(std::string_view name, int device, Kernel** kernel) {
    const uint64_t bit = uint64_t{1} << (device % kMaxDevices);
    {
      std::shared_lock lock(mutex_);
      const auto place = known_.find(name);
      if (place != known_.end() && place->second.devices.load(std::memory_order_acquire) & bit) {
        *kernel = &place->second;
        return 0;
      }
    }
    std::unique_lock lock(mutex_);
    const RelaxedCapture relaxed;
    if (const int error = load_images()) return error;
    const auto place = known_.try_emplace(std::string(name)).first;
    Kernel& found = place->second;
    for (size_t i = 0; !found.handle && i < libraries_.size(); ++i) {
      const int error = driver().get_kernel(&found.handle, libraries_[i], place->first.c_str());
      if (error && error != kNotFound) return error;
      if (error) found.handle = nullptr;
    }
    if (!found.handle) return kNoKernel;
    void* function;
    if (const int error = driver().load_kernel(&function, found.handle)) return error;
    found.devices.fetch_or(bit, std::memory_order_release);
    *kernel = &found;
    return 0;
  }

 private:
  // After a failure the next call goes on where this one stopped.
  int load_images() {
    while (libraries_.size() < static_cast<size_t>(kImageCount)) {
      void* library = nullptr;
      const void* data = kImages[libraries_.size()].data;
      if (const int error = driver().load_library(&library, data, nullptr, nullptr, 0, nullptr, nullptr, 0))
        return error;
      libraries_.push_back(library);
    }
    return 0;
  }

  std::shared_mutex mutex_;
  std::vector<void*> libraries_;
  std::map<std::string, Kernel, std::less<>> known_;
};

// Never freed: threads may still launch while the process ends, and by then the driver has freed the images itself.
Kernels& kernels() {
  static Kernels* const all = new Kernels;
  return *all;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string driver_text() {
  return "version " + std::string(kDriverName) + " or newer (CUDA " + version_text(kDriverNeeded) + ")";
}

std::string text_of(int code) {
  const Driver& d = driver();
  switch (code) {
    case kNoDriver:
      return d.reason + ": there is no NVIDIA driver; CPU tensors go on working. CUDA tensors need a driver of " +
             driver_text();
    case kOldDriver:
      return "the NVIDIA driver is too old: it supports CUDA " + version_text(d.version) + ", these kernels need " +
             driver_text() + "; CPU tensors go on working";
    case kNoArch:
      return "this GPU has compute capability " + capability_text(refused_capability) +
             ", and the kernels are built for " + kArchList +
             "; build them with TORCH_CUDA_ARCH_LIST=" + capability_text(refused_capability);
    case kNoKernel:
      return "no device image of this library has such a kernel";
  }
  const char *name = nullptr, *words = nullptr;
  if (d.error_name) d.error_name(code, &name);
  if (d.error_string) d.error_string(code, &words);
  std::string text = (name ? name : "CUDA error " + std::to_string(code)) + (words ? std::string(": ") + words : "");
  if (code == kNoBinary || code == kNewPtx) {
    text += "; the kernels are built for " + std::string(kArchList) + " by CUDA " + kToolkit +
            ", the driver supports CUDA " + version_text(d.version);
  }
  return text;
}

}  // namespace

int launch(const char* name, Dim grid, unsigned threads, unsigned shared_bytes, void* stream, void** arguments) {
  if (!grid.x || !grid.y || !grid.z) return 0;
  int device;
  if (const int error = current_device(stream, &device)) return error;
  if (const int error = check_arch(device)) return error;
  Kernel* kernel;
  if (const int error = kernels().find(name, device, &kernel)) return error;
  const Driver& d = driver();
  if (shared_bytes) {  // beyond the default a kernel has to ask
    int allowed = 0;
    if (const int error = d.kernel_attribute(&allowed, kMaxDynamicShared, kernel->handle, device)) return error;
    if (shared_bytes > static_cast<unsigned>(allowed)) {
      const int wanted = static_cast<int>(shared_bytes);
      if (const int error = d.set_kernel_attribute(kMaxDynamicShared, wanted, kernel->handle, device)) return error;
    }
  }
  return d.launch_kernel(kernel->handle, grid.x, grid.y, grid.z, threads, 1, 1, shared_bytes, stream, arguments,
                         nullptr);
}

int check() {
  int device;
  const int error = current_device(nullptr, &device);
  return error ? error : check_arch(device);
}

int multiprocessors() {
  static std::atomic<int> known[kMaxDevices];
  int device;
  if (current_device(nullptr, &device)) return 1;
  if (device < kMaxDevices) {
    if (const int count = known[device].load(std::memory_order_relaxed)) return count;
  }
  int count = 0;
  if (driver().device_attribute(&count, kMultiprocessors, device) || count < 1) return 1;
  if (device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

const char* error_text(int code) {
  thread_local std::string text;
  text = text_of(code);
  return text.c_str();
}

}  // namespace rlhf_fast::cuda
