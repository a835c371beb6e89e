// Terms, gradients and sums of neighbouring tokens, by one thread.
#pragma once

#include "ppo_loss/counts.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kQuad = 4;           // neighbouring tokens of a thread: 16 bytes
constexpr int kUnit = 32 * kQuad;  // tokens of a row that a warp takes at once

// A thread's neighbouring tokens.
struct Quad {
  float x[kQuad];
};

struct Place {
  int64_t i;      // of the first token
  int inside;     // tokens of the row, at least 1
  unsigned live;  // bit k: token k counts
  bool aligned;   // 16 bytes at once; then all kQuad are inside
};

// 0 where no token counts: what stands there is not looked at, and mostly not read.
RLHF_HD Quad load_quad(const float* p, const Place& at) {
  Quad quad = {};
  if (at.aligned && at.live) {
    const float4 a = *reinterpret_cast<const float4*>(p + at.i);
    quad = {a.x, a.y, a.z, a.w};
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const bool live = at.live >> k & 1u;
    if (!at.aligned && live) quad.x[k] = p[at.i + k];
    quad.x[k] = live ? quad.x[k] : 0.0f;
  }
  return quad;
}

RLHF_HD void store_quad(float* p, const Place& at, const Quad& quad) {
  if (at.aligned) {
    const float4 a = make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
    *reinterpret_cast<float4*>(p + at.i) = a;
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < at.inside) p[at.i + k] = quad.x[k];
}

RLHF_HD unsigned live_tokens(const PpoLossArgs& args, const Place& at) {
  const unsigned inside = (1u << at.inside) - 1u;
  if (!args.mask) return inside;
  unsigned live = 0;
  if (at.aligned) {
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(args.mask + at.i);
    return __vsetne4(bytes, 0u) * 0x01020408u >> 24;  // bit 8 k goes to bit 24 + k
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < at.inside && args.mask[at.i + k]) live |= 1u << k;
  return live;
}

// What the terms of a row are multiplied with.
struct Weights {
  double scale;          // of a loss
  float factor;          // of a gradient: scale / denominator
  float mean_log_ratio;  // gspo
};

// KL against the reference of a token with log-prob `lp`; returns what it adds to its slope.
RLHF_HD float kl_token(const PpoLossArgs& args, float lp, float ref, double scale, Sums& sums) {
  const auto kl = kl_estimate(difference(lp, ref), static_cast<KlEstimator>(args.estimator));
  sums.kl += kl.value * scale;
  sums.mean_kl += kl.value;
  const bool finite = abs(lp) < kInfinity && abs(ref) < kInfinity;
  return finite && args.kl_coef != 0.0f ? kl.slope * args.kl_coef : 0.0f;
}

template <Kind kind>
RLHF_HD void policy_quad(const PpoLossArgs& args, const Place& at, const Weights& row, Sums& sums) {
  const Quad lp = load_quad(args.logprob, at), old = load_quad(args.old_logprob, at);
  const Quad advantage = load_quad(args.advantages, at);
  const Quad weight = args.weights ? load_quad(args.weights, at) : Quad{1.0f, 1.0f, 1.0f, 1.0f};
  const Quad ref = args.ref_logprob ? load_quad(args.ref_logprob, at) : Quad{};
  const Clip clip = {args.clip_low, args.clip_high, args.dual_clip};
  Quad grad = {}, grad_advantage = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    const float d = difference(lp.x[k], old.x[k]);
    const auto e = exponentials(log_ratio_of(d));
    const float rho = kind == Kind::gspo ? exp_negative(row.mean_log_ratio) : e.exp;
    const bool outside = abs(d) > kLogRatioLimit;
    const auto term = policy_term<kind>(lp.x[k], advantage.x[k], rho, outside, clip);
    const float loss = term.loss * weight.x[k];
    float slope = term.slope * weight.x[k];
    sums.policy += loss * row.scale;
    sums.difference += d;
    sums.k3 += e.minus_line;
    sums.ratio += rho;
    sums.ratio_min = min(rho, sums.ratio_min);
    sums.ratio_max = max(rho, sums.ratio_max);
    sums.clip_low += term.low;
    sums.clip_high += term.high;
    sums.dual_clip += term.dual;
    if (args.ref_logprob) slope += kl_token(args, lp.x[k], ref.x[k], row.scale, sums);
    grad.x[k] = slope * row.factor;
    grad_advantage.x[k] = -lp.x[k] * weight.x[k] * row.factor;
  }
  store_quad(args.grad_logprob, at, grad);
  if (args.grad_advantages) store_quad(args.grad_advantages, at, grad_advantage);
}

