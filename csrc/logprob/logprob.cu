// Log-prob and entropy on CUDA: one block per row, each logit read once. With the gradient, a
// cluster of blocks keeps the row in shared memory, so that it is read once there too.
//
// Which thread sums which column is fixed by the column's index, and threads are combined in a
// fixed order, so that a row's bits depend neither on its alignment nor on the other rows.
#define RLHF_ISA cuda
#include <type_traits>

#include "common/cluster.cuh"
#include "logprob/logprob.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;  // at most, per block
// Packs of a thread under way together: 32 bytes hide the memory's latency, 16 do not.
constexpr int kPacks = 2;
constexpr int kShort = 4096;   // up to so many columns a row is a matter of few threads
constexpr int kMaxBlocks = 8;  // of a cluster
// Bytes of a slice. Four blocks on a multiprocessor keep reading while others write.
constexpr int64_t kGoodShared = 48 * 1024, kMostShared = 200 * 1024;

RLHF_HD float not_a_number() { return __int_as_float(0x7fc00000); }

// A thread's pack of columns from `begin`; -inf behind `end`.
template <class T>
RLHF_HD Pack<T> load_columns(const T* row, int begin, int end) {
  constexpr int N = Pack<T>::kSize;
  if (begin + N <= end) return load_pack(row + begin);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (begin + i < end)
      pack.x[i] = row[begin + i];
    else
      convert(-kInfinity, pack.x[i]);
  }
  return pack;
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

// The sums of the columns [begin, end), for every thread of the block; `rate` in units of ln 2.
// keep(column, pack) is called with what was read.
template <class T, bool WEIGHTED, class Keep>
RLHF_HD Softmax fold_columns(const LogitRows& in, const T* row, int begin, int end, float rate,
                             float* shared, Keep keep) {
  constexpr int N = Pack<T>::kSize;
  const int stride = static_cast<int>(blockDim.x) * N;
  Softmax state = {-kInfinity, 0.0f, 0.0f};
  for (int first = begin + threadIdx.x * N; first < end; first += kPacks * stride) {
    Pack<T> packs[kPacks];
    float x[kPacks * N];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs[p] = load_columns(row, first + p * stride, end);
    float top = state.top;
#pragma unroll
    for (int i = 0; i < kPacks * N; ++i) {
      x[i] = to_float(packs[i / N].x[i % N]);
      if (in.softcap != 0.0f) x[i] = softcapped(x[i], in.softcap).value;  // or none of the launch
      top = fmaxf(top, x[i]);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (first + p * stride < end) keep(first + p * stride, packs[p]);
    raise<WEIGHTED>(state, top, rate);
    const float base = top == -kInfinity ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kPacks * N; ++i) {
      const float d = (x[i] - base) * rate;
      const float e = fast_exp2(d);
      state.total += e;
      if (WEIGHTED) state.weighted = fma(e, floored(d), state.weighted);
    }
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

// The logit of the row's token. Ids are not checked on the device: one out of range reads nothing
// and gives NaN.
template <class T>
RLHF_HD float chosen_logit(const LogitRows& in, const T* z, int64_t y) {
  return y >= 0 && y < in.vocabulary ? to_float(z[y]) : not_a_number();
}

template <class T, bool WEIGHTED>
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
  const Softmax sums = fold_columns<T, WEIGHTED>(in, z, 0, static_cast<int>(in.vocabulary),
                                                 rate * kLog2E, shared, [](int, const Pack<T>&) {});
  if (threadIdx.x != 0) return;
  const float chosen = chosen_logit(in, z, in.ids[row]);
  store_values<WEIGHTED>(args, row, values_of<WEIGHTED>(sums, chosen, in.softcap, rate), sums.top);
}

// The gradient of `count` logits `z` to `out`, by all threads of a block; load(p) is the pack
// there. It is computed number by number, so alignment may choose which thread does it.
template <class T, bool ENTROPY, class Load>
RLHF_HD void store_gradient(T* out, const T* z, int count, const RowGradient& c, Load load) {
  const auto gradient = [&](T logit) {
    T result;
    convert(logit_gradient<ENTROPY, false>(to_float(logit), c), result);
    return result;
  };
  cover_aligned(
      out, count, Pack<T>::kSize, [&](int i) { out[i] = gradient(z[i]); },
      [&](int i) {
        Pack<T> pack = load(z + i);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) pack.x[k] = gradient(pack.x[k]);
        store_pack(out + i, pack);
      });
}

