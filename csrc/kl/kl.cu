// KL divergence on CUDA: one block per row, each logit of both models read once.
//
// As in logprob.cu a column's index alone decides which thread sums it, and threads are combined in
// a fixed order, so that a row's bits depend neither on its alignment nor on the other rows.
#define RLHF_ISA cuda
#include "kl/kl.h"
#include "logprob/chosen.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;  // at most, per row
// Blocks on a multiprocessor: more would spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 5;
#else
constexpr int kBlocks = 4;
#endif

// What is subtracted for a maximum: 0 for -inf, since -inf - -inf is NaN.
RLHF_HD float base_of(float top) { return top == -kInfinity ? 0.0f : top; }

// ------------------------------------------------------------------- sampled

template <bool BACKWARD>
__global__ void __launch_bounds__(256) kl_estimate_kernel(KlEstimateArgs args) {
  constexpr int N = Pack<float>::kSize;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * N;
  const auto token = [&](float a, float b, float grad, int64_t i) {
    if (args.mask && !args.mask[i]) return 0.0f;
    return BACKWARD ? kl_estimate_gradient(grad, a, b, args) : kl_estimate_of(a, b, args);
  };
  if (begin + N <= args.count) {
    const Pack<float> a = load_pack(args.logprob + begin), b = load_pack(args.ref_logprob + begin);
    const Pack<float> grad = BACKWARD ? load_pack(args.grad + begin) : Pack<float>{};
    Pack<float> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.x[k] = token(a.x[k], b.x[k], grad.x[k], begin + k);
    store_pack(args.out + begin, out);
  } else {
    for (int64_t i = begin; i < args.count; ++i)
      args.out[i] = token(args.logprob[i], args.ref_logprob[i], BACKWARD ? args.grad[i] : 0.0f, i);
  }
}

template <bool BACKWARD>
void launch_estimate(const KlEstimateArgs& args, int device, void* stream) {
  constexpr int64_t kTokens = 256 * Pack<float>::kSize;  // per block
  const std::string what = std::string(BACKWARD ? "kl_estimate_backward" : "kl_estimate") +
                           ": tokens " + std::to_string(args.count);
  const unsigned grid = grid_of((args.count + kTokens - 1) / kTokens, what);
  DeviceGuard guard(device);
  kl_estimate_kernel<BACKWARD><<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch(what);
}

// ------------------------------------------------------------------- exact

// With d = z - top and r = q - ref_top, not yet tempered, so that a finite difference stays finite
// at any temperature, e = exp(rate d): total = sum e, weighted = sum e d, cross = sum e (d - r);
// ref_total = sum exp(rate r). `widest` is the largest d - r.
struct Sums {
  float top, ref_top, total, ref_total, weighted, cross, widest;
};

// Moves to maxima that are no smaller; `rate2` is in units of ln 2.
RLHF_HD void raise(Sums& s, float top, float ref_top, float rate2) {
  const float shift = s.top - base_of(top);
  const float ref_shift = s.ref_top - base_of(ref_top);
  const float shrink = fast_exp2(shift * rate2);
  s.ref_total *= fast_exp2(ref_shift * rate2);
  // Without a logit of the reference there is no difference yet.
  const float change = s.ref_top == -kInfinity ? shift : shift - ref_shift;
  s.cross = shrink == 0.0f ? 0.0f : shrink * fma(change, s.total, s.cross);
  s.weighted = shrink == 0.0f ? 0.0f : shrink * fma(shift, s.total, s.weighted);
  s.total *= shrink;
  s.top = top;
  s.ref_top = ref_top;
}

// Takes COUNT logits of both in.
template <int COUNT>
RLHF_HD void fold(Sums& s, const float (&z)[COUNT], const float (&q)[COUNT], float rate2) {
  float top = s.top, ref_top = s.ref_top;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    top = fmaxf(top, z[i]);
    ref_top = fmaxf(ref_top, q[i]);
  }
  raise(s, top, ref_top, rate2);
  const float base = base_of(top), ref_base = base_of(ref_top);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float d = z[i] - base, r = q[i] - ref_base, difference = d - r;
    const float e = fast_exp2(d * rate2);
    s.total += e;
    s.ref_total += fast_exp2(r * rate2);
    s.weighted = fma(e, e == 0.0f ? 0.0f : d, s.weighted);
    s.cross = fma(e, e == 0.0f ? 0.0f : difference, s.cross);
    s.widest = fmaxf(s.widest, difference);  // NaN, where both are -inf, is passed over
  }
}

