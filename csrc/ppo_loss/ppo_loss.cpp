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
constexpr int kRun = 4;          // vectors
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

// A sum in single precision over the few vectors of a run, and then in double: half the work.
struct RunSum {
  Vec run = {};
  Sum sum;

  void add(Vec x) { run += x; }

  void end_run() {
    sum.add(run);
    run = Vec{};
  }
};

struct PolicySums {
  RunSum policy, kl, difference, k3, ratio;
  Vec ratio_min = splat<Vec>(kInfinity), ratio_max = {};
  IntVec clip_low = {}, clip_high = {}, dual_clip = {};

  void end_run() {
    for (RunSum* sum : {&policy, &kl, &difference, &k3, &ratio}) sum->end_run();
  }
};

struct ValueSums {
  RunSum value;
  IntVec clipped = {};

  void end_run() { value.end_run(); }
};

int total(IntVec counts) {
  int sum = 0;
  for (int i = 0; i < W; ++i) sum += counts[i];
  return sum;
}

// KL against the reference of tokens with log-prob `lp`; returns what it adds to their slope.
RLHF_INLINE Vec kl_tokens(const PpoLossArgs& args, Vec lp, int64_t t, int n, IntVec live,
                          PolicySums& sums) {
  const Vec ref = live_load(args.ref_logprob, t, n, live);
  const auto kl = kl_estimate(difference(lp, ref), static_cast<KlEstimator>(args.estimator));
  sums.kl.add(live ? kl.value : Vec{});
  if (args.kl_coef == 0.0f) return Vec{};
  const IntVec finite = (abs(lp) < kInfinity) & (abs(ref) < kInfinity);
  return finite ? kl.slope * args.kl_coef : Vec{};
}

// A vector of log-probs, and what follows from its log-ratios alone.
struct Ratios {
  IntVec live;
  Vec logprob, difference;
  Exponentials<Vec> exponentials;
};

RLHF_INLINE Ratios ratios(const PpoLossArgs& args, int64_t t, int n) {
  Ratios out;
  out.live = load_mask(args.mask ? args.mask + t : nullptr, n);
  out.logprob = live_load(args.logprob, t, n, out.live);
  out.difference = difference(out.logprob, live_load(args.old_logprob, t, n, out.live));
  out.exponentials =
      exponentials(clamp(out.difference, splat<Vec>(-kLogRatioLimit), splat<Vec>(kLogRatioLimit)));
  return out;
}

template <Kind kind, bool kl>
RLHF_INLINE void policy_tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n,
                               const Ratios& ratios, PolicySums& sums) {
  const auto& [live, lp, d, e] = ratios;
  const Vec advantage = live_load(args.advantages, t, n, live);
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
  // All ones is -1. No clip has a say on a token that does not count: its advantage is 0, and in
  // cispo its ratio 1, which is inside the bounds.
  sums.clip_low -= term.low;
  sums.clip_high -= term.high;
  sums.dual_clip -= term.dual;
  if constexpr (kl) term.slope += kl_tokens(args, lp, t, n, live, sums);
  if (args.grad_logprob)
    store_some(args.grad_logprob + t, live ? term.slope * part.factor : Vec{}, n);
  if (args.grad_advantages)
    store_some(args.grad_advantages + t, live ? -lp * weight * part.factor : Vec{}, n);
}

RLHF_INLINE void value_tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n,
                              ValueSums& sums) {
  const IntVec live = load_mask(args.mask ? args.mask + t : nullptr, n);
  const auto term =
      value_term(live_load(args.values, t, n, live), live_load(args.old_values, t, n, live),
                 live_load(args.returns, t, n, live), args.value_clip);
  sums.value.add(term.loss);
  sums.clipped -= term.clipped;
  if (!args.grad_values) return;
  const float factor = args.value_coef * part.factor;
  const IntVec some = args.value_coef != 0.0f ? live : IntVec{};
  store_some(args.grad_values + t, some ? term.slope * factor : Vec{}, n);
}

