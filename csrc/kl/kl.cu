// KL divergence on CUDA: one block per row, each logit of both models read once. With the gradient,
// a cluster of blocks keeps both rows in shared memory, so that they are read once there too.
//
// As in logprob.cu a column's index alone decides which thread sums it, and threads are combined in
// a fixed order, so that a row's bits depend neither on its alignment nor on the other rows.
#define RLHF_ISA cuda
#include "common/cluster.cuh"
#include "kl/kl.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 512;  // at most, per block
constexpr int kColumns = 8;    // neighbouring columns of a thread: 16 bytes of bf16, 32 of float
constexpr int kShort = 4096;   // up to so many columns a row is a matter of few threads
constexpr int kMaxBlocks = 8;  // of a cluster
// Bytes of a slice of both rows.
constexpr int64_t kGoodShared = 96 * 1024, kMostShared = 200 * 1024;

RLHF_HD float not_a_number() { return __int_as_float(0x7fc00000); }

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

// A thread's columns [begin, begin + 8) as floats, -inf behind `end`; keep(column, pack) is called
// with what was read.
template <class T, class Keep>
RLHF_HD void load_columns(const T* row, int begin, int end, float (&z)[kColumns], Keep keep) {
  constexpr int N = Pack<T>::kSize;
#pragma unroll
  for (int part = 0; part < kColumns; part += N) {
    Pack<T> pack;
    if (begin + part + N <= end) {
      pack = load_pack(row + begin + part);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (begin + part + i < end)
          pack.x[i] = row[begin + part + i];
        else
          convert(-kInfinity, pack.x[i]);
      }
    }
    keep(begin + part, pack);
#pragma unroll
    for (int i = 0; i < N; ++i) z[part + i] = to_float(pack.x[i]);
  }
}

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

// The sums of a thread's columns within [first, end).
template <class T, class R, class Keep, class RefKeep>
RLHF_HD Sums fold_columns(const T* z, const R* q, int first, int end, float rate2, Keep keep,
                          RefKeep ref_keep) {
  Sums s = {-kInfinity, -kInfinity, 0.0f, 0.0f, 0.0f, 0.0f, -kInfinity};
  for (int begin = first + threadIdx.x * kColumns; begin < end;
       begin += static_cast<int>(blockDim.x) * kColumns) {
    float x[kColumns], y[kColumns];
    load_columns(z, begin, end, x, keep);
    load_columns(q, begin, end, y, ref_keep);
    float top = s.top, ref_top = s.ref_top;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      top = fmaxf(top, x[i]);
      ref_top = fmaxf(ref_top, y[i]);
    }
    raise(s, top, ref_top, rate2);
    const float base = base_of(top), ref_base = base_of(ref_top);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float d = x[i] - base, r = y[i] - ref_base, difference = d - r;
      const float e = fast_exp2(d * rate2);
      s.total += e;
      s.ref_total += fast_exp2(r * rate2);
      s.weighted = fma(e, e == 0.0f ? 0.0f : d, s.weighted);
      s.cross = fma(e, e == 0.0f ? 0.0f : difference, s.cross);
      s.widest = fmaxf(s.widest, difference);  // NaN, where both are -inf, is passed over
    }
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

// The sums of a row, exact enough.
struct RowSums {
  float top, ref_top, ref_total, weighted, widest;
  double total, cross;
};

// The threads' sums together, for every thread of the block; they move to the row's maxima first.
RLHF_HD RowSums sums_of_block(Sums s, float top, float ref_top, float rate2) {
  __shared__ float shared[32];
  __shared__ double shared_double[kThreads / 32];
  raise(s, top, ref_top, rate2);
  RowSums sums;
  sums.top = top;
  sums.ref_top = ref_top;
  sums.total = block_sum_double(s.total, shared_double);
  sums.cross = block_sum_double(s.cross, shared_double);
  sums.ref_total = block_sum(s.ref_total, shared);
  sums.weighted = block_sum(s.weighted, shared);
  sums.widest = block_max(s.widest, shared);
  return sums;
}

