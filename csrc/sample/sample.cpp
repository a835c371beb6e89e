// Sampling on the CPU: a row is one task, read from memory once and then walked in the caches.
#include "sample/sample.h"

#include "common/parallel.h"
#include "sample/cut.h"
#include "sample/race.h"

namespace rlhf::RLHF_ISA {
namespace {

// Sums over a row: e, and e * log e.
struct Sums {
  double total = 0.0, weighted = 0.0;
};

// The sums of the whole row, and with `race` the draw among its tokens.
template <bool RACE>
Sums fold(const Row& row, Race* race) {
  const float top = row.top == -kInfinity ? 0.0f : row.top;
  Sums sums;
  for (int64_t begin = 0; begin < row.filled; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, row.filled);
    Vec total[kUnroll] = {}, weighted[kUnroll] = {};
    for (int64_t i = begin; i < end; i += kGroup) {
      Vec e[kUnroll];
      for (int k = 0; k < kUnroll; ++k) {
        const Vec d = (load(row.z + i + k * W) - top) * row.s.rate;
        e[k] = exp_negative(d);
        total[k] = total[k] + e[k];
        // Below -87 the exponential is no longer right, and -inf must add nothing.
        weighted[k] = fma(e[k], d > -87.0f ? d : splat<Vec>(0.0f), weighted[k]);
      }
      if (RACE) {
        race->screen(i, e[0], e[1]);
        race->screen(i + 2 * W, e[2], e[3]);
      }
    }
    for (int k = 1; k < kUnroll; ++k) {
      total[0] = total[0] + total[k];
      weighted[0] = weighted[0] + weighted[k];
    }
    sums.total += sum(total[0]);
    sums.weighted += sum(weighted[0]);
  }
  return sums;
}

// The sum of e over the list, which are left in c.e.
double fold_list(const Row& row, Scratch& c) {
  double part = 0.0;
  for (int64_t i = 0; i < c.count; i += W) {
    const Vec e = exp_negative((load(c.z.data() + i) - row.top) * row.s.rate);
    store(c.e.data() + i, e);
    part += sum(e);
  }
  return part;
}

// What is said of the kept set: log sum_kept e, log sum e, log of their quotient.
struct Logs {
  double kept = 0.0, sum = 0.0;
  float mass = 0.0f;
};

Logs logs_of(const Row& row, double total, Cut cut, double part) {
  Logs logs;
  logs.kept = logs.sum = std::log(total);
  if (row.s.greedy) {
    logs.kept = 0.0;
  } else if (cut.tau > -kInfinity) {
    logs.kept = std::log(part);
    logs.mass = std::min(0.0f, static_cast<float>(std::log(part / total)));
  }
  return logs;
}

float logprob_of(const Row& row, int64_t id, double log_kept) {
  const double d = (static_cast<double>(row.z[id]) - row.top) / row.s.temperature;
  return static_cast<float>(d - log_kept) + 0.0f;  // no -0
}

// Few kept tokens race from their list, many more quickly with all others.
int64_t draw(const Row& row, const SampleArgs& args, int64_t n, Cut cut, const Scratch& c) {
  Race race(row, args, n, cut);
  if (c.count < row.vocabulary / 32)
    race.run(c.id.data(), c.e.data(), c.count);
  else
    fold<true>(row, &race);
  return race.winner();
}

template <class T>
void sample_row(const SampleArgs& args, int64_t n) {
  Scratch& scratch = Scratch::mine();
  const uint8_t* mask = args.mask ? args.mask + n * args.mask_stride : nullptr;
  const Row row = row_from<T>(args.in, n, mask, scratch);
  const auto write = [&](int64_t id, float logprob, float log_mass, float entropy) {
    args.ids[n] = id;
    args.logprob[n] = logprob;
    args.log_mass[n] = log_mass;
    args.entropy[n] = entropy;
  };
  const bool whole = !row.s.greedy && !filters(row.s);
  Race race(row, args, n, Cut{});
  Sums sums;
  if (std::isfinite(row.top)) sums = whole ? fold<true>(row, &race) : fold<false>(row, nullptr);
  // Nothing to draw from, +inf or NaN.
  if (!(sums.total > 0.0)) return write(-1, -kInfinity, 0.0f, 0.0f);
  const Cut cut = cut_of(row, scratch);
  if (row.s.greedy) return write(cut.last, 0.0f, 0.0f, 0.0f);
  const double part = whole ? sums.total : fold_list(row, scratch);
  const Logs logs = logs_of(row, sums.total, cut, part);
  const int64_t id = whole ? race.winner() : draw(row, args, n, cut, scratch);
  write(id, logprob_of(row, id, logs.kept), logs.mass,
        static_cast<float>(logs.sum - sums.weighted / sums.total));
}

template <class T>
void replay_row(const ReplayArgs& args, int64_t n) {
  Scratch& scratch = Scratch::mine();
  const Row row = row_from<T>(args.in, n, nullptr, scratch);
  const auto write = [&](float logprob, float log_mass, Cut cut, double log_kept, double log_sum) {
    args.logprob[n] = logprob;
    args.log_mass[n] = log_mass;
    args.tau[n] = cut.tau;
    args.last[n] = cut.last;
    args.log_kept[n] = static_cast<float>(log_kept);
    args.log_sum[n] = static_cast<float>(log_sum);
  };
  const double total = row.top < kInfinity ? fold<false>(row, nullptr).total : NAN;
  if (total != total) return write(NAN, row.s.greedy ? 0.0f : NAN, Cut{}, NAN, NAN);
  if (row.top == -kInfinity) return write(-kInfinity, 0.0f, Cut{}, 0.0, 0.0);
  const Cut cut = cut_of(row, scratch);
  const bool listed = !row.s.greedy && filters(row.s);
  const Logs logs = logs_of(row, total, cut, listed ? fold_list(row, scratch) : total);
  const int64_t y = args.ids[n];
  const bool known = y >= 0 && y < row.vocabulary;
  const bool kept = known && cut.keeps(row.u(row.z[known ? y : 0]), y);
  write(kept ? logprob_of(row, y, logs.kept) : -kInfinity, logs.mass, cut, logs.kept, logs.sum);
}

// What the gradients of a row's logits have in common.
struct Slope {
  float g, h;                 // upstream gradients over the temperature
  float over_kept, over_all;  // 1 / sum_kept e, 1 / sum e
};

template <class T>
void backward_row(const ReplayBackwardArgs& args, int64_t n) {
  Scratch& scratch = Scratch::mine();
  const Row row = row_from<T>(args.in, n, nullptr, scratch);
  const int64_t y = args.ids[n];
  const Cut cut = {args.tau[n], args.last[n]};
  const double log_kept = args.log_kept[n];
  const bool known = y >= 0 && y < row.vocabulary;
  const bool nan = log_kept != log_kept;
  const bool kept = nan || (known && cut.keeps(row.u(row.z[known ? y : 0]), y));
  const float logprob = nan ? NAN : (kept ? logprob_of(row, y, log_kept) : -kInfinity);
  Slope c;
  c.g = kept ? args.grad_logprob[n] * row.s.rate : 0.0f;
  c.h = row.s.greedy ? 0.0f : args.grad_log_mass[n] * row.s.rate;
  c.over_kept = static_cast<float>(std::exp(-log_kept));
  c.over_all = static_cast<float>(std::exp(-static_cast<double>(args.log_sum[n])));
  const float top = row.top == -kInfinity ? 0.0f : row.top;
  const Vec tau = splat<Vec>(cut.tau);
  T* const out = static_cast<T*>(args.out) + n * row.vocabulary;
  for (int64_t i = 0; i < row.vocabulary; i += W) {
    const Vec z = load(row.z + i);
    const Vec d = (z - top) * row.s.rate;
    // The exponential stays above 0, but a logit of -inf must get a gradient of exactly 0.
    const Vec e = d < -87.0f ? splat<Vec>(0.0f) : exp_negative(d);
    const Vec u = (z - row.base) / row.s.temperature;
    const IntVec ids = lanes_from(static_cast<int>(i));
    const auto inside = (u > tau) | ((u == tau) & (ids <= static_cast<int>(cut.last)));
    const Vec q = inside ? e * c.over_kept : splat<Vec>(0.0f);
    Vec du = (q - e * c.over_all) * c.h - q * c.g;
    if (y >= i && y < i + W) {
      const int lane = static_cast<int>(y - i);
      const float p = e[lane] * c.over_all;
      du[lane] = (q[lane] - p) * c.h - c.g * std::expm1(logprob);
    }
    const int64_t left = row.vocabulary - i;
    if (left >= W) {
      store(out + i, du);
    } else {
      T rest[W];
      store(rest, du);
      std::memcpy(out + i, rest, left * sizeof(T));
    }
  }
}

// Rows per turn of a thread: as many short ones as have 4096 logits.
int64_t grain_of(const SampleRows& in) { return in.vocabulary < 4096 ? 4096 / in.vocabulary : 1; }

template <class Args, class Function>
void for_rows(const Args& args, const Function& f) {
  with_type(args.in.dtype, [&](auto type) {
    parallel_for(args.in.rows, grain_of(args.in), args.in.threads, [&](int64_t n) { f(type, n); });
  });
}

}  // namespace

void sample(const SampleArgs& args) {
  for_rows(args, [&](auto type, int64_t n) { sample_row<decltype(type)>(args, n); });
}

void replay_logprob(const ReplayArgs& args) {
  for_rows(args, [&](auto type, int64_t n) { replay_row<decltype(type)>(args, n); });
}

void replay_logprob_backward(const ReplayBackwardArgs& args) {
  for_rows(args, [&](auto type, int64_t n) { backward_row<decltype(type)>(args, n); });
}

}  // namespace rlhf::RLHF_ISA
