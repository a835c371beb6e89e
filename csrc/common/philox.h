// Philox4x32-10, a random function of a counter (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", 2011): one call, or one per 64-bit lane of a vector.
//
// Words are kept in 64-bit numbers. A product needs only the low halves of its factors, and an
// exclusive or never mixes halves, so what stands in the upper ones does no harm until a word is
// used: only then it is cut off.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "common/device.cuh"
#else
#include "common/vec.h"
#endif

namespace rlhf::RLHF_ISA {

struct PhiloxWords {
  uint32_t word[4];
};

RLHF_HD uint64_t low_product(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }

#if !defined(__CUDACC__)
typedef uint64_t LongVec __attribute__((vector_size(4 * W)));
constexpr int L = W / 2;  // 64-bit lanes

inline LongVec low_product(LongVec a, uint32_t b) {
  const LongVec factor = LongVec{} + b;
#if defined(__AVX512F__)
  return bits_of<LongVec>(_mm512_mul_epu32(bits_of<__m512i>(a), bits_of<__m512i>(factor)));
#elif defined(__AVX2__)
  return bits_of<LongVec>(_mm256_mul_epu32(bits_of<__m256i>(a), bits_of<__m256i>(factor)));
#elif defined(__SSE2__)
  return bits_of<LongVec>(_mm_mul_epu32(bits_of<__m128i>(a), bits_of<__m128i>(factor)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}
#endif

constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;  // from round to round

#if defined(__CUDACC__)
// The key, of which each round has other words.
struct PhiloxKey {
  uint32_t first, second;

  RLHF_HD uint64_t word(int round, int half) const {
    return half ? second + round * kKeyStep1 : first + round * kKeyStep0;
  }
};

RLHF_HD PhiloxKey philox_key(uint64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// Twenty words are cheaper to make for each call than to keep in registers.
RLHF_HD PhiloxKey for_one_call(const PhiloxKey& key) {
  return {opaque(key.first), opaque(key.second)};
}
#else
// The key's words of the ten rounds; as wide as a lane, so that a vector takes them from memory.
struct PhiloxKey {
  uint64_t round[10][2];

  uint64_t word(int i, int half) const { return round[i][half]; }
};

inline PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i, k0 += kKeyStep0, k1 += kKeyStep1) {
    key.round[i][0] = k0;
    key.round[i][1] = k1;
  }
  return key;
}

inline const PhiloxKey& for_one_call(const PhiloxKey& key) { return key; }
#endif

// Replaces the four counter words (numbers or lanes) by the four answers, which have anything above
// their 32 bits.
template <class N>
RLHF_HD void philox(const PhiloxKey& key, N& c0, N& c1, N& c2, N& c3) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < 10; ++i) {
    const N p0 = low_product(c0, 0xD2511F53u), p1 = low_product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ key.word(i, 0);
    c2 = (p0 >> 32) ^ c3 ^ key.word(i, 1);
    c1 = p1;
    c3 = p0;
  }
}

}  // namespace rlhf::RLHF_ISA
