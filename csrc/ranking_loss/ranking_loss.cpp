// Ranking loss on the CPU: one prompt per turn, a winner against W others at a time.
#include "ranking_loss/ranking_loss.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/tokens.h"

namespace rlhf::RLHF_ISA {
namespace {

struct Prompt {
  double loss;  // mean over its pairs
  bool some;    // it has a pair
};

// All ones where one of the n completions from `first` on makes a pair with completion `winner`.
template <class Rank>
IntVec losers(const Rank* ranks, const uint8_t* mask, int64_t winner, int64_t first, int n) {
  IntVec lost = {};
  for (int i = 0; i < n; ++i) lost[i] = ranks[winner] < ranks[first + i] ? -1 : 0;
  return lost & load_mask(mask ? mask + first : nullptr, n);
}

// The prompt's mean loss, and its gradient as if it were the only prompt.
template <class Rank>
Prompt prompt_loss(const RankingLossArgs& args, const Rank* all_ranks, int64_t prompt) {
  const int64_t size = args.completions, begin = prompt * size;
  const float* const scores = args.scores + begin;
  const Rank* const ranks = all_ranks + begin;
  const uint8_t* const mask = args.mask ? args.mask + begin : nullptr;
  const int64_t blocks = (size + W - 1) / W;
  std::vector<Sum> gained(blocks);  // by losing: the loss rises with a loser's score
  std::vector<double> given(size);  // by winning
  Sum loss;
  int64_t pairs = 0;
  for (int64_t winner = 0; winner < size; ++winner) {
    if (mask && !mask[winner]) continue;
    Sum slopes;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * W;
      const int n = static_cast<int>(std::min<int64_t>(W, size - first));
      const IntVec lost = losers(ranks, mask, winner, first, n);
      int found = 0;
      for (int i = 0; i < W; ++i) found -= lost[i];
      if (!found) continue;
      const auto term =
          pair_term(splat<Vec>(scores[winner]) - load_some(scores + first, n) - args.margin);
      const Vec slope = lost ? term.slope : Vec{};
      loss.add(lost ? term.loss : Vec{});
      slopes.add(slope);
      gained[block].add(slope);
      pairs += found;
    }
    given[winner] = slopes.total();
  }
  const double weight = pairs ? 1.0 / pairs : 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const Wide& sum = gained[i / W].sum;
    const int lane = static_cast<int>(i % W);
    const double gain = lane < W / 2 ? sum.low[lane] : sum.high[lane - W / 2];
    args.grad[begin + i] = static_cast<float>((gain - given[i]) * weight);
  }
  return {loss.total() * weight, pairs > 0};
}

}  // namespace

void ranking_loss(const RankingLossArgs& args) {
  std::vector<Prompt> prompts(args.prompts);
  // A turn of about 4096 pairs.
  const int64_t grain = std::max<int64_t>(1, 4096 / (args.completions * args.completions));
  parallel_for(args.prompts, grain, args.threads, [&](int64_t p) {
    prompts[p] =
        args.ranks ? prompt_loss(args, args.ranks, p) : prompt_loss(args, args.float_ranks, p);
  });
  double loss = 0.0;
  int64_t count = 0;
  for (const Prompt& prompt : prompts) {
    loss += prompt.loss;
    count += prompt.some;
  }
  const double weight = 1.0 / std::max<int64_t>(count, 1);
  *args.loss = static_cast<float>(loss * weight);
  const float factor = static_cast<float>(weight);
  for (int64_t i = 0; i < args.prompts * args.completions; ++i) args.grad[i] *= factor;
}

}  // namespace rlhf::RLHF_ISA
