// A row of logits on the CPU: copied once into a thread's own memory as floats, then walked there.
#pragma once

#include <vector>

#include "sample/sample.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int kGroup = kUnroll * W;  // rows are filled up with -inf to whole groups
constexpr int kBlock = 1024;         // columns whose sums are kept in float
constexpr int kAhead = 2048;         // prefetched columns: the hardware stops at the end of a page
constexpr uint32_t kAllLanes = (1u << (W - 1) << 1) - 1;

typedef uint8_t ByteVec __attribute__((vector_size(W)));

// Bit i is set where a[i] <= b[i]; never for NaN.
inline uint32_t at_most(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmple_ps(a, b));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < W; ++i) lanes |= static_cast<uint32_t>(a[i] <= b[i]) << i;
  return lanes;
#endif
}

inline IntVec lanes_from(int first) {
  IntVec ids;
  for (int i = 0; i < W; ++i) ids[i] = i;
  return ids + first;
}

// Where the kept set ends: see sample.h.
struct Cut {
  float tau = -kInfinity;
  int64_t last = -1;

  bool keeps(float u, int64_t id) const { return u > tau || (u == tau && id <= last); }
};

struct Row {
  RowSettings s;
  int64_t vocabulary;
  const float* z;     // [filled]
  int64_t filled;     // whole groups
  float top;          // the largest logit
  float base, top_u;  // u = (z - base) / t, and its largest

  float u(float logit) const { return (logit - base) / s.temperature; }
  // What the rounding of u can change in log e, twice over, where e is not 0.
  double slack() const {
    return 2.0 *
           ((std::fabs(static_cast<double>(top_u)) + 88.0) * 0x1p-23 + 88.0 * 0x1p-22 + 0x1p-21);
  }
};

// Memory that a thread keeps from row to row.
struct Scratch {
  std::vector<float> row, maxima;
  // Tokens that a filter looks at, by ascending id.
  std::vector<float> z, u, e;
  std::vector<int32_t> id;
  std::vector<double> weight;
  int64_t count = 0;

  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
  void hold_row(int64_t filled) {
    if (static_cast<int64_t>(row.size()) >= filled) return;
    row.resize(filled);
    maxima.resize(filled + W);
  }
  void hold_tokens(int64_t n) {
    if (static_cast<int64_t>(z.size()) >= n + kGroup) return;
    for (auto* x : {&z, &u, &e}) x->resize(n + kGroup);
    id.resize(n + kGroup);
  }
};

// Copies n logits to `z`, -inf where the mask (null: none) is 0 and behind them; writes the largest
// of every `step` vectors, lane by lane, to `maxima`. Returns the largest of all; NaN is passed
// over.
template <class T>
float stage(const T* from, const uint8_t* mask, int64_t n, int64_t step, float* z, float* maxima) {
  const auto allowed = [&](Vec x, const uint8_t* bytes) {
    ByteVec bits;
    std::memcpy(&bits, bytes, sizeof bits);
    return __builtin_convertvector(bits, IntVec) != 0 ? x : splat<Vec>(-kInfinity);
  };
  Vec top = splat<Vec>(-kInfinity);
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + step * W < n ? i + step * W : n;
    Vec largest_here = splat<Vec>(-kInfinity);
    for (; i + W <= end; i += W) {
      __builtin_prefetch(from + i + kAhead);
      Vec x = load(from + i);
      if (mask) x = allowed(x, mask + i);
      store(z + i, x);
      largest_here = max(x, largest_here);
    }
    if (i < end) {  // the row's last columns
      T rest[W] = {};
      uint8_t bytes[W] = {};
      std::memcpy(rest, from + i, (n - i) * sizeof(T));
      std::memcpy(bytes, mask ? mask + i : bytes, n - i);
      Vec x = load(rest);
      if (mask) x = allowed(x, bytes);
      x = lanes_from(0) < static_cast<int>(n - i) ? x : splat<Vec>(-kInfinity);
      store(z + i, x);
      largest_here = max(x, largest_here);
      i += W;
      n = i;
    }
    store(maxima, largest_here);
    maxima += W;
    top = max(largest_here, top);
  }
  for (int64_t i = n; i % kGroup; i += W) store(z + i, splat<Vec>(-kInfinity));
  return largest(top);
}

// How many vectors share a group of maxima: at least 4 k groups, so that the k-th largest of them
// lies little below the k-th largest logit, and not many more to look through.
inline int64_t step_of(int64_t vocabulary, int64_t top_k) {
  const int64_t vectors = (vocabulary + W - 1) / W;
  const int64_t step = top_k ? vectors * W / (4 * top_k) : 64;
  return step < 1 ? 1 : step;
}

template <class T>
Row row_from(const SampleRows& in, int64_t row, const uint8_t* mask, Scratch& scratch) {
  Row out;
  out.s = settings_of(in, row);
  out.vocabulary = in.vocabulary;
  out.filled = (in.vocabulary + kGroup - 1) / kGroup * kGroup;
  scratch.hold_row(out.filled);
  out.z = scratch.row.data();
  out.top = stage(row_of<T>(in, row), mask, in.vocabulary, step_of(in.vocabulary, out.s.top_k),
                  scratch.row.data(), scratch.maxima.data());
  const float quotient = out.top / out.s.temperature;
  const bool overflows = std::isfinite(out.top) && std::isinf(quotient);
  out.base = overflows ? out.top : 0.0f;
  out.top_u = overflows ? 0.0f : quotient;
  return out;
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