// `chosen` and `ref_chosen` are the logits of the token, NaN where its id is out of range.
RLHF_HD KlValues values_of(const RowSums& s, float chosen, float ref_chosen, float rate) {
  const float total = static_cast<float>(s.total);
  const bool empty = total == 0.0f;  // nothing but -inf
  KlValues v;
  v.row_max = s.top;
  v.ref_row_max = s.ref_top;
  v.log_sum = empty ? 0.0f : logf(total);
  v.ref_log_sum = s.ref_total == 0.0f ? 0.0f : logf(s.ref_total);
  const float known = v.log_sum + v.ref_log_sum;  // NaN where a row has one
  v.kl = static_cast<float>(s.cross / s.total * rate - v.log_sum + v.ref_log_sum);
  if (s.widest == kInfinity) v.kl = kInfinity;
  if (known != known) v.kl = known;
  if (empty) v.kl = 0.0f;
  v.logprob = (chosen - base_of(s.top)) * rate - v.log_sum;
  v.ref_logprob = (ref_chosen - base_of(s.ref_top)) * rate - v.ref_log_sum;
  v.entropy = empty ? 0.0f : v.log_sum - s.weighted / total * rate;
  return v;
}

RLHF_HD void store_values(const KlArgs& args, int64_t row, const KlValues& v) {
  args.kl[row] = v.kl;
  args.logprob[row] = v.logprob;
  args.ref_logprob[row] = v.ref_logprob;
  args.entropy[row] = v.entropy;
  args.row_max[row] = v.row_max;
  args.log_sum[row] = v.log_sum;
  args.ref_row_max[row] = v.ref_row_max;
  args.ref_log_sum[row] = v.ref_log_sum;
}

// The logit of the row's token. Ids are not checked on the device: one out of range reads nothing
// and gives NaN.
template <class T>
RLHF_HD float chosen_logit(const LogitRows& in, const T* z, int64_t y) {
  return y >= 0 && y < in.vocabulary ? to_float(z[y]) : not_a_number();
}

template <class T, class R>
RLHF_HD void forward_row(const KlArgs& args) {
  __shared__ float shared[32];
  const LogitRows& in = args.in;
  const int64_t row = blockIdx.x;
  if (!is_live(in, row)) {  // the same for the whole block
    if (threadIdx.x == 0) store_values(args, row, {});
    return;
  }
  const T* const z = row_of<T>(in, row);
  const R* const q = row_of<R>(args.ref, row);
  const float rate = rate_of(in, row), rate2 = rate * kLog2E;
  const auto keep = [](int, const auto&) {};
  const Sums s = fold_columns(z, q, 0, static_cast<int>(in.vocabulary), rate2, keep, keep);
  const float top = block_max(s.top, shared), ref_top = block_max(s.ref_top, shared);
  const RowSums sums = sums_of_block(s, top, ref_top, rate2);
  if (threadIdx.x != 0) return;
  const int64_t y = in.ids[row];
  store_values(args, row, values_of(sums, chosen_logit(in, z, y), chosen_logit(in, q, y), rate));
}

// The gradient of `count` logits `z` to `out`, by all threads of a block; load(p) is the pack
// there. It is computed number by number, so alignment may choose which thread does it.
template <bool KL, class T, class R, class Load>
RLHF_HD void store_gradient(const T* z, const R* q, int count, const KlRow& c, T* out, Load load) {
  constexpr int N = Pack<T>::kSize, M = Pack<R>::kSize;
  constexpr int kStep = N > M ? N : M;  // columns of a thread: whole packs of both
  const auto single = [&](int i) {
    convert(kl_gradient<KL, false>(to_float(z[i]), to_float(q[i]), c), out[i]);
  };
  cover_aligned(out, count, kStep, single, [&](int begin) {
    float y[kStep];
#pragma unroll
    for (int part = 0; part < kStep; part += M) {
      const Pack<R> pack = load(q + begin + part);
#pragma unroll
      for (int i = 0; i < M; ++i) y[part + i] = to_float(pack.x[i]);
    }
#pragma unroll
    for (int part = 0; part < kStep; part += N) {
      Pack<T> pack = load(z + begin + part);
#pragma unroll
      for (int i = 0; i < N; ++i)
        convert(kl_gradient<KL, false>(to_float(pack.x[i]), y[part + i], c), pack.x[i]);
      store_pack(out + begin + part, pack);
    }
  });
}

