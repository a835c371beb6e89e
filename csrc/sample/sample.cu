// Sampling on CUDA: one launch, a cluster of eight blocks per row, each logit read once from
// memory.
//
// A pass over the row gives sums and, per thread, its largest chunk. The k-th largest of the
// threads' maxima bounds the k-th largest logit from below; the little more than k tokens above it
// become a list, in which one block finds the kept set and draws (finish.cuh). A row whose kept set
// does not fit into a list is walked by all blocks again, from the caches.
//
// What decides is computed in integers or for one token at a time, so that ids and kept sets depend
// neither on an order nor on the other rows; the sums of the entropy have a fixed order.
#define RLHF_ISA cuda
#include "sample/finish.cuh"

namespace rlhf::cuda {
namespace {

// With d = rate (z - top) in units of ln 2: total = sum 2^d, weighted = sum 2^d d.
struct Scan {
  float top = -kInfinity, total = 0.0f, weighted = 0.0f;
  float second = -kInfinity;  // the largest logit outside of the chunk that has `top`
  int at = -1;                // where that chunk begins
  Contender contender;        // of the whole row's race; scores are relative to z = 0

  // Moves the sums to the maximum `largest`, which is no smaller; -inf - -inf is NaN.
  RLHF_HD void raise(float largest, float rate2) {
    const float shift = (top - base_of(largest)) * rate2;
    const float shrink = fast_exp2(shift);
    weighted = shrink * fma(floored(shift), total, weighted);
    total = total * shrink;
    top = largest;
  }
  // 2^-256 is 0 in float; the floor keeps 0 * -inf out.
  static RLHF_HD float floored(float d) { return max(-256.0f, d); }
  static RLHF_HD float base_of(float top) { return top == -kInfinity ? 0.0f : top; }

  RLHF_HD void add(const float (&z)[kColumns], int begin, float rate2) {
    float largest = z[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) largest = fmaxf(largest, z[i]);
    if (largest > top) {
      second = top;
      at = begin;
    } else {
      second = fmaxf(second, largest);
    }
    raise(fmaxf(top, largest), rate2);
    const float base = base_of(top);
    float e[kColumns], ed[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float d = (z[i] - base) * rate2;
      e[i] = fast_exp2(d);
      ed[i] = e[i] * floored(d);
    }
#pragma unroll
    for (int n = kColumns / 2; n > 0; n /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) {
        e[i] = e[2 * i] + e[2 * i + 1];
        ed[i] = ed[2 * i] + ed[2 * i + 1];
      }
    total += e[0];
    weighted += ed[0];
  }

