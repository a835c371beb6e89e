// Sampling: arguments, and the formulas that CPU and CUDA share.
//
//   u = z / t,   m = max u,   e = exp(u - m)
//   kept: (u > tau) or (u == tau and id <= last); tau = -inf keeps all u > -inf
//   the kept token with the least r wins, the lowest id on a tie:  r = E(seed, position, id) / e
//
// kernels/sample/reference.py says how top-k, top-p and min-p set (tau, last) and where numbers are
// rounded, reference_draw.py where E comes from.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace rlhf {

// Row n starts at (n / inner) stride_outer + (n % inner) stride_inner and is dense. Each parameter
// is a number, or per row where its address is not null.
struct SampleRows {
  const void* logits;
  Dtype dtype;
  int64_t rows, vocabulary, inner, stride_outer, stride_inner;
  float temperature;
  const float* temperatures;
  int64_t top_k;
  const int64_t* top_ks;
  double top_p;
  const double* top_ps;
  double min_p;
  const double* min_ps;
  int threads;  // CPU
};

struct SampleArgs {
  SampleRows in;
  const uint8_t* mask;  // null, or row n from n * mask_stride on: 0 is never drawn
  int64_t mask_stride;
  int64_t seed;
  const int64_t* seeds;
  int64_t position;
  const int64_t* positions;
  int64_t* ids;  // [rows]; -1 in a row that has NaN, +inf or nothing that can be drawn
  float *logprob, *log_mass, *entropy;  // [rows]
};

struct ReplayArgs {
  SampleRows in;
  const int64_t* ids;                                    // [rows]
  float *logprob, *log_mass, *tau, *log_kept, *log_sum;  // [rows]
  int64_t* last;                                         // [rows]
};

struct ReplayBackwardArgs {
  SampleRows in;              // of the parameters, the temperature alone
  const int64_t *ids, *last;  // [rows]
  const float *grad_logprob, *grad_log_mass, *tau, *log_kept, *log_sum;  // [rows]
  void* out;                                                             // [rows, vocabulary]
};

namespace cuda {
void sample(const SampleArgs& args, int device, void* stream);
}  // namespace cuda

}  // namespace rlhf

RLHF_CPU_KERNEL(sample, SampleArgs)
RLHF_CPU_KERNEL(replay_logprob, ReplayArgs)
RLHF_CPU_KERNEL(replay_logprob_backward, ReplayBackwardArgs)

#if defined(RLHF_ISA)
#include <cfloat>
#include <cmath>

#include "common/math.h"
#include "common/philox.h"

namespace rlhf::RLHF_ISA {

// The parameters of one row.
struct RowSettings {
  float temperature, rate;
  bool greedy;
  int64_t top_k;  // 0: off
  double top_p, min_p;
};

RLHF_HD RowSettings settings_of(const SampleRows& in, int64_t row) {
  RowSettings s;
  s.temperature = in.temperatures ? in.temperatures[row] : in.temperature;
  s.greedy = s.temperature == 0.0f;
  if (s.greedy) s.temperature = 1.0f;
  // At most 2e38 so that 0 * rate stays 0.
  s.rate = 1.0f / s.temperature;
  s.rate = s.rate < 2e38f ? s.rate : 2e38f;
  s.top_k = in.top_ks ? in.top_ks[row] : in.top_k;
  if (s.top_k >= in.vocabulary) s.top_k = 0;
  s.top_p = in.top_ps ? in.top_ps[row] : in.top_p;
  s.min_p = in.min_ps ? in.min_ps[row] : in.min_p;
  return s;
}

template <class T>
RLHF_HD const T* row_of(const SampleRows& in, int64_t row) {
  return static_cast<const T*>(in.logits) + row / in.inner * in.stride_outer +
         row % in.inner * in.stride_inner;
}

RLHF_HD bool filters(const RowSettings& s) {
  return s.top_k > 0 || s.top_p < 1.0 || static_cast<float>(s.min_p) > 0.0f;
}

// Below every z whose u is not below that of `z`; -FLT_MAX keeps -inf out.
RLHF_HD float below(double z, float top, float temperature) {
  const double width = (fabs(z) + fabs(static_cast<double>(top))) * 0x1p-21 + temperature * 1e-44;
  const double bound = z - width;
  return bound > -FLT_MAX ? static_cast<float>(bound) : -FLT_MAX;
}

// Below every z that min-p keeps.
RLHF_HD float below_likely(float top, const RowSettings& s) {
  const double log_min_p = log(static_cast<double>(static_cast<float>(s.min_p)));
  return below(top + s.temperature * (log_min_p - 1e-6), top, s.temperature);
}

// Whether float(exp(d)) >= min_p, d = u - m: exponentials only where a logarithm does not tell.
RLHF_HD bool is_likely(double d, float min_p, double log_min_p) {
  if (fabs(d - log_min_p) > 1e-6) return d > log_min_p;
  return static_cast<float>(exp(d)) >= min_p;
}

// What the draw of a row is keyed on.
struct RaceKey {
  PhiloxKey key;
  uint64_t position;
};

// The four words of the ids 4 group to 4 group + 3: the high (`half` 0) or the low ones (1).
RLHF_HD PhiloxWords race_words(const RaceKey& key, int64_t group, int half) {
  uint64_t c0 = group, c1 = key.position, c2 = key.position >> 32, c3 = half;
  philox(for_one_call(key.key), c0, c1, c2, c3);
  return {{static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
           static_cast<uint32_t>(c3)}};
}

// That of `id` among the words of its group; not by an index, which registers do not have.
RLHF_HD uint32_t word_of(const PhiloxWords& words, int64_t id) {
  const uint32_t even = id & 2 ? words.word[2] : words.word[0];
  const uint32_t odd = id & 2 ? words.word[3] : words.word[1];
  return id & 1 ? odd : even;
}

// The exponential number of a token id, whose high word is known.
RLHF_HD double race_number(const RaceKey& key, int64_t id, uint32_t high) {
  const uint32_t low = word_of(race_words(key, id >> 2, 1), id);
  const double x = high * 0x1p-32 + (low + 0.5) * 0x1p-64;
  return -log1p(x < 1.0 - 0x1p-53 ? -x : -(1.0 - 0x1p-53));
}

}  // namespace rlhf::RLHF_ISA
#endif
