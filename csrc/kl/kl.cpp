// KL divergence on the CPU: each logit of both models is read from memory once.
//
// Rows are cut into pieces and pieces into blocks as in logprob.cpp: while one pair of blocks is
// exponentiated, the next pair is copied into the first-level cache as floats and its maxima taken.
#include "kl/kl.h"

#include <cmath>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/tokens.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int kPiece = 16384;  // columns per task
constexpr int kBlock = 1024;   // columns per block: 4 KiB of floats, four of them at a time
constexpr int kUnroll = 8;     // vectors whose terms are added as floats before they go to doubles
constexpr int kGroup = kUnroll * W;
constexpr int kBytesAhead = 1536;  // prefetched: the hardware's own stops at the end of a page

// ------------------------------------------------------------------- sampled

template <bool BACKWARD>
void estimates(const KlEstimateArgs& args) {
  parallel_for((args.count + W - 1) / W, kPiece / W, args.threads, [&](int64_t turn) {
    const int64_t i = turn * W, left = args.count - i;
    const int n = static_cast<int>(left < W ? left : W);
    const Vec a = load_some(args.logprob + i, n), b = load_some(args.ref_logprob + i, n);
    const Vec out = BACKWARD ? kl_estimate_gradient(load_some(args.grad + i, n), a, b, args)
                             : kl_estimate_of(a, b, args);
    const IntVec live = load_mask(args.mask ? args.mask + i : nullptr, n);
    store_some(args.out + i, live ? out : Vec{}, n);
  });
}

// ------------------------------------------------------------------- exact: forward

// With d = rate (z - top) and r = rate (q - ref_top), over the columns seen:
// total = sum e, weighted = sum e d, cross = sum e (d - r) with e = exp d; ref_total = sum exp r.
struct Sums {
  float top = -kInfinity, ref_top = -kInfinity;
  double total = 0.0, ref_total = 0.0, weighted = 0.0, cross = 0.0;
  float widest = -kInfinity;  // the largest d - r

  // Moves to larger maxima.
  void raise(float new_top, float new_ref_top, float rate) {
    if (new_ref_top > ref_top) {
      if (ref_top == -kInfinity) {  // nothing but -inf (or NaN, which stays) so far
        ref_total *= 0.0;
      } else {
        const double shift = (static_cast<double>(ref_top) - new_ref_top) * rate;
        ref_total *= std::exp(shift);
        cross -= shift * total;
      }
      ref_top = new_ref_top;
    }
    if (new_top > top) {
      const double shift = (static_cast<double>(top) - new_top) * rate;
      const double factor = top == -kInfinity ? 0.0 : std::exp(shift);
      weighted = factor == 0.0 ? 0.0 : factor * (weighted + shift * total);
      cross = factor == 0.0 ? 0.0 : factor * (cross + shift * total);
      total *= factor;
      top = new_top;
    }
  }

  void merge(Sums other, float rate) {
    raise(other.top, other.ref_top, rate);
    other.raise(top, ref_top, rate);
    total += other.total;
    ref_total += other.ref_total;
    weighted += other.weighted;
    cross += other.cross;
    if (other.widest > widest) widest = other.widest;
  }
};

template <class T>
void prefetch(const T* z, int column) {
  if (column * sizeof(T) % 64 == 0)  // once per line
    __builtin_prefetch(reinterpret_cast<const char*>(z + column) + kBytesAhead);
}

// Copies logits into a block and returns its maximum lane by lane. Fewer than kBlock are filled up
// with -inf to a whole group.
template <class T>
Vec stage(const T* z, int n, float* block) {
  Vec top = splat<Vec>(-kInfinity);
  int i = 0;
  for (; i + W <= n; i += W) {
    const Vec x = load(z + i);
    prefetch(z, i);
    store(block + i, x);
    top = max(x, top);
  }
  if (i < n) {
    T rest[W] = {};
    std::memcpy(rest, z + i, (n - i) * sizeof(T));
    store(block + i, load(rest));
    for (int k = n; k < i + W; ++k) block[k] = -kInfinity;
    top = max(load(block + i), top);
    i += W;
  }
  for (; i % kGroup; i += W) store(block + i, splat<Vec>(-kInfinity));
  return top;
}

