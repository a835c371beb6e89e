// Policy, value and PPO losses on the CPU: losses, gradients and statistics in one pass over the
// tokens, behind a count of the mask (the denominator) and, for gspo, the rows' mean log-ratios.
//
// A part of a row is worked on by one thread, its sums are kept, and one thread adds them in the
// order of the tokens: the result does not depend on the number of threads.
#include "ppo_loss/ppo_loss.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/tokens.h"

namespace rlhf::RLHF_ISA {
namespace {

// One function per kind: pointers, options and sums stay in registers.
#define RLHF_INLINE __attribute__((always_inline)) inline

// Seven tensors are read at once, more than the processor follows by itself: 0.62 for 0.74 ms
// (256 x 1024 tokens, one thread).
constexpr int kAhead = 512;      // floats
constexpr int64_t kPart = 4096;  // tokens of a part, and at least of a thread's turn

// A part of a row, and what its terms are multiplied with.
struct Part {
  int64_t begin, end;    // tokens, counted over the batch
  float factor;          // of a gradient: the row's weight / denominator
  float mean_log_ratio;  // of the row, gspo
};

RLHF_INLINE Vec live_load(const float* p, int64_t t, int n, IntVec live) {
  __builtin_prefetch(p + t + kAhead);
  return live ? load_some(p + t, n) : Vec{};
}

struct Sums {
  Sum policy, value, entropy, kl, difference, k3, ratio;
  Vec ratio_min = splat<Vec>(kInfinity), ratio_max = {};
  IntVec clip_low = {}, clip_high = {}, dual_clip = {}, value_clip = {};
};

int total(IntVec counts) {
  int sum = 0;
  for (int i = 0; i < W; ++i) sum += counts[i];
  return sum;
}

// KL against the reference of tokens with log-prob `lp`; returns what it adds to their slope.
RLHF_INLINE Vec kl_tokens(const PpoLossArgs& args, Vec lp, int64_t t, int n, IntVec live,
                          Sums& sums) {
  const Vec ref = live_load(args.ref_logprob, t, n, live);
  const auto kl = kl_estimate(difference(lp, ref), static_cast<KlEstimator>(args.estimator));
  sums.kl.add(live ? kl.value : Vec{});
  if (args.kl_coef == 0.0f) return Vec{};
  const IntVec finite = (abs(lp) < kInfinity) & (abs(ref) < kInfinity);
  return finite ? kl.slope * args.kl_coef : Vec{};
}

template <Kind kind>
RLHF_INLINE void policy_tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n,
                               IntVec live, Sums& sums) {
  const Vec lp = live_load(args.logprob, t, n, live);
  const Vec advantage = live_load(args.advantages, t, n, live);
  const Vec d = difference(lp, live_load(args.old_logprob, t, n, live));
  const Vec log_ratio = clamp(d, splat<Vec>(-kLogRatioLimit), splat<Vec>(kLogRatioLimit));
  const auto e = exponentials(log_ratio);
  Vec rho = e.exp;
  if constexpr (kind == Kind::gspo) rho = exp_negative(splat<Vec>(part.mean_log_ratio));
  const Clip clip = {args.clip_low, args.clip_high, args.dual_clip};
  auto term = policy_term<kind>(lp, advantage, rho, abs(d) > kLogRatioLimit, clip);
  Vec weight = splat<Vec>(1.0f);
  if (args.weights) {
    weight = live_load(args.weights, t, n, live);
    term.loss *= weight;
    term.slope *= weight;
  }
  sums.policy.add(term.loss);
  sums.difference.add(d);
  sums.k3.add(e.minus_line);
  const Vec counted = live ? rho : Vec{};
  sums.ratio.add(counted);
  sums.ratio_min = min(live ? rho : splat<Vec>(kInfinity), sums.ratio_min);
  sums.ratio_max = max(counted, sums.ratio_max);
  sums.clip_low -= term.low & live;  // all ones is -1
  sums.clip_high -= term.high & live;
  sums.dual_clip -= term.dual & live;
  if (args.ref_logprob) term.slope += kl_tokens(args, lp, t, n, live, sums);
  if (args.grad_logprob)
    store_some(args.grad_logprob + t, live ? term.slope * part.factor : Vec{}, n);
  if (args.grad_advantages)
    store_some(args.grad_advantages + t, live ? -lp * weight * part.factor : Vec{}, n);
}

RLHF_INLINE void value_tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n,
                              IntVec live, Sums& sums) {
  const auto term =
      value_term(live_load(args.values, t, n, live), live_load(args.old_values, t, n, live),
                 live_load(args.returns, t, n, live), args.value_clip);
  sums.value.add(term.loss);
  sums.value_clip -= term.clipped & live;
  if (!args.grad_values) return;
  const float factor = args.value_coef * part.factor;
  const IntVec some = args.value_coef != 0.0f ? live : IntVec{};
  store_some(args.grad_values + t, some ? term.slope * factor : Vec{}, n);
}

