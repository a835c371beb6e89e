// Rewards, advantages and whitening on CUDA: one block per row, or a cluster where a row is long,
// chunks of tokens from its end.
//
// A row's rewards, its scans (gae/scan.cuh) and its moments are made while a chunk is in registers.
// Whitening needs the moments of all rows and blocks of one launch cannot wait for each
// other: the second launch merges all parts in every block, in the same order.
#define RLHF_ISA cuda
#include "advantages/advantages.h"
#include "gae/scan.cuh"
#include "ppo_loss/formulas.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;        // of whitening
constexpr int kWhitenBlocks = 1024;  // of a whitening launch at most, each of which reads all parts
constexpr int kPart = 2048;          // tokens that a block has in its registers
constexpr int kGroupWarps = 4;       // responses of a block

// ------------------------------------------------------------------- moments

// As block_sum of device.cuh.
RLHF_HD double block_total(double x, double* shared) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_down_sync(~0u, x, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) x += shared[warp];
  return x;
}

// Of the block's numbers, n per thread, where bit i of `live` is set. The corrected two-pass
// algorithm of Chan, Golub and LeVeque, 1983: deviations are those from a rounded mean, and what
// its rounding adds is count rest^2.
template <int n>
RLHF_HD Moments block_moments(const float (&x)[n], uint32_t live, float* shared) {
  float sum = 0.0f, deviations = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) sum += live >> i & 1u ? x[i] : 0.0f;
  const float count = block_sum(static_cast<float>(__popc(live)), shared);
  const float divisor = max(1.0f, count);
  const float mean = block_sum(sum, shared) / divisor;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float d = live >> i & 1u ? x[i] - mean : 0.0f;
    deviations += d;
    squares += d * d;
  }
  const double rest = static_cast<double>(block_sum(deviations, shared)) / divisor;
  const double total = block_sum(squares, shared);
  return {count, mean + rest, fmax(total - count * rest * rest, 0.0)};
}

// Of both (Chan, Golub and LeVeque, 1979).
RLHF_HD Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, gap = b.mean - a.mean;
  const double share = count > 0.0 ? b.count / count : 0.0;
  return {count, a.mean + gap * share, a.squares + b.squares + gap * gap * a.count * share};
}

// Of all parts; every block gets the same bits.
RLHF_HD Moments merged(const Moments* parts, int64_t n, double* shared) {
  double count = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    count += parts[i].count;
    sum += parts[i].count * parts[i].mean;
  }
  count = block_total(count, shared);
  const double mean = block_total(sum, shared) / fmax(count, 1.0);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const double shift = parts[i].mean - mean;
    if (parts[i].count > 0.0) squares += parts[i].squares + parts[i].count * shift * shift;
  }
  return {count, mean, block_total(squares, shared)};
}

