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

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kQuad = 4;           // neighbouring tokens of a thread: 16 bytes
constexpr int kUnit = 32 * kQuad;  // tokens of a row that a warp takes at once
constexpr int kMostBlocks = 1024;  // kernels/ppo_loss/_native.py allocates their sums
constexpr int kMostPerMultiprocessor = 4;
constexpr int64_t kPart = 4096;  // tokens of a row that are counted together; as _native.py
constexpr int kScaleBlocks = 1024;

// What a thread and a block add to Totals.
struct Sums {
  double policy = 0.0, value = 0.0, entropy = 0.0, kl = 0.0;
  double mean_entropy = 0.0, mean_kl = 0.0, difference = 0.0, k3 = 0.0, ratio = 0.0;
  float ratio_min = kInfinity, ratio_max = 0.0f;
  int clip_low = 0, clip_high = 0, dual_clip = 0, value_clip = 0;
};

static_assert(sizeof(Sums) == 96, "as _native.py allocates them");

struct Workspace {
  Sums* blocks;        // [kMostBlocks]
  double* log_ratios;  // of a part, gspo
  int* counts;         // unmasked tokens of a part
};

// ------------------------------------------------------------------- counting

struct Parts {
  unsigned of_row, all;
};

RLHF_HD Parts parts_of(const PpoLossArgs& args) {
  const auto of_row = static_cast<unsigned>((args.length + kPart - 1) / kPart);
  return {of_row, static_cast<unsigned>(args.rows) * of_row};
}

template <class T>
RLHF_HD T warp_sum(T x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

RLHF_HD int count_bytes(uint32_t bytes) { return __popc(__vsetne4(bytes, 0u)); }

// How many of n bytes are not 0. Called by a warp; every lane gets it.
RLHF_HD int count_bytes(const uint8_t* p, int n) {
  const int lane = threadIdx.x % 32;
  const int head = ::min(n, static_cast<int>(-reinterpret_cast<uintptr_t>(p) & 15u));
  const int packs = (n - head) / 16, tail = head + 16 * packs;
  const auto* const body = reinterpret_cast<const uint4*>(p + head);
  int count = 0;
#pragma unroll 8
  for (int k = lane; k < packs; k += 32) {
    const uint4 x = body[k];
    count += count_bytes(x.x) + count_bytes(x.y) + count_bytes(x.z) + count_bytes(x.w);
  }
  if (lane < head) count += p[lane] != 0;
  if (tail + lane < n) count += p[tail + lane] != 0;
  return warp_sum(count);
}

RLHF_HD float log_ratio_of(float d) { return clamp(d, -kLogRatioLimit, kLogRatioLimit); }

// Counts the parts, a warp each.
RLHF_HD void count_parts(const PpoLossArgs& args, const Workspace& work, bool gspo) {
  const int lane = threadIdx.x % 32;
  const Parts parts = parts_of(args);
  for (unsigned part = blockIdx.x * kWarps + threadIdx.x / 32; part < parts.all;
       part += gridDim.x * kWarps) {
    const int64_t t = part % parts.of_row * kPart, begin = part / parts.of_row * args.length + t;
    const auto n = static_cast<int>(::min(kPart, args.length - t));
    const int count = args.mask ? count_bytes(args.mask + begin, n) : n;
    if (lane == 0) work.counts[part] = count;
    if (!gspo) continue;
    double sum = 0.0;
    for (int64_t i = begin + lane; i < begin + n; i += 32)
      if (!args.mask || args.mask[i])
        sum += log_ratio_of(difference(args.logprob[i], args.old_logprob[i]));
    sum = warp_sum(sum);
    if (lane == 0) work.log_ratios[part] = sum;
  }
}

struct Row {
  int64_t count;         // unmasked tokens
  float mean_log_ratio;  // gspo
};

// Behind the barrier that follows count_parts; `counted` is whether it was called.
RLHF_HD Row row_of(const PpoLossArgs& args, const Workspace& work, unsigned row, bool counted,
                   bool gspo) {
  if (!counted) return {args.length, 0.0f};
  const Parts parts = parts_of(args);
  int64_t count = 0;
  double sum = 0.0;
  for (unsigned part = row * parts.of_row; part < (row + 1) * parts.of_row; ++part) {
    count += work.counts[part];
    if (gspo) sum += work.log_ratios[part];
  }
  return {count, static_cast<float>(sum / (count > 0 ? count : 1))};
}

struct Denominator {
  double value;
  int64_t tokens;
};

// Every thread of a block gets it; all blocks add the same counts.
RLHF_HD Denominator denominator_of_all(const PpoLossArgs& args, const Workspace& work,
                                       bool counted) {
  __shared__ int64_t tokens_of[kWarps];
  __shared__ int64_t sequences_of[kWarps];
  int64_t tokens = 0, sequences = 0;
  for (unsigned row = threadIdx.x; row < args.rows; row += kThreads) {
    const int64_t count = row_of(args, work, row, counted, false).count;
    tokens += count;
    sequences += count > 0;
  }
  tokens = warp_sum(tokens);
  sequences = warp_sum(sequences);
  if (threadIdx.x % 32 == 0) tokens_of[threadIdx.x / 32] = tokens;
  if (threadIdx.x % 32 == 0) sequences_of[threadIdx.x / 32] = sequences;
  __syncthreads();
  tokens = sequences = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    tokens += tokens_of[warp];
    sequences += sequences_of[warp];
  }
  return {denominator_of(args, tokens, sequences), tokens};
}