// What becomes of the log-prob's gradient: 0 for a log-prob of -inf, NaN for an id out of range.
RLHF_HD float gradient_of_chosen(float g, float chosen) {
  return chosen == -kInfinity ? 0.0f : chosen == chosen ? g : chosen;
}

template <class T, bool ENTROPY>
RLHF_HD void backward_row(const LogprobBackwardArgs& args) {
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  const int vocabulary = static_cast<int>(in.vocabulary);
  T* const out = static_cast<T*>(args.out) + row * in.vocabulary;
  if (!is_live(in, row)) return store_zeros(out, vocabulary);  // the same for the whole block
  const T* const z = row_of<T>(in, row);
  const int64_t y = in.ids[row];
  const float chosen = chosen_logit(in, z, y);
  RowGradient c = row_gradient<ENTROPY>(args, row);
  c.g = gradient_of_chosen(c.g, chosen);
  __syncthreads();  // `out` may be the logits: all have read theirs before it is written
  store_gradient<T, ENTROPY>(out, z, vocabulary, c, [](const T* p) { return load_pack(p); });
  if (y < 0 || y >= vocabulary) return;
  __syncthreads();  // orders the store below behind those above
  if (threadIdx.x == 0) convert(logit_gradient<ENTROPY, true>(chosen, c), out[y]);
}

// ------------------------------------------------------------------- one pass, by a cluster

struct ClusterArgs {
  LogprobGradArgs call;
  int blocks, slice;  // of a cluster, and the columns of each: whole packs
};

// The parts' sums together, in their order.
RLHF_HD Softmax merge(const Softmax* parts, int count, float rate) {
  Softmax whole = {-kInfinity, 0.0f, 0.0f};
  for (int i = 0; i < count; ++i) whole.top = fmaxf(whole.top, parts[i].top);
  for (int i = 0; i < count; ++i) {
    Softmax part = parts[i];
    raise<true>(part, whole.top, rate);
    whole.total += part.total;
    whole.weighted += part.weighted;
  }
  return whole;
}

