// Advice to the operating system about large outputs.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlhf {
namespace {  // compiled per instruction set: never merged by the linker

// Asks for 2 MiB pages where [p, p + bytes) has not been written yet. A fresh tensor of 200 MB
// takes 50 000 page faults otherwise, which cost more than computing a gradient into it: 31 against
// 17 ns for 16 floats. Advice alone: it cannot fail in a way that matters.
inline void advise_large_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace rlhf
