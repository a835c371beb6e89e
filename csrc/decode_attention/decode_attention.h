// Attention of one query token per slot over the slot's KV cache: arguments.
//
//   s_c = softcap(scale q . k_c),   out = sum_c exp(s_c) v_c / sum_c exp(s_c)
//
// over the slot's columns from max(0, length - window) to length - 1. Columns are cut into splits
// of kSplit at fixed places; what a split gives is merged in the order of the splits, so a row's
// bits depend on no other row, on no batch size and on no number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace rlhf {

struct DecodeAttentionArgs {
  const void* query;  // [slots, key_heads * group, size], dense
  const void* keys;   // [slots, key_heads, columns, size], the last axis dense
  const void* values;
  const int64_t* lengths;  // [slots], each in [0, columns]
  void* out;               // [slots, key_heads * group, size], dense
  Dtype dtype;             // of all of them
  int64_t slots, key_heads, group, columns, size;
  int64_t key_strides[3], value_strides[3];  // slot, head, column
  int64_t window;                            // 0: all columns
  float scale, softcap;                      // 0: no softcap
  int threads;
};

}  // namespace rlhf

RLHF_CPU_KERNEL(decode_attention, DecodeAttentionArgs)
