// Policy, value and PPO losses on CUDA: losses, gradients and statistics without a host read.
//
// The number of unmasked tokens divides every gradient, and blocks of one launch cannot wait for
// each other without atomics, so a call is three launches: the counts of the rows (with their mean
// log-ratios for gspo), the tokens, a block per part of a row, and one block that adds the sums of
// the parts. Threads and parts are combined in a fixed order.
#define RLHF_ISA cuda
#include "ppo_loss/ppo_loss.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 128;     // of a row's count and of a part
constexpr int kFinish = 256;      // of the last sums
constexpr int64_t kPart = 4096;   // tokens; kernels/ppo_loss/_native.py counts the parts too
constexpr int64_t kScale = 1024;  // elements of a block that multiplies

struct Row {
  int count;             // unmasked tokens
  float mean_log_ratio;  // gspo
};

static_assert(sizeof(Partial) == 80 && sizeof(Row) == 8, "as _native.py allocates them");

// The result is that of thread 0. `shared` has room for 8; the caller's next use of it is safe.
template <class T, class Combine>
RLHF_HD T combine_block(T x, T* shared, Combine combine) {
  for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_down_sync(~0u, x, d));
  __syncthreads();  // the last call's reader is done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < blockDim.x / 32; ++warp) x = combine(x, shared[warp]);
  return x;
}

template <class T>
RLHF_HD T block_total(T x) {
  __shared__ T shared[8];
  return combine_block(x, shared, [](T a, T b) { return a + b; });
}

RLHF_HD float block_min(float x) {
  __shared__ float shared[8];
  return combine_block(x, shared, [](float a, float b) { return fminf(a, b); });
}

RLHF_HD float block_max_of(float x) {
  __shared__ float shared[8];
  return combine_block(x, shared, [](float a, float b) { return fmaxf(a, b); });
}

RLHF_HD float log_ratio_of(float d) { return clamp(d, -kLogRatioLimit, kLogRatioLimit); }

__global__ void __launch_bounds__(kThreads) count_kernel(PpoLossArgs args, Row* rows, bool gspo) {
  const int64_t begin = blockIdx.x * args.length;
  int count = 0;
  double sum = 0.0;
  for (int64_t t = threadIdx.x; t < args.length; t += kThreads) {
    if (args.mask && !args.mask[begin + t]) continue;
    ++count;
    if (gspo) sum += log_ratio_of(difference(args.logprob[begin + t], args.old_logprob[begin + t]));
  }
  count = block_total(count);
  sum = block_total(sum);
  if (threadIdx.x == 0)
    rows[blockIdx.x] = {count, static_cast<float>(sum / (count > 0 ? count : 1))};
}

struct Denominator {
  double value;
  int64_t tokens;
};

// Every thread of a block gets it; all blocks add the same counts.
RLHF_HD Denominator denominator_of_all(const PpoLossArgs& args, const Row* rows) {
  __shared__ Denominator shared;
  int64_t tokens = 0, sequences = 0;
  for (int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
    tokens += rows[row].count;
    sequences += rows[row].count > 0;
  }
  tokens = block_total(tokens);
  sequences = block_total(sequences);
  if (threadIdx.x == 0) shared = {denominator_of(args, tokens, sequences), tokens};
  __syncthreads();
  return shared;
}

// KL against the reference of a token with log-prob `lp`; returns what it adds to its slope.
RLHF_HD float kl_token(const PpoLossArgs& args, float lp, int64_t i, Partial& sums) {
  const float ref = args.ref_logprob[i];
  const auto kl = kl_estimate(difference(lp, ref), static_cast<KlEstimator>(args.estimator));
  sums.kl += kl.value;
  const bool finite = abs(lp) < kInfinity && abs(ref) < kInfinity;
  return finite && args.kl_coef != 0.0f ? kl.slope * args.kl_coef : 0.0f;
}

template <Kind kind>
RLHF_HD void policy_token(const PpoLossArgs& args, int64_t i, float factor, float mean_log_ratio,
                          Partial& sums) {
  const float lp = args.logprob[i];
  const float d = difference(lp, args.old_logprob[i]);
  const auto e = exponentials(log_ratio_of(d));
  const float rho = kind == Kind::gspo ? exp_negative(mean_log_ratio) : e.exp;
  const Clip clip = {args.clip_low, args.clip_high, args.dual_clip};
  auto term = policy_term<kind>(lp, args.advantages[i], rho, abs(d) > kLogRatioLimit, clip);
  const float weight = args.weights ? args.weights[i] : 1.0f;
  sums.policy += term.loss * weight;
  sums.difference += d;
  sums.k3 += e.minus_line;
  sums.ratio += rho;
  sums.ratio_min = min(rho, sums.ratio_min);
  sums.ratio_max = max(rho, sums.ratio_max);
  sums.clip_low += term.low;
  sums.clip_high += term.high;
  sums.dual_clip += term.dual;
  float slope = term.slope * weight;
  if (args.ref_logprob) slope += kl_token(args, lp, i, sums);
  args.grad_logprob[i] = slope * factor;
  if (args.grad_advantages) args.grad_advantages[i] = -lp * weight * factor;
}

