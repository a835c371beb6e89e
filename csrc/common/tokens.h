// Tokens of a row, W at a time on the CPU: a row's end is a vector whose last lanes are masked, so
// that a token has the same bits wherever it stands.
#pragma once

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
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += p[i] != 0;
  return count;
}

// A sum of floats in double precision; lane by lane, so in an order of its own.
struct Sum {
  static constexpr int kHalf = W / 2;
  typedef double DoubleVec __attribute__((vector_size(8 * kHalf)));
  typedef float HalfVec __attribute__((vector_size(4 * kHalf)));
  DoubleVec low = {}, high = {};

  void add(Vec x) {
#if defined(__AVX512F__)
    low += _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    high += _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
    low += _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    high += _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
    HalfVec halves[2];
    std::memcpy(halves, &x, sizeof x);
    low += __builtin_convertvector(halves[0], DoubleVec);
    high += __builtin_convertvector(halves[1], DoubleVec);
#endif
  }

  double total() const {
    double sum = 0.0;
    for (int i = 0; i < kHalf; ++i) sum += low[i];
    for (int i = 0; i < kHalf; ++i) sum += high[i];
    return sum;
  }
};

}  // namespace rlhf::RLHF_ISA
