// Log-prob and entropy on the CPU: each logit is read from memory once.
//
// A row is cut into pieces of fixed columns, each a task, so that a row's bits depend neither on
// the number of threads nor on the other rows. A piece is walked in blocks that are copied into the
// first-level cache as floats: while one block is exponentiated, the next one is fetched and its
// maximum taken, so that the sums need one exponential per logit and memory is never waited for.
#include "logprob/logprob.h"

#include <cmath>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int kPiece = 16384;  // columns per task
constexpr int kBlock = 1024;   // columns per block: 4 KiB of floats
constexpr int kUnroll = 4;     // vectors, each with sums of its own
constexpr int kGroup = kUnroll * W;
// How far to prefetch: the hardware's own stops at the end of a page. On a Xeon with 2 threads a
// logit takes 1.1 times what a plain sum takes; 1.4 times without this line or at 8 KiB.
constexpr int kBytesAhead = 1536;

// With d = rate (z - top): total = sum exp d, weighted = sum exp(d) d over the columns seen.
struct Softmax {
  float top = -kInfinity;
  double total = 0.0, weighted = 0.0;

  // Moves to a larger maximum.
  void raise(float new_top, float rate) {
    if (!(new_top > top)) return;
    if (top == -kInfinity) {  // nothing but -inf (or NaN, which stays) so far
      total *= 0.0;
      weighted *= 0.0;
    } else {
      const double shift = (static_cast<double>(top) - new_top) * rate;
      const double factor = std::exp(shift);
      weighted = factor == 0.0 ? weighted * 0.0 : factor * (weighted + shift * total);
      total *= factor;
    }
    top = new_top;
  }

  void merge(Softmax other, float rate) {
    raise(other.top, rate);
    other.raise(top, rate);
    total += other.total;
    weighted += other.weighted;
  }
};

template <class T>
void prefetch(const T* z, int column) {
  if (column * sizeof(T) % 64 == 0)  // once per line
    __builtin_prefetch(reinterpret_cast<const char*>(z + column) + kBytesAhead);
}

// Logits on their way into the sums: converted, capped.
template <class T, bool CAP>
Vec prepared(const T* z, float softcap) {
  const Vec x = load(z);
  return CAP ? softcapped(x, softcap).value : x;
}

// 2 W of them into a block, where their order does not matter.
template <class T, bool CAP>
void stage_pair(const T* z, float softcap, float* block, Vec& top) {
  Vec a, b;
  load_pair(z, a, b);
  if (CAP) {
    a = softcapped(a, softcap).value;
    b = softcapped(b, softcap).value;
  }
  store(block, a);
  store(block + W, b);
  top = max(b, max(a, top));
}

// The last n < kBlock columns of a piece into `block`, filled up with -inf to whole groups; returns
// the filled length.
template <class T, bool CAP>
int stage_rest(const T* z, int n, float softcap, float* block, Vec& top) {
  const int filled = (n + kGroup - 1) / kGroup * kGroup;
  int i = 0;
  for (; i + W <= n; i += W) store(block + i, prepared<T, CAP>(z + i, softcap));
  if (i < n) {
    T rest[W] = {};
    std::memcpy(rest, z + i, (n - i) * sizeof(T));
    store(block + i, prepared<T, CAP>(rest, softcap));
  }
  for (i = n; i < filled; ++i) block[i] = -kInfinity;
  for (i = 0; i < filled; i += W) top = max(load(block + i), top);
  return filled;
}

template <class T, bool CAP, bool WEIGHTED>
Softmax fold_piece(const T* z, int n, float rate, float softcap) {
  alignas(64) float blocks[2][kBlock];
  Softmax state;
  Vec top = splat<Vec>(-kInfinity);
  int filled = kBlock;
  if (n < kBlock) {
    filled = stage_rest<T, CAP>(z, n, softcap, blocks[0], top);
  } else {
    for (int i = 0; i < kBlock; i += 2 * W) stage_pair<T, CAP>(z + i, softcap, blocks[0] + i, top);
  }
  for (int begin = 0, which = 0; begin < n; begin += kBlock, which ^= 1) {
    state.raise(largest(top), rate);
    top = splat<Vec>(-kInfinity);
    const float base = state.top == -kInfinity ? 0.0f : state.top;
    const float* const block = blocks[which];
    float* const next_block = blocks[which ^ 1];
    const T* const next = z + begin + kBlock;
    const int left = n - begin - kBlock;
    Vec total[kUnroll] = {}, weighted[kUnroll] = {};
    const auto fold = [&](int i, int lane) {
      const Vec d = (load(block + i) - base) * rate;
      const Vec e = exp_negative(d);
      total[lane] = total[lane] + e;
      // The floor keeps 0 * -inf out.
      if (WEIGHTED) weighted[lane] = fma(e, max(splat<Vec>(-87.0f), d), weighted[lane]);
    };
    if (left >= kBlock) {
      for (int i = 0; i < kBlock; i += kGroup)
        for (int u = 0; u < kUnroll; u += 2) {
          const int at = i + u * W;
          fold(at, u);
          fold(at + W, u + 1);
          prefetch(next + i, u * W);
          prefetch(next + i, u * W + W);
          stage_pair<T, CAP>(next + at, softcap, next_block + at, top);
        }
    } else {
      for (int i = 0; i < filled; i += kGroup)
        for (int u = 0; u < kUnroll; ++u) fold(i + u * W, u);
      if (left > 0) filled = stage_rest<T, CAP>(next, left, softcap, next_block, top);
    }
    for (int u = 1; u < kUnroll; ++u) {
      total[0] = total[0] + total[u];
      weighted[0] = weighted[0] + weighted[u];
    }
    state.total += sum(total[0]);
    if (WEIGHTED) state.weighted += sum(weighted[0]);
  }
  return state;
}

