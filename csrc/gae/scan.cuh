// The recursion of GAE over a chunk of tokens, by a block of threads; rows are walked from their
// end, and what a chunk needs from the one to its right are three numbers.
//
// Every thread owns kItems neighbouring tokens of a chunk and turns them into one affine map; the
// maps are scanned over the block. The value that stands behind a token is found by the same scan:
// a token that the recursion runs through is the map x -> V_t, one that it skips x -> x.
#pragma once

#include "gae/gae.h"

namespace rlhf::cuda {
namespace {

constexpr int kItems = 8;  // per thread
constexpr uint8_t kLive = 1, kWalked = 2, kDone = 4;

// x -> slope x + offset
struct Map {
  float slope, offset;
};

RLHF_HD float apply(Map map, float x) { return affine(map.slope, map.offset, x); }

// First `right`, then `left`.
RLHF_HD Map compose(Map left, Map right) {
  return {left.slope * right.slope, affine(left.slope, left.offset, right.offset)};
}

// A_{t+1} -> A_t
RLHF_HD Map step_of(uint8_t flag, float delta, float decay) {
  if (!(flag & kWalked)) return {1.0f, 0.0f};
  return {flag & kDone ? 0.0f : decay, delta};
}

// What enters this thread from the right when x = `carried` enters the last thread and each thread
// passes map(x) on to its left neighbour; `carried` becomes what leaves thread 0. Called by the
// whole block; `shared` (a map per warp) is free again behind the block's next barrier.
template <int THREADS>
RLHF_HD float scan_from_right(Map map, float& carried, Map* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const Map right = {__shfl_down_sync(~0u, map.slope, d), __shfl_down_sync(~0u, map.offset, d)};
    if (lane + d < 32) map = compose(map, right);
  }
  if (lane == 0) shared[warp] = map;
  const Map behind = {__shfl_down_sync(~0u, map.slope, 1), __shfl_down_sync(~0u, map.offset, 1)};
  __syncthreads();
  float x = carried, entering = 0.0f;
  for (int w = THREADS / 32 - 1; w >= 0; --w) {
    if (w == warp) entering = x;
    x = apply(shared[w], x);
  }
  carried = x;
  return lane == 31 ? entering : apply(behind, entering);
}

// Token k of a chunk in shared memory: threads that read 8 neighbours each meet in no bank.
RLHF_HD int place(int k) { return k + k / kItems; }

template <int THREADS>
struct Chunk {
  static constexpr int kTokens = THREADS * kItems;
  float rewards[kTokens + THREADS], values[kTokens + THREADS];
  uint8_t flags[kTokens + THREADS];
  Map maps[3][THREADS / 32];
};

// What stands behind a chunk.
struct Behind {
  float value, trace, trace_returns;
};

// Turns rewards into advantages and values into returns, 0 where no token is live. `behind` becomes
// what stands behind the chunk to the left. Called by the whole block, behind which all has been
// written by then.
template <int THREADS>
RLHF_HD void walk(Chunk<THREADS>& chunk, Behind& behind, float gamma, float decay,
                  float decay_returns, bool two_lambdas) {
  __syncthreads();
  float reward[kItems], value[kItems];
  uint8_t flag[kItems];
  Map nearest = {1.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    reward[i] = chunk.rewards[place(threadIdx.x * kItems + i)];
    value[i] = chunk.values[place(threadIdx.x * kItems + i)];
    flag[i] = chunk.flags[place(threadIdx.x * kItems + i)];
    // The leftmost walked token hides those to its right.
    if (flag[i] & kWalked && nearest.slope != 0.0f) nearest = {0.0f, value[i]};
  }
  float following = scan_from_right<THREADS>(nearest, behind.value, chunk.maps[0]);

  float delta[kItems];
  Map map = {1.0f, 0.0f}, map_returns = {1.0f, 0.0f};
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    delta[i] = temporal_difference(reward[i], value[i], flag[i] & kDone ? 0.0f : following, gamma);
    if (flag[i] & kWalked) following = value[i];
    map = compose(step_of(flag[i], delta[i], decay), map);
    if (two_lambdas) map_returns = compose(step_of(flag[i], delta[i], decay_returns), map_returns);
  }
  float a = scan_from_right<THREADS>(map, behind.trace, chunk.maps[1]);
  float b = two_lambdas ? scan_from_right<THREADS>(map_returns, behind.trace_returns, chunk.maps[2])
                        : 0.0f;
  // Each thread puts its results where it alone has read.
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    a = apply(step_of(flag[i], delta[i], decay), a);
    if (two_lambdas) b = apply(step_of(flag[i], delta[i], decay_returns), b);
    const bool live = flag[i] & kLive;
    chunk.rewards[place(threadIdx.x * kItems + i)] = live ? a : 0.0f;
    chunk.values[place(threadIdx.x * kItems + i)] = live ? (two_lambdas ? b : a) + value[i] : 0.0f;
  }
  __syncthreads();
}

}  // namespace
}  // namespace rlhf::cuda
