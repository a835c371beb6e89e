// GAE on CUDA: one block per row, or a cluster where a row is long, chunks of tokens from the row's
// end (scan.cuh).
#define RLHF_ISA cuda
#include "gae/gae.h"
#include "gae/scan.cuh"

namespace rlhf::cuda {
namespace {

template <int THREADS, bool SPLIT>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) gae_kernel(GaeArgs args) {
  constexpr int kBlocks = SPLIT ? kSplit : 1, kChunk = THREADS * kItems;
  __shared__ Scratch<THREADS> scratch;
  const int64_t row = blockIdx.x / kBlocks;
  const int rank = blockIdx.x % kBlocks;
  int64_t begin = row * args.length, length = args.length;
  if (args.offsets) {  // offsets are not checked on the device; none may reach foreign memory
    const int64_t end = ::min(::max(args.offsets[row + 1], int64_t{0}), args.length);
    begin = ::min(::max(args.offsets[row], int64_t{0}), args.length);
    length = end - begin;
  }
  const bool aligned = !args.offsets && length % kItems == 0 &&
                       aligned_to(16, args.rewards, args.values, args.advantages, args.returns) &&
                       aligned_to(kItems, args.mask, args.dones);
  Behind behind = {args.bootstrap ? args.bootstrap[row] : args.bootstrap_value, 0.0f, 0.0f};
  const bool two_lambdas = args.returns && args.decay != args.decay_returns;
  if constexpr (SPLIT) cluster_sync();  // all blocks have started

  const auto steps = static_cast<int>((length + kBlocks * kChunk - 1) / (kBlocks * kChunk));
  for (int step = steps - 1; step >= 0; --step) {
    const Span span =
        span_of(scratch, begin, length, (int64_t{step} * kBlocks + rank) * kChunk, aligned);
    Tokens tokens;
    tokens.live = args.mask ? load_bits(args.mask, span) : inside_bits(span);
    tokens.walked = args.carry ? tokens.live : inside_bits(span);
    tokens.done = args.dones ? load_bits(args.dones, span) & tokens.live : 0u;
    load_items(args.rewards, span, tokens.live, tokens.reward);
    load_items(args.values, span, args.values ? tokens.live : 0u, tokens.value);
    walk<THREADS, SPLIT>(tokens, scratch, behind, args.gamma, args.decay, args.decay_returns,
                         two_lambdas);
    store_items(args.advantages, span, tokens.reward);
    if (args.returns) store_items(args.returns, span, tokens.value);
  }
}

template <int THREADS>
void launch_blocks(const GaeArgs& args, unsigned rows, cudaStream_t stream) {
  gae_kernel<THREADS, false><<<rows, THREADS, 0, stream>>>(args);
}

}  // namespace

void gae(const GaeArgs& args, int device, void* stream) {
  const std::string what =
      "gae: rows " + std::to_string(args.rows) + ", length " + std::to_string(args.length);
  DeviceGuard guard(device);
  const unsigned rows = grid_of(args.rows, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  // The length of a packed row is on the device: one shape for all.
  if (args.offsets) {
    launch_blocks<256>(args, rows, queue);
  } else if (args.length > kSplitFrom && can_cluster(gae_kernel<kSplitThreads, true>, device)) {
    launch_clusters(gae_kernel<kSplitThreads, true>, grid_of(args.rows * kSplit, what), kSplit,
                    kSplitThreads, queue, args, what);
  } else {
    const auto launch = args.length <= 32 * kItems    ? launch_blocks<32>
                        : args.length <= 64 * kItems  ? launch_blocks<64>
                        : args.length <= 128 * kItems ? launch_blocks<128>
                                                      : launch_blocks<256>;
    launch(args, rows, queue);
  }
  check_launch(what);
}

}  // namespace rlhf::cuda
