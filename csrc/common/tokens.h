// Tokens of a row, W at a time on the CPU: a row's end is a vector whose last lanes are masked, so
// that a token has the same bits wherever it stands.
#pragma once

#include <algorithm>

#include "common/vec.h"

namespace rlhf::RLHF_ISA {

typedef uint8_t ByteVec __attribute__((vector_size(W)));

// The first n numbers at p, zeros behind them.
inline Vec load_some(const float* p, int n) {
  if (n == W) return load(p);
  Vec x = {};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}

inline void store_some(float* p, Vec x, int n) {
  if (n == W) return store(p, x);
  std::memcpy(p, &x, n * sizeof(float));
}

inline IntVec widened(ByteVec bytes) {
  // GCC 12 would convert byte by byte.
#if defined(__AVX512F__)
  return bits_of<IntVec>(_mm512_cvtepu8_epi32(bits_of<__m128i>(bytes)));
#elif defined(__AVX2__)
  int64_t low;
  std::memcpy(&low, &bytes, sizeof low);
  return bits_of<IntVec>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low)));
#else
  return __builtin_convertvector(bytes, IntVec);
#endif
}

// All ones where one of the first n tokens counts; no mask counts all n.
inline IntVec load_mask(const uint8_t* p, int n) {
  if (p) {
    ByteVec bytes = {};
    if (n == W)
      std::memcpy(&bytes, p, W);
    else
      std::memcpy(&bytes, p, n);
    return widened(bytes) != 0;
  }
  IntVec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < n;
}

// How many of n tokens count.
inline int64_t count_tokens(const uint8_t* p, int64_t n) {
  if (!p) return n;
  int64_t count = 0, i = 0;
  // Bytes hold the counts of 255 steps.
  constexpr int kBytes = 4 * W;
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  while (i + kBytes <= n) {
    Bytes counts = {};
    const int64_t end = std::min(n, i + 255 * kBytes);
    for (; i + kBytes <= end; i += kBytes) {
      Bytes x;
      std::memcpy(&x, p + i, kBytes);
      counts -= bits_of<Bytes>(x != 0);
    }
    for (int k = 0; k < kBytes; ++k) count += counts[k];
  }
  for (; i < n; ++i) count += p[i] != 0;
  return count;
}

// W floats as doubles, which take two vectors.
struct Wide {
  typedef double Half __attribute__((vector_size(4 * W)));
  typedef float NarrowHalf __attribute__((vector_size(2 * W)));
  Half low, high;
};

inline Wide widened(Vec x) {
#if defined(__AVX512F__)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#else
  Wide::NarrowHalf halves[2];
  std::memcpy(halves, &x, sizeof x);
  return {__builtin_convertvector(halves[0], Wide::Half),
          __builtin_convertvector(halves[1], Wide::Half)};
#endif
}

inline Vec narrowed(const Wide& x) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)), _mm512_cvtpd_ps(x.high),
                            1);
#elif defined(__AVX2__)
  return _mm256_set_m128(_mm256_cvtpd_ps(x.high), _mm256_cvtpd_ps(x.low));
#else
  const Wide::NarrowHalf halves[2] = {__builtin_convertvector(x.low, Wide::NarrowHalf),
                                      __builtin_convertvector(x.high, Wide::NarrowHalf)};
  Vec out;
  std::memcpy(&out, halves, sizeof out);
  return out;
#endif
}

// A sum of floats in double precision; lane by lane, so in an order of its own.
struct Sum {
  Wide sum = {};

  void add(Vec x) { add(widened(x)); }

  void add(const Wide& x) {
    sum.low += x.low;
    sum.high += x.high;
  }

  double total() const {
    double all = 0.0;
    for (int i = 0; i < W / 2; ++i) all += sum.low[i];
    for (int i = 0; i < W / 2; ++i) all += sum.high[i];
    return all;
  }
};

}  // namespace rlhf::RLHF_ISA
