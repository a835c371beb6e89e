// Loops over threads of the OpenMP pool, which is torch's own where both use libgomp.
#pragma once

#include <cstdint>

namespace rlhf {
namespace {  // compiled per instruction set: never merged by the linker

// Calls f(i) for i in [0, n), `grain` neighbours per turn, on at most `threads` threads. Which
// thread gets which turn is open, so f must not depend on it.
template <class Function>
void parallel_for(int64_t n, int64_t grain, int threads, const Function& f) {
  const int64_t turns = (n + grain - 1) / grain;
  const int used = static_cast<int>(turns < threads ? turns : threads);
#if defined(_OPENMP)
  if (used > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(used)
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t end = turn * grain + grain < n ? turn * grain + grain : n;
      for (int64_t i = turn * grain; i < end; ++i) f(i);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace
}  // namespace rlhf