template <class T, class R>
Sums fold_piece(const T* z, const R* q, int n, float rate) {
  alignas(64) float blocks[2][kBlock], ref_blocks[2][kBlock];
  Sums state;
  Vec widest = splat<Vec>(-kInfinity);
  int filled = n < kBlock ? n : kBlock;
  Vec top = stage(z, filled, blocks[0]), ref_top = stage(q, filled, ref_blocks[0]);
  for (int begin = 0, which = 0; begin < n; begin += kBlock, which ^= 1) {
    state.raise(largest(top), largest(ref_top), rate);
    const float base = state.top == -kInfinity ? 0.0f : state.top;
    const float ref_base = state.ref_top == -kInfinity ? 0.0f : state.ref_top;
    const float *const block = blocks[which], *const ref_block = ref_blocks[which];
    float *const next_block = blocks[which ^ 1], *const next_ref_block = ref_blocks[which ^ 1];
    const T* const next = z + begin + kBlock;
    const R* const next_ref = q + begin + kBlock;
    const int left = n - begin - kBlock;
    Sum total, ref_total, weighted, cross;
    // Folds a group of columns; `between` runs beside each vector of it.
    const auto fold = [&](int begin, const auto& between) {
      Vec group = {}, ref_group = {}, weighted_group = {}, cross_group = {};
      for (int i = begin; i < begin + kGroup; i += W) {
        const Vec d = (load(block + i) - base) * rate;
        const Vec r = (load(ref_block + i) - ref_base) * rate;
        const Vec e = exp_negative(d);
        const Vec difference = d - r;
        group = group + e;
        ref_group = ref_group + exp_negative(r);
        // The floor keeps 0 * -inf out; below it e is no longer exp d.
        weighted_group = fma(e, max(splat<Vec>(-87.0f), d), weighted_group);
        cross_group = fma(e, d < -87.0f ? Vec{} : difference, cross_group);
        widest = max(difference, widest);  // NaN, where both are -inf, is passed over
        between(i);
      }
      total.add(group);
      ref_total.add(ref_group);
      weighted.add(weighted_group);
      cross.add(cross_group);
    };
    if (left >= kBlock) {
      top = ref_top = splat<Vec>(-kInfinity);
      for (int group = 0; group < kBlock; group += kGroup)
        fold(group, [&](int i) {
          const Vec x = load(next + i), y = load(next_ref + i);
          prefetch(next, i);
          prefetch(next_ref, i);
          store(next_block + i, x);
          store(next_ref_block + i, y);
          top = max(x, top);
          ref_top = max(y, ref_top);
        });
    } else {
      for (int group = 0; group < filled; group += kGroup) fold(group, [](int) {});
      if (left > 0) {
        filled = left;
        top = stage(next, left, next_block);
        ref_top = stage(next_ref, left, next_ref_block);
      }
    }
    state.total += total.total();
    state.ref_total += ref_total.total();
    state.weighted += weighted.total();
    state.cross += cross.total();
  }
  state.widest = largest(widest);
  return state;
}

// Tasks per turn of a thread: as many short rows as make up a piece.
int64_t grain_of(const LogitRows& in) {
  return in.vocabulary < kPiece ? kPiece / in.vocabulary : 1;
}

int64_t pieces_of(const LogitRows& in) { return (in.vocabulary + kPiece - 1) / kPiece; }

// The columns of the piece that begins at `begin`.
int columns_of(const LogitRows& in, int64_t begin) {
  const int64_t left = in.vocabulary - begin;
  return static_cast<int>(left < kPiece ? left : kPiece);
}

template <class T, class R>
Sums fold(const KlArgs& args, int64_t row, int64_t begin) {
  return fold_piece(row_of<T>(args.in, row) + begin, row_of<R>(args.ref, row) + begin,
                    columns_of(args.in, begin), rate_of(args.in, row));
}

template <class T>
float logit(const T* row, int64_t column) {
  T one[W] = {};
  one[0] = row[column];
  return load(one)[0];
}