// Columns of a thread in one step: whole packs of both, as floats.
template <class T, class R>
constexpr int kStep = Pack<T>::kSize > Pack<R>::kSize ? Pack<T>::kSize : Pack<R>::kSize;

template <class T, int COUNT>
RLHF_HD void load_columns(const T* p, float (&z)[COUNT]) {
  constexpr int N = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < COUNT; part += N) {
    const Pack<T> pack = load_pack(p + part);
#pragma unroll
    for (int i = 0; i < N; ++i) z[part + i] = to_float(pack.x[i]);
  }
}

// The sums of a thread's columns: steps, and single logits where no step fits.
template <class T, class R>
RLHF_HD Sums fold_columns(const T* z, const R* q, int vocabulary, float rate2) {
  constexpr int STEP = kStep<T, R>;
  const int steps = vocabulary / STEP;
  Sums s = {-kInfinity, -kInfinity, 0.0f, 0.0f, 0.0f, 0.0f, -kInfinity};
  for (int step = threadIdx.x; step < steps; step += static_cast<int>(blockDim.x)) {
    float x[STEP], y[STEP];
    load_columns(z + step * STEP, x);
    load_columns(q + step * STEP, y);
    fold(s, x, y, rate2);
  }
  if (const int tail = steps * STEP + threadIdx.x; tail < vocabulary) {
    const float x[1] = {to_float(z[tail])}, y[1] = {to_float(q[tail])};
    fold(s, x, y, rate2);
  }
  return s;
}

// block_sum, rounded once: a KL of 60 out of terms of 60 would lose digits at each step of a tree.
RLHF_HD double block_sum_double(double x, double* shared) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_down_sync(~0u, x, d);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) x += shared[warp];
  return x;
}

template <class T, class R>
RLHF_HD void forward_row(const KlArgs& args) {
  __shared__ float shared[32];
  __shared__ double shared_double[32];
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  if (!is_live(in, row)) {  // the same for the whole block
    if (threadIdx.x == 0) {
      args.kl[row] = args.logprob[row] = args.ref_logprob[row] = args.entropy[row] = 0.0f;
      args.row_max[row] = args.log_sum[row] = args.ref_row_max[row] = args.ref_log_sum[row] = 0.0f;
    }
    return;
  }
  const T* const z = row_of<T>(in, row);
  const R* const q = row_of<R>(args.ref, row);
  const float rate = rate_of(in, row), rate2 = rate * kLog2E;
  Sums s = fold_columns(z, q, static_cast<int>(in.vocabulary), rate2);
  const float row_max = block_max(s.top, shared), ref_max = block_max(s.ref_top, shared);
  raise(s, row_max, ref_max, rate2);
  const double exact_total = block_sum_double(s.total, shared_double);
  const double cross = block_sum_double(s.cross, shared_double);
  const float total = static_cast<float>(exact_total), ref_total = block_sum(s.ref_total, shared);
  const float weighted = block_sum(s.weighted, shared);
  const float widest = block_max(s.widest, shared);
  if (threadIdx.x != 0) return;
  const bool empty = total == 0.0f;  // nothing but -inf
  const float log_sum = empty ? 0.0f : logf(total);
  const float ref_log_sum = ref_total == 0.0f ? 0.0f : logf(ref_total);
  const float known = log_sum + ref_log_sum;  // NaN where a row has one
  float kl = static_cast<float>(cross / exact_total * rate - log_sum + ref_log_sum);
  if (widest == kInfinity) kl = kInfinity;
  if (known != known) kl = known;
  const int64_t y = in.ids[row];
  args.kl[row] = empty ? 0.0f : kl;
  args.logprob[row] = (chosen_logit(in, z, y) - base_of(row_max)) * rate - log_sum;
  args.ref_logprob[row] = (chosen_logit(in, q, y) - base_of(ref_max)) * rate - ref_log_sum;
  args.entropy[row] = empty ? 0.0f : log_sum - weighted / total * rate;
  args.row_max[row] = row_max;
  args.log_sum[row] = log_sum;
  args.ref_row_max[row] = ref_max;
  args.ref_log_sum[row] = ref_log_sum;
}