// ------------------------------------------------------------------- tokens

// A thread's neighbouring tokens.
struct Quad {
  float x[kQuad];
};

struct Place {
  int64_t i;      // of the first token
  int inside;     // tokens of the row, at least 1
  unsigned live;  // bit k: token k counts
  bool aligned;   // 16 bytes at once; then all kQuad are inside
};

// 0 where no token counts.
RLHF_HD Quad load_quad(const float* p, const Place& at) {
  Quad quad = {};
  if (at.aligned) {
    const float4 a = *reinterpret_cast<const float4*>(p + at.i);
    quad = {a.x, a.y, a.z, a.w};
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const bool live = at.live >> k & 1u;
    if (!at.aligned && live) quad.x[k] = p[at.i + k];
    quad.x[k] = live ? quad.x[k] : 0.0f;
  }
  return quad;
}

RLHF_HD void store_quad(float* p, const Place& at, const Quad& quad) {
  if (at.aligned) {
    const float4 a = make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
    *reinterpret_cast<float4*>(p + at.i) = a;
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < at.inside) p[at.i + k] = quad.x[k];
}

RLHF_HD unsigned live_tokens(const PpoLossArgs& args, const Place& at) {
  const unsigned inside = (1u << at.inside) - 1u;
  if (!args.mask) return inside;
  unsigned live = 0;
  if (at.aligned) {
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(args.mask + at.i);
    return __vsetne4(bytes, 0u) * 0x01020408u >> 24;  // bit 8 k goes to bit 24 + k
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < at.inside && args.mask[at.i + k]) live |= 1u << k;
  return live;
}

// What the terms of a row are multiplied with.
struct Weights {
  double scale;          // of a loss
  float factor;          // of a gradient: scale / denominator
  float mean_log_ratio;  // gspo
};

// KL against the reference of a token with log-prob `lp`; returns what it adds to its slope.
RLHF_HD float kl_token(const PpoLossArgs& args, float lp, float ref, double scale, Sums& sums) {
  const auto kl = kl_estimate(difference(lp, ref), static_cast<KlEstimator>(args.estimator));
  sums.kl += kl.value * scale;
  sums.mean_kl += kl.value;
  const bool finite = abs(lp) < kInfinity && abs(ref) < kInfinity;
  return finite && args.kl_coef != 0.0f ? kl.slope * args.kl_coef : 0.0f;
}

template <Kind kind>
RLHF_HD void policy_quad(const PpoLossArgs& args, const Place& at, const Weights& row, Sums& sums) {
  const Quad lp = load_quad(args.logprob, at), old = load_quad(args.old_logprob, at);
  const Quad advantage = load_quad(args.advantages, at);
  const Quad weight = args.weights ? load_quad(args.weights, at) : Quad{1.0f, 1.0f, 1.0f, 1.0f};
  const Quad ref = args.ref_logprob ? load_quad(args.ref_logprob, at) : Quad{};
  const Clip clip = {args.clip_low, args.clip_high, args.dual_clip};
  Quad grad = {}, grad_advantage = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    const float d = difference(lp.x[k], old.x[k]);
    const auto e = exponentials(log_ratio_of(d));
    const float rho = kind == Kind::gspo ? exp_negative(row.mean_log_ratio) : e.exp;
    const bool outside = abs(d) > kLogRatioLimit;
    const auto term = policy_term<kind>(lp.x[k], advantage.x[k], rho, outside, clip);
    const float loss = term.loss * weight.x[k];
    float slope = term.slope * weight.x[k];
    sums.policy += loss * row.scale;
    sums.difference += d;
    sums.k3 += e.minus_line;
    sums.ratio += rho;
    sums.ratio_min = min(rho, sums.ratio_min);
    sums.ratio_max = max(rho, sums.ratio_max);
    sums.clip_low += term.low;
    sums.clip_high += term.high;
    sums.dual_clip += term.dual;
    if (args.ref_logprob) slope += kl_token(args, lp.x[k], ref.x[k], row.scale, sums);
    grad.x[k] = slope * row.factor;
    grad_advantage.x[k] = -lp.x[k] * weight.x[k] * row.factor;
  }
  store_quad(args.grad_logprob, at, grad);
  if (args.grad_advantages) store_quad(args.grad_advantages, at, grad_advantage);
}