template <Kind kind>
RLHF_INLINE void tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n, Sums& sums) {
  const IntVec live = load_mask(args.mask ? args.mask + t : nullptr, n);
  if (args.logprob) policy_tokens<kind>(args, part, t, n, live, sums);
  if (args.values) value_tokens(args, part, t, n, live, sums);
  if (args.entropy) {
    sums.entropy.add(live_load(args.entropy, t, n, live));
    const Vec slope = splat<Vec>(-args.entropy_coef * part.factor);
    if (args.grad_entropy) store_some(args.grad_entropy + t, live ? slope : Vec{}, n);
  }
}

template <Kind kind>
Partial part_sums(const PpoLossArgs args, const Part part) {  // by value: no store changes them
  Sums sums;
  int64_t t = part.begin;
  for (; t + W <= part.end; t += W) tokens<kind>(args, part, t, W, sums);
  if (t < part.end) tokens<kind>(args, part, t, static_cast<int>(part.end - t), sums);
  Partial out = {sums.policy.total(),
                 sums.value.total(),
                 sums.entropy.total(),
                 sums.kl.total(),
                 sums.difference.total(),
                 sums.k3.total(),
                 sums.ratio.total(),
                 kInfinity,
                 0.0f,
                 total(sums.clip_low),
                 total(sums.clip_high),
                 total(sums.dual_clip),
                 total(sums.value_clip)};
  for (int i = 0; i < W; ++i) {
    out.ratio_min = std::min(out.ratio_min, sums.ratio_min[i]);
    out.ratio_max = std::max(out.ratio_max, sums.ratio_max[i]);
  }
  return out;
}

Partial part_sums(const PpoLossArgs& args, const Part& part) {
  switch (static_cast<Kind>(args.kind)) {
    case Kind::gspo:
      return part_sums<Kind::gspo>(args, part);
    case Kind::reinforce:
      return part_sums<Kind::reinforce>(args, part);
    case Kind::cispo:
      return part_sums<Kind::cispo>(args, part);
    case Kind::sapo:
      return part_sums<Kind::sapo>(args, part);
    default:
      return part_sums<Kind::clipped>(args, part);
  }
}

// The mean of the clamped log-ratios of a row's `count` tokens.
float mean_log_ratio(const PpoLossArgs& args, int64_t row, int64_t count) {
  Sum sum;
  const int64_t end = (row + 1) * args.length;
  for (int64_t t = row * args.length; t < end; t += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, end - t));
    const IntVec live = load_mask(args.mask ? args.mask + t : nullptr, n);
    const Vec d =
        difference(live_load(args.logprob, t, n, live), live_load(args.old_logprob, t, n, live));
    sum.add(clamp(d, splat<Vec>(-kLogRatioLimit), splat<Vec>(kLogRatioLimit)));
  }
  return static_cast<float>(sum.total() / std::max<int64_t>(count, 1));
}

}  // namespace

void ppo_loss(const PpoLossArgs& args) {
  const int64_t parts = (args.length + kPart - 1) / kPart;
  const int64_t grain = std::max<int64_t>(1, kPart / args.length);
  const bool gspo = args.logprob && static_cast<Kind>(args.kind) == Kind::gspo;
  std::vector<int64_t> counts(args.rows);
  std::vector<float> means(gspo ? args.rows : 0);
  // A byte per token: only long masks are worth waking threads for.
  parallel_for(args.rows, gspo ? grain : 16 * grain, args.threads, [&](int64_t row) {
    counts[row] = count_tokens(args.mask ? args.mask + row * args.length : nullptr, args.length);
    if (gspo) means[row] = mean_log_ratio(args, row, counts[row]);
  });
  int64_t all = 0, sequences = 0;
  for (const int64_t count : counts) {
    all += count;
    sequences += count > 0;
  }
  const double denominator = denominator_of(args, all, sequences);

  std::vector<Partial> partials(args.rows * parts);
  parallel_for(args.rows * parts, grain, args.threads, [&](int64_t i) {
    const int64_t row = i / parts, begin = row * args.length + i % parts * kPart;
    const double factor = row_scale(args.reduction, counts[row]) / denominator;
    partials[i] = part_sums(args, {begin, std::min(begin + kPart, (row + 1) * args.length),
                                   static_cast<float>(factor), gspo ? means[row] : 0.0f});
  });
  Totals totals;
  for (int64_t i = 0; i < args.rows * parts; ++i)
    add(totals, partials[i], row_scale(args.reduction, counts[i / parts]));
  finish(args, totals, all, denominator);
}

}  // namespace rlhf::RLHF_ISA
