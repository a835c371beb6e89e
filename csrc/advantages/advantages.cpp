// Rewards, advantages and whitening on the CPU.
//
// A row's rewards, its advantages (gae/gae.cpp) and their moments are made while the row is in the
// cache; whitening is a second pass. Moments are those of parts of at most kPart tokens, merged in
// the order of the tokens: the number of threads changes no bit.
#include "advantages/advantages.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/tokens.h"
#include "gae/gae.h"
#include "ppo_loss/formulas.h"

namespace rlhf::RLHF_ISA {

void gae(const GaeArgs&);  // of the same instruction set

namespace {

constexpr int64_t kPart = 4096;  // tokens, and at least of a thread's turn

template <class T>
T* shifted(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// ------------------------------------------------------------------- moments

// Of a part: the mean is sum / count, `squares` are about it.
struct PartMoments {
  double count, sum, squares;
};

// Two passes over numbers in the cache: E[x^2] - E[x]^2 would lose the digits of a variance that is
// small beside the squared mean.
PartMoments part_moments(const float* x, const uint8_t* mask, int64_t size) {
  const int64_t count = count_tokens(mask, size);
  Sum sum;
  for (int64_t i = 0; i < size; i += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, size - i));
    sum.add(load_mask(shifted(mask, i), n) ? load_some(x + i, n) : Vec{});
  }
  const double total = sum.total();
  const double mean = count ? total / count : 0.0;
  Sum squares;
  for (int64_t i = 0; i < size; i += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, size - i));
    const IntVec live = load_mask(shifted(mask, i), n);
    // A deviation is as good as its float; only the mean needs more.
    const Wide d = widened(load_some(x + i, n));
    const Vec deviation = narrowed({d.low - mean, d.high - mean});
    const Wide kept = widened(live ? deviation : Vec{});
    squares.add({kept.low * kept.low, kept.high * kept.high});
  }
  return {static_cast<double>(count), total, squares.total()};
}

// Chan, Golub and LeVeque, 1979: each part's deviations are moved to the common mean.
Moments merged(const std::vector<PartMoments>& parts) {
  double count = 0.0, sum = 0.0, squares = 0.0;
  for (const PartMoments& part : parts) {
    count += part.count;
    sum += part.sum;
  }
  const double mean = sum / std::max(count, 1.0);
  for (const PartMoments& part : parts) {
    const double shift = part.sum / std::max(part.count, 1.0) - mean;
    if (part.count > 0.0) squares += part.squares + part.count * shift * shift;
  }
  return {count, mean, squares};
}

void whiten_part(const WhitenArgs& args, int64_t begin, int64_t end) {
  const Moments& m = *args.moments;
  const double degrees = args.unbiased ? m.count - 1.0 : m.count;
  const bool some = m.count > 1.0;
  const double scale = some ? 1.0 / std::sqrt(m.squares / degrees + args.eps) : 0.0;
  // Infinite without spread and eps: every deviation is 0, and stays it.
  const double factor = scale == HUGE_VAL ? 0.0 : scale;
  const double offset = args.shift_mean ? 0.0 : m.mean;
  for (int64_t i = begin; i < end; i += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, end - i));
    const Vec x = load_some(args.x + i, n);
    const Wide d = widened(x);
    const Vec y =
        some ? narrowed({(d.low - m.mean) * factor + offset, (d.high - m.mean) * factor + offset})
             : splat<Vec>(static_cast<float>(offset));
    store_some(args.out + i, load_mask(shifted(args.mask, i), n) ? y : Vec{}, n);
  }
}

// ------------------------------------------------------------------- rewards

// Where the score of a row lands, or -1.
int64_t score_place(const AdvantagesArgs& args, int64_t row) {
  const uint8_t* const mask = shifted(args.mask, row * args.length);
  int64_t t = args.at ? args.at[row] : args.length - 1;
  if (t < 0 || t >= args.length) return -1;
  if (!mask) return t;
  if (args.at) return mask[t] ? t : -1;
  while (t >= 0 && !mask[t]) --t;
  return t;
}

void rewards_row(const AdvantagesArgs& args, int64_t row) {
  const int64_t end = (row + 1) * args.length;
  const Vec in = splat<Vec>(args.clamp_in), out = splat<Vec>(args.clamp_out);
  for (int64_t t = row * args.length; t < end; t += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, end - t));
    const IntVec live = load_mask(shifted(args.mask, t), n);
    const Vec d = difference(load_some(args.logprob + t, n), load_some(args.ref_logprob + t, n));
    Vec kl = kl_estimate(clamp(d, -in, in), static_cast<KlEstimator>(args.estimator)).value;
    kl = live ? clamp(kl, -out, out) : Vec{};
    store_some(args.kl + t, kl, n);
    // A coefficient of 0 ignores an infinite penalty.
    const Vec reward = args.kl_coef == 0.0f ? Vec{} : kl * -args.kl_coef;
    store_some(args.rewards + t, live ? reward : Vec{}, n);
  }
  const int64_t place = score_place(args, row);
  if (place >= 0) args.rewards[row * args.length + place] += args.scores[row];
}