// The gradient is computed number by number, so alignment may choose which thread does it.
template <bool KL, class T, class R>
RLHF_HD void store_gradient(const T* z, const R* q, int vocabulary, const KlRow& c, T* out) {
  constexpr int N = Pack<T>::kSize, STEP = kStep<T, R>;
  const auto single = [&](int i) {
    convert(kl_gradient<KL, false>(to_float(z[i]), to_float(q[i]), c), out[i]);
  };
  cover_aligned(out, vocabulary, STEP, single, [&](int begin) {
    float y[STEP];
    load_columns(q + begin, y);
#pragma unroll
    for (int part = 0; part < STEP; part += N) {
      Pack<T> pack = load_pack(z + begin + part);
#pragma unroll
      for (int i = 0; i < N; ++i)
        convert(kl_gradient<KL, false>(to_float(pack.x[i]), y[part + i], c), pack.x[i]);
      store_pack(out + begin + part, pack);
    }
  });
}

template <class T, class R>
RLHF_HD void backward_row(const KlBackwardArgs& args) {
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  const int vocabulary = static_cast<int>(in.vocabulary);
  T* const out = static_cast<T*>(args.out) + row * in.vocabulary;
  if (!is_live(in, row)) return store_zeros(out, vocabulary);  // the same for the whole block
  const T* const z = row_of<T>(in, row);
  const R* const q = row_of<R>(args.ref, row);
  const float chosen = chosen_logit(in, z, in.ids[row]);
  const float ref_chosen = chosen_logit(in, q, in.ids[row]);
  __syncthreads();  // `out` may be the logits: all have read theirs before it is written
  const KlRow c = kl_row(args, row, chosen);
  if (c.with_kl)
    store_gradient<true>(z, q, vocabulary, c, out);
  else
    store_gradient<false>(z, q, vocabulary, c, out);
  const int64_t y = in.ids[row];
  if (!args.grad_logprob || y < 0 || y >= vocabulary) return;
  __syncthreads();  // orders the store below behind those above
  if (threadIdx.x == 0) {
    convert(c.with_kl ? kl_gradient<true, true>(chosen, ref_chosen, c)
                      : kl_gradient<false, true>(chosen, ref_chosen, c),
            out[y]);
  }
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, kBlocks) kl_kernel(KlArgs args) {
  forward_row<T, R>(args);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, kBlocks) kl_backward_kernel(KlBackwardArgs args) {
  backward_row<T, R>(args);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, kBlocks) kl_and_grad_kernel(KlGradArgs args) {
  forward_row<T, R>(args.forward);
  __syncthreads();  // thread 0 has written what all read
  backward_row<T, R>(args.backward);
}

// Calls f(T{}, R{}) with the types of the policy's and the reference's logits.
template <class Function>
void with_types(const LogitRows& in, const LogitRows& ref, Function f) {
  with_type(in.dtype,
            [&](auto type) { with_type(ref.dtype, [&](auto ref_type) { f(type, ref_type); }); });
}

std::string describe(const char* op, const LogitRows& in) {
  if (in.vocabulary > INT32_MAX / 2)
    throw std::invalid_argument(std::string(op) + ": expected a vocabulary of at most 2^30, got " +
                                std::to_string(in.vocabulary));
  return std::string(op) + ": rows " + std::to_string(in.rows) + ", vocabulary " +
         std::to_string(in.vocabulary);
}

// Threads of a row: by the vocabulary alone.
int threads_of(const LogitRows& in) { return in.vocabulary <= 4096 ? 128 : kThreads; }

}  // namespace

void kl_estimate(const KlEstimateArgs& args, int device, void* stream) {
  launch_estimate<false>(args, device, stream);
}

void kl_estimate_backward(const KlEstimateArgs& args, int device, void* stream) {
  launch_estimate<true>(args, device, stream);
}

void kl(const KlArgs& args, int device, void* stream) {
  const std::string what = describe("kl_divergence", args.in);
  const unsigned grid = grid_of(args.in.rows, what);
  const int threads = threads_of(args.in);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_types(args.in, args.ref, [&](auto type, auto ref_type) {
    kl_kernel<decltype(type), decltype(ref_type)><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

void kl_backward(const KlBackwardArgs& args, int device, void* stream) {
  const std::string what = describe("kl_divergence_backward", args.in);
  const unsigned grid = grid_of(args.in.rows, what);
  const int threads = threads_of(args.in);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_types(args.in, args.ref, [&](auto type, auto ref_type) {
    kl_backward_kernel<decltype(type), decltype(ref_type)><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

void kl_and_grad(const KlGradArgs& args, int device, void* stream) {
  const LogitRows& in = args.forward.in;
  const std::string what = describe("kl_divergence_and_grad", in);
  const unsigned grid = grid_of(in.rows, what);
  const int threads = threads_of(in);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_types(in, args.forward.ref, [&](auto type, auto ref_type) {
    kl_and_grad_kernel<decltype(type), decltype(ref_type)><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

}  // namespace rlhf::cuda