// One row's results from the sums over it, which those of a masked row do not need.
template <class T, class R>
void finish_row(const KlArgs& args, int64_t row, const Sums& state) {
  float kl = 0.0f, logprob = 0.0f, ref_logprob = 0.0f, entropy = 0.0f;
  double log_sum = 0.0, ref_log_sum = 0.0;
  const bool live = is_live(args.in, row);
  if (live) {
    const float rate = rate_of(args.in, row);
    // A sum that is NaN is that of a row with a NaN.
    const bool empty = state.top == -kInfinity && state.total == state.total;
    const bool ref_empty = state.ref_top == -kInfinity && state.ref_total == state.ref_total;
    if (!empty) log_sum = std::log(state.total);
    if (!ref_empty) ref_log_sum = std::log(state.ref_total);
    if (!empty) {
      const double known = log_sum + ref_log_sum;
      entropy = static_cast<float>(log_sum - state.weighted / state.total);
      kl = static_cast<float>(state.cross / state.total - log_sum + ref_log_sum);
      if (state.widest == kInfinity) kl = kInfinity;
      if (known != known) kl = NAN;
    }
    const int64_t y = args.in.ids[row];
    logprob = ref_logprob = NAN;
    if (y >= 0 && y < args.in.vocabulary) {
      const float base = state.top == -kInfinity ? 0.0f : state.top;
      const float ref_base = state.ref_top == -kInfinity ? 0.0f : state.ref_top;
      logprob = (logit(row_of<T>(args.in, row), y) - base) * rate - static_cast<float>(log_sum);
      ref_logprob =
          (logit(row_of<R>(args.ref, row), y) - ref_base) * rate - static_cast<float>(ref_log_sum);
    }
  }
  args.kl[row] = kl;
  args.logprob[row] = logprob;
  args.ref_logprob[row] = ref_logprob;
  args.entropy[row] = entropy;
  args.row_max[row] = live ? state.top : 0.0f;
  args.log_sum[row] = static_cast<float>(log_sum);
  args.ref_row_max[row] = live ? state.ref_top : 0.0f;
  args.ref_log_sum[row] = static_cast<float>(ref_log_sum);
}

template <class T, class R>
void forward(const KlArgs& args) {
  const LogitRows& in = args.in;
  const int64_t count = pieces_of(in);
  std::vector<Sums> pieces(in.rows * count);
  parallel_for(in.rows * count, grain_of(in), in.threads, [&](int64_t task) {
    const int64_t row = task / count;
    if (is_live(in, row)) pieces[task] = fold<T, R>(args, row, task % count * kPiece);
  });
  for (int64_t row = 0; row < in.rows; ++row) {
    Sums state;
    if (is_live(in, row))
      for (int64_t i = 0; i < count; ++i) state.merge(pieces[row * count + i], rate_of(in, row));
    finish_row<T, R>(args, row, state);
  }
}

// ------------------------------------------------------------------- exact: backward

// What the gradient of a row needs of it. It is read before any of it is written, since the
// gradient may be written over the logits.
struct GradientRow {
  KlRow c;
  float chosen, ref_chosen;  // logits of the token, as kl_row takes them
};

template <class T, class R>
GradientRow gradient_row(const KlBackwardArgs& args, int64_t row) {
  GradientRow r = {{}, NAN, NAN};
  const int64_t y = args.in.ids[row];
  if (y >= 0 && y < args.in.vocabulary) {
    r.chosen = logit(row_of<T>(args.in, row), y);
    r.ref_chosen = logit(row_of<R>(args.ref, row), y);
  } else if (y == kElsewhere) {
    r.chosen = r.ref_chosen = 0.0f;
  }
  r.c = kl_row(args, row, r.chosen);
  return r;
}

// The gradient is computed number by number, so neither pieces nor alignment can change it.
template <bool KL, class T, class R>
void backward_piece(const T* z, const R* q, int n, KlRow c, T* out) {
  int i = 0;
  for (; i + W <= n; i += W) {
    prefetch(z, i);
    prefetch(q, i);
    store(out + i, kl_gradient<KL, false>(load(z + i), load(q + i), c));
  }
  if (i < n) {
    T rest[W] = {};
    R ref_rest[W] = {};
    std::memcpy(rest, z + i, (n - i) * sizeof(T));
    std::memcpy(ref_rest, q + i, (n - i) * sizeof(R));
    store(rest, kl_gradient<KL, false>(load(rest), load(ref_rest), c));
    std::memcpy(out + i, rest, (n - i) * sizeof(T));
  }
}