// As above, then the chosen token, whose column of the slice is `y` and may lie outside.
template <class T, class R, class Load>
RLHF_HD void store_gradient(const T* z, const R* q, int count, const KlRow& c, T* out, Load load,
                            int64_t y, float chosen, float ref_chosen, bool with_logprob) {
  if (c.with_kl)
    store_gradient<true>(z, q, count, c, out, load);
  else
    store_gradient<false>(z, q, count, c, out, load);
  if (!with_logprob || y < 0 || y >= count) return;
  __syncthreads();  // orders the store below behind those above
  if (threadIdx.x == 0) {
    convert(c.with_kl ? kl_gradient<true, true>(chosen, ref_chosen, c)
                      : kl_gradient<false, true>(chosen, ref_chosen, c),
            out[y]);
  }
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
  const int64_t y = in.ids[row];
  const float chosen = chosen_logit(in, z, y), ref_chosen = chosen_logit(in, q, y);
  __syncthreads();  // `out` may be the logits: all have read theirs before it is written
  store_gradient(
      z, q, vocabulary, kl_row(args, row, chosen), out, [](const auto* p) { return load_pack(p); },
      y, chosen, ref_chosen, args.grad_logprob != nullptr);
}

// ------------------------------------------------------------------- one pass, by a cluster

struct ClusterArgs {
  KlGradArgs call;
  int blocks, slice;  // of a cluster, and the columns of each: whole packs
};

struct Tops {
  float top, ref_top;
};

