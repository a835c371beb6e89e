// Bindings of what a decode step calls: sampling and its replay, attention, linear layers.
#include <algorithm>
#include <array>
#include <tuple>

#include "bindings.h"
#include "decode_attention/decode_attention.h"
#include "decode_linear/decode_linear.h"
#include "sample/sample.h"

namespace rlhf {
namespace {

// (logits, dtype, rows, vocabulary, inner, stride_outer, stride_inner, temperature, temperatures,
//  top_k, top_ks, top_p, top_ps, min_p, min_ps) as _native.py packs them.
using SampleTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, float,
                               Address, int64_t, Address, double, Address, double, Address>;

SampleRows sample_rows(int threads, const SampleTuple& t) {
  const auto& [logits, dtype, rows, vocabulary, inner, stride_outer, stride_inner, temperature,
               temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps] = t;
  RLHF_CHECK(dtype >= 0 && dtype <= 2, "dtype: expected 0, 1 or 2, got " + std::to_string(dtype));
  check_positive(rows, "rows");
  check_positive(vocabulary, "vocabulary");
  check_positive(inner, "inner");
  check_positive(threads, "threads");
  SampleRows in;
  in.logits = required<void>(logits, "logits");
  in.dtype = static_cast<Dtype>(dtype);
  in.rows = rows;
  in.vocabulary = vocabulary;
  in.inner = inner;
  in.stride_outer = stride_outer;
  in.stride_inner = stride_inner;
  in.temperature = temperature;
  in.temperatures = pointer<float>(temperatures);
  in.top_k = top_k;
  in.top_ks = pointer<int64_t>(top_ks);
  in.top_p = top_p;
  in.top_ps = pointer<double>(top_ps);
  in.min_p = min_p;
  in.min_ps = pointer<double>(min_ps);
  in.threads = threads;
  return in;
}

// (mask, mask_stride, seed, seeds, position, positions) and (ids, logprob, log_mass, entropy).
using SampleAddresses = std::tuple<Address, int64_t, int64_t, Address, int64_t, Address, Address,
                                   Address, Address, Address>;

SampleArgs sample_args(int threads, const SampleTuple& rows, const SampleAddresses& addresses) {
  const auto& [mask, mask_stride, seed, seeds, position, positions, ids, logprob, log_mass,
               entropy] = addresses;
  SampleArgs args;
  args.in = sample_rows(threads, rows);
  args.mask = pointer<uint8_t>(mask);
  args.mask_stride = mask_stride;
  args.seed = seed;
  args.seeds = pointer<int64_t>(seeds);
  args.position = position;
  args.positions = pointer<int64_t>(positions);
  args.ids = required<int64_t>(ids, "ids");
  args.logprob = required<float>(logprob, "logprob");
  args.log_mass = required<float>(log_mass, "log_mass");
  args.entropy = required<float>(entropy, "entropy");
  return args;
}

// The tokens and kept sets that the forward pass of replay_logprob writes and its backward pass
// reads.
template <class Args>
void set_kept(Args& args, Address ids, Address tau, Address last, Address log_kept,
              Address log_sum) {
  args.ids = required<int64_t>(ids, "ids");
  args.tau = required<float>(tau, "tau");
  args.last = required<int64_t>(last, "last");
  args.log_kept = required<float>(log_kept, "log_kept");
  args.log_sum = required<float>(log_sum, "log_sum");
}

ReplayArgs replay_args(int threads, const SampleTuple& rows, Address ids, Address logprob,
                       Address log_mass, Address tau, Address last, Address log_kept,
                       Address log_sum) {
  ReplayArgs args;
  args.in = sample_rows(threads, rows);
  set_kept(args, ids, tau, last, log_kept, log_sum);
  args.logprob = required<float>(logprob, "logprob");
  args.log_mass = required<float>(log_mass, "log_mass");
  return args;
}

ReplayBackwardArgs replay_backward_args(int threads, const SampleTuple& rows, Address grad_logprob,
                                        Address grad_log_mass, Address ids, Address tau,
                                        Address last, Address log_kept, Address log_sum,
                                        Address out) {
  ReplayBackwardArgs args;
  args.in = sample_rows(threads, rows);
  args.grad_logprob = required<float>(grad_logprob, "grad_logprob");
  args.grad_log_mass = required<float>(grad_log_mass, "grad_log_mass");
  set_kept(args, ids, tau, last, log_kept, log_sum);
  args.out = required<void>(out, "out");
  return args;
}

DecodeLinearArgs decode_linear_args(int threads, Address x, Address weight, Address bias,
                                    Address out, int64_t rows, int64_t size, int64_t outputs,
                                    bool transposed) {
  for (int64_t value : {rows, size, outputs}) check_positive(value, "sizes");
  check_positive(threads, "threads");
  return {required<float>(x, "x"),
          required<float>(weight, "weight"),
          pointer<float>(bias),
          required<float>(out, "out"),
          rows,
          size,
          outputs,
          transposed,
          threads};
}

// (keys, values, lengths, columns, strides of keys, of values); all 0 where there are none.
using KeyValuesTuple =
    std::tuple<Address, Address, Address, int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>>;

KeyValues key_values(const KeyValuesTuple& given) {
  const auto& [keys, values, lengths, columns, key_strides, value_strides] = given;
  RLHF_CHECK(columns >= 0, "columns: expected at least 0, got " + std::to_string(columns));
  KeyValues part;
  part.keys = columns ? required<void>(keys, "keys") : nullptr;
  part.values = columns ? required<void>(values, "values") : nullptr;
  part.lengths = columns ? required<int64_t>(lengths, "lengths") : nullptr;
  part.columns = columns;
  std::copy(key_strides.begin(), key_strides.end(), part.key_strides);
  std::copy(value_strides.begin(), value_strides.end(), part.value_strides);
  return part;
}

DecodeAttentionArgs decode_attention_args(int threads, Address query, Address out, int dtype,
                                          const KeyValuesTuple& own, const KeyValuesTuple& prefix,
                                          Address prefix_rows, int64_t slots, int64_t key_heads,
                                          int64_t group, int64_t size, int64_t window, float scale,
                                          float softcap) {
  for (int64_t value : {slots, key_heads, group, size}) check_positive(value, "sizes");
  check_positive(threads, "threads");
  check_dtype(dtype, "dtype");
  DecodeAttentionArgs args;
  args.query = required<void>(query, "query");
  args.out = required<void>(out, "out");
  args.dtype = static_cast<Dtype>(dtype);
  args.own = key_values(own);
  args.prefix = key_values(prefix);
  args.prefix_rows = args.prefix.columns ? required<int64_t>(prefix_rows, "prefix_rows") : nullptr;
  args.slots = slots;
  args.key_heads = key_heads;
  args.group = group;
  args.size = size;
  args.window = window;
  args.scale = scale;
  args.softcap = softcap;
  args.threads = threads;
  return args;
}

}  // namespace

void define_decoding(py::module_& m) {
  RLHF_DEFINE_CPU(decode_attention, decode_attention_args);
  RLHF_DEFINE_CPU(decode_linear, decode_linear_args);
  RLHF_DEFINE_CPU(replay_logprob, replay_args);
  RLHF_DEFINE_CPU(replay_logprob_backward, replay_backward_args);
  RLHF_DEFINE_CUDA(sample, sample_args);
  m.def(
      "cpu_sample",
      [](int threads, const SampleTuple& rows, const SampleAddresses& addresses) {
        const SampleArgs args = sample_args(threads, rows, addresses);
        py::gil_scoped_release released;
        cpu::sample(args);
        return std::all_of(args.ids, args.ids + args.in.rows, [](int64_t id) { return id >= 0; });
      },
      "Whether a token was drawn in every row.");
}

}  // namespace rlhf
