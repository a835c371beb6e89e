// The blocks that share a row, one or a cluster of them, and what they work out together. Sums that
// decide about a cut are sums of integers: they do not depend on an order.
#pragma once

#include "common/cluster.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;  // per block; also the bins of a histogram

// What stands at `place` of this block's shared memory, in that of block `rank` of its cluster. All
// must have started, and none may end before the last such read. Volatile, so that the addresses of
// all blocks do not wait in registers for their use.
template <class X>
RLHF_HD X read_in_block(X& place, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return place;
#else
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(&place), "r"(rank));
  return *reinterpret_cast<X*>(address);
#endif
}

template <int BLOCKS>
struct Team {
  static RLHF_HD int rank() { return blockIdx.x % BLOCKS; }

  // Called by all threads; what they wrote before can be read by all behind it.
  static RLHF_HD void sync() {
    if constexpr (BLOCKS == 1)
      __syncthreads();
    else
      cluster_sync();
  }

  // What stands at `place` of this block's shared memory, in that of block `rank`.
  template <class X>
  static RLHF_HD X read(X& place, int rank) {
    if constexpr (BLOCKS == 1) return place;
    return read_in_block(place, rank);
  }
};

// Called by all threads of a block, which all get the result, in an order that is fixed.
template <class X, class Combine>
RLHF_HD X reduce_block(X x, const Combine& combine) {
  __shared__ X parts[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(~0u, x, d));
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) x = combine(x, parts[warp]);
  return x;
}

template <class X>
RLHF_HD X sum_block(X x) {
  return reduce_block(x, [](X a, X b) { return a + b; });
}

template <class X>
RLHF_HD X min_block(X x) {
  return reduce_block(x, [](X a, X b) { return a < b ? a : b; });
}

// NaN is passed over.
RLHF_HD float max_block(float x) {
  return reduce_block(x, [](float a, float b) { return fmaxf(a, b); });
}

// The same over all blocks of a team.
template <int BLOCKS>
RLHF_HD uint64_t sum_team(uint64_t x) {
  x = sum_block(x);
  if constexpr (BLOCKS > 1) {
    __shared__ uint64_t part;
    if (threadIdx.x == 0) part = x;
    Team<BLOCKS>::sync();
    x = 0;
    for (int rank = 0; rank < BLOCKS; ++rank) x += Team<BLOCKS>::read(part, rank);
    Team<BLOCKS>::sync();  // all have read before the next call writes
  }
  return x;
}

// ------------------------------------------------------------------- selection

// Weights by an 8-bit digit; a weight is two words, since shared memory adds 32 bits at once.
struct Histogram {
  uint32_t low[kThreads], high[kThreads];
  uint64_t before[kThreads];

  RLHF_HD void add(int bin, uint64_t weight) {
    const uint32_t word = static_cast<uint32_t>(weight);
    const uint32_t old = atomicAdd(&low[bin], word);
    const uint32_t carry = static_cast<uint32_t>(weight >> 32) + (old + word < old ? 1u : 0u);
    if (carry) atomicAdd(&high[bin], carry);
  }
};

// The sum of x over the threads of a block before this one.
RLHF_HD uint64_t scan_block(uint64_t x) {
  __shared__ uint64_t parts[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = x;
  for (int d = 1; d < 32; d *= 2) {
    const uint64_t left = __shfl_up_sync(~0u, sum, d);
    sum += lane >= d ? left : 0;
  }
  __syncthreads();  // the last call's readers are done
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  sum -= x;
  for (int w = 0; w < kThreads / 32; ++w) sum += w < warp ? parts[w] : 0;
  return sum;
}

struct Edge {
  uint32_t key;
  uint64_t before;  // the weight of all smaller keys
};

// The largest key that stays, where a key stays if `stays(weight of all smaller keys)`; the
// smallest one does. `each(f)` calls f(key, weight) for this thread's part of them, `bits` is how
// many bits a key has. Digit by digit, from the highest one.
template <int BLOCKS, class Each, class Stays>
RLHF_HD Edge select(Histogram& histogram, int bits, const Each& each, const Stays& stays) {
  Edge edge = {0, 0};
  for (int shift = (bits - 1) / 8 * 8; shift >= 0; shift -= 8) {
    histogram.low[threadIdx.x] = histogram.high[threadIdx.x] = 0;
    __syncthreads();
    each([&](uint32_t key, uint64_t weight) {
      const uint32_t digits = (key ^ edge.key) >> shift;
      if (digits < 256) histogram.add(key >> shift & 255, weight);
    });
    Team<BLOCKS>::sync();
    uint64_t weight = 0;
    for (int rank = 0; rank < BLOCKS; ++rank) {
      const uint64_t high = Team<BLOCKS>::read(histogram.high[threadIdx.x], rank);
      weight += high << 32 | Team<BLOCKS>::read(histogram.low[threadIdx.x], rank);
    }
    const uint64_t before = edge.before + scan_block(weight);
    histogram.before[threadIdx.x] = before;
    // Ascending digits stay up to the one in which the edge lies.
    const int digit = reduce_block(weight > 0 && stays(before) ? static_cast<int>(threadIdx.x) : 0,
                                   [](int a, int b) { return a > b ? a : b; });
    edge.before = histogram.before[digit];
    edge.key |= static_cast<uint32_t>(digit) << shift;
    if constexpr (BLOCKS > 1) Team<BLOCKS>::sync();  // all have read before the next digit
  }
  return edge;
}

}  // namespace
}  // namespace rlhf::cuda
