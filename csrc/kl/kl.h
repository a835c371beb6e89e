// KL divergence of a policy from its reference: arguments, and the formulas that CPU and CUDA
// share.
//
// Sampled, with d = logprob - ref_logprob:
//
//   k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = expm1(-d) + d
//
// Exact, with z and q the logits of both, m their maxima and rate = 1 / temperature:
//
//   d_j = rate (z_j - m),   s = log sum exp d,   p = exp(d - s);   r_j, s_ref likewise from q
//   kl = sum p (d - r) - s + s_ref
//   d kl / dz_j = rate p_j (d_j - r_j - sum p (d - r))
#pragma once

#include "logprob/logprob.h"

namespace rlhf {

enum class KlEstimator : int;

struct KlEstimateArgs {
  const float *logprob, *ref_logprob;  // [count]
  const uint8_t* mask;                 // [count]; null: every token counts
  const float* grad;                   // [count], read by the backward pass alone
  float* out;                          // [count]: the estimate, or the gradient of logprob
  int64_t count;
  KlEstimator estimator;
  float clamp_in, clamp_out;  // +inf: none
  int threads;                // CPU
};

struct KlArgs {
  LogitRows in;
  LogitRows ref;  // logits, dtype, inner and strides only
  float *kl, *logprob, *ref_logprob, *entropy, *row_max, *log_sum, *ref_row_max, *ref_log_sum;
};

struct KlBackwardArgs {
  LogitRows in;
  LogitRows ref;                                                    // as above
  const float* grad_kl;                                             // [rows]
  const float *grad_logprob, *grad_entropy;                         // [rows] or null
  const float *row_max, *log_sum, *ref_row_max, *ref_log_sum, *kl;  // [rows]
  const float* entropy;  // [rows]; null without grad_entropy
  void* out;  // [rows, vocabulary]; may be the policy's logits where those are contiguous
};

// Values and gradient in one pass: `backward` reads what `forward` writes.
struct KlGradArgs {
  KlArgs forward;
  KlBackwardArgs backward;
};

namespace cuda {
void kl_estimate(const KlEstimateArgs& args, int device, void* stream);
void kl_estimate_backward(const KlEstimateArgs& args, int device, void* stream);
void kl(const KlArgs& args, int device, void* stream);
void kl_backward(const KlBackwardArgs& args, int device, void* stream);
void kl_and_grad(const KlGradArgs& args, int device, void* stream);
}  // namespace cuda

}  // namespace rlhf

RLHF_CPU_KERNEL(kl_estimate, KlEstimateArgs)
RLHF_CPU_KERNEL(kl_estimate_backward, KlEstimateArgs)
RLHF_CPU_KERNEL(kl, KlArgs)
RLHF_CPU_KERNEL(kl_backward, KlBackwardArgs)
RLHF_CPU_KERNEL(kl_and_grad, KlGradArgs)

#if defined(RLHF_ISA)
#include "ppo_loss/formulas.h"

namespace rlhf::RLHF_ISA {

// ------------------------------------------------------------------- sampled

template <class F>
RLHF_HD F kl_estimate_of(F logprob, F ref_logprob, const KlEstimateArgs& args) {
  const F in = splat<F>(args.clamp_in), out = splat<F>(args.clamp_out);
  const F d = clamp(difference(logprob, ref_logprob), -in, in);
  return clamp(kl_estimate(d, args.estimator).value, -out, out);
}

// Gradient of logprob: 0 beyond either clamp and where a log-prob is infinite.
template <class F>
RLHF_HD F kl_estimate_gradient(F grad, F logprob, F ref_logprob, const KlEstimateArgs& args) {
  const F infinity = splat<F>(kInfinity);
  const F d = difference(logprob, ref_logprob);
  const Estimate<F> k = kl_estimate(d, args.estimator);
  const Mask<F> finite = (abs(logprob) < infinity) & (abs(ref_logprob) < infinity);
  const Mask<F> inside =
      (abs(d) <= splat<F>(args.clamp_in)) & (abs(k.value) <= splat<F>(args.clamp_out));
  return finite & inside ? grad * k.slope : splat<F>(0.0f);
}

// ------------------------------------------------------------------- exact

// What the backward pass needs to know of a row. `k`, `g` and `h` are the upstream gradients of KL,
// log-prob and entropy times rate.
struct KlRow {
  float rate, row_max, log_sum, ref_row_max;
  float k, mean, lost;    // mean + lost = sum p (d - r): it cancels where one token has all of p
  float g;                // 0 for a log-prob of -inf, NaN for an unknown id out of range
  float h, entropy_mean;  // entropy_mean = sum p d
  bool with_kl;           // false where KL is +inf: it gets no gradient, but what is beside it does
};

// `chosen` is the logit of the token, any number for kElsewhere, NaN for another id out of range.
RLHF_HD KlRow kl_row(const KlBackwardArgs& args, int64_t row, float chosen) {
  KlRow c;
  c.rate = rate_of(args.in, row);
  c.row_max = args.row_max[row] == -kInfinity ? 0.0f : args.row_max[row];
  c.ref_row_max = args.ref_row_max[row] == -kInfinity ? 0.0f : args.ref_row_max[row];
  c.log_sum = args.log_sum[row];
  c.with_kl = args.kl[row] != kInfinity;
  c.k = c.with_kl ? args.grad_kl[row] * c.rate : 0.0f;
  const double mean = static_cast<double>(args.kl[row]) + c.log_sum - args.ref_log_sum[row];
  c.mean = static_cast<float>(mean);
  c.lost = c.with_kl ? static_cast<float>(mean - c.mean) : 0.0f;
  c.g = args.grad_logprob && chosen != -kInfinity
            ? args.grad_logprob[row] * c.rate + (chosen - chosen)
            : 0.0f;
  c.h = args.grad_entropy ? args.grad_entropy[row] * c.rate : 0.0f;
  c.entropy_mean = args.grad_entropy ? c.log_sum - args.entropy[row] : 0.0f;
  return c;
}

// Gradient of the policy's logit z, q being the reference's: that of the chosen token where
// `CHOSEN`, where the factor 1 - p is -expm1(logprob), which does not cancel when p is close to 1.
template <bool KL, bool CHOSEN, class F>
RLHF_HD F kl_gradient(F z, F q, const KlRow& c) {
  const F d = (z - c.row_max) * c.rate;
  const F log_p = d - c.log_sum;
  // A logit of -inf must get a gradient of exactly 0, whatever the rest of it comes to.
  const auto none = log_p < -87.0f;
  const F p = fast_exp_negative(log_p);
  F slope = (max(splat<F>(-256.0f), d) - c.entropy_mean) * -c.h;
  if (KL) slope = slope + (d - (q - c.ref_row_max) * c.rate - c.mean - c.lost) * c.k;
  const F zero = splat<F>(0.0f);
  if (CHOSEN) return (none ? zero : p * slope) - expm1_negative(log_p) * c.g;
  return none ? zero : p * (slope - c.g);
}

}  // namespace rlhf::RLHF_ISA
#endif