__global__ void __launch_bounds__(kThreads) moments_kernel(MomentsArgs args) {
  constexpr int kOwn = kPart / kThreads;
  __shared__ float shared[32];
  Moments all = {};
  for (int64_t first = blockIdx.x * int64_t{kPart}; first < args.size;
       first += gridDim.x * int64_t{kPart}) {
    float x[kOwn];
    uint32_t live = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t k = first + i * kThreads + threadIdx.x;
      const bool counts = k < args.size && (!args.mask || args.mask[k]);
      x[i] = counts ? args.x[k] : 0.0f;
      live |= static_cast<uint32_t>(counts) << i;
    }
    all = merged(all, block_moments(x, live, shared));
  }
  if (threadIdx.x == 0) args.out[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(WhitenArgs args) {
  __shared__ double shared[32];
  const Moments m = merged(args.moments, args.parts, shared);
  const double degrees = args.unbiased ? m.count - 1.0 : m.count;
  const bool some = m.count > 1.0;
  const double scale = some ? 1.0 / sqrt(m.squares / degrees + args.eps) : 0.0;
  // Infinite without spread and eps: every deviation is 0, and stays it.
  const float factor = scale == HUGE_VAL ? 0.0f : static_cast<float>(scale);
  // A mean has more digits than one float.
  const float mean = static_cast<float>(m.mean), rest = static_cast<float>(m.mean - mean);
  const auto whitened = [&](float x, bool live) {
    float y = live && some ? (x - mean - rest) * factor : 0.0f;
    if (!args.shift_mean) y = mean + (y + rest);
    return live ? y : 0.0f;
  };
  // 16 bytes at a time. `out` may be x: nothing is read ahead of a store, so each thread needs
  // some.
  const bool aligned = aligned_to(16, args.x, args.out) && aligned_to(4, args.mask);
  for (int64_t i = 4 * (blockIdx.x * int64_t{kThreads} + threadIdx.x); i < args.size;
       i += 4 * gridDim.x * int64_t{kThreads}) {
    if (aligned && i + 4 <= args.size) {
      const uint32_t bytes = args.mask ? *reinterpret_cast<const uint32_t*>(args.mask + i) : ~0u;
      const float4 x = *reinterpret_cast<const float4*>(args.x + i);
      *reinterpret_cast<float4*>(args.out + i) =
          make_float4(whitened(x.x, bytes & 0xffu), whitened(x.y, bytes & 0xff00u),
                      whitened(x.z, bytes & 0xff0000u), whitened(x.w, bytes & 0xff000000u));
      continue;
    }
    for (int64_t k = i; k < i + 4 && k < args.size; ++k)
      args.out[k] = whitened(args.x[k], !args.mask || args.mask[k]);
  }
}

// ------------------------------------------------------------------- rewards and advantages

// The column of the last token that counts, or -1.
RLHF_HD int64_t last_live(const uint8_t* mask, int64_t length, float* shared) {
  constexpr int64_t kWindow = 2048;
  for (int64_t end = length; end > 0; end -= kWindow) {
    const int64_t first = ::max(end - kWindow, int64_t{0});
    float last = -1.0f;  // exact: a window is short
    for (int k = threadIdx.x; k < end - first; k += blockDim.x)
      if (mask[first + k]) last = static_cast<float>(k);
    last = block_max(last, shared);
    if (last >= 0.0f) return first + static_cast<int64_t>(last);
  }
  return -1;
}

// KL and rewards of a thread's tokens, of which the one of number `last` gets *score, if it counts.
RLHF_HD void reward_tokens(const AdvantagesArgs& args, const Span& span, uint32_t live,
                           int64_t last, const float* score, float (&reward)[kItems]) {
  float kl[kItems], ref[kItems];
  load_items(args.logprob, span, live, kl);
  load_items(args.ref_logprob, span, live, ref);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float d = clamp(difference(kl[i], ref[i]), -args.clamp_in, args.clamp_in);
    kl[i] = clamp(kl_estimate(d, static_cast<KlEstimator>(args.estimator)).value, -args.clamp_out,
                  args.clamp_out);
    kl[i] = live >> i & 1u ? kl[i] : 0.0f;
    // A coefficient of 0 ignores an infinite penalty.
    reward[i] = args.kl_coef == 0.0f ? 0.0f : kl[i] * -args.kl_coef;
    reward[i] = live >> i & 1u ? reward[i] : 0.0f;
    if (i == last && live >> i & 1u) reward[i] += *score;
  }
  store_items(args.kl, span, kl);
  store_items(args.rewards, span, reward);
}

