// GAE on CUDA: one block per row, chunks of tokens from the row's end (scan.cuh).
#define RLHF_ISA cuda
#include "gae/gae.h"
#include "gae/scan.cuh"

namespace rlhf::cuda {
namespace {

template <int THREADS>
__global__ void __launch_bounds__(THREADS) gae_kernel(GaeArgs args) {
  constexpr int kChunk = Chunk<THREADS>::kTokens;
  __shared__ Chunk<THREADS> chunk;
  const int64_t row = blockIdx.x;
  int64_t begin = row * args.length, length = args.length;
  if (args.offsets) {  // offsets are not checked on the device; none may reach foreign memory
    const int64_t end = ::min(::max(args.offsets[row + 1], int64_t{0}), args.length);
    begin = ::min(::max(args.offsets[row], int64_t{0}), args.length);
    length = end - begin;
  }
  Behind behind = {args.bootstrap ? args.bootstrap[row] : args.bootstrap_value, 0.0f, 0.0f};
  const bool two_lambdas = args.returns && args.decay != args.decay_returns;

  for (int64_t step = (length + kChunk - 1) / kChunk - 1; step >= 0; --step) {
    const int64_t first = begin + step * kChunk;  // may be added to any pointer
    const int64_t inside = length - step * kChunk;
    // Neighbouring threads read neighbouring tokens.
    for (int k = threadIdx.x; k < kChunk; k += THREADS) {
      const bool in = k < inside;
      const bool live = in && (!args.mask || args.mask[first + k]);
      chunk.rewards[place(k)] = live ? args.rewards[first + k] : 0.0f;
      chunk.values[place(k)] = live && args.values ? args.values[first + k] : 0.0f;
      const bool done = live && args.dones && args.dones[first + k];
      const bool walked = in && (live || !args.carry);
      chunk.flags[place(k)] = (live ? kLive : 0) | (walked ? kWalked : 0) | (done ? kDone : 0);
    }
    walk(chunk, behind, args.gamma, args.decay, args.decay_returns, two_lambdas);
    for (int k = threadIdx.x; k < kChunk && k < inside; k += THREADS) {
      args.advantages[first + k] = chunk.rewards[place(k)];
      if (args.returns) args.returns[first + k] = chunk.values[place(k)];
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