// The gradient of the piece that begins at `begin`.
template <class T, class R>
void write_piece(const KlBackwardArgs& args, int64_t row, int64_t begin, const GradientRow& r) {
  const LogitRows& in = args.in;
  const int n = columns_of(in, begin);
  T* const out = static_cast<T*>(args.out) + row * in.vocabulary + begin;
  if (!is_live(in, row)) {
    std::memset(static_cast<void*>(out), 0, n * sizeof(T));
    return;
  }
  const T* const z = row_of<T>(in, row) + begin;
  const R* const q = row_of<R>(args.ref, row) + begin;
  if (r.c.with_kl)
    backward_piece<true>(z, q, n, r.c, out);
  else
    backward_piece<false>(z, q, n, r.c, out);
  const int64_t y = in.ids[row];
  if (args.grad_logprob && y >= begin && y < begin + n) {
    const Vec zy = splat<Vec>(r.chosen), qy = splat<Vec>(r.ref_chosen);
    T one[W];
    store(one, r.c.with_kl ? kl_gradient<true, true>(zy, qy, r.c)
                           : kl_gradient<false, true>(zy, qy, r.c));
    out[y - begin] = one[0];
  }
}

template <class T, class R>
void backward(const KlBackwardArgs& args) {
  const LogitRows& in = args.in;
  const int64_t count = pieces_of(in);
  advise_large_pages(args.out, in.rows * in.vocabulary * sizeof(T));
  std::vector<GradientRow> rows(in.rows);
  parallel_for(in.rows, kPiece, in.threads, [&](int64_t row) {
    if (is_live(in, row)) rows[row] = gradient_row<T, R>(args, row);
  });
  parallel_for(in.rows * count, grain_of(in), in.threads, [&](int64_t task) {
    write_piece<T, R>(args, task / count, task % count * kPiece, rows[task / count]);
  });
}

// ------------------------------------------------------------------- exact: both in one pass

// Each row is still in the second-level cache when its gradient is computed.
template <class T, class R>
void forward_and_backward(const KlGradArgs& args) {
  const LogitRows& in = args.forward.in;
  if (in.rows < 2 * in.threads) {  // too few for each thread: their pieces are shared out instead
    forward<T, R>(args.forward);
    backward<T, R>(args.backward);
    return;
  }
  advise_large_pages(args.backward.out, in.rows * in.vocabulary * sizeof(T));
  parallel_for(in.rows, grain_of(in), in.threads, [&](int64_t row) {
    const bool live = is_live(in, row);
    Sums state;
    for (int64_t begin = 0; live && begin < in.vocabulary; begin += kPiece)
      state.merge(fold<T, R>(args.forward, row, begin), rate_of(in, row));
    finish_row<T, R>(args.forward, row, state);
    GradientRow r = {};
    if (live) r = gradient_row<T, R>(args.backward, row);
    // From the end, which was read last.
    for (int64_t i = pieces_of(in) - 1; i >= 0; --i)
      write_piece<T, R>(args.backward, row, i * kPiece, r);
  });
}

// Calls f(T{}, R{}) with the types of the policy's and the reference's logits.
template <class Function>
void with_types(const LogitRows& in, const LogitRows& ref, Function f) {
  with_type(in.dtype,
            [&](auto type) { with_type(ref.dtype, [&](auto ref_type) { f(type, ref_type); }); });
}

}  // namespace

void kl_estimate(const KlEstimateArgs& args) { estimates<false>(args); }

void kl_estimate_backward(const KlEstimateArgs& args) { estimates<true>(args); }

void kl(const KlArgs& args) {
  with_types(args.in, args.ref,
             [&](auto type, auto ref_type) { forward<decltype(type), decltype(ref_type)>(args); });
}

void kl_backward(const KlBackwardArgs& args) {
  with_types(args.in, args.ref,
             [&](auto type, auto ref_type) { backward<decltype(type), decltype(ref_type)>(args); });
}

void kl_and_grad(const KlGradArgs& args) {
  with_types(args.forward.in, args.forward.ref, [&](auto type, auto ref_type) {
    forward_and_backward<decltype(type), decltype(ref_type)>(args);
  });
}

}  // namespace rlhf::RLHF_ISA