// Each block of a cluster takes a slice of the row. It keeps it in shared memory until the sums of
// all slices are known, so that the gradient may be written over the logits.
template <class T, bool ENTROPY>
RLHF_HD void row_of_cluster(const ClusterArgs& args) {
  extern __shared__ uint4 words[];
  __shared__ float shared[32];
  __shared__ Softmax parts[kMaxBlocks];
  T* const kept = reinterpret_cast<T*>(words);
  const LogprobArgs& forward = args.call.forward;
  const LogitRows& in = forward.in;
  const int64_t row = blockIdx.x / args.blocks;
  const int rank = static_cast<int>(cluster_rank());
  const int vocabulary = static_cast<int>(in.vocabulary);
  const int begin = rank * args.slice < vocabulary ? rank * args.slice : vocabulary;
  const int end = begin + args.slice < vocabulary ? begin + args.slice : vocabulary;
  T* const out = static_cast<T*>(args.call.backward.out) + row * in.vocabulary + begin;
  if (!is_live(in, row)) {  // the same for the whole cluster
    store_zeros(out, end - begin);
    if (rank == 0 && threadIdx.x == 0) store_values<true>(forward, row, {}, 0.0f);
    return;
  }
  cluster_sync();  // all blocks have started: their shared memory may be written
  const T* const z = row_of<T>(in, row);
  const int64_t y = in.ids[row];
  const float chosen = chosen_logit(in, z, y), rate = rate_of(in, row), rate2 = rate * kLog2E;
  const Softmax part = fold_columns<T, true>(
      in, z, begin, end, rate2, shared,
      [&](int column, const Pack<T>& pack) { store_pack(kept + (column - begin), pack); });
  if (threadIdx.x < args.blocks) store_in_block(parts + rank, threadIdx.x, part);
  cluster_sync();  // the parts are there, and nobody reads logits any more
  const Softmax sums = merge(parts, args.blocks, rate2);
  const RowValues values = values_of<true>(sums, chosen, in.softcap, rate);
  if (rank == 0 && threadIdx.x == 0) store_values<true>(forward, row, values, sums.top);

  RowGradient c =
      row_gradient<ENTROPY>(args.call.backward, row, sums.top, values.log_sum, values.entropy);
  c.g = gradient_of_chosen(c.g, chosen);
  store_gradient<T, ENTROPY>(out, kept, end - begin, c, [](const T* p) { return generic_pack(p); });
  if (y < begin || y >= end) return;
  __syncthreads();  // orders the store below behind those above
  if (threadIdx.x == 0) convert(logit_gradient<ENTROPY, true>(chosen, c), out[y - begin]);
}

template <class T, bool WEIGHTED>
__global__ void __launch_bounds__(kThreads, 2) logprob_kernel(LogprobArgs args) {
  forward_row<T, WEIGHTED>(args);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads, 2) logprob_backward_kernel(LogprobBackwardArgs args) {
  backward_row<T, ENTROPY>(args);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads, 2) logprob_and_grad_kernel(LogprobGradArgs args) {
  forward_row<T, true>(args.forward);
  __syncthreads();  // thread 0 has written what all read
  backward_row<T, ENTROPY>(args.backward);
}

template <class T, bool ENTROPY>
__global__ void __launch_bounds__(kThreads, 2) logprob_and_grad_cluster_kernel(ClusterArgs args) {
  row_of_cluster<T, ENTROPY>(args);
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
  return in.vocabulary <= kShort ? 128 : kThreads;
}

// Launches clusters and says whether it did: not for short rows, not for rows beyond the shared
// memory of a cluster, not on a GPU without them.
template <class T, bool ENTROPY>
bool run_clusters(const LogprobGradArgs& call, int device, cudaStream_t stream,
                  const std::string& what) {
  const int64_t vocabulary = call.forward.in.vocabulary, rows = call.forward.in.rows;
  const int64_t bytes = vocabulary * static_cast<int64_t>(sizeof(T));
  const auto kernel = logprob_and_grad_cluster_kernel<T, ENTROPY>;
  if (vocabulary <= kShort || bytes > kMaxBlocks * kMostShared || !can_cluster(kernel, device))
    return false;
  int blocks = 1;
  while (blocks < kMaxBlocks && bytes > blocks * kGoodShared) blocks *= 2;
  constexpr int N = Pack<T>::kSize;
  const int slice = static_cast<int>((vocabulary + blocks * N - 1) / (blocks * N)) * N;
  launch_clusters(kernel, grid_of(rows * blocks, what), blocks, kThreads,
                  slice * static_cast<int>(sizeof(T)), stream, ClusterArgs{call, blocks, slice},
                  what);
  return true;
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
  const auto run = [&](auto type, auto entropy) {
    if (run_clusters<decltype(type), entropy>(args, device, queue, what)) return;
    logprob_and_grad_kernel<decltype(type), entropy><<<grid, threads, 0, queue>>>(args);
  };
  with_type(in.dtype, [&](auto type) {
    if (args.backward.grad_entropy)
      run(type, std::true_type());
    else
      run(type, std::false_type());
  });
  check_launch(what);
}

}  // namespace rlhf::cuda
