// Attention of one query token per slot over the slot's KV cache: arguments.
//
//   s_c = softcap(scale q . k_c),   out = sum_c exp(s_c) v_c / sum_c exp(s_c)
//
// over the last `window` tokens of a slot: those of its prefix, which slots may share, and behind
// them its own. Either part is cut into splits of kSplit columns at fixed places; what a split
// gives is merged in the order of the splits, so a row's bits depend on no other row, on no batch
// size and on no number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace rlhf {

// Keys and values: [rows, key_heads, columns, size], the last axis dense.
struct KeyValues {
  const void *keys, *values;
  const int64_t* lengths;  // [slots], each in [0, columns]
  int64_t columns;
  int64_t key_strides[3], value_strides[3];  // row, head, column
};

struct DecodeAttentionArgs {
  const void* query;           // [slots, key_heads * group, size], dense
  void* out;                   // [slots, key_heads * group, size], dense
  Dtype dtype;                 // of all of them
  KeyValues prefix;            // of 0 columns: none
  const int64_t* prefix_rows;  // [slots]: which row of the prefix a slot has
  KeyValues own;               // a row per slot
  int64_t slots, key_heads, group, size;
  int64_t window;        // 0: all columns
  float scale, softcap;  // 0: no softcap
  int threads;
};

}  // namespace rlhf

RLHF_CPU_KERNEL(decode_attention, DecodeAttentionArgs)
