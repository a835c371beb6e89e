// The race of a row on the CPU: all tokens are screened in float by their high words, the few that
// may win are settled in double.
//
// E >= x, so r = E / e >= x / e, and x is at least its upper 24 bits: a token that has them above
// (best r so far) * e cannot win. Over a row about ln V tokens come through.
#pragma once

#include "sample/row.h"

namespace rlhf::RLHF_ISA {
namespace {

// The high words of the ids first to first + 2 W - 1; `first` is a multiple of 4.
inline void high_words(const RaceKey& key, int64_t first, UintVec& a, UintVec& b) {
  LongVec c0;
  for (int i = 0; i < L; ++i) c0[i] = i;
  c0 = c0 + static_cast<uint64_t>(first / 4);
  LongVec c1 = LongVec{} + key.position, c2 = LongVec{} + (key.position >> 32), c3 = {};
  philox(key.key, c0, c1, c2, c3);
  // Lane i: ids 4 i and 4 i + 1, then 4 i + 2 and 4 i + 3.
  const LongVec even = (c0 & 0xffffffffu) | c1 << 32, odd = (c2 & 0xffffffffu) | c3 << 32;
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i x = bits_of<__m512i>(even), y = bits_of<__m512i>(odd);
  a = bits_of<UintVec>(_mm512_permutex2var_epi64(x, low, y));
  b = bits_of<UintVec>(_mm512_permutex2var_epi64(x, high, y));
#elif defined(__AVX2__)
  const __m256i x = bits_of<__m256i>(even), y = bits_of<__m256i>(odd);
  const __m256i low = _mm256_unpacklo_epi64(x, y), high = _mm256_unpackhi_epi64(x, y);
  a = bits_of<UintVec>(_mm256_permute2x128_si256(low, high, 0x20));
  b = bits_of<UintVec>(_mm256_permute2x128_si256(low, high, 0x31));
#else
  a = bits_of<UintVec>(LongVec{even[0], odd[0]});
  b = bits_of<UintVec>(LongVec{even[1], odd[1]});
#endif
}

class Race {
 public:
  Race(const Row& row, const SampleArgs& args, int64_t n, Cut cut) : row_(row), cut_(cut) {
    key_.key = philox_key(static_cast<uint64_t>(args.seeds ? args.seeds[n] : args.seed));
    key_.position = static_cast<uint64_t>(args.positions ? args.positions[n] : args.position);
    scale_ = std::exp(row.slack()) * 0x1p24;
  }

  int64_t winner() const { return winner_; }

  // The ids first to first + 2 W - 1, whose e as far as float knows it are `a` and `b`.
  void screen(int64_t first, Vec a, Vec b) {
    UintVec high[2];
    high_words(key_, first, high[0], high[1]);
    const Vec limit = splat<Vec>(limit_);
    const uint32_t lanes_a = at_most(upper(high[0]), limit * a);
    const uint32_t lanes_b = at_most(upper(high[1]), limit * b);
    if (__builtin_expect(lanes_a | lanes_b, 0)) {
      settle(first, lanes_a, high[0], a);
      settle(first + W, lanes_b, high[1], b);
    }
  }

  // Tokens of a list by ascending id, with their e as far as float knows it.
  void run(const int32_t* ids, const float* e, int64_t n) {
    int64_t group = -1;
    PhiloxWords words = {};
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] >> 2 != group) {
        group = ids[i] >> 2;
        words = race_words(key_, group, 0);
      }
      const uint32_t high = words.word[ids[i] & 3];
      if (static_cast<float>(high >> 8) <= limit_ * e[i]) offer(ids[i], high);
    }
  }

 private:
  static Vec upper(UintVec high) {
    return __builtin_convertvector(bits_of<IntVec>(high >> 8), Vec);
  }

  __attribute__((noinline)) void settle(int64_t first, uint32_t lanes, UintVec high, Vec e) {
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      if (static_cast<float>(high[i] >> 8) <= limit_ * e[i]) offer(first + i, high[i]);
    }
  }

  void offer(int64_t id, uint32_t high) {
    const float u = row_.u(row_.z[id]);
    if (!cut_.keeps(u, id)) return;
    const double e = std::exp(static_cast<double>(u) - row_.top_u);
    const double r = race_number(key_, id, high) / e;
    if (!(r < best_)) return;
    best_ = r;
    winner_ = id;
    limit_ = static_cast<float>(r * scale_);
  }

  const Row& row_;
  const Cut cut_;
  RaceKey key_;
  double scale_, best_ = kInfinity;
  float limit_ = kInfinity;
  int64_t winner_ = -1;
};

}  // namespace
}  // namespace rlhf::RLHF_ISA
