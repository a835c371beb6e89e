// How the threads of a warp come by kItems neighbouring tokens of a row each, and give results
// back.
//
// Where rows are aligned, lanes read and write 16 bytes at a time; elsewhere neighbouring lanes
// take neighbouring numbers, and each gets its own through shared memory. The numbers are the same.
#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kItems = 8;  // of a thread
constexpr int kWarpItems = 32 * kItems;
constexpr int kStage = kWarpItems + 32;

// A warp's part of a row: lane l has the kItems tokens from first + kItems l on.
struct Span {
  int64_t first;  // may be added to any pointer
  int inside;     // tokens of the row; negative: none
  bool aligned;   // `first` and `inside` are multiples of kItems, pointers of 16 or kItems bytes
  float* stage;   // [kStage] in shared memory, the warp's own
};

// Lanes that read kItems neighbours each meet in no bank.
RLHF_HD int place(int k) { return k + k / kItems; }

// Bit i of the results is that of the thread's token i; 0 beyond the row.
RLHF_HD uint32_t inside_bits(const Span& span) {
  const int lane = threadIdx.x % 32;
  return (1u << ::max(0, ::min(kItems, span.inside - kItems * lane))) - 1u;
}

// Bytes that are not 0, as bits 0 to 3.
RLHF_HD uint32_t bits_of_bytes(uint32_t bytes) {
  return __vsetne4(bytes, 0u) * 0x01020408u >> 24 & 15u;  // bit 8 i goes to bit 24 + i
}

RLHF_HD uint32_t load_bits(const uint8_t* p, const Span& span) {
  const int lane = threadIdx.x % 32;
  if (span.aligned) {
    if (kItems * lane >= span.inside) return 0u;
    const auto bytes = *reinterpret_cast<const uint2*>(p + span.first + kItems * lane);
    return bits_of_bytes(bytes.x) | bits_of_bytes(bytes.y) << 4;
  }
  uint32_t own = 0u;  // lane i: tokens 32 i to 32 i + 31
#pragma unroll 4
  for (int i = 0; i < kItems; ++i) {
    const int k = 32 * i + lane;
    const uint32_t word = __ballot_sync(~0u, k < span.inside && p[span.first + k]);
    if (lane == i) own = word;
  }
  return __shfl_sync(~0u, own, lane / 4) >> kItems * (lane % 4) & 0xffu;
}

// 0 where `wanted` has no bit: what stands there is not looked at, and mostly not read.
RLHF_HD void load_items(const float* p, const Span& span, uint32_t wanted, float (&x)[kItems]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = 0.0f;
  if (span.aligned) {
    if (!wanted) return;
    const auto* const from = reinterpret_cast<const float4*>(p + span.first + kItems * lane);
    const float4 a = from[0], b = from[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else if (__any_sync(~0u, wanted != 0u)) {
#pragma unroll 4
    for (int i = 0; i < kItems; ++i) {
      const int k = 32 * i + lane;
      span.stage[place(k)] = k < span.inside ? p[span.first + k] : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kItems; ++i) x[i] = span.stage[place(kItems * lane) + i];
    __syncwarp();  // before the stage is written again
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] = wanted >> i & 1u ? x[i] : 0.0f;
}

// Called by whole warps.
RLHF_HD void store_items(float* p, const Span& span, const float (&x)[kItems]) {
  const int lane = threadIdx.x % 32;
  if (span.aligned) {
    // Two neighbours exchange halves, and write 32 bytes side by side.
    const bool odd = lane % 2;
    float first[4], second[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float got = __shfl_xor_sync(~0u, odd ? x[i] : x[4 + i], 1);
      first[i] = odd ? got : x[i];
      second[i] = odd ? x[4 + i] : got;
    }
    const int k = odd ? kItems * lane - 4 : kItems * lane;
    auto* const to = reinterpret_cast<float4*>(p + span.first + k);
    if (k < span.inside) to[0] = make_float4(first[0], first[1], first[2], first[3]);
    if (k + 8 < span.inside) to[2] = make_float4(second[0], second[1], second[2], second[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) span.stage[place(kItems * lane) + i] = x[i];
  __syncwarp();
#pragma unroll 4
  for (int i = 0; i < kItems; ++i) {
    const int k = 32 * i + lane;
    if (k < span.inside) p[span.first + k] = span.stage[place(k)];
  }
  __syncwarp();  // before the stage is written again
}

// Whether all of these addresses, 0 among them, are multiples of `bytes`.
template <class... Pointers>
RLHF_HD bool aligned_to(unsigned bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & (bytes - 1)) == 0;
}

}  // namespace
}  // namespace rlhf::cuda
