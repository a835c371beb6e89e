// A row of logits on CUDA, the chunks of neighbouring columns in which a team of blocks reads it
// from memory, and the tokens that it walks over later: all of them, or a short list in shared
// memory.
#pragma once

#include "sample/sample.h"
#include "sample/team.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kColumns = 8;  // of a chunk: 16 bytes of bf16, 32 of float, two groups of the race
constexpr int kList = 2048;  // tokens of a list
// Of a weight of 1: the sum of 2^21 of them fits into 64 bits.
constexpr double kUnits = 0x1p43;

// Numbers that order like x: the further below `top`, the larger.
RLHF_HD uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // no -0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

RLHF_HD float float_of(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// In shared memory: registers are few.
__device__ __noinline__ double exp_of(double d) { return exp(d); }

template <class T>
struct Row {
  RowSettings s;
  RaceKey key;
  const T* logits;
  const uint8_t* mask;  // or null
  int vocabulary;
  float rate2;             // 1 / t in units of ln 2
  float top;               // the largest logit
  float base, top_u;       // u = (z - base) / t, and its largest
  double total, weighted;  // sums over the row
  float slack;             // what the rounding of u can change in log2 e, twice over

  RLHF_HD void rise_to(float largest) {
    top = largest;
    const float quotient = top / s.temperature;
    const bool overflows = fabsf(top) < kInfinity && fabsf(quotient) == kInfinity;
    base = overflows ? top : 0.0f;
    top_u = overflows ? 0.0f : quotient;
    slack = (fabsf(top) * rate2 + 512.0f) * 0x1p-20f;
  }

  RLHF_HD float logit(int id) const { return to_float(logits[id]); }
  RLHF_HD float z(int id) const { return mask && !mask[id] ? -kInfinity : logit(id); }
  RLHF_HD float u(float z) const { return (z - base) / s.temperature; }
  RLHF_HD double d(float u) const { return static_cast<double>(u) - top_u; }
  RLHF_HD double e(float u) const { return exp_of(d(u)); }
  // The same from z, in float.
  RLHF_HD float e_of(float z) const { return fast_exp2((z - top) * rate2); }
  // How far u lies below the largest one, in numbers of floats.
  RLHF_HD uint32_t depth(float u) const { return order_of(top_u) - order_of(u); }
  RLHF_HD float at_depth(uint32_t depth) const { return float_of(order_of(top_u) - depth); }

  // A probability of 1 is 2^62.
  RLHF_HD static uint64_t mass_of(float q) {
    return static_cast<uint64_t>(static_cast<double>(q) * 0x1p62);
  }
  // Weights e from 0 to 1 as integers whose sum over a row fits into 64 bits.
  RLHF_HD static uint64_t weight_of(double e) { return static_cast<uint64_t>(e * kUnits + 0.5); }
};

// By one thread.
template <class T>
RLHF_HD void begin_row(const SampleArgs& args, int64_t n, Row<T>& row) {
  row.s = settings_of(args.in, n);
  row.key.key = philox_key(static_cast<uint64_t>(args.seeds ? args.seeds[n] : args.seed));
  row.key.position = static_cast<uint64_t>(args.positions ? args.positions[n] : args.position);
  row.logits = row_of<T>(args.in, n);
  row.mask = args.mask ? args.mask + n * args.mask_stride : nullptr;
  row.vocabulary = static_cast<int>(args.in.vocabulary);
  row.rate2 = row.s.rate * kLog2E;
}

// ------------------------------------------------------------------- chunks

// A chunk as it lies in memory; -inf beyond the row.
template <class T>
struct Chunk {
  static constexpr int N = Pack<T>::kSize;
  Pack<T> packs[kColumns / N];

  RLHF_HD void load(const Row<T>& row, int begin) {
#pragma unroll
    for (int part = 0; part < kColumns / N; ++part) {
      const int first = begin + part * N;
      if (first + 2 * N <= row.vocabulary) {  // as load_pack asks for
        packs[part] = load_pack(row.logits + first);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (first + i < row.vocabulary)
            packs[part].x[i] = row.logits[first + i];
          else
            convert(-kInfinity, packs[part].x[i]);
        }
      }
    }
  }

  // As floats; -inf where the mask forbids a token.
  RLHF_HD void unpack(const Row<T>& row, int begin, float (&z)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) z[i] = to_float(packs[i / N].x[i % N]);
    if (!row.mask) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (begin + i < row.vocabulary && !row.mask[begin + i]) z[i] = -kInfinity;
  }
};

template <class T>
RLHF_HD void load_columns(const Row<T>& row, int begin, float (&z)[kColumns]) {
  Chunk<T> chunk;
  chunk.load(row, begin);
  chunk.unpack(row, begin, z);
}

// The first column of this thread's chunks, and from one to the next.
template <int BLOCKS>
RLHF_HD int first_column() {
  return (Team<BLOCKS>::rank() * kThreads + static_cast<int>(threadIdx.x)) * kColumns;
}
template <int BLOCKS>
constexpr int kStep = BLOCKS * kThreads * kColumns;

// ------------------------------------------------------------------- tokens

// `each(f)` calls f(z, u, id, place) for this thread's tokens with u > -inf. `q(place, u)` is a
// token's probability as float, `keep(place, q)` may store it.

template <class T, int BLOCKS>
struct AllTokens {
  const Row<T>& row;
  double rate;  // of e, for probabilities

  template <class F>
  RLHF_HD void each(const F& f) const {
#pragma unroll 1
    for (int id = Team<BLOCKS>::rank() * kThreads + threadIdx.x; id < row.vocabulary;
         id += BLOCKS * kThreads) {
      const float z = row.z(id), u = row.u(z);
      if (u > -kInfinity) f(z, u, id, 0);
    }
  }
  RLHF_HD float q(int, float u) const { return static_cast<float>(row.e(u) * rate); }
  RLHF_HD void keep(int, float) const {}
};

// In no particular order.
struct List {
  float z[kList], q[kList];
  int id[kList];
  int count;  // may exceed kList: then some are missing
};

template <class T>
struct ListedTokens {
  const Row<T>& row;
  double rate;
  List& list;
  int count;

  template <class F>
  RLHF_HD void each(const F& f) const {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float z = list.z[i], u = row.u(z);
      if (u > -kInfinity) f(z, u, list.id[i], i);
    }
  }
  RLHF_HD float q(int place, float) const { return list.q[place]; }
  RLHF_HD void keep(int place, float q) const { list.q[place] = q; }
};

}  // namespace
}  // namespace rlhf::cuda
