// Policy, value and PPO losses: arguments, and how token sums become losses and statistics.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace rlhf {

// The statistics' places; STATS of kernels/ppo_loss/reference.py names them.
enum Stat {
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKl,
  kClipFraction,
  kClipFractionLow,
  kClipFractionHigh,
  kValueClipFraction,
  kApproxKlK1,
  kApproxKlK3,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kTokens,
  kDualClipFraction,
  kStats
};

enum class Reduction : int {
  token_mean = 0,
  token_sum = 1,
  seq_mean_token_mean = 2,
  seq_mean_token_sum = 3
};

struct PpoLossArgs {
  // Tokens: [rows, length]. Null: the term is left out.
  const float *logprob, *old_logprob, *advantages, *weights;  // policy; weights alone may be null
  const float *values, *old_values, *returns;                 // value
  const float *entropy, *ref_logprob;
  const uint8_t* mask;  // null: every token counts
  // Gradients for an upstream gradient of 1; null: not wanted.
  float *grad_logprob, *grad_advantages, *grad_values, *grad_entropy;
  float *loss, *stats;      // [1], [kStats]
  const float* normalizer;  // [1], or null: `divisor`, or the denominator of the reduction
  // CUDA: 96 bytes for each of 1024 blocks, then 16 for each part of 4096 tokens of a row.
  void* workspace;
  double divisor;  // negative: none
  int64_t rows, length;
  int kind, estimator;  // Kind, KlEstimator
  Reduction reduction;
  float clip_low, clip_high, dual_clip;  // bounds of the ratio; 0: no dual clip
  float value_clip;                      // negative: none
  float value_coef, entropy_coef, kl_coef;
  int threads;  // CPU
};

namespace cuda {
void ppo_loss(const PpoLossArgs& args, int device, void* stream);
// out = grad * unit, where grad is one number; `out` may be `unit`.
void scale_unit_gradient(const float* grad, const void* unit, void* out, Dtype dtype, int64_t size,
                         int device, void* stream);
}  // namespace cuda

}  // namespace rlhf

RLHF_CPU_KERNEL(ppo_loss, PpoLossArgs)

#if defined(RLHF_ISA)
#include "ppo_loss/formulas.h"

namespace rlhf::RLHF_ISA {

constexpr float kLogRatioLimit = 20.0f;

// What a part of a row adds to losses and statistics.
struct Partial {
  double policy, value, entropy, kl, difference, k3, ratio;  // sums over its tokens
  float ratio_min, ratio_max;
  int clip_low, clip_high, dual_clip, value_clip;  // tokens
};

// Sums over parts; those of a loss with the weight of their row.
struct Totals {
  double policy = 0.0, value = 0.0, entropy = 0.0, kl = 0.0;  // weighted
  double mean_entropy = 0.0, mean_kl = 0.0, difference = 0.0, k3 = 0.0, ratio = 0.0;
  float ratio_min = kInfinity, ratio_max = 0.0f;
  int64_t clip_low = 0, clip_high = 0, dual_clip = 0, value_clip = 0;
};

RLHF_HD double row_scale(Reduction reduction, int64_t count) {
  return reduction == Reduction::seq_mean_token_mean && count > 0 ? 1.0 / count : 1.0;
}

// A denominator of 0 goes with a numerator of 0 (no token counts), and is replaced by 1.
RLHF_HD double denominator_of(const PpoLossArgs& args, int64_t tokens, int64_t sequences) {
  double denominator = static_cast<double>(sequences);
  if (args.normalizer)
    denominator = *args.normalizer;
  else if (args.divisor >= 0.0)
    denominator = args.divisor;
  else if (args.reduction == Reduction::token_mean)
    denominator = static_cast<double>(tokens);
  else if (args.reduction == Reduction::token_sum)
    denominator = 1.0;
  return denominator == 0.0 ? 1.0 : denominator;
}

RLHF_HD void add(Totals& total, const Partial& part, double scale) {
  total.policy += part.policy * scale;
  total.value += part.value * scale;
  total.entropy += part.entropy * scale;
  total.kl += part.kl * scale;
  total.mean_entropy += part.entropy;
  total.mean_kl += part.kl;
  total.difference += part.difference;
  total.k3 += part.k3;
  total.ratio += part.ratio;
  total.ratio_min = part.ratio_min < total.ratio_min ? part.ratio_min : total.ratio_min;
  total.ratio_max = part.ratio_max > total.ratio_max ? part.ratio_max : total.ratio_max;
  total.clip_low += part.clip_low;
  total.clip_high += part.clip_high;
  total.dual_clip += part.dual_clip;
  total.value_clip += part.value_clip;
}

// Loss and statistics. A term with coefficient 0 is left out: an infinite one does no harm.
RLHF_HD void finish(const PpoLossArgs& args, const Totals& total, int64_t tokens,
                    double denominator) {
  const double n = tokens > 0 ? static_cast<double>(tokens) : 1.0;
  float* const stats = args.stats;
  for (int i = 0; i < kStats; ++i) stats[i] = 0.0f;
  stats[kTokens] = static_cast<float>(tokens);
  double loss = 0.0;
  if (args.logprob) {
    loss = total.policy / denominator;
    stats[kPolicyLoss] = static_cast<float>(loss);
    stats[kClipFraction] = static_cast<float>((total.clip_low + total.clip_high) / n);
    stats[kClipFractionLow] = static_cast<float>(total.clip_low / n);
    stats[kClipFractionHigh] = static_cast<float>(total.clip_high / n);
    stats[kDualClipFraction] = static_cast<float>(total.dual_clip / n);
    stats[kApproxKlK1] = static_cast<float>(-total.difference / n);
    stats[kApproxKlK3] = static_cast<float>(total.k3 / n);
    stats[kRatioMean] = static_cast<float>(total.ratio / n);
    // Comparisons pass NaN over, sums do not.
    const bool sound = total.ratio == total.ratio;
    if (tokens > 0) stats[kRatioMin] = sound ? total.ratio_min : stats[kRatioMean];
    if (tokens > 0) stats[kRatioMax] = sound ? total.ratio_max : stats[kRatioMean];
  }
  if (args.values) {
    const double value = total.value / denominator;
    stats[kValueLoss] = static_cast<float>(value);
    stats[kValueClipFraction] = static_cast<float>(total.value_clip / n);
    if (args.value_coef != 0.0f) loss += args.value_coef * value;
  }
  if (args.entropy) {
    stats[kEntropy] = static_cast<float>(total.mean_entropy / n);
    if (args.entropy_coef != 0.0f) loss -= args.entropy_coef * (total.entropy / denominator);
  }
  if (args.ref_logprob) {
    stats[kKl] = static_cast<float>(total.mean_kl / n);
    if (args.kl_coef != 0.0f) loss += args.kl_coef * (total.kl / denominator);
  }
  *args.loss = static_cast<float>(loss);
}

}  // namespace rlhf::RLHF_ISA
#endif
