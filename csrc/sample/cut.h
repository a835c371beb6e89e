// The kept set of a row on the CPU: top-k, then top-p, then min-p, without sorting the row.
//
// Top-k: the k-th largest of the maxima of many small groups of columns is a lower bound of the
// k-th largest logit; little more than k tokens reach it, and only these are looked at. Top-p adds
// up the mass of 4096 bins and sorts the one in which it ends.
#pragma once

#include <algorithm>

#include "sample/row.h"

namespace rlhf::RLHF_ISA {
namespace {

typedef double DoubleVec __attribute__((vector_size(4 * W)));
typedef float HalfVec __attribute__((vector_size(2 * W)));  // as many floats as doubles

// exp(x) for x <= 0 to about 1 ulp; 0 below -700, which in float it is anyway.
inline DoubleVec exp_double(DoubleVec x) {
  constexpr double kRound = 0x1.8p52;
  const auto tiny = x < -700.0;
  x = tiny ? DoubleVec{} - 700.0 : x;
  const DoubleVec shifted = x * 1.44269504088896340736 + kRound;
  const DoubleVec n = shifted - kRound;
  // ln 2 in two parts, the first with 21 trailing zeros: n times it is exact.
  const DoubleVec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  DoubleVec p = DoubleVec{} + 1.0 / 6227020800.0;  // Taylor's series up to r^13, |r| <= ln(2) / 2
  for (double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                   1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + c;
  const LongVec bits = bits_of<LongVec>(p) + (bits_of<LongVec>(shifted) << 52);
  return tiny ? DoubleVec{} : bits_of<DoubleVec>(bits);
}

// The k-th largest of n numbers, which are reordered.
inline float kth_largest(float* x, int64_t n, int64_t k) {
  std::nth_element(x, x + k - 1, x + n, std::greater<float>());
  return x[k - 1];
}

// Ends a list of tokens: -inf up to a whole vector.
inline void close(Scratch& c) {
  for (auto* x : {&c.z, &c.u}) store(x->data() + c.count, splat<Vec>(-kInfinity));
}

// The tokens with z >= from, and their u.
inline void collect(const Row& row, float from, Scratch& c) {
  c.hold_tokens(row.filled);
  int64_t n = 0;
  const Vec bound = splat<Vec>(from);
  for (int64_t i = 0; i < row.filled; i += W) {
    const Vec z = load(row.z + i);
    uint32_t lanes = at_most(bound, z);
    if (lanes == kAllLanes) {
      store(c.z.data() + n, z);
      const IntVec ids = lanes_from(static_cast<int>(i));
      std::memcpy(c.id.data() + n, &ids, sizeof ids);
      n += W;
      continue;
    }
    for (; lanes; lanes &= lanes - 1, ++n) {
      const int64_t id = i + __builtin_ctz(lanes);
      c.z[n] = row.z[id];
      c.id[n] = static_cast<int32_t>(id);
    }
  }
  c.count = n;
  close(c);
  for (int64_t i = 0; i < n; i += W)
    store(c.u.data() + i, (load(c.z.data() + i) - row.base) / row.s.temperature);
  close(c);
}

// Drops the tokens outside of `cut` from the list.
inline void keep(Cut cut, Scratch& c) {
  int64_t n = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const bool kept = cut.keeps(c.u[i], c.id[i]);
    c.z[n] = c.z[i];
    c.u[n] = c.u[i];
    c.id[n] = c.id[i];
    n += kept;
  }
  c.count = n;
  close(c);
}

struct Ranked {
  float u, q;
  int32_t id;
};

// Distances below the largest u at which top-p looks how much mass lies above.
constexpr float kDepths[] = {1.0f, 2.0f, 4.0f, 6.0f, 9.0f, 13.0f};
constexpr int kDepthCount = sizeof kDepths / sizeof *kDepths;

struct Masses {
  double whole, above[kDepthCount];
};

inline double lane_sum(DoubleVec x) {
  double total = 0.0;
  for (int i = 0; i < L; ++i) total += x[i];
  return total;
}

// Probabilities among the tokens of the list, rounded to float, into c.e; returns their sums.
inline Masses probabilities(const Row& row, Scratch& c) {
  if (static_cast<int64_t>(c.weight.size()) < c.count + W) c.weight.resize(c.z.size());
  DoubleVec sums = {};
  for (int64_t i = 0; i < c.count; i += L) {
    HalfVec u;
    std::memcpy(&u, c.u.data() + i, sizeof u);
    const DoubleVec d = __builtin_convertvector(u, DoubleVec) - static_cast<double>(row.top_u);
    const DoubleVec e = exp_double(d);
    std::memcpy(c.weight.data() + i, &e, sizeof e);
    sums = sums + e;
  }
  const double rate = 1.0 / lane_sum(sums);
  DoubleVec whole = {}, above[kDepthCount] = {};
  for (int64_t i = 0; i < c.count; i += L) {
    DoubleVec e;
    HalfVec u;
    std::memcpy(&e, c.weight.data() + i, sizeof e);
    std::memcpy(&u, c.u.data() + i, sizeof u);
    const HalfVec rounded = __builtin_convertvector(e * rate, HalfVec);
    std::memcpy(c.e.data() + i, &rounded, sizeof rounded);
    const DoubleVec q = __builtin_convertvector(rounded, DoubleVec);
    whole = whole + q;
    for (int k = 0; k < kDepthCount; ++k) {
      const auto inside = __builtin_convertvector(u, DoubleVec) >= row.top_u - double{kDepths[k]};
      above[k] = above[k] + (inside ? q : DoubleVec{});
    }
  }
  Masses masses;
  masses.whole = lane_sum(whole);
  for (int k = 0; k < kDepthCount; ++k) masses.above[k] = lane_sum(above[k]);
  return masses;
}

// Drops the tokens with u < from, of which top-p keeps none.
inline void trim(float from, Scratch& c) {
  int64_t n = 0;
  const Vec bound = splat<Vec>(from);
  for (int64_t i = 0; i < c.count; i += W)
    for (uint32_t lanes = at_most(bound, load(c.u.data() + i)); lanes; lanes &= lanes - 1, ++n) {
      const int64_t k = i + __builtin_ctz(lanes);
      c.z[n] = c.z[k];
      c.u[n] = c.u[k];
      c.e[n] = c.e[k];
      c.id[n] = c.id[k];
    }
  c.count = n;
  close(c);
}

// Sorts tokens by descending u, among equals by ascending id, which is how they come.
inline void rank(std::vector<Ranked>& tokens) {
  const float first = tokens[0].u;
  if (std::all_of(tokens.begin(), tokens.end(), [=](const Ranked& t) { return t.u == first; }))
    return;
  std::sort(tokens.begin(), tokens.end(),
            [](const Ranked& a, const Ranked& b) { return a.u != b.u ? a.u > b.u : a.id < b.id; });
}

// Where top-p ends among the tokens of the list.
inline Cut nucleus(const Row& row, Scratch& c) {
  constexpr int kBins = 4096;
  thread_local std::vector<double> mass;
  thread_local std::vector<Ranked> tokens;
  const float limit = static_cast<float>(1.0 - row.s.top_p);
  const Masses masses = probabilities(row, c);
  const double whole = masses.whole;
  const auto stays = [&](double above) { return static_cast<float>(whole - above) > limit; };
  // The margin is for the order in which mass is added up.
  for (int k = 0; k < kDepthCount && c.count > 256; ++k)
    if (!stays(masses.above[k] - 1e-12)) {
      trim(static_cast<float>(row.top_u - double{kDepths[k]}), c);
      break;
    }
  // Bins of equal width in u. Behind 40 there is no mass to speak of.
  const float lowest = *std::min_element(c.u.begin(), c.u.begin() + c.count);
  const float range = std::min(row.top_u - lowest, 40.0f);
  const float scale = c.count > 256 && range > 1e-30f ? (kBins - 1) / range : 0.0f;
  const auto bin_of = [&](float u) {
    return static_cast<int>(std::min((row.top_u - u) * scale, static_cast<float>(kBins - 1)));
  };
  int bin = 0;
  double above = 0.0;
  if (scale > 0.0f) {
    mass.assign(kBins, 0.0);
    for (int64_t i = 0; i < c.count; ++i) mass[bin_of(c.u[i])] += c.e[i];
    double passed = 0.0;
    for (int b = 0; b < kBins; passed += mass[b++]) {
      if (mass[b] == 0.0) continue;
      if (b > 0 && !stays(passed)) break;
      bin = b;
      above = passed;
    }
  }
  tokens.clear();
  for (int64_t i = 0; i < c.count; ++i)
    if (scale == 0.0f || bin_of(c.u[i]) == bin) tokens.push_back({c.u[i], c.e[i], c.id[i]});
  rank(tokens);
  Cut cut{tokens[0].u, tokens[0].id};
  for (const Ranked& token : tokens) {
    if (&token != tokens.data() && !stays(above)) break;
    cut = {token.u, token.id};
    above += token.q;
  }
  return cut;
}

inline Cut min_p_of(const Row& row, Cut cut, float min_p, const Scratch& c) {
  const double log_min_p = std::log(static_cast<double>(min_p));
  float floor = kInfinity;
  for (int64_t i = 0; i < c.count; ++i)
    if (c.u[i] < floor && is_likely(static_cast<double>(c.u[i]) - row.top_u, min_p, log_min_p))
      floor = c.u[i];
  return floor > cut.tau && floor < kInfinity ? Cut{floor, row.vocabulary - 1} : cut;
}

inline int64_t first_of_largest(const Row& row) {
  for (int64_t i = 0;; i += W)
    if (const uint32_t lanes = at_most(splat<Vec>(row.top), load(row.z + i)))
      return i + __builtin_ctz(lanes);
}

// The kept set of a row whose largest logit is finite, and its tokens in the list if it filters.
inline Cut cut_of(const Row& row, Scratch& c) {
  const RowSettings& s = row.s;
  const float min_p = static_cast<float>(s.min_p);
  const int64_t highest = row.vocabulary - 1;
  Cut cut;
  if (s.greedy) return {row.top_u, first_of_largest(row)};
  if (!filters(s)) return cut;
  float from = -FLT_MAX;
  if (s.top_k > 0) {
    const int64_t vectors = (row.vocabulary + W - 1) / W;
    const int64_t step = step_of(row.vocabulary, s.top_k);
    const int64_t groups = (vectors + step - 1) / step * W;
    from = below(kth_largest(c.maxima.data(), groups, s.top_k), row.top, s.temperature);
  } else if (s.top_p == 1.0) {
    from = below_likely(row.top, s);
  }
  collect(row, from, c);
  if (s.top_k > 0 && c.count >= s.top_k) {
    std::copy(c.u.begin(), c.u.begin() + c.count, c.e.begin());
    cut = {kth_largest(c.e.data(), c.count, s.top_k), highest};
  }
  if (cut.tau > -kInfinity) keep(cut, c);
  if (s.top_p < 1.0) {
    cut = nucleus(row, c);
    keep(cut, c);
  }
  if (min_p > 0.0f) {
    cut = min_p_of(row, cut, min_p, c);
    keep(cut, c);
  }
  if (cut.tau == -kInfinity) cut.last = -1;
  return cut;
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