// Tasks per turn of a thread. Neighbours in memory are best read by one thread (5 % faster than in
// turns of one piece), but each thread should get four turns, and none is worth waking for less
// than a piece.
int64_t grain_of(const LogitRows& in, int64_t count) {
  const int64_t columns = in.vocabulary < kPiece ? in.vocabulary : kPiece;
  const int64_t least = kPiece / columns, fair = in.rows * count / (4 * in.threads);
  const int64_t grain = fair < 16 * least ? fair : 16 * least;
  return grain > least ? grain : least;
}

int64_t pieces_of(const LogitRows& in) { return (in.vocabulary + kPiece - 1) / kPiece; }

// The columns of the piece that begins at `begin`.
int columns_of(const LogitRows& in, int64_t begin) {
  const int64_t left = in.vocabulary - begin;
  return static_cast<int>(left < kPiece ? left : kPiece);
}

template <class T, bool CAP, bool WEIGHTED>
Softmax fold(const LogitRows& in, int64_t row, int64_t begin) {
  return fold_piece<T, CAP, WEIGHTED>(row_of<T>(in, row) + begin, columns_of(in, begin),
                                      rate_of(in, row), in.softcap);
}

// One row's results from the sums over it, which those of a masked row do not need.
template <class T, bool CAP>
void finish_row(const LogprobArgs& args, int64_t row, const Softmax& state) {
  const LogitRows& in = args.in;
  float logprob = 0.0f, entropy = 0.0f, row_max = 0.0f, log_sum = 0.0f;
  if (is_live(in, row)) {
    const float rate = rate_of(in, row);
    row_max = state.top;
    const int64_t y = in.ids[row];
    const bool known = y >= 0 && y < in.vocabulary;
    if (row_max == -kInfinity && state.total == state.total) {  // nothing but -inf
      logprob = known ? -kInfinity : NAN;
    } else {
      const double log_total = std::log(state.total);
      log_sum = static_cast<float>(log_total);
      entropy = static_cast<float>(log_total - state.weighted / state.total);
      T chosen[W] = {};
      if (known) chosen[0] = row_of<T>(in, row)[y];
      const float z = prepared<T, CAP>(chosen, in.softcap)[0];
      const float base = row_max == -kInfinity ? 0.0f : row_max;
      logprob = known ? (z - base) * rate - log_sum : NAN;
    }
  }
  args.logprob[row] = logprob;
  args.row_max[row] = row_max;
  args.log_sum[row] = log_sum;
  if (args.entropy) args.entropy[row] = entropy;
}

template <class T, bool CAP, bool WEIGHTED>
void forward(const LogprobArgs& args) {
  const LogitRows& in = args.in;
  const int64_t count = pieces_of(in);
  std::vector<Softmax> pieces(in.rows * count);
  parallel_for(in.rows * count, grain_of(in, count), in.threads, [&](int64_t task) {
    const int64_t row = task / count;
    if (is_live(in, row)) pieces[task] = fold<T, CAP, WEIGHTED>(in, row, task % count * kPiece);
  });
  for (int64_t row = 0; row < in.rows; ++row) {
    Softmax state;
    if (is_live(in, row))
      for (int64_t i = 0; i < count; ++i) state.merge(pieces[row * count + i], rate_of(in, row));
    finish_row<T, CAP>(args, row, state);
  }
}

// What the gradient of a row needs of it. It is read before any of it is written, since the
// gradient may be written over the logits.
template <class T>
struct GradientRow {
  RowGradient c;
  T chosen;  // the logit of the token, 0 where its id is out of range
};

template <class T, bool ENTROPY>
GradientRow<T> gradient_row(const LogprobBackwardArgs& args, int64_t row) {
  GradientRow<T> r = {row_gradient<ENTROPY>(args, row), {}};
  const int64_t y = args.in.ids[row];
  if (y < 0 || y >= args.in.vocabulary) {
    if (y != kElsewhere) r.c.g = NAN;
    return r;
  }
  T one[W] = {};
  one[0] = r.chosen = row_of<T>(args.in, row)[y];
  if (load(one)[0] == -kInfinity) r.c.g = 0.0f;
  return r;
}