// Each block of a cluster takes a slice of both rows. It keeps it in shared memory until the sums
// of all slices are known, so that the gradient may be written over the logits.
template <class T, class R>
RLHF_HD void row_of_cluster(const ClusterArgs& args) {
  extern __shared__ uint4 words[];
  __shared__ float shared[32];
  __shared__ Tops tops[kMaxBlocks];
  __shared__ RowSums parts[kMaxBlocks];
  T* const kept = reinterpret_cast<T*>(words);
  R* const ref_kept = reinterpret_cast<R*>(kept + args.slice);
  const KlArgs& forward = args.call.forward;
  const KlBackwardArgs& backward = args.call.backward;
  const LogitRows& in = forward.in;
  const int64_t row = blockIdx.x / args.blocks;
  const int rank = static_cast<int>(cluster_rank());
  const int vocabulary = static_cast<int>(in.vocabulary);
  const int begin = rank * args.slice < vocabulary ? rank * args.slice : vocabulary;
  const int end = begin + args.slice < vocabulary ? begin + args.slice : vocabulary;
  T* const out = static_cast<T*>(backward.out) + row * in.vocabulary + begin;
  if (!is_live(in, row)) {  // the same for the whole cluster
    store_zeros(out, end - begin);
    if (rank == 0 && threadIdx.x == 0) store_values(forward, row, {});
    return;
  }
  cluster_sync();  // all blocks have started: their shared memory may be written
  const T* const z = row_of<T>(in, row);
  const R* const q = row_of<R>(forward.ref, row);
  const int64_t y = in.ids[row];
  const float chosen = chosen_logit(in, z, y), ref_chosen = chosen_logit(in, q, y);
  const float rate = rate_of(in, row), rate2 = rate * kLog2E;
  const Sums s = fold_columns(
      z, q, begin, end, rate2,
      [&](int i, const Pack<T>& pack) {
        if (i < end) store_pack(kept + (i - begin), pack);
      },
      [&](int i, const Pack<R>& pack) {
        if (i < end) store_pack(ref_kept + (i - begin), pack);
      });
  const Tops own = {block_max(s.top, shared), block_max(s.ref_top, shared)};
  if (threadIdx.x < args.blocks) store_in_block(tops + rank, threadIdx.x, own);
  cluster_sync();  // the maxima are there, and nobody reads logits any more
  Tops row_tops = tops[0];
  for (int i = 1; i < args.blocks; ++i) {
    row_tops.top = fmaxf(row_tops.top, tops[i].top);
    row_tops.ref_top = fmaxf(row_tops.ref_top, tops[i].ref_top);
  }
  const RowSums part = sums_of_block(s, row_tops.top, row_tops.ref_top, rate2);
  if (threadIdx.x < args.blocks) store_in_block(parts + rank, threadIdx.x, part);
  cluster_sync();
  RowSums sums = parts[0];
  for (int i = 1; i < args.blocks; ++i) {
    sums.total += parts[i].total;
    sums.cross += parts[i].cross;
    sums.ref_total += parts[i].ref_total;
    sums.weighted += parts[i].weighted;
    sums.widest = fmaxf(sums.widest, parts[i].widest);
  }
  const KlValues values = values_of(sums, chosen, ref_chosen, rate);
  if (rank == 0 && threadIdx.x == 0) store_values(forward, row, values);
  store_gradient(
      kept, ref_kept, end - begin, kl_row(backward, row, chosen, values), out,
      [](const auto* p) { return generic_pack(p); }, y - begin, chosen, ref_chosen,
      backward.grad_logprob != nullptr);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, 2) kl_kernel(KlArgs args) {
  forward_row<T, R>(args);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, 2) kl_backward_kernel(KlBackwardArgs args) {
  backward_row<T, R>(args);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, 2) kl_and_grad_kernel(KlGradArgs args) {
  forward_row<T, R>(args.forward);
  __syncthreads();  // thread 0 has written what all read
  backward_row<T, R>(args.backward);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads, 2) kl_and_grad_cluster_kernel(ClusterArgs args) {
  row_of_cluster<T, R>(args);
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
int threads_of(const LogitRows& in) { return in.vocabulary <= kShort ? 128 : kThreads; }

// Launches clusters and says whether it did: not for short rows, not for rows beyond the shared
// memory of a cluster, not on a GPU without them.
template <class T, class R>
bool run_clusters(const KlGradArgs& call, int device, cudaStream_t stream,
                  const std::string& what) {
  constexpr int64_t kBytes = sizeof(T) + sizeof(R);
  const int64_t vocabulary = call.forward.in.vocabulary, rows = call.forward.in.rows;
  const auto kernel = kl_and_grad_cluster_kernel<T, R>;
  if (vocabulary <= kShort || vocabulary * kBytes > kMaxBlocks * kMostShared ||
      !can_cluster(kernel, device))
    return false;
  int blocks = 1;
  while (blocks < kMaxBlocks && vocabulary * kBytes > blocks * kGoodShared) blocks *= 2;
  const int slice =
      static_cast<int>((vocabulary + blocks * kColumns - 1) / (blocks * kColumns)) * kColumns;
  launch_clusters(kernel, grid_of(rows * blocks, what), blocks, kThreads,
                  slice * static_cast<int>(kBytes), stream, ClusterArgs{call, blocks, slice}, what);
  return true;
}

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
    if (run_clusters<decltype(type), decltype(ref_type)>(args, device, queue, what)) return;
    kl_and_grad_kernel<decltype(type), decltype(ref_type)><<<grid, threads, 0, queue>>>(args);
  });
  check_launch(what);
}

}  // namespace rlhf::cuda