RLHF_HD void value_quad(const PpoLossArgs& args, const Place& at, const Weights& row, Sums& sums) {
  const Quad value = load_quad(args.values, at), old_value = load_quad(args.old_values, at);
  const Quad target = load_quad(args.returns, at);
  Quad grad = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    const auto term = value_term(value.x[k], old_value.x[k], target.x[k], args.value_clip);
    sums.value += term.loss * row.scale;
    sums.value_clip += term.clipped;
    if (args.value_coef != 0.0f) grad.x[k] = term.slope * (args.value_coef * row.factor);
  }
  store_quad(args.grad_values, at, grad);
}

RLHF_HD void entropy_quad(const PpoLossArgs& args, const Place& at, const Weights& row,
                          Sums& sums) {
  const Quad entropy = load_quad(args.entropy, at);
  Quad grad = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    sums.entropy += entropy.x[k] * row.scale;
    sums.mean_entropy += entropy.x[k];
    grad.x[k] = -args.entropy_coef * row.factor;
  }
  store_quad(args.grad_entropy, at, grad);
}

// Whether each row starts 16 bytes aligned, in every tensor that there is.
RLHF_HD bool rows_aligned(const PpoLossArgs& args) {
  uintptr_t bits = 0;
  for (const float* p :
       {args.logprob, args.old_logprob, args.advantages, args.weights, args.values, args.old_values,
        args.returns, args.entropy, args.ref_logprob, static_cast<const float*>(args.grad_logprob),
        static_cast<const float*>(args.grad_advantages),
        static_cast<const float*>(args.grad_values), static_cast<const float*>(args.grad_entropy)})
    bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0 && reinterpret_cast<uintptr_t>(args.mask) % kQuad == 0 &&
         args.length % kQuad == 0;
}

// Gradients of all tokens; the sums of this thread's.
template <Kind kind>
RLHF_HD Sums walk_tokens(const PpoLossArgs& args, const Workspace& work, double denominator,
                         bool counted) {
  const bool gspo = kind == Kind::gspo && args.logprob;
  const bool per_row = gspo || args.reduction == Reduction::seq_mean_token_mean;
  const auto units_of_row = static_cast<unsigned>((args.length + kUnit - 1) / kUnit);
  const unsigned units = static_cast<unsigned>(args.rows) * units_of_row;
  Sums sums;
  Place at;
  at.aligned = rows_aligned(args);
  Weights weights = {1.0, static_cast<float>(1.0 / denominator), 0.0f};
  for (unsigned unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < units;
       unit += gridDim.x * kWarps) {
    const unsigned row = unit / units_of_row;
    const int64_t t = int64_t{unit % units_of_row} * kUnit + threadIdx.x % 32 * kQuad;
    if (t >= args.length) continue;
    if (per_row) {
      const Row r = row_of(args, work, row, counted, gspo);
      const double scale = row_scale(args.reduction, r.count);
      weights = {scale, static_cast<float>(scale / denominator), r.mean_log_ratio};
    }
    at.i = row * args.length + t;
    at.inside = static_cast<int>(::min(int64_t{kQuad}, args.length - t));
    at.live = live_tokens(args, at);
    if (args.logprob) policy_quad<kind>(args, at, weights, sums);
    if (args.values) value_quad(args, at, weights, sums);
    if (args.entropy) entropy_quad(args, at, weights, sums);
  }
  return sums;
}

}  // namespace
}  // namespace rlhf::cuda