  RLHF_HD void race(const float (&z)[kColumns], int begin, float rate2, const RaceKey& key) {
#pragma unroll
    for (int part = 0; part < kColumns; part += 4) {
      const PhiloxWords words = race_words(key, (begin + part) / 4, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        contender.offer(score_of(z[part + i] * rate2, words.word[i]), begin + part + i);
    }
  }
};

// This thread's part of the row; with RACE it looks for the winner among all tokens as well.
template <int BLOCKS, bool RACE, class T>
RLHF_HD Scan scan_row(const Row<T>& row) {
  // 64 bytes on their way; the race takes its time and its registers.
  constexpr int kAhead = RACE ? 1 : (sizeof(T) == 2 ? 4 : 2);
  constexpr int step = kStep<BLOCKS>;
  Scan scan;
  for (int begin = first_column<BLOCKS>(); begin < row.vocabulary; begin += kAhead * step) {
    Chunk<T> chunks[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) chunks[k].load(row, begin + k * step);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int first = begin + k * step;
      if (first >= row.vocabulary) break;
      float z[kColumns];
      chunks[k].unpack(row, first, z);
      scan.add(z, first, row.rate2);
      if (RACE) scan.race(z, first, row.rate2, row.key);
    }
  }
  return scan;
}

// How many of the maxima are at least `order`, `order` + step and so on, 10 bits each. A warp has
// at most 256.
template <int BLOCKS>
RLHF_HD uint32_t count_three(const uint32_t (&orders)[BLOCKS], uint32_t order, uint32_t step) {
  uint32_t counts = 0;
#pragma unroll
  for (int rank = 0; rank < BLOCKS; ++rank)
#pragma unroll
    for (int i = 0; i < 3; ++i) counts += orders[rank] >= order + i * step ? 1u << 10 * i : 0;
  return __reduce_add_sync(~0u, counts);
}

// A lower bound of the k-th largest logit: of the k-th largest maximum of a thread, the upper half
// of its bits, two at a time. -FLT_MAX where fewer threads than k have a token.
template <int BLOCKS>
RLHF_HD float bound_of_kth(const float (&maxima)[BLOCKS], int64_t k) {
  __shared__ uint32_t counts[2][kThreads / 32];
  uint32_t orders[BLOCKS], order = 0;
#pragma unroll
  for (int rank = 0; rank < BLOCKS; ++rank) orders[rank] = order_of(maxima[rank]);
  for (int bit = 30; bit >= 16; bit -= 2) {
    const uint32_t step = 1u << bit;
    const uint32_t warp_counts = count_three(orders, order + step, step);
    uint32_t (&parts)[kThreads / 32] = counts[bit / 2 % 2];  // two, so that one barrier is enough
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = warp_counts;
    __syncthreads();
    int number[3] = {};
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp)
#pragma unroll
      for (int i = 0; i < 3; ++i) number[i] += parts[warp] >> 10 * i & 1023;
    order += step * ((number[0] >= k) + (number[1] >= k) + (number[2] >= k));
  }
  return order < order_of(-FLT_MAX) ? -FLT_MAX : float_of(order);
}

// A z that no token which matters to the kept set lies below; -FLT_MAX where nothing is known.
template <int BLOCKS, class T>
RLHF_HD float lowest_of_list(const Row<T>& row, const float (&maxima)[BLOCKS]) {
  constexpr int64_t kMost = BLOCKS * kThreads / 2;  // then a list has about 1.4 k tokens
  const RowSettings& s = row.s;
  float from = -FLT_MAX;
  if (row.vocabulary <= kList) return from;
  // Top-p alone: the likeliest `kMost` tokens may be enough.
  const int64_t k = s.top_k == 0 && s.top_p < 1.0 ? kMost : s.top_k;
  if (k > 0 && k <= kMost) from = below(bound_of_kth(maxima, k), row.top, s.temperature);
  // Top-p needs the mass of what min-p removes.
  if (s.top_p == 1.0 && static_cast<float>(s.min_p) > 0.0f)
    from = max(from, below_likely(row.top, s));
  return from;
}

// This block's tokens with z >= from; returns the sum of e over this thread's.
template <int BLOCKS, class T>
RLHF_HD uint64_t collect(const Row<T>& row, const Scan& own, float own_top, float from,
                         List& list) {
  uint64_t mass = 0;
  const auto take = [&](int begin) {
    float z[kColumns];
    load_columns(row, begin, z);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (!(z[i] >= from)) continue;
      mass += Row<T>::weight_of(row.e_of(z[i]));
      const int place = atomicAdd(&list.count, 1);
      if (place < kList) {
        list.z[place] = z[i];
        list.id[place] = begin + i;
      }
    }
  };
  if (own.second >= from) {
    for (int begin = first_column<BLOCKS>(); begin < row.vocabulary; begin += kStep<BLOCKS>)
      take(begin);
  } else if (own_top >= from) {
    take(own.at);
  }
  return mass;
}

// The lowest id of the largest logit in this block, as a winner of the time 0.
template <class T>
RLHF_HD Winner first_of_largest(const Row<T>& row, const Scan& own, float own_top) {
  int id = INT32_MAX;
  if (own_top == row.top && own.at >= 0) {
    float z[kColumns];
    load_columns(row, own.at, z);
#pragma unroll
    for (int i = kColumns - 1; i >= 0; --i)
      if (z[i] == row.top) id = own.at + i;
  }
  id = min_block(id);
  return {id == INT32_MAX ? kInfinity : 0.0, id};
}

// What a block tells the others.
struct Share {
  double total, weighted;
  uint64_t mass;  // of its list
  Winner winner;
};

// The sums of a block's threads, which have the same maximum.
RLHF_HD void share_sums(const Scan& own, Share& share) {
  const double total = sum_block(static_cast<double>(own.total));
  const double weighted = sum_block(static_cast<double>(own.weighted));
  if (threadIdx.x != 0) return;
  share.total = total;
  share.weighted = weighted;
}

