// Token log-probability and entropy of rows of logits: arguments, and the formulas that CPU and
// CUDA share. With z the capped logits, m their maximum and rate = 1 / temperature,
//
//   d_j = rate (z_j - m),   s = log sum exp d,   logprob = d_y - s,   entropy = s - sum p d
//   d logprob / dz_j = rate ([j = y] - p_j),   d entropy / dz_j = -rate p_j (d_j - (s - entropy))
//
// The maximum is taken before the temperature: rate (z - m) loses nothing under a common offset.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace rlhf {

// The id of a token that is not among a row's columns, for rows that are a part of a vocabulary.
// The backward pass takes its log-prob to be finite; that of the forward pass says nothing.
constexpr int64_t kElsewhere = -(int64_t{1} << 62);

// Row n starts at (n / inner) stride_outer + (n % inner) stride_inner and is dense.
struct LogitRows {
  const void* logits;
  Dtype dtype;
  int64_t rows, vocabulary, inner, stride_outer, stride_inner;
  const int64_t* ids;
  const uint8_t* mask;        // null: every token counts
  const float* temperatures;  // null: `temperature` for each
  float temperature;
  float softcap;  // 0: none
  int64_t ignore_index;
  int threads;  // CPU
};

struct LogprobArgs {
  LogitRows in;
  float *logprob, *row_max, *log_sum;  // [rows]
  float* entropy;                      // [rows], or null
};

struct LogprobBackwardArgs {
  LogitRows in;
  const float *grad_logprob, *row_max, *log_sum;  // [rows]
  const float *grad_entropy, *entropy;            // [rows], or both null
  void* out;        // [rows, vocabulary]; may be the logits themselves where those are contiguous
  Dtype out_dtype;  // that of the logits, or any for float logits
  const int64_t* places;  // [rows] or null: see place_of
};

// Calls f(T{}, O{}) with the types of the logits and of their gradient.
template <class Function>
void with_gradient_types(Dtype logits, Dtype gradient, Function f) {
  if (logits == gradient) return with_type(logits, [&](auto type) { f(type, type); });
  with_type(gradient, [&](auto type) { f(float{}, type); });
}

// Values and gradient in one pass: `backward` reads what `forward` writes.
struct LogprobGradArgs {
  LogprobArgs forward;
  LogprobBackwardArgs backward;
};

namespace cuda {
void logprob(const LogprobArgs& args, int device, void* stream);
void logprob_backward(const LogprobBackwardArgs& args, int device, void* stream);
void logprob_and_grad(const LogprobGradArgs& args, int device, void* stream);
}  // namespace cuda

}  // namespace rlhf

RLHF_CPU_KERNEL(logprob, LogprobArgs)
RLHF_CPU_KERNEL(logprob_backward, LogprobBackwardArgs)
RLHF_CPU_KERNEL(logprob_and_grad, LogprobGradArgs)

#if defined(RLHF_ISA)
#include "common/math.h"

namespace rlhf::RLHF_ISA {

RLHF_HD bool is_live(const LogitRows& in, int64_t row) {
  return in.ids[row] != in.ignore_index && (!in.mask || in.mask[row]);
}

template <class T>
RLHF_HD const T* row_of(const LogitRows& in, int64_t row) {
  return static_cast<const T*>(in.logits) + row / in.inner * in.stride_outer +
         row % in.inner * in.stride_inner;
}

// The row of `out` that a row's gradient goes to, negative for none.
RLHF_HD int64_t place_of(const LogprobBackwardArgs& args, int64_t row) {
  return args.places ? args.places[row] : row;
}

// 1 / temperature, at most 2e38 so that 0 * rate stays 0 at any legal temperature.
RLHF_HD float rate_of(const LogitRows& in, int64_t row) {
  const float rate = 1.0f / (in.temperatures ? in.temperatures[row] : in.temperature);
  return rate < 2e38f ? rate : 2e38f;
}

// What the backward pass needs to know of a row; `g` and `h` are the upstream gradients times rate.
struct RowGradient {
  float row_max, rate, log_sum, g, h, mean, softcap;
};

template <bool ENTROPY>
RLHF_HD RowGradient row_gradient(const LogprobBackwardArgs& args, int64_t row) {
  RowGradient c;
  c.row_max = args.row_max[row] == -kInfinity ? 0.0f : args.row_max[row];
  c.rate = rate_of(args.in, row);
  c.log_sum = args.log_sum[row];
  c.g = args.grad_logprob[row] * c.rate;
  c.h = ENTROPY ? args.grad_entropy[row] * c.rate : 0.0f;
  c.mean = ENTROPY ? c.log_sum - args.entropy[row] : 0.0f;
  c.softcap = args.in.softcap;
  return c;
}

// Gradient of the logit z: that of the chosen token where `CHOSEN`, where the factor 1 - p is
// -expm1(logprob), which does not cancel when p is close to 1. `g` is 0 for a log-prob of -inf.
template <bool ENTROPY, bool CHOSEN, class F>
RLHF_HD F logit_gradient(F z, const RowGradient& c) {
  F slope = splat<F>(1.0f);
  if (c.softcap != 0.0f) {  // the same for the whole call
    const Capped<F> capped = softcapped(z, c.softcap);
    z = capped.value;
    slope = capped.slope;
  }
  const F d = (z - c.row_max) * c.rate;
  const F log_p = d - c.log_sum;
  // The exponential may stay above 0, but a logit of -inf must get a gradient of exactly 0.
  const F p = log_p < -87.0f ? splat<F>(0.0f) : fast_exp_negative(log_p);
  F du = p * -c.g;
  if (CHOSEN) {
    const F g = log_p == -kInfinity ? splat<F>(0.0f) : splat<F>(c.g);
    du = -g * expm1_negative(log_p);
  }
  // The floor keeps 0 * -inf out.
  if (ENTROPY) du = du - p * (max(splat<F>(-256.0f), d) - c.mean) * c.h;
  return c.softcap != 0.0f ? du * slope : du;
}

}  // namespace rlhf::RLHF_ISA
#endif
