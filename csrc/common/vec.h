// The vector of floats of the instruction set that a file is compiled for.
//
// Arithmetic, comparisons and `mask ? a : b` are those of GCC's and Clang's vector extension; only
// what it lacks is written with intrinsics. Everything is in the namespace RLHF_ISA (common/isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RLHF_HD inline

namespace rlhf::RLHF_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef uint32_t UintVec __attribute__((vector_size(4 * W)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * W)));

template <class F>
inline F splat(float x) {
  return F{} + x;
}

template <class To, class From>
inline To bits_of(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

// a > b ? a : b, which is b where either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, which is b where either is NaN.
inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vec abs(Vec x) { return bits_of<Vec>(bits_of<UintVec>(x) & 0x7fffffffu); }

// a * b + c, with one rounding where the processor can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// x * 2^n, where `shifted` is n + 1.5 * 2^23 and the result is a normal number.
inline Vec times_power_of_2(Vec x, [[maybe_unused]] Vec n, [[maybe_unused]] Vec shifted) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, n);
#else
  const Vec y = bits_of<Vec>(bits_of<UintVec>(x) + (bits_of<UintVec>(shifted) << 23));
  return x == x ? y : x;  // the NaN 0x7fffffff, which GPUs make, would become 3.4e38
#endif
}

// The sum of the lanes, neighbours first.
inline float sum(Vec x) {
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[2 * i] + x[2 * i + 1];
  return x[0];
}

// The largest lane; NaN is passed over.
inline float largest(Vec x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = top > x[i] ? top : x[i];
  return top;
}

// ------------------------------------------------------------------- memory, at any alignment

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Vec load(const BFloat16* p) {
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits_of<Vec>(__builtin_convertvector(bits, UintVec) << 16);
}

inline Vec load(const Half* p) {
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bits_of<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bits_of<__m128i>(bits));
#else
  const UintVec wide = __builtin_convertvector(bits, UintVec);
  // The exponent's bias changes from 15 to 127; 2^112 does it for subnormal numbers too.
  const Vec size = bits_of<Vec>((wide & 0x7fffu) << 13) * 0x1p112f;
  const UintVec special = (wide & 0x7c00u) == 0x7c00u ? UintVec{} + 0x7f800000u : UintVec{};
  return bits_of<Vec>(bits_of<UintVec>(size) | special | (wide & 0x8000u) << 16);
#endif
}

// 2 W numbers in an order of the type's own: the even and the odd ones of bfloat16, which needs one
// instruction each.
template <class T>
inline void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + W);
}

inline void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  UintVec bits;
  std::memcpy(&bits, p, sizeof bits);
  a = bits_of<Vec>(bits << 16);
  b = bits_of<Vec>(bits & 0xffff0000u);
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; a NaN stays one.
inline ShortVec to_bfloat16(Vec x) {
  const UintVec bits = bits_of<UintVec>(x);
  const UintVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40u), ShortVec);
}

inline void store(BFloat16* p, Vec x) {
  const ShortVec bits = to_bfloat16(x);
  std::memcpy(p, &bits, sizeof bits);
}

inline void store(Half* p, Vec x) {
#if defined(__AVX512F__)
  const ShortVec bits = bits_of<ShortVec>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  const ShortVec bits = bits_of<ShortVec>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const UintVec size = bits_of<UintVec>(abs(x));
  // Rounds at bit 13 and changes the exponent's bias from 127 to 15.
  const UintVec normal = (size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  // In [1/2, 1) the unit of a float is the least half, so an addition rounds as it should.
  const UintVec small = bits_of<UintVec>(abs(x) + 0.5f) - 0x3f000000u;
  UintVec wide = size < (113u << 23) ? small : normal;
  wide = size >= 0x477ff000u ? UintVec{} + 0x7c00u : wide;
  wide = size > 0x7f800000u ? UintVec{} + 0x7e00u : wide;
  const ShortVec bits =
      __builtin_convertvector(wide | (bits_of<UintVec>(x) >> 16 & 0x8000u), ShortVec);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

}  // namespace rlhf::RLHF_ISA
