// The surface between Python and the native code: casts, checks, release of the GIL. What a decode
// step calls is in bindings_decoding.cpp.
#include "bindings.h"

#include <array>
#include <tuple>

#include "advantages/advantages.h"
#include "gae/gae.h"
#include "kl/kl.h"
#include "logprob/logprob.h"
#include "ppo_loss/ppo_loss.h"
#include "ranking_loss/ranking_loss.h"

namespace rlhf {
namespace {

// (logits, dtype, rows, vocabulary, inner, stride_outer, stride_inner, ids, mask, temperatures,
//  temperature, softcap, ignore_index) as _native.py packs them.
using RowsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, Address,
                             Address, Address, float, float, int64_t>;

LogitRows logit_rows(int threads, const RowsTuple& t) {
  const auto& [logits, dtype, rows, vocabulary, inner, stride_outer, stride_inner, ids, mask,
               temperatures, temperature, softcap, ignore_index] = t;
  check_dtype(dtype, "dtype");
  check_positive(rows, "rows");
  check_positive(vocabulary, "vocabulary");
  check_positive(inner, "inner");
  check_positive(threads, "threads");
  LogitRows in;
  in.logits = required<void>(logits, "logits");
  in.dtype = static_cast<Dtype>(dtype);
  in.rows = rows;
  in.vocabulary = vocabulary;
  in.inner = inner;
  in.stride_outer = stride_outer;
  in.stride_inner = stride_inner;
  in.ids = required<int64_t>(ids, "ids");
  in.mask = pointer<uint8_t>(mask);
  in.temperatures = pointer<float>(temperatures);
  in.temperature = temperature;
  in.softcap = softcap;
  in.ignore_index = ignore_index;
  in.threads = threads;
  return in;
}

LogprobArgs logprob_args(int threads, const RowsTuple& rows, Address logprob, Address entropy,
                         Address row_max, Address log_sum) {
  LogprobArgs args;
  args.in = logit_rows(threads, rows);
  args.logprob = required<float>(logprob, "logprob");
  args.row_max = required<float>(row_max, "row_max");
  args.log_sum = required<float>(log_sum, "log_sum");
  args.entropy = pointer<float>(entropy);
  return args;
}

LogprobBackwardArgs logprob_backward_args(int threads, const RowsTuple& rows, Address grad_logprob,
                                          Address grad_entropy, Address row_max, Address log_sum,
                                          Address entropy, Address out, int out_dtype,
                                          Address places) {
  RLHF_CHECK(out_dtype == std::get<1>(rows) || std::get<1>(rows) == 0,
             "out_dtype: expected that of the logits, got " + std::to_string(out_dtype));
  check_dtype(out_dtype, "out_dtype");
  LogprobBackwardArgs args;
  args.in = logit_rows(threads, rows);
  args.grad_logprob = required<float>(grad_logprob, "grad_logprob");
  args.row_max = required<float>(row_max, "row_max");
  args.log_sum = required<float>(log_sum, "log_sum");
  args.grad_entropy = pointer<float>(grad_entropy);
  args.entropy = grad_entropy ? required<float>(entropy, "entropy") : nullptr;
  args.out = required<void>(out, "out");
  args.out_dtype = static_cast<Dtype>(out_dtype);
  args.places = pointer<int64_t>(places);
  return args;
}

LogprobGradArgs logprob_grad_args(int threads, const RowsTuple& rows, Address logprob,
                                  Address entropy, Address row_max, Address log_sum,
                                  Address grad_logprob, Address grad_entropy, Address out) {
  LogprobGradArgs args;
  required<float>(entropy, "entropy");
  args.forward = logprob_args(threads, rows, logprob, entropy, row_max, log_sum);
  args.backward = logprob_backward_args(threads, rows, grad_logprob, grad_entropy, row_max, log_sum,
                                        entropy, out, std::get<1>(rows), 0);
  return args;
}

GaeArgs gae_args(int threads, Address rewards, Address values, Address offsets, Address mask,
                 Address dones, Address bootstrap, Address advantages, Address returns,
                 int64_t rows, int64_t length, float bootstrap_value, float gamma, float decay,
                 float decay_returns, bool carry) {
  check_positive(rows, "rows");
  check_positive(length, "length");
  check_positive(threads, "threads");
  GaeArgs args;
  args.rewards = required<float>(rewards, "rewards");
  args.values = pointer<float>(values);
  args.offsets = pointer<int64_t>(offsets);
  args.mask = pointer<uint8_t>(mask);
  args.dones = pointer<uint8_t>(dones);
  args.bootstrap = pointer<float>(bootstrap);
  args.advantages = required<float>(advantages, "advantages");
  args.returns = pointer<float>(returns);
  args.rows = rows;
  args.length = length;
  args.bootstrap_value = bootstrap_value;
  args.gamma = gamma;
  args.decay = decay;
  args.decay_returns = decay_returns;
  args.carry = carry;
  args.threads = threads;
  return args;
}

// (logprob, old_logprob, advantages, weights, values, old_values, returns, entropy, ref_logprob,
//  mask, grad_logprob, grad_advantages, grad_values, grad_entropy, loss, stats, normalizer,
//  workspace),
// (divisor, kind, estimator, reduction, clip_low, clip_high, dual_clip, value_clip, value_coef,
//  entropy_coef, kl_coef) as _native.py packs them.
using LossAddresses = std::array<Address, 18>;
using LossOptions =
    std::tuple<double, int, int, int, float, float, float, float, float, float, float>;

PpoLossArgs ppo_loss_args(int threads, const LossAddresses& a, const LossOptions& options,
                          int64_t rows, int64_t length) {
  check_positive(rows, "rows");
  check_positive(length, "length");
  check_positive(threads, "threads");
  PpoLossArgs args;
  args.logprob = pointer<float>(a[0]);
  args.old_logprob = a[0] ? required<float>(a[1], "old_logprob") : nullptr;
  args.advantages = a[0] ? required<float>(a[2], "advantages") : nullptr;
  args.weights = pointer<float>(a[3]);
  args.values = pointer<float>(a[4]);
  args.old_values = a[4] ? required<float>(a[5], "old_values") : nullptr;
  args.returns = a[4] ? required<float>(a[6], "returns") : nullptr;
  args.entropy = pointer<float>(a[7]);
  args.ref_logprob = pointer<float>(a[8]);
  args.mask = pointer<uint8_t>(a[9]);
  args.grad_logprob = pointer<float>(a[10]);
  args.grad_advantages = pointer<float>(a[11]);
  args.grad_values = pointer<float>(a[12]);
  args.grad_entropy = pointer<float>(a[13]);
  args.loss = required<float>(a[14], "loss");
  args.stats = required<float>(a[15], "stats");
  args.normalizer = pointer<float>(a[16]);
  args.workspace = pointer<void>(a[17]);
  int reduction;
  std::tie(args.divisor, args.kind, args.estimator, reduction, args.clip_low, args.clip_high,
           args.dual_clip, args.value_clip, args.value_coef, args.entropy_coef, args.kl_coef) =
      options;
  args.reduction = static_cast<Reduction>(reduction);
  args.rows = rows;
  args.length = length;
  args.threads = threads;
  return args;
}

KlEstimateArgs kl_estimate_args(int threads, Address logprob, Address ref_logprob, Address mask,
                                Address grad, Address out, int64_t count, int estimator,
                                float clamp_in, float clamp_out) {
  RLHF_CHECK(estimator >= 0 && estimator <= 3,
             "estimator: expected 0 to 3, got " + std::to_string(estimator));
  check_positive(count, "count");
  check_positive(threads, "threads");
  KlEstimateArgs args;
  args.logprob = required<float>(logprob, "logprob");
  args.ref_logprob = required<float>(ref_logprob, "ref_logprob");
  args.mask = pointer<uint8_t>(mask);
  args.grad = pointer<float>(grad);
  args.out = required<float>(out, "out");
  args.count = count;
  args.estimator = static_cast<KlEstimator>(estimator);
  args.clamp_in = clamp_in;
  args.clamp_out = clamp_out;
  args.threads = threads;
  return args;
}

// (ref_logits, dtype, inner, stride_outer, stride_inner) of a reference beside its policy's rows.
using RefTuple = std::tuple<Address, int, int64_t, int64_t, int64_t>;

LogitRows ref_rows(const RefTuple& t) {
  const auto& [logits, dtype, inner, stride_outer, stride_inner] = t;
  RLHF_CHECK(dtype >= 0 && dtype <= 2, "dtype: expected 0, 1 or 2, got " + std::to_string(dtype));
  check_positive(inner, "inner");
  LogitRows ref = {};
  ref.logits = required<void>(logits, "ref_logits");
  ref.dtype = static_cast<Dtype>(dtype);
  ref.inner = inner;
  ref.stride_outer = stride_outer;
  ref.stride_inner = stride_inner;
  return ref;
}

// (kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum)
using KlOutputs = std::array<Address, 8>;

KlArgs kl_args(int threads, const RowsTuple& rows, const RefTuple& ref, const KlOutputs& out) {
  KlArgs args;
  args.in = logit_rows(threads, rows);
  args.ref = ref_rows(ref);
  args.kl = required<float>(out[0], "kl");
  args.logprob = required<float>(out[1], "logprob");
  args.ref_logprob = required<float>(out[2], "ref_logprob");
  args.entropy = required<float>(out[3], "entropy");
  args.row_max = required<float>(out[4], "row_max");
  args.log_sum = required<float>(out[5], "log_sum");
  args.ref_row_max = required<float>(out[6], "ref_row_max");
  args.ref_log_sum = required<float>(out[7], "ref_log_sum");
  return args;
}

// (grad_kl, grad_logprob, grad_entropy, row_max, log_sum, ref_row_max, ref_log_sum, kl, entropy)
using KlInputs = std::array<Address, 9>;

KlBackwardArgs kl_backward_args(int threads, const RowsTuple& rows, const RefTuple& ref,
                                const KlInputs& in, Address out) {
  KlBackwardArgs args;
  args.in = logit_rows(threads, rows);
  args.ref = ref_rows(ref);
  args.grad_kl = required<float>(in[0], "grad_kl");
  args.grad_logprob = pointer<float>(in[1]);
  args.grad_entropy = pointer<float>(in[2]);
  args.row_max = required<float>(in[3], "row_max");
  args.log_sum = required<float>(in[4], "log_sum");
  args.ref_row_max = required<float>(in[5], "ref_row_max");
  args.ref_log_sum = required<float>(in[6], "ref_log_sum");
  args.kl = required<float>(in[7], "kl");
  args.entropy = in[2] ? required<float>(in[8], "entropy") : nullptr;
  args.out = required<void>(out, "out");
  return args;
}

// `grads` are (grad_kl, grad_logprob, grad_entropy).
KlGradArgs kl_grad_args(int threads, const RowsTuple& rows, const RefTuple& ref,
                        const KlOutputs& out, const std::array<Address, 3>& grads, Address grad) {
  const auto& [kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum] = out;
  KlGradArgs args;
  args.forward = kl_args(threads, rows, ref, out);
  args.backward = kl_backward_args(
      threads, rows, ref,
      {grads[0], grads[1], grads[2], row_max, log_sum, ref_row_max, ref_log_sum, kl, entropy},
      grad);
  return args;
}

// (scores, logprob, ref_logprob, values, mask, at, rewards, kl, advantages, returns, parts) and
// (kl_coef, estimator, clamp_in, clamp_out, gamma, decay, carry, whitened, unbiased, eps) as
// _native.py packs them.
using AdvantagesAddresses = std::array<Address, 11>;
using AdvantagesOptions =
    std::tuple<float, int, float, float, float, float, bool, bool, bool, double>;

AdvantagesArgs advantages_args(int threads, const AdvantagesAddresses& a,
                               const AdvantagesOptions& options, int64_t rows, int64_t length) {
  check_positive(rows, "rows");
  check_positive(length, "length");
  check_positive(threads, "threads");
  AdvantagesArgs args;
  args.scores = required<float>(a[0], "scores");
  args.logprob = required<float>(a[1], "logprob");
  args.ref_logprob = required<float>(a[2], "ref_logprob");
  args.values = pointer<float>(a[3]);
  args.mask = pointer<uint8_t>(a[4]);
  args.at = pointer<int64_t>(a[5]);
  args.rewards = required<float>(a[6], "rewards");
  args.kl = required<float>(a[7], "kl");
  args.advantages = a[3] ? required<float>(a[8], "advantages") : nullptr;
  args.returns = a[3] ? required<float>(a[9], "returns") : nullptr;
  std::tie(args.kl_coef, args.estimator, args.clamp_in, args.clamp_out, args.gamma, args.decay,
           args.carry, args.whitened, args.unbiased, args.eps) = options;
  args.parts = pointer<Moments>(a[10]);
  args.rows = rows;
  args.length = length;
  args.threads = threads;
  return args;
}

MomentsArgs moments_args(int threads, Address x, Address mask, Address out, int64_t size,
                         int64_t parts) {
  check_positive(size, "size");
  check_positive(parts, "parts");
  check_positive(threads, "threads");
  return {required<float>(x, "x"),
          pointer<uint8_t>(mask),
          required<Moments>(out, "out"),
          size,
          parts,
          threads};
}

WhitenArgs whiten_args(int threads, Address x, Address mask, Address out, int64_t size,
                       Address moments, int64_t parts, bool shift_mean, bool unbiased, double eps) {
  check_positive(size, "size");
  check_positive(parts, "parts");
  check_positive(threads, "threads");
  WhitenArgs args;
  args.x = required<float>(x, "x");
  args.mask = pointer<uint8_t>(mask);
  args.out = required<float>(out, "out");
  args.moments = required<Moments>(moments, "moments");
  args.size = size;
  args.parts = parts;
  args.shift_mean = shift_mean;
  args.unbiased = unbiased;
  args.eps = eps;
  args.threads = threads;
  return args;
}

GroupArgs group_args(int, Address scores, Address ids, Address out, int64_t rows, int kind,
                     double eps) {
  check_positive(rows, "rows");
  return {required<float>(scores, "scores"), required<int64_t>(ids, "ids"),
          required<float>(out, "out"),       rows,
          static_cast<GroupKind>(kind),      eps};
}

RankingLossArgs ranking_loss_args(int threads, Address scores, Address ranks, Address float_ranks,
                                  Address mask, Address grad, Address loss, Address parts,
                                  int64_t prompts, int64_t completions, float margin) {
  check_positive(prompts, "prompts");
  check_positive(completions, "completions");
  check_positive(threads, "threads");
  RankingLossArgs args;
  args.scores = required<float>(scores, "scores");
  args.ranks = pointer<int64_t>(ranks);
  args.float_ranks = ranks ? nullptr : required<double>(float_ranks, "ranks");
  args.mask = pointer<uint8_t>(mask);
  args.grad = required<float>(grad, "grad");
  args.loss = required<float>(loss, "loss");
  args.parts = pointer<RankedPrompt>(parts);
  args.prompts = prompts;
  args.completions = completions;
  args.margin = margin;
  args.threads = threads;
  return args;
}

}  // namespace
}  // namespace rlhf

