// The race of a row on CUDA: all tokens are screened in float by the high words of their numbers,
// the few that may win are settled in double.
//
//   score = log2 e - log2 E',   E' = x + x^2 / 2 + x^3 / 3 + x^4 / 4 <= E
//
// where x is what the high word says: a token's score is at least -log2 r, up to rounding. The
// block's best score is settled first; only what comes within `slack` of it can be better.
#pragma once

#include "sample/tokens.cuh"

namespace rlhf::cuda {
namespace {

RLHF_HD float score_of(float log2_e, uint32_t high) {
  const float x = static_cast<float>(high) * 0x1p-32f;
  float series = fma(x, 0.25f, 1.0f / 3.0f);
  series = fma(x, series, 0.5f);
  series = fma(x, series, 1.0f);
  return log2_e - fast_log2(x * series);
}

// The best score of a thread's tokens, and the best of all its others.
struct Contender {
  float best = -kInfinity, second = -kInfinity;
  int id = -1;

  RLHF_HD void offer(float score, int at) {
    second = fmaxf(second, fminf(best, score));
    if (score > best) {
      best = score;
      id = at;
    }
  }
};

struct Winner {
  double r;
  int id;  // -1: none
};

RLHF_HD uint32_t high_word(const RaceKey& key, int id) {
  return word_of(race_words(key, id >> 2, 0), id);
}

// E / exp(d) in double, as reference_draw.py has it. Not inlined: it is long and seldom called.
__device__ __noinline__ double race_time(RaceKey key, int id, double d) {
  return race_number(key, id, high_word(key, id)) / exp(d);
}

// Of equal r the lowest id.
template <class T>
RLHF_HD void settle(const Row<T>& row, float u, int id, Winner& winner) {
  const double r = race_time(row.key, id, row.d(u));
  if (r < winner.r || (r == winner.r && id < winner.id)) winner = {r, id};
}

// Of equal r the lowest id.
RLHF_HD Winner best_in_block(const Winner& mine) {
  const double r = min_block(mine.r);
  const int id = min_block(mine.id >= 0 && mine.r == r ? mine.id : INT32_MAX);
  return {r, id == INT32_MAX ? -1 : id};
}

// The winner among the tokens of a block, whose threads know their `own` contenders. Scores are
// relative to `origin` in place of log2 e = 0. `again(f)` calls f(u, id, score) for all tokens of
// this thread that were offered.
template <class T, class Again>
RLHF_HD Winner settle_block(const Row<T>& row, const Contender& own, float origin,
                            const Again& again) {
  __shared__ uint32_t bound;
  if (threadIdx.x == 0) bound = order_of(-kInfinity);
  const float best = max_block(own.best);
  Winner mine = {kInfinity, -1};
  const bool first = own.id >= 0 && own.best == best;
  if (first) {
    settle(row, row.u(row.logit(own.id)), own.id, mine);
    const float limit = origin - log2f(static_cast<float>(mine.r)) - row.slack;
    if (limit > -kInfinity) atomicMax(&bound, order_of(limit));
  }
  __syncthreads();
  const float limit = float_of(bound);
  if (own.second >= limit) {
    again([&](float u, int id, float score) {
      if (score >= limit && u > -kInfinity) settle(row, u, id, mine);
    });
  } else if (own.id >= 0 && own.best >= limit && !first) {
    settle(row, row.u(row.logit(own.id)), own.id, mine);
  }
  return best_in_block(mine);
}

}  // namespace
}  // namespace rlhf::cuda
