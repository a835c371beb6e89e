// The logit of a row's token on CUDA, for the rooms that read rows of logits.
#pragma once

#include "common/device.cuh"
#include "logprob/logprob.h"

namespace rlhf::RLHF_ISA {

// The logit of token `y` of the row `z`, 0 for kElsewhere. Ids are not checked on the device: one
// out of range reads nothing and gives NaN.
template <class T>
RLHF_HD float chosen_logit(const LogitRows& in, const T* z, int64_t y) {
  if (y >= 0 && y < in.vocabulary) return to_float(z[y]);
  return y == kElsewhere ? 0.0f : __int_as_float(0x7fc00000);
}

}  // namespace rlhf::RLHF_ISA