RLHF_INLINE void entropy_tokens(const PpoLossArgs& args, const Part& part, int64_t t, int n,
                                RunSum& sum) {
  const IntVec live = load_mask(args.mask ? args.mask + t : nullptr, n);
  sum.add(live_load(args.entropy, t, n, live));
  const Vec slope = splat<Vec>(-args.entropy_coef * part.factor);
  if (args.grad_entropy) store_some(args.grad_entropy + t, live ? slope : Vec{}, n);
}

// f(first token, tokens) for each vector of the part, and sums.end_run() behind each run of them.
template <class Sums, class Function>
RLHF_INLINE void for_each_vector(const Part& part, Sums& sums, const Function& f) {
  int64_t t = part.begin;
  for (; t + kRun * W <= part.end; t += kRun * W) {
    for (int i = 0; i < kRun; ++i) f(t + i * W, W);
    sums.end_run();
  }
  for (; t + W <= part.end; t += W) f(t, W);
  if (t < part.end) f(t, static_cast<int>(part.end - t));
  sums.end_run();
}

// A loop for each term, since the sums of all together do not fit into the registers. The
// arguments are copies: no store changes them.
template <Kind kind, bool kl>
void policy_part(const PpoLossArgs args, const Part part, Partial& out) {
  PolicySums sums;
  int64_t t = part.begin;
  for (; t + kRun * W <= part.end; t += kRun * W) {
    // Exponentials of several vectors side by side: each alone is a chain of 20 dependent steps.
    Ratios r[kRun];
    for (int i = 0; i < kRun; ++i) r[i] = ratios(args, t + i * W, W);
    for (int i = 0; i < kRun; ++i) policy_tokens<kind, kl>(args, part, t + i * W, W, r[i], sums);
    sums.end_run();
  }
  for (; t < part.end; t += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, part.end - t));
    policy_tokens<kind, kl>(args, part, t, n, ratios(args, t, n), sums);
  }
  sums.end_run();
  out.policy = sums.policy.sum.total();
  out.kl = sums.kl.sum.total();
  out.difference = sums.difference.sum.total();
  out.k3 = sums.k3.sum.total();
  out.ratio = sums.ratio.sum.total();
  out.clip_low = total(sums.clip_low);
  out.clip_high = total(sums.clip_high);
  out.dual_clip = total(sums.dual_clip);
  for (int i = 0; i < W; ++i) {
    out.ratio_min = std::min(out.ratio_min, sums.ratio_min[i]);
    out.ratio_max = std::max(out.ratio_max, sums.ratio_max[i]);
  }
}

void value_part(const PpoLossArgs args, const Part part, Partial& out) {
  ValueSums sums;
  for_each_vector(part, sums, [&](int64_t t, int n) __attribute__((always_inline)) {
    value_tokens(args, part, t, n, sums);
  });
  out.value = sums.value.sum.total();
  out.value_clip = total(sums.clipped);
}

void entropy_part(const PpoLossArgs args, const Part part, Partial& out) {
  RunSum sums;
  for_each_vector(part, sums, [&](int64_t t, int n) __attribute__((always_inline)) {
    entropy_tokens(args, part, t, n, sums);
  });
  out.entropy = sums.sum.total();
}

template <Kind kind>
void policy_part(const PpoLossArgs& args, const Part& part, Partial& out) {
  args.ref_logprob ? policy_part<kind, true>(args, part, out)
                   : policy_part<kind, false>(args, part, out);
}

Partial part_sums(const PpoLossArgs& args, const Part& part) {
  Partial out = {};
  out.ratio_min = kInfinity;
  if (args.values) value_part(args, part, out);
  if (args.entropy) entropy_part(args, part, out);
  if (!args.logprob) return out;
  switch (static_cast<Kind>(args.kind)) {
    case Kind::gspo:
      policy_part<Kind::gspo>(args, part, out);
      break;
    case Kind::reinforce:
      policy_part<Kind::reinforce>(args, part, out);
      break;
    case Kind::cispo:
      policy_part<Kind::cispo>(args, part, out);
      break;
    case Kind::sapo:
      policy_part<Kind::sapo>(args, part, out);
      break;
    default:
      policy_part<Kind::clipped>(args, part, out);
  }
  return out;
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
