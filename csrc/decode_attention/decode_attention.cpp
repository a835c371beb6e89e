// Decode attention on the CPU: a task is one split of the columns of one slot and key head, with
// all query heads that share the key head, so that keys and values are read from memory once.
#include "decode_attention/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "common/math.h"
#include "common/parallel.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kSplit = 256;  // columns, a multiple of every W
// Query heads whose sums over the values stay in registers, with kVecs vectors each.
constexpr int kRows = W == 16 ? 4 : 2;
constexpr int kVecs = 4;

// Unlike splat, no addition where x is not a constant: x - 0 is x, whatever its sign.
inline Vec every_lane(float x) { return x - Vec{}; }

// The first n numbers at p, zeros behind them.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T some[W] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}

template <class T>
inline void store_first(T* p, Vec x, int64_t n) {
  if (n >= W) return store(p, x);
  T some[W];
  store(some, x);
  std::memcpy(p, some, n * sizeof(T));
}

template <int... I>
inline Vec pair_sums(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// A vector whose lane i is the sum of the lanes of x[i], neighbours first.
template <int N = W>
inline Vec totals(const Vec* x) {
  if constexpr (N == 1)
    return x[0];
  else
    return pair_sums(totals<N / 2>(x), totals<N / 2>(x + N / 2),
                     std::make_integer_sequence<int, W>{});
}

// The softmax over some columns, before the division: exponentials are of s - top.
struct State {
  float top, total;
};

// One task: the columns [first, last) of a slot and key head, which are part of one split.
template <class T>
struct Task {
  const T* query;  // [group, size]
  const T* keys;   // of column 0
  const T* values;
  int64_t key_stride, value_stride;  // between columns
  int64_t first, last;
};

// The columns of a part of the cache that a slot sees, and the splits that hold them.
struct Span {
  int64_t first, last;

  int64_t split_first() const { return first / kSplit; }
  int64_t splits() const {
    return last > first ? (last + kSplit - 1) / kSplit - first / kSplit : 0;
  }
};

struct Spans {
  Span prefix, own;

  Spans(const DecodeAttentionArgs& args, int64_t slot) {
    const auto length = [&](const KeyValues& part) {
      return part.columns ? std::clamp<int64_t>(part.lengths[slot], 0, part.columns) : 0;
    };
    const int64_t before = length(args.prefix), last = length(args.own);
    const int64_t first = args.window ? std::max<int64_t>(0, before + last - args.window) : 0;
    prefix = {std::min(first, before), before};
    own = {std::max<int64_t>(first - before, 0), last};
  }
  int64_t splits() const { return prefix.splits() + own.splits(); }
};

// Products of a query with the W keys from `keys` on, of which `count` exist.
template <class T>
inline Vec products(const T* query, const T* keys, int64_t stride, int64_t count, int64_t size) {
  const T* row[W];
  for (int i = 0; i < W; ++i) row[i] = keys + std::min<int64_t>(i, count - 1) * stride;
  Vec part[W] = {};
  int64_t d = 0;
  for (; d + W <= size; d += W) {
    const Vec q = load(query + d);
    for (int i = 0; i < W; ++i) part[i] = fma(load(row[i] + d), q, part[i]);
  }
  if (d < size) {
    const Vec q = load_first(query + d, size - d);
    for (int i = 0; i < W; ++i) part[i] = fma(load_first(row[i] + d, size - d), q, part[i]);
  }
  return totals(part);
}

// Scores of every query head into `scores[head * kSplit + column - begin]`, -inf outside the task.
template <class T>
void score(const DecodeAttentionArgs& args, const Task<T>& task, int64_t begin, float* scores) {
  const int64_t stride = task.key_stride;
  IntVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t c = task.first / W * W; c < task.last; c += W) {
    const IntVec column = lane + static_cast<int>(c - begin);
    const IntVec inside = (column >= static_cast<int>(task.first - begin)) &
                          (column < static_cast<int>(task.last - begin));
    for (int64_t g = 0; g < args.group; ++g) {
      Vec s = products(task.query + g * args.size, task.keys + c * stride, stride, task.last - c,
                       args.size);
      s = s * args.scale;
      if (args.softcap > 0.0f) s = softcapped(s, args.softcap).value;
      store(scores + g * kSplit + c - begin, inside ? s : every_lane(-kInfinity));
    }
  }
}