template <int BLOCKS>
RLHF_HD Winner best_of(Share& share) {
  Winner best = {kInfinity, -1};
  for (int rank = 0; rank < BLOCKS; ++rank) {
    const Winner winner = Team<BLOCKS>::read(share.winner, rank);
    if (winner.r < best.r || (winner.r == best.r && winner.id < best.id)) best = winner;
  }
  return best;
}

// The lists of all blocks in the first one's: a warp copies from each.
template <int BLOCKS>
RLHF_HD void gather(List& list) {
  static_assert(BLOCKS <= kThreads / 32, "a warp per block");
  const int from = threadIdx.x / 32;
  int begin = 0, count = 0;
  for (int rank = 0; rank < BLOCKS; ++rank) {
    const int number = Team<BLOCKS>::read(list.count, rank);
    if (rank < from) begin += number;
    if (rank == from) count = number;
  }
  if (from == 0) return;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    list.z[begin + i] = Team<BLOCKS>::read(list.z[i], from);
    list.id[begin + i] = Team<BLOCKS>::read(list.id[i], from);
  }
}

// By the first block; three of its warps have a number each, since logarithms in double take time.
// `part` is the sum of e over the kept set, 0 where nothing was cut.
template <class T>
RLHF_HD void write(const SampleArgs& args, int64_t n, const Row<T>& row, int id, double part) {
  const bool drawn = id >= 0 && !row.s.greedy;
  if (threadIdx.x == 0) {
    float logprob = id < 0 ? -kInfinity : 0.0f;
    if (drawn) {
      const double log_kept = log(part > 0.0 ? part : row.total);
      const double d = (static_cast<double>(row.logit(id)) - row.top) / row.s.temperature;
      logprob = static_cast<float>(d - log_kept) + 0.0f;  // no -0
    }
    args.ids[n] = id;
    args.logprob[n] = logprob;
  } else if (threadIdx.x == 32) {
    const bool cut = drawn && part > 0.0;
    args.log_mass[n] = cut ? min(0.0f, static_cast<float>(log(part / row.total))) : 0.0f;
  } else if (threadIdx.x == 64) {
    const double mean = row.weighted / row.total * 0.69314718055994531;
    args.entropy[n] = drawn ? static_cast<float>(log(row.total) - mean) : 0.0f;
  }
}

