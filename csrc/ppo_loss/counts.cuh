// How many tokens count, by all blocks of a launch; and what the losses' blocks share.
#pragma once

#include "ppo_loss/ppo_loss.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostBlocks = 1024;  // kernels/ppo_loss/_native.py allocates their sums
constexpr int64_t kPart = 4096;    // tokens of a row that are counted together; as _native.py

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

}  // namespace
}  // namespace rlhf::cuda