// Turns the scores [first, last), whole vectors, into exponentials.
State exponentials(float* scores, int64_t first, int64_t last) {
  Vec top = every_lane(-kInfinity);
  for (int64_t c = first; c < last; c += W) top = max(top, load(scores + c));
  State state = {largest(top), 0.0f};
  const float base = state.top == -kInfinity ? 0.0f : state.top;
  Vec total = {};
  for (int64_t c = first; c < last; c += W) {
    const Vec d = load(scores + c) - base;
    // The exponential stays above 0, but a column outside must not count.
    const Vec e = d < -87.0f ? Vec{} : exp_negative(d);
    store(scores + c, e);
    total = total + e;
  }
  state.total = sum(total);
  return state;
}

// sum_c weight_c v_c for ROWS heads and VECS vectors of the head size, into out[head * size].
template <int ROWS, int VECS, class T>
inline void weigh(const DecodeAttentionArgs& args, const Task<T>& task, int64_t begin,
                  const float* weights, int64_t d, float* out) {
  const int64_t stride = task.value_stride;
  const int64_t left = args.size - d;
  Vec acc[ROWS][VECS] = {};
  for (int64_t c = task.first; c < task.last; ++c) {
    const T* const value = task.values + c * stride + d;
    Vec v[VECS];
    for (int k = 0; k < VECS; ++k) v[k] = VECS > 1 ? load(value + k * W) : load_first(value, left);
    for (int r = 0; r < ROWS; ++r) {
      const Vec weight = every_lane(weights[r * kSplit + c - begin]);
      for (int k = 0; k < VECS; ++k) acc[r][k] = fma(weight, v[k], acc[r][k]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < VECS; ++k)
      store_first(out + r * args.size + d + k * W, acc[r][k], VECS > 1 ? W : left);
}

template <int ROWS, class T>
void weigh_rows(const DecodeAttentionArgs& args, const Task<T>& task, int64_t begin,
                const float* weights, float* out) {
  int64_t d = 0;
  for (; d + kVecs * W <= args.size; d += kVecs * W)
    weigh<ROWS, kVecs>(args, task, begin, weights, d, out);
  for (; d < args.size; d += W) weigh<ROWS, 1>(args, task, begin, weights, d, out);
}

// States of the query heads, and their sums over the values into out[head * size].
template <class T>
void run(const DecodeAttentionArgs& args, const Task<T>& task, State* states, float* out) {
  const int64_t begin = task.first / kSplit * kSplit;
  std::vector<float> scores(args.group * kSplit);
  score(args, task, begin, scores.data());
  const int64_t first = task.first / W * W - begin;
  for (int64_t g = 0; g < args.group; ++g)
    states[g] = exponentials(scores.data() + g * kSplit, first, task.last - begin);
  int64_t g = 0;
  for (; g + kRows <= args.group; g += kRows)
    weigh_rows<kRows>(args, task, begin, scores.data() + g * kSplit, out + g * args.size);
  for (; g < args.group; ++g)
    weigh_rows<1>(args, task, begin, scores.data() + g * kSplit, out + g * args.size);
}

// What the splits of one slot and key head gave, `count` of them; 0 where there is no column.
struct Parts {
  const State* states;  // [count, group]
  const float* sums;    // [count, group, size]
  int64_t count;
};

template <class T>
void merge(const DecodeAttentionArgs& args, const Parts& parts, T* out) {
  for (int64_t g = 0; g < args.group; ++g) {
    float top = -kInfinity;
    for (int64_t p = 0; p < parts.count; ++p)
      top = std::max(top, parts.states[p * args.group + g].top);
    const float base = top == -kInfinity ? 0.0f : top;
    std::vector<float> factor(parts.count);
    float total = 0.0f;
    for (int64_t p = 0; p < parts.count; ++p) {
      const State& state = parts.states[p * args.group + g];
      factor[p] = static_cast<float>(std::exp(static_cast<double>(state.top) - base));
      total += factor[p] * state.total;
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < args.size; d += W) {
      Vec sum = {};
      for (int64_t p = 0; p < parts.count; ++p)
        sum =
            fma(every_lane(factor[p]),
                load_first(parts.sums + (p * args.group + g) * args.size + d, args.size - d), sum);
      store_first(out + g * args.size + d, sum * inverse, args.size - d);
    }
  }
}

// Split number `split` of a slot and key head, counted from the first that the slot sees.
template <class T>
Task<T> task_of(const DecodeAttentionArgs& args, const Spans& spans, int64_t slot, int64_t key_head,
                int64_t split) {
  const bool shared = split < spans.prefix.splits();
  const KeyValues& part = shared ? args.prefix : args.own;
  const Span& span = shared ? spans.prefix : spans.own;
  const int64_t row = shared ? args.prefix_rows[slot] : slot;
  const int64_t number = span.split_first() + split - (shared ? 0 : spans.prefix.splits());
  const auto base = [&](const void* p, const int64_t* strides) {
    return static_cast<const T*>(p) + row * strides[0] + key_head * strides[1];
  };
  Task<T> task;
  task.query = static_cast<const T*>(args.query) +
               (slot * args.key_heads + key_head) * args.group * args.size;
  task.keys = base(part.keys, part.key_strides);
  task.values = base(part.values, part.value_strides);
  task.key_stride = part.key_strides[2];
  task.value_stride = part.value_strides[2];
  task.first = std::max(span.first, number * kSplit);
  task.last = std::min(span.last, (number + 1) * kSplit);
  return task;
}

template <class T>
void decode(const DecodeAttentionArgs& args) {
  const int64_t pairs = args.slots * args.key_heads, head = args.group * args.size;
  int64_t most = 1, columns = 0;
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    const Spans spans(args, slot);
    most = std::max(most, spans.splits());
    columns += spans.prefix.last - spans.prefix.first + spans.own.last - spans.own.first;
  }
  // Written by the tasks before it is read: no need to fill it.
  const std::unique_ptr<State[]> states(new State[pairs * most * args.group]);
  const std::unique_ptr<float[]> sums(new float[pairs * most * head]);
  // A turn of about 2^17 multiply-adds, 10 us.
  const int64_t work = std::max<int64_t>(1, columns * args.key_heads * head * 2 / (pairs * most));
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / work);
  // Slots that share a prefix are neighbours, as a rule: they find its columns in the cache.
  parallel_for(pairs * most, grain, args.threads, [&](int64_t i) {
    const int64_t slot = i % args.slots, key_head = i / args.slots % args.key_heads;
    const int64_t split = i / pairs, pair = slot * args.key_heads + key_head;
    const Spans spans(args, slot);
    if (split >= spans.splits()) return;
    State* const state = states.get() + (pair * most + split) * args.group;
    float* const sum = sums.get() + (pair * most + split) * head;
    run(args, task_of<T>(args, spans, slot, key_head, split), state, sum);
    if (spans.splits() == 1) merge(args, {state, sum, 1}, static_cast<T*>(args.out) + pair * head);
  });
  parallel_for(
      pairs, std::max<int64_t>(1, (1 << 17) / (most * head)), args.threads, [&](int64_t i) {
        const int64_t count = Spans(args, i / args.key_heads).splits();
        if (count != 1)
          merge(args, {states.get() + i * most * args.group, sums.get() + i * most * head, count},
                static_cast<T*>(args.out) + i * head);
      });
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args) {
  with_type(args.dtype, [&](auto type) { decode<decltype(type)>(args); });
}

}  // namespace rlhf::RLHF_ISA