template <int THREADS, bool SPLIT, bool ADVANTAGES>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) advantages_kernel(AdvantagesArgs args) {
  constexpr int kBlocks = SPLIT ? kSplit : 1, kChunk = THREADS * kItems;
  __shared__ Scratch<THREADS> scratch;
  __shared__ float shared[32];
  __shared__ Moments moments;  // of the block, thread 0's
  __shared__ int64_t column;   // of the score; no register to spare
  const int64_t row = blockIdx.x / kBlocks, begin = row * args.length;
  const int rank = blockIdx.x % kBlocks;
  const bool aligned = args.length % kItems == 0 && aligned_to(kItems, args.mask) &&
                       aligned_to(16, args.logprob, args.ref_logprob, args.values, args.rewards,
                                  args.kl, args.advantages, args.returns);
  int64_t last = args.length - 1;
  if (!args.at && args.mask) last = last_live(args.mask + begin, args.length, shared);
  if (threadIdx.x == 0) column = args.at ? args.at[row] : last, moments = {};
  Behind behind = {0.0f, 0.0f, 0.0f};
  if constexpr (SPLIT && ADVANTAGES)
    cluster_sync();  // all blocks have started
  else
    __syncthreads();

  const auto steps = static_cast<int>((args.length + kBlocks * kChunk - 1) / (kBlocks * kChunk));
  for (int step = steps - 1; step >= 0; --step) {
    const int64_t before = (int64_t{step} * kBlocks + rank) * kChunk;
    const Span span = span_of(scratch, begin, args.length, before, aligned);
    Tokens tokens;
    tokens.live = args.mask ? load_bits(args.mask, span) : inside_bits(span);
    reward_tokens(args, span, tokens.live, begin + column - span.first - threadIdx.x % 32 * kItems,
                  args.scores + row, tokens.reward);
    if constexpr (ADVANTAGES) {
      tokens.walked = args.carry ? tokens.live : inside_bits(span);
      tokens.done = 0u;
      load_items(args.values, span, tokens.live, tokens.value);
      walk<THREADS, SPLIT>(tokens, scratch, behind, args.gamma, args.decay, args.decay, false);
      store_items(args.advantages, span, tokens.reward);
      store_items(args.returns, span, tokens.value);
      if (args.whitened) {
        const Moments chunk = block_moments(tokens.reward, tokens.live, shared);
        if (threadIdx.x == 0) moments = merged(moments, chunk);
      }
    }
  }
  if (ADVANTAGES && args.whitened && threadIdx.x == 0) args.parts[blockIdx.x] = moments;
}

// ------------------------------------------------------------------- groups

