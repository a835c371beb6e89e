// Ranking loss on CUDA: a warp has a prompt, a lane one completion at a time.
//
// A lane's sums go over the completions that it meets, in their order. A prompt's weight needs the
// number of prompts with a pair, and blocks of one launch cannot wait for each other: in the second
// launch each block counts them for itself.
#define RLHF_ISA cuda
#include "ranking_loss/ranking_loss.h"

namespace rlhf::cuda {
namespace {

constexpr int kWarps = 4;  // prompts of a block
constexpr int kThreads = 256, kBlocks = 512;

// The sum over the warp in lane 0.
template <class T>
RLHF_HD T warp_sum(T x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_down_sync(~0u, x, d);
  return x;
}

// The prompt's mean loss and number of pairs, and its gradient before the division by it.
template <class Rank>
__global__ void __launch_bounds__(32 * kWarps)
    pairs_kernel(RankingLossArgs args, const Rank* all_ranks) {
  const int64_t prompt = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (prompt >= args.prompts) return;
  const int64_t size = args.completions, begin = prompt * size;
  const float* const scores = args.scores + begin;
  const Rank* const ranks = all_ranks + begin;
  const uint8_t* const mask = args.mask ? args.mask + begin : nullptr;
  float loss = 0.0f;
  int pairs = 0;
  for (int64_t i = threadIdx.x % 32; i < size; i += 32) {
    float slopes = 0.0f;
    if (!mask || mask[i]) {
      float losses = 0.0f;
      for (int64_t j = 0; j < size; ++j) {
        const bool wins = ranks[i] < ranks[j], loses = ranks[j] < ranks[i];
        if ((!wins && !loses) || (mask && !mask[j])) continue;
        const float gap = wins ? scores[i] - scores[j] : scores[j] - scores[i];
        const auto term = pair_term(gap - args.margin);
        losses += wins ? term.loss : 0.0f;
        slopes += wins ? -term.slope : term.slope;
        pairs += wins;
      }
      loss += losses;
    }
    args.grad[begin + i] = slopes;
  }
  __syncwarp();
  loss = warp_sum(loss);
  pairs = warp_sum(pairs);
  if (threadIdx.x % 32 == 0)
    args.parts[prompt] = {loss / static_cast<float>(pairs > 0 ? pairs : 1), pairs};
}

__global__ void __launch_bounds__(kThreads) mean_kernel(RankingLossArgs args) {
  __shared__ float shared[32];
  float loss = 0.0f, some = 0.0f;  // counts are exact below 2^24
  for (int64_t p = threadIdx.x; p < args.prompts; p += kThreads) {
    loss += args.parts[p].loss;
    some += args.parts[p].pairs > 0 ? 1.0f : 0.0f;
  }
  const float prompts = max(1.0f, block_sum(some, shared));
  loss = block_sum(loss, shared) / prompts;
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.loss = loss;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
       i < args.prompts * args.completions; i += gridDim.x * int64_t{kThreads}) {
    const int pairs = args.parts[i / args.completions].pairs;
    args.grad[i] *= 1.0f / (static_cast<float>(pairs > 0 ? pairs : 1) * prompts);
  }
}

}  // namespace

void ranking_loss(const RankingLossArgs& args, int device, void* stream) {
  const std::string what = "ranking_loss: prompts " + std::to_string(args.prompts) +
                           ", completions " + std::to_string(args.completions);
  DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const unsigned grid = grid_of((args.prompts + kWarps - 1) / kWarps, what);
  if (args.ranks)
    pairs_kernel<<<grid, 32 * kWarps, 0, queue>>>(args, args.ranks);
  else
    pairs_kernel<<<grid, 32 * kWarps, 0, queue>>>(args, args.float_ranks);
  const int64_t blocks = (args.prompts * args.completions + kThreads - 1) / kThreads;
  mean_kernel<<<static_cast<unsigned>(::min(int64_t{kBlocks}, blocks)), kThreads, 0, queue>>>(args);
  check_launch(what);
}

}  // namespace rlhf::cuda