RLHF_HD void value_quad(const PpoLossArgs& args, const Place& at, const Weights& row, Sums& sums) {
  const Quad value = load_quad(args.values, at), old_value = load_quad(args.old_values, at);
  const Quad target = load_quad(args.returns, at);
  Quad grad = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    const auto term = value_term(value.x[k], old_value.x[k], target.x[k], args.value_clip);
    sums.value += term.loss * row.scale;
    sums.value_clip += term.clipped;
    if (args.value_coef != 0.0f) grad.x[k] = term.slope * (args.value_coef * row.factor);
  }
  store_quad(args.grad_values, at, grad);
}

RLHF_HD void entropy_quad(const PpoLossArgs& args, const Place& at, const Weights& row,
                          Sums& sums) {
  const Quad entropy = load_quad(args.entropy, at);
  Quad grad = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (!(at.live >> k & 1u)) continue;
    sums.entropy += entropy.x[k] * row.scale;
    sums.mean_entropy += entropy.x[k];
    grad.x[k] = -args.entropy_coef * row.factor;
  }
  store_quad(args.grad_entropy, at, grad);
}

// Whether each row starts 16 bytes aligned, in every tensor that there is.
RLHF_HD bool rows_aligned(const PpoLossArgs& args) {
  uintptr_t bits = 0;
  for (const float* p :
       {args.logprob, args.old_logprob, args.advantages, args.weights, args.values, args.old_values,
        args.returns, args.entropy, args.ref_logprob, static_cast<const float*>(args.grad_logprob),
        static_cast<const float*>(args.grad_advantages),
        static_cast<const float*>(args.grad_values), static_cast<const float*>(args.grad_entropy)})
    bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0 && reinterpret_cast<uintptr_t>(args.mask) % kQuad == 0 &&
         args.length % kQuad == 0;
}

// Gradients of all tokens; the sums of this thread's.
template <Kind kind>
RLHF_HD Sums walk_tokens(const PpoLossArgs& args, const Workspace& work, double denominator,
                         bool counted) {
  const bool gspo = kind == Kind::gspo && args.logprob;
  const bool per_row = gspo || args.reduction == Reduction::seq_mean_token_mean;
  const auto units_of_row = static_cast<unsigned>((args.length + kUnit - 1) / kUnit);
  const unsigned units = static_cast<unsigned>(args.rows) * units_of_row;
  Sums sums;
  Place at;
  at.aligned = rows_aligned(args);
  Weights weights = {1.0, static_cast<float>(1.0 / denominator), 0.0f};
  for (unsigned unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < units;
       unit += gridDim.x * kWarps) {
    const unsigned row = unit / units_of_row;
    const int64_t t = int64_t{unit % units_of_row} * kUnit + threadIdx.x % 32 * kQuad;
    if (t >= args.length) continue;
    if (per_row) {
      const Row r = row_of(args, work, row, counted, gspo);
      const double scale = row_scale(args.reduction, r.count);
      weights = {scale, static_cast<float>(scale / denominator), r.mean_log_ratio};
    }
    at.i = row * args.length + t;
    at.inside = static_cast<int>(::min(int64_t{kQuad}, args.length - t));
    at.live = live_tokens(args, at);
    if (args.logprob) policy_quad<kind>(args, at, weights, sums);
    if (args.values) value_quad(args, at, weights, sums);
    if (args.entropy) entropy_quad(args, at, weights, sums);
  }
  return sums;
}

// ------------------------------------------------------------------- sums

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
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* grad, const float* unit, float* out, int64_t size) {
  const float factor = *grad;
  if (unit == out && factor == 1.0f) return;
  for (int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kQuad; i < size;
       i += gridDim.x * int64_t{kThreads} * kQuad) {
    const bool aligned = i + kQuad <= size && reinterpret_cast<uintptr_t>(unit) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int inside = static_cast<int>(::min(int64_t{kQuad}, size - i));
    const Place at = {i, inside, (1u << inside) - 1u, aligned};
    Quad x = load_quad(unit, at);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) x.x[k] = x.x[k] == 0.0f ? 0.0f : x.x[k] * factor;
    store_quad(out, at, x);
  }
}

}  // namespace

void ppo_loss(const PpoLossArgs& args, void* workspace, int device, void* stream) {
  const std::string what =
      "ppo_loss: rows " + std::to_string(args.rows) + ", length " + std::to_string(args.length);
  const int64_t parts = args.rows * ((args.length + kPart - 1) / kPart);
  Workspace work;
  work.blocks = static_cast<Sums*>(workspace);
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

void scale_unit_gradient(const float* grad, const float* unit, float* out, int64_t size, int device,
                         void* stream) {
  const std::string what = "scale_unit_gradient: elements " + std::to_string(size);
  constexpr int64_t kBlock = kThreads * kQuad;
  DeviceGuard guard(device);
  const auto blocks =
      static_cast<unsigned>(::min(int64_t{kScaleBlocks}, (size + kBlock - 1) / kBlock));
  scale_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(grad, unit, out, size);
  check_launch(what);
}

}  // namespace rlhf::cuda
