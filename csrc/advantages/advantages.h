// Rewards with a KL penalty, advantages of PPO and of groups, whitening: arguments.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace rlhf {

// Count, mean and sum of squared deviations of the numbers that count.
struct Moments {
  double count, mean, squares;
};

struct AdvantagesArgs {
  const float* scores;                 // [rows]
  const float *logprob, *ref_logprob;  // [rows, length], as all that follows
  const float* values;                 // null: rewards and kl alone
  const uint8_t* mask;                 // null: every token counts
  const int64_t* at;  // [rows]: the score's column; null: the last token that counts
  float *rewards, *kl;
  float *advantages, *returns;  // null without values
  int64_t rows, length;
  float kl_coef;
  int estimator;              // KlEstimator of ppo_loss/formulas.h
  float clamp_in, clamp_out;  // infinite: none
  float gamma, decay;         // decay = gamma lambda
  bool carry, whitened, unbiased;
  double eps;
  Moments* parts;  // [rows], or [8 rows] beyond 16384 tokens, where whitened; CUDA
  int threads;     // CPU
};

struct MomentsArgs {
  const float* x;       // [size]
  const uint8_t* mask;  // [size] or null
  Moments* out;         // [parts]
  int64_t size, parts;  // one part on the CPU
  int threads;          // CPU
};

struct WhitenArgs {
  const float* x;          // [size]
  const uint8_t* mask;     // [size] or null
  float* out;              // [size], may be x
  const Moments* moments;  // [parts]
  int64_t size, parts;     // one part on the CPU
  bool shift_mean, unbiased;
  double eps;
  int threads;  // CPU
};

enum class GroupKind : int { grpo = 0, dr_grpo = 1, rloo = 2 };

struct GroupArgs {
  const float* scores;  // [rows]
  const int64_t* ids;   // [rows]
  float* out;           // [rows]
  int64_t rows;
  GroupKind kind;
  double eps;
};

namespace cuda {
void advantages(const AdvantagesArgs& args, int device, void* stream);
void moments(const MomentsArgs& args, int device, void* stream);
void whiten(const WhitenArgs& args, int device, void* stream);
void group_advantages(const GroupArgs& args, int device, void* stream);
}  // namespace cuda

}  // namespace rlhf

RLHF_CPU_KERNEL(advantages, AdvantagesArgs)
RLHF_CPU_KERNEL(moments, MomentsArgs)
RLHF_CPU_KERNEL(whiten, WhitenArgs)
RLHF_CPU_KERNEL(group_advantages, GroupArgs)
