// The recursion of GAE over a chunk of tokens, by a block of threads; rows are walked from their
// end, and what a chunk needs from the one to its right are three numbers.
//
// Few long rows would leave most of a GPU idle: kSplit blocks of a cluster then share a row, each
// of them with one of kSplit neighbouring chunks. A scan over them goes through the blocks' maps.
//
// Every thread owns kItems neighbouring tokens of a chunk (items.cuh) and turns them into one
// affine map; the maps are scanned over the block. The value that stands behind a token is found by
// the same scan: a token that the recursion runs through is the map x -> V_t, one that it skips x
// -> x.
#pragma once

#include "common/cluster.cuh"
#include "gae/gae.h"
#include "gae/items.cuh"

namespace rlhf::cuda {
namespace {

// Rows beyond kSplitFrom tokens are split: by their length alone, so that a row has the same bits
// in every batch.
constexpr int kSplit = 8, kSplitThreads = 512;  // blocks of a row, threads of each
constexpr int64_t kSplitFrom = 16384;

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
RLHF_HD Map step_of(bool walked, bool done, float delta, float decay) {
  if (!walked) return {1.0f, 0.0f};
  return {done ? 0.0f : decay, delta};
}

// What enters this block from the right when x = `carried` enters the last block of the cluster and
// each passes its map, that of all `warps`, on to its left neighbour; `carried` becomes what leaves
// block 0. Called by all threads of the cluster.
template <int WARPS>
RLHF_HD float scan_blocks(float& carried, const Map* warps, Map* blocks) {
  const int rank = blockIdx.x % kSplit;
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    Map map = lane < WARPS ? warps[lane] : Map{1.0f, 0.0f};
    for (int d = 1; d < WARPS; d *= 2) {
      const Map right = {__shfl_down_sync(~0u, map.slope, d), __shfl_down_sync(~0u, map.offset, d)};
      if (lane + d < WARPS) map = compose(map, right);
    }
    map = {__shfl_sync(~0u, map.slope, 0), __shfl_sync(~0u, map.offset, 0)};
    if (lane < kSplit) store_in_block(blocks + rank, lane, map);
  }
  cluster_sync();
  float x = carried, entering = 0.0f;
#pragma unroll 4
  for (int block = kSplit - 1; block >= 0; --block) {
    if (block == rank) entering = x;
    x = apply(blocks[block], x);
  }
  carried = x;
  return entering;
}

// Room for the maps of one scan.
template <int THREADS>
struct Maps {
  Map warps[THREADS / 32], blocks[kSplit];
};

// What enters this thread from the right when x = `carried` enters the last thread and each thread
// passes map(x) on to its left neighbour; `carried` becomes what leaves thread 0. Called by the
// whole block, or cluster; `shared` is free again behind its next barrier.
template <int THREADS, bool SPLIT>
RLHF_HD float scan_from_right(Map map, float& carried, Maps<THREADS>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const Map right = {__shfl_down_sync(~0u, map.slope, d), __shfl_down_sync(~0u, map.offset, d)};
    if (lane + d < 32) map = compose(map, right);
  }
  if (lane == 0) shared.warps[warp] = map;
  const Map behind = {__shfl_down_sync(~0u, map.slope, 1), __shfl_down_sync(~0u, map.offset, 1)};
  __syncthreads();
  float x = carried, entering = 0.0f;
  if constexpr (SPLIT) x = scan_blocks<THREADS / 32>(carried, shared.warps, shared.blocks);
#pragma unroll 4
  for (int w = THREADS / 32 - 1; w >= 0; --w) {
    if (w == warp) entering = x;
    x = apply(shared.warps[w], x);
  }
  if constexpr (!SPLIT) carried = x;
  return lane == 31 ? entering : apply(behind, entering);
}

// What a block keeps in shared memory.
template <int THREADS>
struct Scratch {
  Maps<THREADS> maps[3];
  float stages[THREADS / 32][kStage];
};

// The warp's part of a chunk whose first token is token `before` of a row of `length`, which starts
// at `begin`.
template <int THREADS>
RLHF_HD Span span_of(Scratch<THREADS>& scratch, int64_t begin, int64_t length, int64_t before,
                     bool aligned) {
  const int warp = threadIdx.x / 32;
  before += warp * kWarpItems;
  const auto inside =
      static_cast<int>(::min(int64_t{kWarpItems}, ::max(int64_t{-1}, length - before)));
  return {begin + before, inside, aligned, scratch.stages[warp]};
}

// A thread's tokens; bit i of a word is that of token i.
struct Tokens {
  float reward[kItems], value[kItems];
  uint32_t live, walked, done;
};

// What stands behind a chunk.
struct Behind {
  float value, trace, trace_returns;
};

// Turns rewards into advantages and values into returns, 0 where no token is live. `behind` is what
// stands behind the chunk (of the cluster's last block) and becomes what stands behind the next one
// to the left. Called by the whole block, or cluster.
//
// Two scans at least take turns, each with room of its own and a barrier: all have read the maps of
// one before the next chunk writes new ones.
template <int THREADS, bool SPLIT>
RLHF_HD void walk(Tokens& tokens, Scratch<THREADS>& scratch, Behind& behind, float gamma,
                  float decay, float decay_returns, bool two_lambdas) {
  const auto walked = [&](int i) { return (tokens.walked >> i & 1u) != 0; };
  const auto done = [&](int i) { return (tokens.done >> i & 1u) != 0; };
  Map nearest = {1.0f, 0.0f};
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i)  // the leftmost walked token hides those to its right
    if (walked(i)) nearest = {0.0f, tokens.value[i]};
  float following = scan_from_right<THREADS, SPLIT>(nearest, behind.value, scratch.maps[0]);

  float delta[kItems];
  Map map = {1.0f, 0.0f}, map_returns = {1.0f, 0.0f};
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const float next = done(i) ? 0.0f : following;
    delta[i] = temporal_difference(tokens.reward[i], tokens.value[i], next, gamma);
    if (walked(i)) following = tokens.value[i];
    map = compose(step_of(walked(i), done(i), delta[i], decay), map);
    if (two_lambdas)
      map_returns = compose(step_of(walked(i), done(i), delta[i], decay_returns), map_returns);
  }
  float a = scan_from_right<THREADS, SPLIT>(map, behind.trace, scratch.maps[1]);
  float b = 0.0f;
  if (two_lambdas)
    b = scan_from_right<THREADS, SPLIT>(map_returns, behind.trace_returns, scratch.maps[2]);
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    a = apply(step_of(walked(i), done(i), delta[i], decay), a);
    if (two_lambdas) b = apply(step_of(walked(i), done(i), delta[i], decay_returns), b);
    const bool live = tokens.live >> i & 1u;
    tokens.reward[i] = live ? a : 0.0f;
    tokens.value[i] = live ? (two_lambdas ? b : a) + tokens.value[i] : 0.0f;
  }
}

}  // namespace
}  // namespace rlhf::cuda
