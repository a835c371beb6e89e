// Ranking loss of the reward model: arguments, and the terms of a pair.
//
//   x = score_w - score_l - margin,   l = -log sigmoid(x),   dl/dscore_w = -sigmoid(-x)
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace rlhf {

// The mean loss of a prompt's pairs, and their number.
struct RankedPrompt {
  float loss;
  int32_t pairs;
};

struct RankingLossArgs {
  const float* scores;        // [prompts, completions], as all that follows
  const int64_t* ranks;       // or null:
  const double* float_ranks;  // ranks that are no integers
  const uint8_t* mask;        // null: all completions are there
  float* grad;                // gradient for an upstream gradient of 1
  float* loss;                // [1]
  RankedPrompt* parts;        // [prompts]; CUDA
  int64_t prompts, completions;
  float margin;
  int threads;  // CPU
};

namespace cuda {
void ranking_loss(const RankingLossArgs& args, int device, void* stream);
}

}  // namespace rlhf

RLHF_CPU_KERNEL(ranking_loss, RankingLossArgs)

#if defined(RLHF_ISA)
#include "common/math.h"

namespace rlhf::RLHF_ISA {

template <class F>
struct PairTerm {
  F loss, slope;  // slope = sigmoid(-x) = -dl/dx
};

template <class F>
RLHF_HD PairTerm<F> pair_term(F x) {
  const F e = exp_negative(-abs(x));
  const F above = e + 1.0f;
  // log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3; the first term left out is 1e-9 of the sum.
  const F s = e / (e + 2.0f);
  const F square = s * s;
  F series = fma(square, splat<F>(1.0f / 15), splat<F>(1.0f / 13));
  series = fma(square, series, splat<F>(1.0f / 11));
  series = fma(square, series, splat<F>(1.0f / 9));
  series = fma(square, series, splat<F>(1.0f / 7));
  series = fma(square, series, splat<F>(1.0f / 5));
  series = fma(square, series, splat<F>(1.0f / 3));
  series = fma(square, series, splat<F>(1.0f));
  const F tail = s * 2.0f * series;
  return {x < 0.0f ? tail - x : tail, (x < 0.0f ? splat<F>(1.0f) : e) / above};
}

}  // namespace rlhf::RLHF_ISA
#endif
