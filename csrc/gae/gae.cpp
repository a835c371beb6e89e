// GAE on the CPU: one row per turn, chunks of tokens from the row's end, through the first-level
// cache.
#include "gae/gae.h"

#include "common/parallel.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int kChunk = 1024;  // tokens; six arrays of them take 24 KiB
constexpr int kRoom = 2 * W;  // behind a chunk: what stands right of it, and zeros

// A chunk of tokens that the recursion runs through, right-aligned: token i of n is at
// kChunk - n + i. `slope` is 1 or 0: whether the trace crosses from a token to the next.
struct Chunk {
  alignas(64) float delta[kChunk + kRoom];
  alignas(64) float value[kChunk + kRoom];
  alignas(64) float crosses[kChunk + kRoom];
};

struct Row {
  const float *rewards, *values;
  const uint8_t *mask, *dones;
  float *advantages, *returns;
  int64_t length;
};

template <class T>
T* shifted(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// Tokens [begin, begin + n) when all of them count and no trace ends.
void stage_plain(const Row& row, int64_t begin, int n, float gamma, float next, Chunk& chunk) {
  float* const delta = chunk.delta + kChunk - n;
  const float* const rewards = row.rewards + begin;
  if (!row.values) {
    std::memcpy(delta, rewards, n * sizeof(float));
    return;
  }
  float* const value = chunk.value + kChunk - n;
  std::memcpy(value, row.values + begin, n * sizeof(float));
  value[n] = next;
  int i = 0;
  for (; i + W <= n; i += W)
    store(delta + i,
          temporal_difference(load(rewards + i), load(value + i), load(value + i + 1), gamma));
  for (; i < n; ++i)
    delta[i] = temporal_difference(splat<Vec>(rewards[i]), splat<Vec>(value[i]),
                                   splat<Vec>(value[i + 1]), gamma)[0];
}

// The same with a mask or `dones`, from right to left; returns how many tokens the recursion runs
// through and moves `next`, the value that stands right of the token at hand, on.
int stage_masked(const Row& row, int64_t begin, int n, bool carry, float gamma, float& next,
                 Chunk& chunk) {
  int at = kChunk;
  float following = next;
  for (int64_t t = begin + n - 1; t >= begin; --t) {
    const bool live = !row.mask || row.mask[t];
    const bool done = row.dones && row.dones[t] && live;
    const float value = live && row.values ? row.values[t] : 0.0f;
    const float reward = live ? row.rewards[t] : 0.0f;
    // Written in any case, kept if the token is walked through. Masks are runs, whose branches are
    // foreseen: with selects on bits a padded mask took 1.5 times as long, a random one 0.45.
    chunk.delta[at - 1] = temporal_difference(reward, value, done ? 0.0f : following, gamma);
    chunk.value[at - 1] = value;
    chunk.crosses[at - 1] = done ? 0.0f : 1.0f;
    const bool walked = live || !carry;
    following = walked ? value : following;
    at -= walked;
  }
  next = following;
  return kChunk - at;
}

// A_t of the last n tokens of a chunk into `out`, where A is `trace` behind them.
//
// After the pass with step k, offset[t] holds the sum over the 2k tokens from t on; the last loop
// adds what lies W tokens on. No pass moves numbers between lanes.
void scan(const float* delta, int n, float decay, float trace, float* out) {
  // Whole vectors; what lies left of the n tokens only ever takes from the right.
  const int first = (kChunk - n) / W * W;
  std::memcpy(out + first, delta + first, (kChunk - first) * sizeof(float));
  std::memset(out + kChunk, 0, kRoom * sizeof(float));
  out[kChunk] = trace;
  double factor = decay;
  for (int step = 1; step < W; step *= 2, factor *= factor) {
    const Vec slope = splat<Vec>(static_cast<float>(factor));
    for (int t = first; t < kChunk; t += W)
      store(out + t, fma(slope, load(out + t + step), load(out + t)));
  }
  const Vec slope = splat<Vec>(static_cast<float>(factor));
  // Right of the chunk: A is `trace` in lane 0 and nothing beyond.
  Vec behind = load(out + kChunk);
  for (int t = kChunk - W; t >= first; t -= W) {
    behind = fma(slope, behind, load(out + t));
    store(out + t, behind);
  }
}

// The same where traces end: every token has a slope of its own.
void scan_cut(const float* delta, const float* crosses, int n, float decay, float trace,
              float* out) {
  alignas(64) float slopes[kChunk + kRoom];
  const int first = (kChunk - n) / W * W;
  for (int t = first; t < kChunk; t += W) store(slopes + t, load(crosses + t) * decay);
  std::memset(slopes + kChunk, 0, kRoom * sizeof(float));
  std::memcpy(out + first, delta + first, (kChunk - first) * sizeof(float));
  std::memset(out + kChunk, 0, kRoom * sizeof(float));
  out[kChunk] = trace;
  for (int step = 1; step < W; step *= 2)
    for (int t = first; t < kChunk; t += W) {
      store(out + t, affine(load(slopes + t), load(out + t), load(out + t + step)));
      store(slopes + t, load(slopes + t) * load(slopes + t + step));
    }
  Vec behind = load(out + kChunk);
  for (int t = kChunk - W; t >= first; t -= W) {
    behind = affine(load(slopes + t), load(out + t), behind);
    store(out + t, behind);
  }
}

// `walked` numbers of a chunk to their tokens; 0 for masked ones.
void unstage(const float* chunk, const Row& row, int64_t begin, int n, int walked, bool carry,
             float* out) {
  const float* from = chunk + kChunk - walked;
  if (!row.mask) {
    std::memcpy(out + begin, from, n * sizeof(float));
    return;
  }
  for (int64_t t = begin; t < begin + n; ++t) {
    const bool live = row.mask[t];
    out[t] = live ? *from : 0.0f;  // one behind the last is still inside the chunk's room
    from += live || !carry;
  }
}

void gae_row(const GaeArgs& args, const Row& row, float next) {
  Chunk chunk;
  alignas(64) float advantages[kChunk + kRoom], returns[kChunk + kRoom];
  const bool plain = !row.mask && !row.dones;
  const bool two_lambdas = row.returns && args.decay != args.decay_returns;
  float trace = 0.0f, trace_returns = 0.0f;
  for (int64_t end = row.length; end > 0; end -= kChunk) {
    const int n = static_cast<int>(end < kChunk ? end : kChunk);
    const int64_t begin = end - n;
    int walked = n;
    if (plain) {
      stage_plain(row, begin, n, args.gamma, next, chunk);
      next = row.values ? row.values[begin] : 0.0f;
    } else {
      walked = stage_masked(row, begin, n, args.carry, args.gamma, next, chunk);
    }
    const auto walk = [&](float decay, float& carried, float* out) {
      if (row.dones)
        scan_cut(chunk.delta, chunk.crosses, walked, decay, carried, out);
      else
        scan(chunk.delta, walked, decay, carried, out);
      carried = out[kChunk - walked];
    };
    walk(args.decay, trace, advantages);
    unstage(advantages, row, begin, n, walked, args.carry, row.advantages);
    if (!row.returns) continue;
    const float* traces = advantages;
    if (two_lambdas) {
      walk(args.decay_returns, trace_returns, returns);
      traces = returns;
    }
    for (int t = (kChunk - walked) / W * W; t < kChunk; t += W)
      store(returns + t, load(traces + t) + load(chunk.value + t));
    unstage(returns, row, begin, n, walked, args.carry, row.returns);
  }
}

}  // namespace

void gae(const GaeArgs& args) {
  // A turn of at least 4096 tokens, so that a short row does not pay for a wake-up.
  const int64_t per_row = args.offsets ? args.length / args.rows + 1 : args.length;
  const int64_t grain = per_row < 4096 ? 4096 / (per_row + 1) + 1 : 1;
  parallel_for(args.rows, grain, args.threads, [&](int64_t b) {
    const int64_t begin = args.offsets ? args.offsets[b] : b * args.length;
    const int64_t length = args.offsets ? args.offsets[b + 1] - begin : args.length;
    const Row row = {args.rewards + begin,
                     shifted(args.values, begin),
                     shifted(args.mask, begin),
                     shifted(args.dones, begin),
                     args.advantages + begin,
                     shifted(args.returns, begin),
                     length};
    gae_row(args, row, args.bootstrap ? args.bootstrap[b] : args.bootstrap_value);
  });
}

}  // namespace rlhf::RLHF_ISA