RLHF_HD void value_token(const PpoLossArgs& args, int64_t i, float factor, Partial& sums) {
  const auto term =
      value_term(args.values[i], args.old_values[i], args.returns[i], args.value_clip);
  sums.value += term.loss;
  sums.value_clip += term.clipped;
  args.grad_values[i] = args.value_coef != 0.0f ? term.slope * (args.value_coef * factor) : 0.0f;
}

template <Kind kind>
RLHF_HD void token(const PpoLossArgs& args, int64_t i, float factor, float mean_log_ratio,
                   Partial& sums) {
  if (args.mask && !args.mask[i]) {
    if (args.logprob) args.grad_logprob[i] = 0.0f;
    if (args.grad_advantages) args.grad_advantages[i] = 0.0f;
    if (args.values) args.grad_values[i] = 0.0f;
    if (args.entropy) args.grad_entropy[i] = 0.0f;
    return;
  }
  if (args.logprob) policy_token<kind>(args, i, factor, mean_log_ratio, sums);
  if (args.values) value_token(args, i, factor, sums);
  if (args.entropy) {
    sums.entropy += args.entropy[i];
    args.grad_entropy[i] = -args.entropy_coef * factor;
  }
}

template <Kind kind>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(PpoLossArgs args, const Row* rows, Partial* partials) {
  const int64_t parts = (args.length + kPart - 1) / kPart;
  const int64_t row = blockIdx.x / parts, first = blockIdx.x % parts * kPart;
  const int64_t end = ::min(first + kPart, args.length);
  const double denominator = denominator_of_all(args, rows).value;
  const auto factor = static_cast<float>(row_scale(args.reduction, rows[row].count) / denominator);
  Partial sums = {};
  sums.ratio_min = kInfinity;
  for (int64_t t = first + threadIdx.x; t < end; t += kThreads)
    token<kind>(args, row * args.length + t, factor, rows[row].mean_log_ratio, sums);
  sums = {block_total(sums.policy),    block_total(sums.value),      block_total(sums.entropy),
          block_total(sums.kl),        block_total(sums.difference), block_total(sums.k3),
          block_total(sums.ratio),     block_min(sums.ratio_min),    block_max_of(sums.ratio_max),
          block_total(sums.clip_low),  block_total(sums.clip_high),  block_total(sums.dual_clip),
          block_total(sums.value_clip)};
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    finish_kernel(PpoLossArgs args, const Row* rows, const Partial* partials) {
  const int64_t parts = (args.length + kPart - 1) / kPart;
  const Denominator denominator = denominator_of_all(args, rows);
  Totals total;
  for (int64_t i = threadIdx.x; i < args.rows * parts; i += THREADS)
    add(total, partials[i], row_scale(args.reduction, rows[i / parts].count));
  total.policy = block_total(total.policy);
  total.value = block_total(total.value);
  total.entropy = block_total(total.entropy);
  total.kl = block_total(total.kl);
  total.mean_entropy = block_total(total.mean_entropy);
  total.mean_kl = block_total(total.mean_kl);
  total.difference = block_total(total.difference);
  total.k3 = block_total(total.k3);
  total.ratio = block_total(total.ratio);
  total.ratio_min = block_min(total.ratio_min);
  total.ratio_max = block_max_of(total.ratio_max);
  total.clip_low = block_total(total.clip_low);
  total.clip_high = block_total(total.clip_high);
  total.dual_clip = block_total(total.dual_clip);
  total.value_clip = block_total(total.value_clip);
  if (threadIdx.x == 0) finish(args, total, denominator.tokens, denominator.value);
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* grad, const float* unit, float* out, int64_t size) {
  const int64_t begin = blockIdx.x * kScale, end = ::min(begin + kScale, size);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    out[i] = unit[i] == 0.0f ? 0.0f : unit[i] * *grad;
}

auto kernel_of(Kind kind) {
  switch (kind) {
    case Kind::gspo:
      return loss_kernel<Kind::gspo>;
    case Kind::reinforce:
      return loss_kernel<Kind::reinforce>;
    case Kind::cispo:
      return loss_kernel<Kind::cispo>;
    case Kind::sapo:
      return loss_kernel<Kind::sapo>;
    default:
      return loss_kernel<Kind::clipped>;
  }
}

}  // namespace

void ppo_loss(const PpoLossArgs& args, void* workspace, int device, void* stream) {
  const std::string what =
      "ppo_loss: rows " + std::to_string(args.rows) + ", length " + std::to_string(args.length);
  const int64_t parts = args.rows * ((args.length + kPart - 1) / kPart);
  auto* const partials = static_cast<Partial*>(workspace);
  auto* const rows = reinterpret_cast<Row*>(partials + parts);
  const auto kind = static_cast<Kind>(args.kind);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  count_kernel<<<grid_of(args.rows, what), kThreads, 0, queue>>>(
      args, rows, args.logprob && kind == Kind::gspo);
  kernel_of(kind)<<<grid_of(parts, what), kThreads, 0, queue>>>(args, rows, partials);
  finish_kernel<kFinish><<<1, kFinish, 0, queue>>>(args, rows, partials);
  check_launch(what);
}

void scale_unit_gradient(const float* grad, const float* unit, float* out, int64_t size, int device,
                         void* stream) {
  const std::string what = "scale_unit_gradient: elements " + std::to_string(size);
  DeviceGuard guard(device);
  scale_kernel<<<grid_of((size + kScale - 1) / kScale, what), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(grad, unit, out, size);
  check_launch(what);
}

}  // namespace rlhf::cuda