// Every lane gets the result.
template <class T, class Combine>
RLHF_HD T warp_reduce(T x, Combine combine) {
  for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// In units of 2^-40: 2^23 of them are exact in 64 bits, in any order. Not finite counts as 0.
RLHF_HD int64_t units(float ratio) {
  return fabsf(ratio) <= 1.0f ? static_cast<int64_t>(ratio * 0x1p40f) : 0;
}

RLHF_HD float from_units(int64_t n) { return static_cast<float>(n) * 0x1p-40f; }

// A warp takes a response and looks at all of them, three times, for those of its group. Float sums
// would depend on their order, and so on who stands between a group's members: deviations are added
// as integers, in units of the group's spread.
__global__ void __launch_bounds__(32 * kGroupWarps) group_kernel(GroupArgs args) {
  const int64_t row = blockIdx.x * int64_t{kGroupWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= args.rows) return;
  const int64_t id = args.ids[row];
  const auto add = [](auto a, auto b) { return a + b; };
  int count = 0, broken = 0;
  float top = -kInfinity, bottom = kInfinity;
  for (int64_t j = lane; j < args.rows; j += 32) {
    if (args.ids[j] != id) continue;
    const float score = args.scores[j];
    ++count;
    broken += score != score;
    top = fmaxf(top, score);  // passes NaN over
    bottom = fminf(bottom, score);
  }
  count = warp_reduce(count, add);
  broken = warp_reduce(broken, add);
  top = warp_reduce(top, [](float a, float b) { return fmaxf(a, b); });
  bottom = warp_reduce(bottom, [](float a, float b) { return fminf(a, b); });
  const float n = static_cast<float>(count), others = max(1.0f, n - 1.0f);
  const float spread = top - bottom, reach = spread > 0.0f ? spread : 1.0f;

  int64_t total = 0;
  for (int64_t j = lane; j < args.rows; j += 32)
    if (args.ids[j] == id) total += units((args.scores[j] - bottom) / reach);
  // The mean is bottom + rest: a common offset of the scores costs no digits.
  float rest = from_units(warp_reduce(total, add)) * spread / n;
  if (broken || spread == kInfinity) rest = NAN;
  const float deviation = args.scores[row] - bottom - rest;
  float out = deviation;
  if (args.kind == GroupKind::rloo) out = deviation * (n / others);
  if (args.kind == GroupKind::grpo) {
    total = 0;
    for (int64_t j = lane; j < args.rows; j += 32) {
      if (args.ids[j] != id) continue;
      const float ratio = (args.scores[j] - bottom - rest) / reach;
      total += units(ratio * ratio);
    }
    const float variance = from_units(warp_reduce(total, add)) / others;
    out = deviation / (spread * sqrtf(variance) + static_cast<float>(args.eps));
  }
  // Equal scores with eps = 0 would give 0 / 0.
  if (lane == 0) args.out[row] = count > 1 && deviation != 0.0f ? out : 0.0f;
}

std::string size_of(const char* op, int64_t rows, int64_t length) {
  return std::string(op) + ": rows " + std::to_string(rows) + ", length " + std::to_string(length);
}

template <int THREADS, bool ADVANTAGES>
void launch_blocks(const AdvantagesArgs& args, unsigned rows, cudaStream_t stream) {
  advantages_kernel<THREADS, false, ADVANTAGES><<<rows, THREADS, 0, stream>>>(args);
}

// By the length of a row alone; returns the number of blocks of each.
template <bool ADVANTAGES>
int launch_rows(const AdvantagesArgs& args, int device, cudaStream_t stream,
                const std::string& what) {
  const auto split = advantages_kernel<kSplitThreads, true, ADVANTAGES>;
  if (args.length > kSplitFrom && can_cluster(split, device)) {
    launch_clusters(split, grid_of(args.rows * kSplit, what), kSplit, kSplitThreads, stream, args,
                    what);
    return kSplit;
  }
  const auto launch = args.length <= 32 * kItems    ? launch_blocks<32, ADVANTAGES>
                      : args.length <= 64 * kItems  ? launch_blocks<64, ADVANTAGES>
                      : args.length <= 128 * kItems ? launch_blocks<128, ADVANTAGES>
                                                    : launch_blocks<256, ADVANTAGES>;
  launch(args, grid_of(args.rows, what), stream);
  check_launch(what);
  return 1;
}

}  // namespace

// ------------------------------------------------------------------- host

void moments(const MomentsArgs& args, int device, void* stream) {
  DeviceGuard guard(device);
  const auto blocks = static_cast<unsigned>(args.parts);
  moments_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch("whiten: size " + std::to_string(args.size));
}

void whiten(const WhitenArgs& args, int device, void* stream) {
  DeviceGuard guard(device);
  const int64_t blocks = ::min(int64_t{kWhitenBlocks}, (args.size + kPart - 1) / kPart);
  whiten_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args);
  check_launch("whiten: size " + std::to_string(args.size));
}

void advantages(const AdvantagesArgs& args, int device, void* stream) {
  const std::string what = size_of("advantages", args.rows, args.length);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  const int blocks = args.values ? launch_rows<true>(args, device, queue, what)
                                 : launch_rows<false>(args, device, queue, what);
  if (!args.values || !args.whitened) return;
  WhitenArgs all = {};
  all.x = all.out = args.advantages;
  all.mask = args.mask;
  all.moments = args.parts;
  all.parts = args.rows * blocks;
  all.size = args.rows * args.length;
  all.shift_mean = true;
  all.unbiased = args.unbiased;
  all.eps = args.eps;
  whiten(all, device, stream);
}

void group_advantages(const GroupArgs& args, int device, void* stream) {
  const std::string what = "group_advantages: rows " + std::to_string(args.rows);
  DeviceGuard guard(device);
  const unsigned grid = grid_of((args.rows + kGroupWarps - 1) / kGroupWarps, what);
  group_kernel<<<grid, 32 * kGroupWarps, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch(what);
}

}  // namespace rlhf::cuda
