// Log-prob and entropy on CUDA: one block per row, each logit read once.
//
// Which thread sums which column is fixed by the column's index, and threads are combined in a
// fixed order, so that a row's bits depend neither on its alignment nor on the other rows.
#define RLHF_ISA cuda
#include "logprob/chosen.cuh"
#include "logprob/logprob.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;  // at most, per row
// Blocks on a multiprocessor. Four of at most 32 registers fill it: on an H200 that hides the
// memory's latency better than fewer threads with more loads under way (docs/log.md). For other
// targets the compiler would spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 3;
#endif

// With d = rate (z - top) in units of ln 2: total = sum 2^d, weighted = sum 2^d d.
struct Softmax {
  float top, total, weighted;
};

// 2^-256 is 0 in float; the floor keeps 0 * -inf out.
RLHF_HD float floored(float d) { return max(-256.0f, d); }

// Moves to the maximum `top`, which is no smaller; 0 stands for -inf as what is subtracted.
template <bool WEIGHTED>
RLHF_HD void raise(Softmax& state, float top, float rate) {
  const float base = top == -kInfinity ? 0.0f : top;
  const float shift = (state.top - base) * rate;
  const float shrink = fast_exp2(shift);
  if (WEIGHTED) state.weighted = shrink * fma(floored(shift), state.total, state.weighted);
  state.total = state.total * shrink;
  state.top = top;
}

// Takes COUNT logits in, which are capped in place.
template <bool WEIGHTED, bool CAPPED, int COUNT>
RLHF_HD void fold(Softmax& state, float (&z)[COUNT], float softcap, float rate) {
  float top = state.top;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (CAPPED) z[i] = softcapped(z[i], softcap).value;
    top = fmaxf(top, z[i]);
  }
  raise<WEIGHTED>(state, top, rate);
  const float base = top == -kInfinity ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float d = (z[i] - base) * rate;
    const float e = fast_exp2(d);
    state.total += e;
    if (WEIGHTED) state.weighted = fma(e, floored(d), state.weighted);
  }
}

// The sums of a row, for every thread of the block; `rate` in units of ln 2.
template <class T, bool WEIGHTED, bool CAPPED>
RLHF_HD Softmax fold_row(const LogitRows& in, const T* row, float rate, float* shared) {
  constexpr int N = Pack<T>::kSize;
  const int packs = static_cast<int>(in.vocabulary) / N;
  Softmax state = {-kInfinity, 0.0f, 0.0f};
  for (int i = threadIdx.x; i < packs; i += static_cast<int>(blockDim.x)) {
    const Pack<T> pack = load_pack(row + i * N);
    float z[N];
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = to_float(pack.x[k]);
    fold<WEIGHTED, CAPPED>(state, z, in.softcap, rate);
  }
  if (const int tail = packs * N + threadIdx.x; tail < in.vocabulary) {
    float z[1] = {to_float(row[tail])};
    fold<WEIGHTED, CAPPED>(state, z, in.softcap, rate);
  }
  const float top = block_max(state.top, shared);
  raise<WEIGHTED>(state, top, rate);
  state.total = block_sum(state.total, shared);
  if (WEIGHTED) state.weighted = block_sum(state.weighted, shared);
  return state;
}

struct RowValues {
  float logprob, entropy, log_sum;
};

// `chosen` is the logit of the token, NaN where its id is out of range.
template <bool WEIGHTED>
RLHF_HD RowValues values_of(const Softmax& sums, float chosen, float softcap, float rate) {
  const bool empty = sums.total == 0.0f;  // nothing but -inf
  if (softcap != 0.0f) chosen = softcapped(chosen, softcap).value;
  RowValues row;
  row.log_sum = empty ? 0.0f : logf(sums.total);
  row.logprob = (chosen - (sums.top == -kInfinity ? 0.0f : sums.top)) * rate - row.log_sum;
  row.entropy = empty || !WEIGHTED ? 0.0f : row.log_sum - sums.weighted / sums.total * 0.69314718f;
  return row;
}

template <bool WEIGHTED>
RLHF_HD void store_values(const LogprobArgs& args, int64_t row, const RowValues& values,
                          float row_max) {
  args.logprob[row] = values.logprob;
  args.row_max[row] = row_max;
  args.log_sum[row] = values.log_sum;
  if (WEIGHTED) args.entropy[row] = values.entropy;
}

template <class T, bool WEIGHTED, bool CAPPED>
RLHF_HD void forward_row(const LogprobArgs& args) {
  __shared__ float shared[32];
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  if (!is_live(in, row)) {  // the same for the whole block
    if (threadIdx.x == 0) store_values<WEIGHTED>(args, row, {}, 0.0f);
    return;
  }
  const T* const z = row_of<T>(in, row);
  const float rate = rate_of(in, row);
  const Softmax sums = fold_row<T, WEIGHTED, CAPPED>(in, z, rate * kLog2E, shared);
  if (threadIdx.x != 0) return;
  const float chosen = chosen_logit(in, z, in.ids[row]);
  store_values<WEIGHTED>(args, row, values_of<WEIGHTED>(sums, chosen, in.softcap, rate), sums.top);
}