template <int THREADS, int BLOCKS, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS == 1 ? 3 : 4) sample_kernel(SampleArgs args) {
  static_assert(THREADS == kThreads, "a block is as wide as a histogram");
  using Blocks = Team<BLOCKS>;
  __shared__ Row<T> row;
  __shared__ float own_maxima[kThreads];
  __shared__ Share share;
  __shared__ List list;
  __shared__ Histogram histogram;
  const int n = blockIdx.x / BLOCKS;
  const bool first = Blocks::rank() == 0;
  if (threadIdx.x == 0) {
    begin_row(args, n, row);
    list.count = 0;
  }
  __syncthreads();
  const RowSettings& s = row.s;
  const bool whole = !s.greedy && !filters(s);
  Scan own = whole ? scan_row<BLOCKS, true>(row) : scan_row<BLOCKS, false>(row);

  own_maxima[threadIdx.x] = own.top;
  Blocks::sync();
  float maxima[BLOCKS], top = -kInfinity;
#pragma unroll
  for (int rank = 0; rank < BLOCKS; ++rank) {
    maxima[rank] = Blocks::read(own_maxima[threadIdx.x], rank);
    top = fmaxf(top, maxima[rank]);
  }
  top = max_block(top);
  if (threadIdx.x == 0) row.rise_to(top);
  __syncthreads();
  const float own_top = own.top;
  own.raise(row.top, row.rate2);
  share_sums(own, share);
  float from = -FLT_MAX;
  if (s.greedy) {
    const Winner winner = first_of_largest(row, own, own_top);
    if (threadIdx.x == 0) share.winner = winner;
  } else if (whole) {
    const Winner winner = settle_block(row, own.contender, row.top * row.rate2, [&](const auto& f) {
      for (int begin = first_column<BLOCKS>(); begin < row.vocabulary; begin += kStep<BLOCKS>) {
#pragma unroll 1
        for (int id = begin; id < begin + kColumns && id < row.vocabulary; ++id) {
          const float z = row.z(id);
          f(row.u(z), id, score_of(z * row.rate2, high_word(row.key, id)));
        }
      }
    });
    if (threadIdx.x == 0) share.winner = winner;
  } else {
    from = lowest_of_list(row, maxima);
    uint64_t mass = 0;
    if (from > -FLT_MAX || row.vocabulary <= kList)
      mass = collect<BLOCKS>(row, own, own_top, from, list);
    if (s.top_k == 0) mass = sum_block(mass);  // for top-p alone
    if (threadIdx.x == 0) share.mass = mass;
  }
  Blocks::sync();

  int count = 0;
  double total = 0.0, weighted = 0.0;
  uint64_t mass = 0;
  for (int rank = 0; rank < BLOCKS; ++rank) {
    total += Blocks::read(share.total, rank);
    weighted += Blocks::read(share.weighted, rank);
    mass += Blocks::read(share.mass, rank);
    count += ::min(Blocks::read(list.count, rank), kList + 1);
  }
  if (threadIdx.x == 0) {
    row.total = total;
    row.weighted = weighted;
  }
  __syncthreads();
  if (!(total > 0.0)) {  // nothing to draw from, +inf or NaN
    if (first) write(args, n, row, -1, 0.0);
  } else if (s.greedy || whole) {
    const Winner winner = best_of<BLOCKS>(share);
    if (first) write(args, n, row, winner.id, 0.0);
  } else {
    const bool top_p_alone = s.top_k == 0 && s.top_p < 1.0;
    // Above the mass that top-p needs by more than float knows it.
    const double enough = (s.top_p + 2.0 * row.slack + 1e-6) * total * kUnits;
    const bool listed = (from > -FLT_MAX || row.vocabulary <= kList) && count <= kList &&
                        (!top_p_alone || row.vocabulary <= kList || mass > enough);
    AllTokens<T, BLOCKS> all = {row, 0.0};
    const Masses known = top_p_alone ? masses_of<BLOCKS>(row, all, Cut{}) : Masses{};
    Draw draw;
    if (listed) {
      if (first) gather<BLOCKS>(list);
      Blocks::sync();
      if (!first) return;
      if (count <= kThreads) {
        draw = draw_from_few(row, list, count, known);
      } else {
        ListedTokens<T> tokens = {row, 0.0, list, count};
        const int bits = bits_of_number(row.depth(row.u(from)));
        draw = draw_from<1>(row, tokens, known, bits, histogram);
      }
    } else {
      draw = draw_from<BLOCKS>(row, all, known, bits_of_number(row.depth(-kInfinity)), histogram);
      if (threadIdx.x == 0) share.winner = draw.winner;
      Blocks::sync();
      draw.winner = best_of<BLOCKS>(share);
    }
    if (first) write(args, n, row, draw.winner.id, static_cast<double>(draw.part) / kUnits);
    if (listed) return;
  }
  Blocks::sync();  // all have read from the others
}

template <int BLOCKS, class T>
constexpr auto kKernel = sample_kernel<kThreads, BLOCKS, T>;

}  // namespace

void sample(const SampleArgs& args, int device, void* stream) {
  constexpr int kBlocks = 8;  // of a long row, whatever the number of rows: bits depend on it
  const SampleRows& in = args.in;
  const std::string what =
      "sample: rows " + std::to_string(in.rows) + ", vocabulary " + std::to_string(in.vocabulary);
  if (in.vocabulary > INT32_MAX / 2)
    throw std::invalid_argument(what + ": expected a vocabulary of at most 2^30");
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceGuard guard(device);
  with_type(in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto split = kKernel<kBlocks, T>;
    if (in.vocabulary > kList && can_cluster(split, device))
      return launch_clusters(split, grid_of(in.rows * kBlocks, what), kBlocks, kThreads, queue,
                             args, what);
    kKernel<1, T><<<grid_of(in.rows, what), kThreads, 0, queue>>>(args);
    check_launch(what);
  });
}

}  // namespace rlhf::cuda