// The gradient is computed number by number, so neither `piece` nor alignment can change it.
template <class T, class O, bool ENTROPY>
void backward_piece(const T* z, int n, RowGradient c, O* out) {
  int i = 0;
  for (; i + W <= n; i += W) {
    prefetch(z, i);
    store(out + i, logit_gradient<ENTROPY, false>(load(z + i), c));
  }
  if (i < n) {
    T rest[W] = {};
    O result[W];
    std::memcpy(rest, z + i, (n - i) * sizeof(T));
    store(result, logit_gradient<ENTROPY, false>(load(rest), c));
    std::memcpy(out + i, result, (n - i) * sizeof(O));
  }
}

// The gradient of the piece that begins at `begin`.
template <class T, class O, bool ENTROPY>
void write_piece(const LogprobBackwardArgs& args, int64_t row, int64_t begin,
                 const GradientRow<T>& r) {
  const LogitRows& in = args.in;
  const int n = columns_of(in, begin);
  const int64_t place = place_of(args, row);
  if (place < 0) return;
  O* const out = static_cast<O*>(args.out) + place * in.vocabulary + begin;
  if (!is_live(in, row)) {
    std::memset(static_cast<void*>(out), 0, n * sizeof(O));
    return;
  }
  backward_piece<T, O, ENTROPY>(row_of<T>(in, row) + begin, n, r.c, out);
  const int64_t y = in.ids[row];
  if (y >= begin && y < begin + n) {
    const T one[W] = {r.chosen};
    O result[W];
    store(result, logit_gradient<ENTROPY, true>(load(one), r.c));
    out[y - begin] = result[0];
  }
}

template <class T, class O, bool ENTROPY>
void backward(const LogprobBackwardArgs& args) {
  const LogitRows& in = args.in;
  if (!args.places) advise_large_pages(args.out, in.rows * in.vocabulary * sizeof(O));
  const int64_t count = pieces_of(in);
  std::vector<GradientRow<T>> rows(in.rows);
  parallel_for(in.rows, kPiece, in.threads, [&](int64_t row) {
    if (is_live(in, row)) rows[row] = gradient_row<T, ENTROPY>(args, row);
  });
  parallel_for(in.rows * count, grain_of(in, count), in.threads, [&](int64_t task) {
    write_piece<T, O, ENTROPY>(args, task / count, task % count * kPiece, rows[task / count]);
  });
}

// Each row is still in the second-level cache when its gradient is computed.
template <class T, bool CAP, bool ENTROPY>
void forward_and_backward(const LogprobGradArgs& args) {
  const LogitRows& in = args.forward.in;
  if (in.rows < 2 * in.threads) {  // too few for each thread: their pieces are shared out instead
    forward<T, CAP, true>(args.forward);
    backward<T, T, ENTROPY>(args.backward);
    return;
  }
  advise_large_pages(args.backward.out, in.rows * in.vocabulary * sizeof(T));
  parallel_for(in.rows, grain_of(in, 1), in.threads, [&](int64_t row) {
    const bool live = is_live(in, row);
    Softmax state;
    for (int64_t begin = 0; live && begin < in.vocabulary; begin += kPiece)
      state.merge(fold<T, CAP, true>(in, row, begin), rate_of(in, row));
    finish_row<T, CAP>(args.forward, row, state);
    GradientRow<T> r = {};
    if (live) r = gradient_row<T, ENTROPY>(args.backward, row);
    // From the end, which was read last.
    for (int64_t i = pieces_of(in) - 1; i >= 0; --i)
      write_piece<T, T, ENTROPY>(args.backward, row, i * kPiece, r);
  });
}

}  // namespace

void logprob(const LogprobArgs& args) {
  with_type(args.in.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.in.softcap != 0.0f)
      args.entropy ? forward<T, true, true>(args) : forward<T, true, false>(args);
    else
      args.entropy ? forward<T, false, true>(args) : forward<T, false, false>(args);
  });
}

void logprob_backward(const LogprobBackwardArgs& args) {
  with_gradient_types(args.in.dtype, args.out_dtype, [&](auto type, auto out_type) {
    using T = decltype(type);
    using O = decltype(out_type);
    args.grad_entropy ? backward<T, O, true>(args) : backward<T, O, false>(args);
  });
}

void logprob_and_grad(const LogprobGradArgs& args) {
  with_type(args.forward.in.dtype, [&](auto type) {
    using T = decltype(type);
    const bool entropy = args.backward.grad_entropy;
    if (args.forward.in.softcap != 0.0f)
      entropy ? forward_and_backward<T, true, true>(args)
              : forward_and_backward<T, true, false>(args);
    else
      entropy ? forward_and_backward<T, false, true>(args)
              : forward_and_backward<T, false, false>(args);
  });
}

}  // namespace rlhf::RLHF_ISA