template <class T, class O, bool ENTROPY>
RLHF_HD void backward_row(const LogprobBackwardArgs& args) {
  constexpr int N = Pack<O>::kSize, M = Pack<T>::kSize;
  static_assert(N % M == 0, "a pack of the gradient is whole packs of logits");
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  const int vocabulary = static_cast<int>(in.vocabulary);
  const int64_t place = place_of(args, row);
  if (place < 0) return;  // the same for the whole block
  O* const out = static_cast<O*>(args.out) + place * in.vocabulary;
  if (!is_live(in, row)) return store_zeros(out, vocabulary);  // the same for the whole block
  const T* const z = row_of<T>(in, row);
  const float chosen = chosen_logit(in, z, in.ids[row]);
  RowGradient c = row_gradient<ENTROPY>(args, row);
  if (chosen == -kInfinity) c.g = 0.0f;
  if (chosen != chosen) c.g = chosen;
  __syncthreads();  // `out` may be the logits: all have read theirs before it is written
  // Computed number by number, so alignment may choose which thread does it.
  const auto gradient = [&](T logit) {
    O result;
    convert(logit_gradient<ENTROPY, false>(to_float(logit), c), result);
    return result;
  };
  cover_aligned(
      out, vocabulary, N, [&](int i) { out[i] = gradient(z[i]); },
      [&](int i) {
        Pack<O> result;
#pragma unroll
        for (int part = 0; part < N; part += M) {
          const Pack<T> pack = load_pack(z + i + part);
#pragma unroll
          for (int k = 0; k < M; ++k) result.x[part + k] = gradient(pack.x[k]);
        }
        store_pack(out + i, result);
      });
  const int64_t y = in.ids[row];
  if (y < 0 || y >= vocabulary) return;
  __syncthreads();  // orders the store below behind those above
  if (threadIdx.x == 0) convert(logit_gradient<ENTROPY, true>(chosen, c), out[y]);
}

// A softcap takes registers enough for a kernel of its own.
template <class T, bool WEIGHTED, bool CAPPED>
__global__ void __launch_bounds__(kThreads, CAPPED ? 3 : kBlocks) logprob_kernel(LogprobArgs args) {
  forward_row<T, WEIGHTED, CAPPED>(args);
}

template <class T, class O, bool ENTROPY>
__global__ void __launch_bounds__(kThreads, kBlocks)
    logprob_backward_kernel(LogprobBackwardArgs args) {
  backward_row<T, O, ENTROPY>(args);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads, 3) logprob_and_grad_kernel(LogprobGradArgs args) {
  if (args.forward.in.softcap != 0.0f)
    forward_row<T, true, true>(args.forward);
  else
    forward_row<T, true, false>(args.forward);
  __syncthreads();  // thread 0 has written what all read
  backward_row<T, T, ENTROPY>(args.backward);
}

std::string describe(const char* op, const LogitRows& in) {
  return std::string(op) + ": rows " + std::to_string(in.rows) + ", vocabulary " +
         std::to_string(in.vocabulary);
}

// Threads of a row: by the vocabulary alone.
int threads_of(const LogitRows& in, const std::string& what) {
  if (in.vocabulary > INT32_MAX / 2)
    throw std::invalid_argument(what + ": expected a vocabulary of at most 2^30, got " +
                                std::to_string(in.vocabulary));
  return in.vocabulary <= 4096 ? 128 : kThreads;
}

}  // namespace

void logprob(const LogprobArgs& args, int device, void* stream) {
  const std::string what = describe(args.entropy ? "logprob_entropy" : "logprob", args.in);
  const unsigned grid = grid_of(args.in.rows, what);
  const int threads = threads_of(args.in, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_type(args.in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel =
        args.in.softcap != 0.0f
            ? (args.entropy ? logprob_kernel<T, true, true> : logprob_kernel<T, false, true>)
            : (args.entropy ? logprob_kernel<T, true, false> : logprob_kernel<T, false, false>);
    kernel<<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

void logprob_backward(const LogprobBackwardArgs& args, int device, void* stream) {
  const std::string what = describe("logprob_backward", args.in);
  const unsigned grid = grid_of(args.in.rows, what);
  const int threads = threads_of(args.in, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_gradient_types(args.in.dtype, args.out_dtype, [&](auto type, auto out_type) {
    using T = decltype(type);
    using O = decltype(out_type);
    if (args.grad_entropy)
      logprob_backward_kernel<T, O, true><<<grid, threads, 0, queue>>>(args);
    else
      logprob_backward_kernel<T, O, false><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

void logprob_and_grad(const LogprobGradArgs& args, int device, void* stream) {
  const LogitRows& in = args.forward.in;
  const std::string what = describe("logprob_entropy_and_grad", in);
  const unsigned grid = grid_of(in.rows, what);
  const int threads = threads_of(in, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_type(in.dtype, [&](auto type) {
    if (args.backward.grad_entropy)
      logprob_and_grad_kernel<decltype(type), true><<<grid, threads, 0, queue>>>(args);
    else
      logprob_and_grad_kernel<decltype(type), false><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

}  // namespace rlhf::cuda
