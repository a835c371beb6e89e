// A linear layer for the few rows of a decode step: arguments.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace rlhf {

// out[m, n] = bias[n] + sum_k x[m, k] weight[n, k]; everything is dense, the weight as it is or
// transposed.
struct DecodeLinearArgs {
  const float* x;       // [rows, size]
  const float* weight;  // [outputs, size]
  const float* bias;    // [outputs], or null
  float* out;           // [rows, outputs]
  int64_t rows, size, outputs;
  bool transposed;  // the weight is stored as [size, outputs]
  int threads;
};

}  // namespace rlhf

RLHF_CPU_KERNEL(decode_linear, DecodeLinearArgs)
