// Token terms of the losses that CPU and CUDA share: F is a vector of floats, or a float.
//
// Estimates of KL: Schulman, "Approximating KL divergence", 2020. Clipped surrogate: Schulman et
// al., "Proximal Policy Optimization Algorithms", 2017.
#pragma once

#include "common/math.h"

namespace rlhf {

enum class Kind : int { clipped = 0, gspo = 1, reinforce = 2, cispo = 3, sapo = 4 };
enum class KlEstimator : int { k1 = 0, abs = 1, k2 = 2, k3 = 3 };

}  // namespace rlhf

namespace rlhf::RLHF_ISA {

template <class F>
using Mask = decltype(F{} < F{});

// NaN stays NaN; a bound that is NaN is none.
template <class F>
RLHF_HD F clamp(F x, F low, F high) {
  return min(high, max(low, x));
}

// x - y, 0 where both are the same infinity.
template <class F>
RLHF_HD F difference(F x, F y) {
  return x == y ? splat<F>(0.0f) : x - y;
}

// exp(x), exp(x) - 1 and exp(x) - 1 - x.
template <class F>
struct Exponentials {
  F exp, minus_one, minus_line;
};

// For |x| <= 87. Near 0, where the differences would cancel, Taylor: the first term left out is
// 1e-8 of the sum at the switch.
template <class F>
RLHF_HD Exponentials<F> exponentials(F x) {
  const F e = exp_negative(x);  // as good above 0 until the result overflows
  F series = fma(x, splat<F>(1.0f / 5040), splat<F>(1.0f / 720));
  series = fma(x, series, splat<F>(1.0f / 120));
  series = fma(x, series, splat<F>(1.0f / 24));
  series = fma(x, series, splat<F>(1.0f / 6));
  series = fma(x, series, splat<F>(0.5f)) * (x * x);
  const Mask<F> near = abs(x) < 0.25f;
  const F above = e - 1.0f;
  return {e, near ? series + x : above, near ? series : above - x};
}

template <class F>
struct Estimate {
  F value, slope;  // the slope is not yet cut at clamps and infinities
};

// The estimate of KL from d = logprob - ref_logprob, and its derivative.
template <class F>
RLHF_HD Estimate<F> kl_estimate(F d, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1:
      return {d, splat<F>(1.0f)};
    case KlEstimator::abs:
      return {abs(d), d > 0.0f ? splat<F>(1.0f) : (d < 0.0f ? splat<F>(-1.0f) : d)};
    case KlEstimator::k2:
      return {d * 0.5f * d, d};
    default: {
      Exponentials<F> e = exponentials(-d);
      // Beyond, exp(x) - 1 - x is -1 - x or infinite; not inf - inf.
      const F infinity = splat<F>(kInfinity);
      e.minus_one = d < -88.72283f ? infinity : e.minus_one;
      e.minus_line = d < -88.72283f ? infinity : e.minus_line;
      return {e.minus_line, -e.minus_one};
    }
  }
}

// A token's loss, its slope in the log-prob, and whether a clip has a say.
template <class F>
struct PolicyTerm {
  F loss, slope;
  Mask<F> low, high, dual;
};

struct Clip {
  float low, high;  // bounds of the ratio, infinite without a clip
  float dual;       // 0: none
};

// max(-A rho, -A clip(rho)), then min(-A dual, .) where A < 0. A clip has no slope where it is
// strictly active; at a tie the slope is that of -A rho.
template <class F>
RLHF_HD PolicyTerm<F> clipped_term(F advantage, F rho, const Clip& clip) {
  const F plain = -advantage * rho;
  const F cut = -advantage * clamp(rho, splat<F>(clip.low), splat<F>(clip.high));
  const Mask<F> clipped = cut > plain;
  F loss = clipped ? cut : plain;
  const F cap = -advantage * clip.dual;
  const Mask<F> none = rho < 0.0f;  // a ratio is positive
  const Mask<F> dual = clip.dual > 0.0f ? (advantage < 0.0f) & (loss > cap) : none;
  loss = dual ? cap : loss;
  const F slope = clipped | dual ? splat<F>(0.0f) : plain;
  const Mask<F> low = clipped & (rho < clip.low), high = clipped & (rho > clip.high);
  return {loss, slope, low, high, dual};
}

// `outside`: the log-ratio is beyond its limit, where no kind with a ratio has a slope.
template <Kind kind, class F>
RLHF_HD PolicyTerm<F> policy_term(F logprob, F advantage, F rho, Mask<F> outside,
                                  const Clip& clip) {
  const Mask<F> none = rho < 0.0f;
  const F zero = splat<F>(0.0f);
  PolicyTerm<F> term;
  if constexpr (kind == Kind::reinforce) {
    // 0 * -inf: a token without advantage says nothing, however impossible it is.
    const F loss = advantage == 0.0f ? zero : -advantage * logprob;
    term = {loss, -advantage, none, none, none};
  } else if constexpr (kind == Kind::cispo) {
    const F slope = -advantage * clamp(rho, splat<F>(clip.low), splat<F>(clip.high));
    const F loss = advantage == 0.0f ? zero : slope * logprob;
    term = {loss, slope, rho<clip.low, rho> clip.high, none};
  } else if constexpr (kind == Kind::sapo) {
    const F tau = advantage > 0.0f ? splat<F>(1.0f) : splat<F>(1.05f);
    const F x = tau * (rho - 1.0f);
    const F e = exp_negative(-abs(x));
    const F above = e + 1.0f;
    const F small = e / above, large = splat<F>(1.0f) / above;
    const F gate = x < 0.0f ? small : large;  // sigmoid(x)
    const F loss = -advantage * (splat<F>(4.0f) / tau) * gate;
    const F slope = advantage * -4.0f * rho * small * large;
    term = {loss, slope, none, none, none};
  } else {
    term = clipped_term(advantage, rho, clip);
  }
  if constexpr (kind != Kind::reinforce) term.slope = outside ? zero : term.slope;
  return term;
}

template <class F>
struct ValueTerm {
  F loss, slope;
  Mask<F> clipped;
};

// 0.5 max((v - R)^2, (clip(v) - R)^2); a negative clip is none.
template <class F>
RLHF_HD ValueTerm<F> value_term(F value, F old_value, F target, float clip) {
  const F error = value - target;
  const F squares = error * error;
  if (clip < 0.0f) return {squares * 0.5f, error, squares < 0.0f};
  const F near = clamp(value, old_value - clip, old_value + clip) - target;
  const F near_squares = near * near;
  const Mask<F> clipped = near_squares > squares;
  return {(clipped ? near_squares : squares) * 0.5f, clipped ? splat<F>(0.0f) : error, clipped};
}

}  // namespace rlhf::RLHF_ISA
