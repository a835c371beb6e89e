// GAE on CUDA: one block per row, chunks of tokens from the row's end.
//
// Every thread owns kItems neighbouring tokens of a chunk and turns them into one affine map; the
// maps are scanned over the block. The value that stands behind a token is found by the same scan:
// a token that the recursion runs through is the map x -> V_t, one that it skips x -> x.
#define RLHF_ISA cuda
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
__global__ void __launch_bounds__(THREADS) gae_kernel(GaeArgs args) {
  constexpr int kChunk = THREADS * kItems;
  __shared__ float rewards[kChunk + THREADS], values[kChunk + THREADS];
  __shared__ uint8_t flags[kChunk + THREADS];
  __shared__ Map maps[3][THREADS / 32];
  const int64_t row = blockIdx.x;
  int64_t begin = row * args.length, length = args.length;
  if (args.offsets) {  // offsets are not checked on the device; none may reach foreign memory
    const int64_t end = ::min(::max(args.offsets[row + 1], int64_t{0}), args.length);
    begin = ::min(::max(args.offsets[row], int64_t{0}), args.length);
    length = end - begin;
  }
  float next = args.bootstrap ? args.bootstrap[row] : args.bootstrap_value;
  float trace = 0.0f, trace_returns = 0.0f;
  const bool two_lambdas = args.returns && args.decay != args.decay_returns;

  for (int64_t chunk = (length + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk) {
    const int64_t first = begin + chunk * kChunk;  // may be added to any pointer
    const int64_t inside = length - chunk * kChunk;
    // Neighbouring threads read neighbouring tokens.
    for (int k = threadIdx.x; k < kChunk; k += THREADS) {
      const bool in = k < inside;
      const bool live = in && (!args.mask || args.mask[first + k]);
      rewards[place(k)] = live ? args.rewards[first + k] : 0.0f;
      values[place(k)] = live && args.values ? args.values[first + k] : 0.0f;
      const bool done = live && args.dones && args.dones[first + k];
      const bool walked = in && (live || !args.carry);
      flags[place(k)] = (live ? kLive : 0) | (walked ? kWalked : 0) | (done ? kDone : 0);
    }
    __syncthreads();
    float reward[kItems], value[kItems];
    uint8_t flag[kItems];
    Map nearest = {1.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      reward[i] = rewards[place(threadIdx.x * kItems + i)];
      value[i] = values[place(threadIdx.x * kItems + i)];
      flag[i] = flags[place(threadIdx.x * kItems + i)];
      // The leftmost walked token hides those to its right.
      if (flag[i] & kWalked && nearest.slope != 0.0f) nearest = {0.0f, value[i]};
    }
    float following = scan_from_right<THREADS>(nearest, next, maps[0]);

    float delta[kItems];
    Map map = {1.0f, 0.0f}, map_returns = {1.0f, 0.0f};
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      delta[i] =
          temporal_difference(reward[i], value[i], flag[i] & kDone ? 0.0f : following, args.gamma);
      if (flag[i] & kWalked) following = value[i];
      map = compose(step_of(flag[i], delta[i], args.decay), map);
      if (two_lambdas)
        map_returns = compose(step_of(flag[i], delta[i], args.decay_returns), map_returns);
    }
    float a = scan_from_right<THREADS>(map, trace, maps[1]);
    float b = two_lambdas ? scan_from_right<THREADS>(map_returns, trace_returns, maps[2]) : 0.0f;
    // Each thread puts its results where it alone has read.
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
      a = apply(step_of(flag[i], delta[i], args.decay), a);
      if (two_lambdas) b = apply(step_of(flag[i], delta[i], args.decay_returns), b);
      const bool live = flag[i] & kLive;
      rewards[place(threadIdx.x * kItems + i)] = live ? a : 0.0f;
      values[place(threadIdx.x * kItems + i)] = live ? (two_lambdas ? b : a) + value[i] : 0.0f;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kChunk && k < inside; k += THREADS) {
      args.advantages[first + k] = rewards[place(k)];
      if (args.returns) args.returns[first + k] = values[place(k)];
    }
    __syncthreads();  // before the next chunk is staged
  }
}

}  // namespace

void gae(const GaeArgs& args, int device, void* stream) {
  const std::string what =
      "gae: rows " + std::to_string(args.rows) + ", length " + std::to_string(args.length);
  DeviceGuard guard(device);
  const unsigned grid = grid_of(args.rows, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  // By the length of a row alone. That of a packed row is on the device: one shape for all.
  if (!args.offsets && args.length <= 64 * kItems)
    gae_kernel<64><<<grid, 64, 0, queue>>>(args);
  else
    gae_kernel<256><<<grid, 256, 0, queue>>>(args);
  check_launch(what);
}

}  // namespace rlhf::cuda
