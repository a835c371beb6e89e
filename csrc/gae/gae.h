// Generalised advantage estimation: arguments, and the formulas that CPU and CUDA share.
//
//   delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + slope_t A_{t+1},   return_t = A_t + V_t
//
// slope_t is gamma lambda, or 0 where a trace ends. Masked tokens are left out ("carry") or count
// as zeros. The recursion composes affine maps x -> slope x + offset, which is associative
// (Blelloch, "Prefix sums and their applications", 1990).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace rlhf {

struct GaeArgs {
  const float* rewards;    // [rows, length], or [length] packed
  const float* values;     // as rewards; null: zeros
  const int64_t* offsets;  // null, or [rows + 1]: row b is [offsets[b], offsets[b + 1])
  const uint8_t* mask;     // as rewards, or null: every token counts
  const uint8_t* dones;    // as rewards, or null: none
  const float* bootstrap;  // [rows], or null: bootstrap_value for each
  float* advantages;       // as rewards
  float* returns;          // as rewards, or null
  int64_t rows, length;
  float bootstrap_value, gamma;
  float decay, decay_returns;  // gamma lambda of the advantages and of the returns
  bool carry;
  int threads;  // CPU
};

namespace cuda {
void gae(const GaeArgs& args, int device, void* stream);
}

}  // namespace rlhf

RLHF_CPU_KERNEL(gae, GaeArgs)

#if defined(RLHF_ISA)
#include "common/math.h"

namespace rlhf::RLHF_ISA {

// r + gamma next - v. Two roundings more than a fused form would need, but those of plain PyTorch.
template <class F>
RLHF_HD F temporal_difference(F reward, F value, F next, float gamma) {
  return reward + next * gamma - value;
}

// slope x + offset; a slope of 0 cuts off even NaN.
template <class F>
RLHF_HD F affine(F slope, F offset, F x) {
  return slope == 0.0f ? offset : fma(slope, x, offset);
}

}  // namespace rlhf::RLHF_ISA
#endif
