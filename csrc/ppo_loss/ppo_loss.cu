// Policy, value and PPO losses on CUDA: losses, gradients and statistics in one launch, without a
// host read.
//
// The number of unmasked tokens divides every gradient, so the blocks of a cooperative launch, all
// of which run at once, first count the tokens (and add up the log-ratios for gspo) and wait for
// each other; then they walk the tokens, wait again, and block 0 adds the sums of all. Nothing is
// atomic: which thread adds what depends on the shape and the device, and on nothing else.
#define RLHF_ISA cuda
#include <cooperative_groups.h>

#include <atomic>

#include "ppo_loss/ppo_loss.h"
#include "ppo_loss/tokens.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kMostPerMultiprocessor = 4;  // blocks
constexpr int kScaleBlocks = 1024;

// Each is Totals or Sums.
template <class A, class B>
RLHF_HD void merge(A& a, const B& b) {
  a.policy += b.policy;
  a.value += b.value;
  a.entropy += b.entropy;
  a.kl += b.kl;
  a.mean_entropy += b.mean_entropy;
  a.mean_kl += b.mean_kl;
  a.difference += b.difference;
  a.k3 += b.k3;
  a.ratio += b.ratio;
  a.ratio_min = min(b.ratio_min, a.ratio_min);
  a.ratio_max = max(b.ratio_max, a.ratio_max);
  a.clip_low += b.clip_low;
  a.clip_high += b.clip_high;
  a.dual_clip += b.dual_clip;
  a.value_clip += b.value_clip;
}

// Of the first `lanes` lanes, a power of 2; lane 0 gets them.
template <class T>
RLHF_HD void merge_lanes(T& sums, int lanes) {
  constexpr int kWords = sizeof(T) / 4;
  for (int d = lanes / 2; d > 0; d /= 2) {
    uint32_t words[kWords];
    memcpy(words, &sums, sizeof sums);
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = __shfl_down_sync(~0u, words[k], d);
    T other;
    memcpy(&other, words, sizeof other);
    merge(sums, other);
  }
}

// Of a block, in a fixed order; thread 0 gets them.
template <class T>
RLHF_HD T block_sums(T sums) {
  __shared__ double room[kWarps * sizeof(T) / sizeof(double)];
  auto* const of_warps = reinterpret_cast<T*>(room);
  merge_lanes(sums, 32);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x < 32) {
    sums = of_warps[threadIdx.x % kWarps];
    merge_lanes(sums, kWarps);
  }
  return sums;
}

template <int THREADS, Kind kind>
__global__ void __launch_bounds__(THREADS) loss_kernel(PpoLossArgs args, Workspace work) {
  static_assert(THREADS == kThreads, "named in the template for the table of resources");
  const bool gspo = kind == Kind::gspo && args.logprob, counted = args.mask || gspo;
  const auto all_blocks = cooperative_groups::this_grid();
  if (counted) {
    count_parts(args, work, gspo);
    all_blocks.sync();
  }
  const Denominator denominator = denominator_of_all(args, work, counted);
  const Sums sums = block_sums(walk_tokens<kind>(args, work, denominator.value, counted));
  if (threadIdx.x == 0) work.blocks[blockIdx.x] = sums;
  all_blocks.sync();
  if (blockIdx.x > 0) return;
  Totals totals;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += THREADS)
    merge(totals, work.blocks[block]);
  totals = block_sums(totals);
  if (threadIdx.x == 0) finish(args, totals, denominator.tokens, denominator.value);
}

// ------------------------------------------------------------------- host

// How many blocks of the kernel run at once on the current device.
template <Kind kind>
unsigned resident_blocks(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int blocks = device < kDevices ? known[device].load() : 0;
  if (blocks == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    DeviceGuard::check(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
    DeviceGuard::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                           &per_multiprocessor, loss_kernel<kThreads, kind>, kThreads, 0),
                       "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    blocks =
        ::min(kMostBlocks, multiprocessors * ::min(per_multiprocessor, kMostPerMultiprocessor));
    if (device < kDevices) known[device] = blocks;
  }
  return static_cast<unsigned>(blocks);
}

template <Kind kind>
void launch_loss(const PpoLossArgs& args, const Workspace& work, int device, cudaStream_t stream,
                 const std::string& what) {
  const int64_t units = args.rows * ((args.length + kUnit - 1) / kUnit);
  if (units > UINT32_MAX - kMostBlocks * kWarps)
    throw std::invalid_argument(what + ": expected at most 2^32 parts of rows, got " +
                                std::to_string(units));
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      ::min(resident_blocks<kind>(device), static_cast<unsigned>((units + kWarps - 1) / kWarps)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  DeviceGuard::check(cudaLaunchKernelEx(&config, loss_kernel<kThreads, kind>, args, work), what);
}

// A gradient in place that is multiplied with 1 is neither read nor written.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* grad, const T* unit, T* out, int64_t size) {
  constexpr int N = Pack<T>::kSize;
  const float factor = *grad;
  if (unit == out && factor == 1.0f) return;
  const auto scaled = [factor](T x) {
    const float unit = to_float(x);
    T result;
    convert(unit == 0.0f ? 0.0f : unit * factor, result);
    return result;
  };
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * N; i < size;
       i += gridDim.x * int64_t{kThreads} * N) {
    if (aligned && i + N <= size) {
      Pack<T> pack = load_pack(unit + i);
#pragma unroll
      for (int k = 0; k < N; ++k) pack.x[k] = scaled(pack.x[k]);
      store_pack(out + i, pack);
    } else {
      for (int64_t k = i; k < i + N && k < size; ++k) out[k] = scaled(unit[k]);
    }
  }
}

}  // namespace

void ppo_loss(const PpoLossArgs& args, int device, void* stream) {
  const std::string what =
      "ppo_loss: rows " + std::to_string(args.rows) + ", length " + std::to_string(args.length);
  const int64_t parts = args.rows * ((args.length + kPart - 1) / kPart);
  Workspace work;
  work.blocks = static_cast<Sums*>(args.workspace);
  work.log_ratios = reinterpret_cast<double*>(work.blocks + kMostBlocks);
  work.counts = reinterpret_cast<int*>(work.log_ratios + parts);
  DeviceGuard guard(device);
  const auto launch = [&] {
    switch (static_cast<Kind>(args.kind)) {
      case Kind::gspo:
        return launch_loss<Kind::gspo>;
      case Kind::reinforce:
        return launch_loss<Kind::reinforce>;
      case Kind::cispo:
        return launch_loss<Kind::cispo>;
      case Kind::sapo:
        return launch_loss<Kind::sapo>;
      default:
        return launch_loss<Kind::clipped>;
    }
  }();
  launch(args, work, device, static_cast<cudaStream_t>(stream), what);
}

void scale_unit_gradient(const float* grad, const void* unit, void* out, Dtype dtype, int64_t size,
                         int device, void* stream) {
  const std::string what = "scale_unit_gradient: elements " + std::to_string(size);
  constexpr int64_t kBlock = kThreads * kQuad;
  DeviceGuard guard(device);
  const auto blocks =
      static_cast<unsigned>(::min(int64_t{kScaleBlocks}, (size + kBlock - 1) / kBlock));
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    scale_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        grad, static_cast<const T*>(unit), static_cast<T*>(out), size);
  });
  check_launch(what);
}

}  // namespace rlhf::cuda