PYBIND11_MODULE(_C, m) {
  using namespace rlhf;
  m.doc() = "Native kernels of rlhf_fast; called by rlhf_fast/kernels/<op>/_native.py only.";
  m.attr("WITH_CUDA") = static_cast<bool>(RLHF_WITH_CUDA);
  m.def("isa", &isa_name, "The instruction set that the CPU kernels use.");
  m.def("isas", &isas, "The instruction sets that this processor has, the slowest first.");
  m.def("set_isa", &set_isa, "Use one of `isas()` from now on.");

  RLHF_DEFINE(logprob, logprob_args);
  RLHF_DEFINE(logprob_backward, logprob_backward_args);
  RLHF_DEFINE(logprob_and_grad, logprob_grad_args);
  RLHF_DEFINE(kl_estimate, kl_estimate_args);
  RLHF_DEFINE(kl_estimate_backward, kl_estimate_args);
  RLHF_DEFINE(kl, kl_args);
  RLHF_DEFINE(kl_backward, kl_backward_args);
  RLHF_DEFINE(kl_and_grad, kl_grad_args);
  RLHF_DEFINE(gae, gae_args);
  RLHF_DEFINE(advantages, advantages_args);
  RLHF_DEFINE(moments, moments_args);
  RLHF_DEFINE(whiten, whiten_args);
  RLHF_DEFINE(group_advantages, group_args);
  RLHF_DEFINE(ppo_loss, ppo_loss_args);
  RLHF_DEFINE(ranking_loss, ranking_loss_args);
  define_decoding(m);
#if RLHF_WITH_CUDA
  m.def("cuda_scale_unit_gradient", [](int device, Address stream, Address grad, Address unit,
                                       Address out, int dtype, int64_t size) {
    check_positive(size, "size");
    check_dtype(dtype, "dtype");
    const auto* const g = required<float>(grad, "grad");
    const auto* const u = required<void>(unit, "unit");
    auto* const product = required<void>(out, "out");
    py::gil_scoped_release released;
    cuda::scale_unit_gradient(g, u, product, static_cast<Dtype>(dtype), size, device,
                              pointer<void>(stream));
  });
#endif
}