// A row whose tokens stand side by side needs no mask: it is a shorter row. Nothing stands behind
// its end in either mode, and the zeros before its begin are not written by the recursion.
void gae_row(const AdvantagesArgs& args, int64_t row) {
  const int64_t start = row * args.length;
  const uint8_t* mask = shifted(args.mask, start);
  int64_t first = 0, last = args.length;
  if (mask) {
    while (last > 0 && !mask[last - 1]) --last;
    while (first < last && !mask[first]) ++first;
    if (count_tokens(mask + first, last - first) == last - first)
      mask = nullptr;
    else
      first = 0, last = args.length;
  }
  for (float* const out : {args.advantages + start, args.returns + start}) {
    std::fill(out, out + first, 0.0f);
    std::fill(out + last, out + args.length, 0.0f);
  }
  if (first == last) return;
  GaeArgs gae_args = {};
  gae_args.rewards = args.rewards + start + first;
  gae_args.values = args.values + start + first;
  gae_args.mask = mask;
  gae_args.advantages = args.advantages + start + first;
  gae_args.returns = args.returns + start + first;
  gae_args.rows = 1;
  gae_args.length = last - first;
  gae_args.gamma = args.gamma;
  gae_args.decay = gae_args.decay_returns = args.decay;
  gae_args.carry = args.carry;
  gae_args.threads = 1;
  gae(gae_args);
}

}  // namespace

void moments(const MomentsArgs& args) {
  std::vector<PartMoments> parts((args.size + kPart - 1) / kPart);
  parallel_for(parts.size(), 2, args.threads, [&](int64_t i) {
    const int64_t begin = i * kPart, size = std::min(kPart, args.size - begin);
    parts[i] = part_moments(args.x + begin, shifted(args.mask, begin), size);
  });
  *args.out = merged(parts);
}

void whiten(const WhitenArgs& args) {
  parallel_for((args.size + kPart - 1) / kPart, 2, args.threads, [&](int64_t i) {
    whiten_part(args, i * kPart, std::min((i + 1) * kPart, args.size));
  });
}

void advantages(const AdvantagesArgs& args) {
  const int64_t parts_of_row = (args.length + kPart - 1) / kPart;
  const int64_t grain = std::max<int64_t>(1, kPart / args.length);
  const bool whitened = args.values && args.whitened;
  std::vector<PartMoments> parts(whitened ? args.rows * parts_of_row : 0);
  parallel_for(args.rows, grain, args.threads, [&](int64_t row) {
    rewards_row(args, row);
    if (!args.values) return;
    gae_row(args, row);
    if (!whitened) return;
    for (int64_t i = 0; i < parts_of_row; ++i) {
      const int64_t begin = row * args.length + i * kPart;
      const int64_t size = std::min(kPart, args.length - i * kPart);
      parts[row * parts_of_row + i] =
          part_moments(args.advantages + begin, shifted(args.mask, begin), size);
    }
  });
  if (!whitened) return;
  const Moments all = merged(parts);
  whiten({args.advantages, args.mask, args.advantages, &all, args.rows * args.length, 1, true,
          args.unbiased, args.eps, args.threads});
}

// ------------------------------------------------------------------- groups

namespace {

struct Response {
  int64_t group, row;
  float score;
};

// A group's rows, in the order of their scores: neither the batch's order nor its other groups
// change a bit. NaN stands last.
void group_rows(const GroupArgs& args, Response* begin, Response* end) {
  std::sort(begin, end, [](const Response& a, const Response& b) {
    return a.score < b.score || (a.score == a.score && b.score != b.score);
  });
  const double count = static_cast<double>(end - begin), others = std::max(count - 1.0, 1.0);
  double total = 0.0, squares = 0.0;
  for (const Response* r = begin; r < end; ++r) total += r->score;
  const double mean = total / count;
  for (const Response* r = begin; r < end; ++r) squares += (r->score - mean) * (r->score - mean);
  const double spread = std::sqrt(squares / others) + args.eps;
  for (const Response* r = begin; r < end; ++r) {
    double out = r->score - mean;
    if (args.kind == GroupKind::rloo) out = out * count / others;
    if (args.kind == GroupKind::grpo && out != 0.0) out /= spread;
    args.out[r->row] = count > 1.0 ? static_cast<float>(out) : 0.0f;
  }
}

}  // namespace

void group_advantages(const GroupArgs& args) {
  std::vector<Response> responses(args.rows);
  for (int64_t i = 0; i < args.rows; ++i) responses[i] = {args.ids[i], i, args.scores[i]};
  const auto by_group = [](const Response& a, const Response& b) { return a.group < b.group; };
  if (!std::is_sorted(responses.begin(), responses.end(), by_group))
    std::sort(responses.begin(), responses.end(), by_group);
  Response* const end = responses.data() + args.rows;
  for (Response* first = responses.data(); first < end;) {
    Response* last = first;
    while (last < end && last->group == first->group) ++last;
    group_rows(args, first, last);
    first = last;
  }
}

}  // namespace rlhf::RLHF_ISA
