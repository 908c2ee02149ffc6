// Memory advice for large outputs.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlhf_fast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for 2 MiB pages under a buffer about to be filled. A fresh gradient of hundreds of MiB costs more in page faults
// of 4 KiB than in the kernel that writes it. Only a hint: where it is refused nothing changes.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace
}  // namespace rlhf_fast
