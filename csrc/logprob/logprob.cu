// Log-prob and entropy on CUDA: one block per row, each logit read once.
//
// Which thread sums which column is fixed by the column's index, and threads are combined in a
// fixed order, so that a row's bits depend neither on its alignment nor on the other rows.
#define RLHF_ISA cuda
#include "logprob/logprob.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;  // at most, per row
constexpr int kColumns = 8;    // neighbouring columns of a thread: 16 bytes of bf16, 32 of float

// A thread's columns [begin, begin + 8) as floats, capped; -inf beyond the row.
template <class T>
RLHF_HD void load_columns(const T* row, int begin, int vocabulary, float softcap,
                          float (&z)[kColumns]) {
  constexpr int N = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kColumns; part += N) {
    if (begin + part + 2 * N <= vocabulary) {  // as load_pack asks for
      const Pack<T> pack = load_pack(row + begin + part);
#pragma unroll
      for (int i = 0; i < N; ++i) z[part + i] = to_float(pack.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int column = begin + part + i;
        z[part + i] = column < vocabulary ? to_float(row[column]) : -kInfinity;
      }
    }
  }
  if (softcap != 0.0f) {  // the same for the whole launch
#pragma unroll
    for (int i = 0; i < kColumns; ++i) z[i] = softcapped(z[i], softcap).value;
  }
}

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

template <class T, bool WEIGHTED>
RLHF_HD void forward_row(const LogprobArgs& args) {
  __shared__ float shared[32];
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  if (!is_live(in, row)) {  // the same for the whole block
    if (threadIdx.x == 0) {
      args.logprob[row] = args.row_max[row] = args.log_sum[row] = 0.0f;
      if (WEIGHTED) args.entropy[row] = 0.0f;
    }
    return;
  }
  const T* const z = row_of<T>(in, row);
  const int vocabulary = static_cast<int>(in.vocabulary);
  const float rate = rate_of(in, row), rate2 = rate * kLog2E;
  Softmax state = {-kInfinity, 0.0f, 0.0f};
#pragma unroll 2
  for (int begin = threadIdx.x * kColumns; begin < vocabulary;
       begin += static_cast<int>(blockDim.x) * kColumns) {
    float x[kColumns];
    load_columns<T>(z, begin, vocabulary, in.softcap, x);
    float top = state.top;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) top = fmaxf(top, x[i]);
    raise<WEIGHTED>(state, top, rate2);
    const float base = top == -kInfinity ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float d = (x[i] - base) * rate2;
      const float e = fast_exp2(d);
      state.total += e;
      if (WEIGHTED) state.weighted = fma(e, floored(d), state.weighted);
    }
  }
  const float row_max = block_max(state.top, shared);
  raise<WEIGHTED>(state, row_max, rate2);
  const float total = block_sum(state.total, shared);
  const float weighted = WEIGHTED ? block_sum(state.weighted, shared) : 0.0f;
  if (threadIdx.x != 0) return;
  const bool empty = total == 0.0f;  // nothing but -inf
  const float log_sum = empty ? 0.0f : logf(total);
  const int64_t y = in.ids[row];
  // Ids are not checked on the device: one out of range reads nothing and gives NaN.
  float logprob = __int_as_float(0x7fc00000);
  if (y >= 0 && y < in.vocabulary) {
    float chosen = to_float(z[y]);
    if (in.softcap != 0.0f) chosen = softcapped(chosen, in.softcap).value;
    logprob = (chosen - (row_max == -kInfinity ? 0.0f : row_max)) * rate - log_sum;
  }
  args.logprob[row] = logprob;
  args.row_max[row] = row_max;
  args.log_sum[row] = log_sum;
  if (WEIGHTED) args.entropy[row] = empty ? 0.0f : log_sum - weighted / total * 0.69314718f;
}

// The gradient is computed number by number, so alignment may choose which thread does it: stores
// are always aligned, what stands before the first and behind the last pack is stored singly. It
// goes from the end of the row, which a forward pass before it read last.
template <class T, bool ENTROPY>
RLHF_HD void backward_row(const LogprobBackwardArgs& args) {
  constexpr int N = Pack<T>::kSize;
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  const int vocabulary = static_cast<int>(in.vocabulary);
  T* const out = static_cast<T*>(args.out) + row * in.vocabulary;
  const T* const z = row_of<T>(in, row);
  const int64_t y = in.ids[row];
  const bool live = is_live(in, row);
  const bool known = y >= 0 && y < in.vocabulary;
  RowGradient c = {};
  float chosen = 0.0f;
  if (live) {
    c = row_gradient<ENTROPY>(args, row);
    if (known) {
      chosen = to_float(z[y]);
      if (chosen == -kInfinity) c.g = 0.0f;
    } else {
      c.g = __int_as_float(0x7fc00000);
    }
    __syncthreads();  // `out` may be the logits: all have read theirs before it is written
  }
  const auto gradient = [&](T logit) {
    T result = {};
    if (live) convert(logit_gradient<ENTROPY, false>(to_float(logit), c), result);
    return result;
  };
  const int lead = (16 - reinterpret_cast<uintptr_t>(out) % 16) % 16 / sizeof(T);
  const int head = lead < vocabulary ? lead : vocabulary;
  const int packs = (vocabulary - head) / N, tail = head + packs * N;
  const int single = threadIdx.x < head ? threadIdx.x : tail + static_cast<int>(threadIdx.x) - head;
  if (single < vocabulary) out[single] = gradient(z[single]);
#pragma unroll 2
  for (int i = packs - 1 - static_cast<int>(threadIdx.x); i >= 0;
       i -= static_cast<int>(blockDim.x)) {
    const int begin = head + i * N;
    Pack<T> pack = {};
    if (live && begin + 2 * N <= vocabulary) {  // as load_pack asks for
      pack = load_pack(z + begin);
    } else if (live) {
#pragma unroll
      for (int k = 0; k < N; ++k) pack.x[k] = z[begin + k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) pack.x[k] = gradient(pack.x[k]);
    store_pack(out + begin, pack);
  }
  if (!live || !known) return;
  __syncthreads();  // orders the store below behind that of the loop; `live` is the whole block's
  if (threadIdx.x == 0) convert(logit_gradient<ENTROPY, true>(chosen, c), out[y]);
}

template <class T, bool WEIGHTED>
__global__ void __launch_bounds__(kThreads) logprob_kernel(LogprobArgs args) {
  forward_row<T, WEIGHTED>(args);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads) logprob_backward_kernel(LogprobBackwardArgs args) {
  backward_row<T, ENTROPY>(args);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads) logprob_and_grad_kernel(LogprobGradArgs args) {
  forward_row<T, true>(args.forward);
  __syncthreads();  // thread 0 has written what all read
  backward_row<T, ENTROPY>(args.backward);
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
    if (args.entropy)
      logprob_kernel<decltype(type), true><<<grid, threads, 0, queue>>>(args);
    else
      logprob_kernel<decltype(type), false><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

void logprob_backward(const LogprobBackwardArgs& args, int device, void* stream) {
  const std::string what = describe("logprob_backward", args.in);
  const unsigned grid = grid_of(args.in.rows, what);
  const int threads = threads_of(args.in, what);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_type(args.in.dtype, [&](auto type) {
    if (args.grad_entropy)
      logprob_backward_kernel<decltype(type), true><<<grid, threads, 0, queue>>>(args);
    else
      logprob_backward_kernel<decltype(type), false><<<grid, threads, 0, queue>>>(args);
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
