// What CUDA kernels share: arithmetic of a float, 16-byte loads at any alignment, sums of a block
// in a fixed order, launches that report their errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

#define RLHF_HD __device__ __forceinline__

namespace rlhf::RLHF_ISA {

// ------------------------------------------------------------------- numbers, as in vec.h

template <class F>
RLHF_HD F splat(float x) {
  return x;
}

RLHF_HD float max(float a, float b) { return a > b ? a : b; }
RLHF_HD float min(float a, float b) { return a < b ? a : b; }
RLHF_HD float abs(float x) { return fabsf(x); }
RLHF_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
RLHF_HD float times_power_of_2(float x, float, float shifted) {
  const float y = __uint_as_float(__float_as_uint(x) + (__float_as_uint(shifted) << 23));
  return x == x ? y : x;  // CUDA's NaN, 0x7fffffff, would become 3.4e38
}

// 2^x to 2 ulp in one instruction; results below 2^-126 are 0.
RLHF_HD float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to about 2^-22, absolutely where the result is small; -inf for 0.
RLHF_HD float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

RLHF_HD float fast_exp_negative(float x) { return fast_exp2(x * 1.4426950408889634f); }

// x, of which the compiler does not know that it is x: what is made of it is not kept in registers
// from one loop to the next.
RLHF_HD uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

RLHF_HD float to_float(float x) { return x; }
RLHF_HD float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
RLHF_HD float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

RLHF_HD void convert(float x, float& out) { out = x; }
RLHF_HD void convert(float x, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
RLHF_HD void convert(float x, Half& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }

// ------------------------------------------------------------------- 16 bytes at a time

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// A load that the compiler may move like __ldg's, but through the coherent cache: a gradient may be
// written over the logits that it was computed from.
RLHF_HD uint4 load_words(const uint4* p) {
  uint4 a;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
      : "l"(p));
  return a;
}

// 16 bytes from `p` in global memory, a multiple of sizeof(T) but not always of 16. An unaligned
// pack is cut out of the two aligned ones that it lies in, and no others are touched.
template <class T>
RLHF_HD Pack<T> load_pack(const T* p) {
  const uint32_t offset = reinterpret_cast<uintptr_t>(p) & 15u;
  const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(p) - offset);
  uint4 a = load_words(aligned);
  if (offset) {
    uint4 b = load_words(aligned + 1);
    // Words first, by 2 and by 1, then bytes: a register cannot be indexed.
    if (offset & 8u) {
      a = make_uint4(a.z, a.w, b.x, b.y);
      b = make_uint4(b.z, b.w, 0u, 0u);
    }
    if (offset & 4u) {
      a = make_uint4(a.y, a.z, a.w, b.x);
      b.x = b.y;
    }
    const uint32_t bits = 8u * (offset & 3u);
    a = make_uint4(__funnelshift_r(a.x, a.y, bits), __funnelshift_r(a.y, a.z, bits),
                   __funnelshift_r(a.z, a.w, bits), __funnelshift_r(a.w, b.x, bits));
  }
  Pack<T> pack;
  memcpy(&pack, &a, sizeof a);
  return pack;
}

// `p` is a multiple of 16.
template <class T>
RLHF_HD void store_pack(T* p, const Pack<T>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof words);
  *reinterpret_cast<uint4*>(p) = words;
}

// ------------------------------------------------------------------- a block

// Calls single(i) and many(i), the latter for `step` numbers i, i + 1, ... of which out + i is
// aligned to 16 bytes, so that together they cover [0, count); by all threads of a block. It goes
// from the end, which a forward pass before it read last.
template <class T, class Single, class Many>
RLHF_HD void cover_aligned(const T* out, int count, int step, Single single, Many many) {
  const int lead = (16 - reinterpret_cast<uintptr_t>(out) % 16) % 16 / sizeof(T);
  const int head = lead < count ? lead : count;
  const int steps = (count - head) / step, tail = head + steps * step;
  const int thread = static_cast<int>(threadIdx.x);
  const int alone = thread < head ? thread : tail + thread - head;
  if (alone < count) single(alone);
  for (int i = steps - 1 - thread; i >= 0; i -= static_cast<int>(blockDim.x)) many(head + i * step);
}

// Zeros, by all threads of a block.
template <class T>
RLHF_HD void store_zeros(T* out, int count) {
  cover_aligned(
      out, count, Pack<T>::kSize, [&](int i) { out[i] = T{}; },
      [&](int i) { store_pack(out + i, Pack<T>{}); });
}

// Called by all threads of a block; `shared` has room for 32 floats. Every thread gets the result.
// Between two calls with the same `shared` there is no barrier to add.
template <class Combine>
RLHF_HD float block_reduce(float x, float* shared, Combine combine) {
  for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_down_sync(~0u, x, d));
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) x = combine(x, shared[warp]);
  return x;
}

RLHF_HD float block_sum(float x, float* shared) {
  return block_reduce(x, shared, [](float a, float b) { return a + b; });
}

// NaN is passed over.
RLHF_HD float block_max(float x, float* shared) {
  return block_reduce(x, shared, [](float a, float b) { return fmaxf(a, b); });
}

// ------------------------------------------------------------------- host

// Makes a device current, and the one before it when the scope ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  static void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess)
      throw std::runtime_error(what + ": CUDA error: " + cudaGetErrorString(error));
  }

 private:
  int previous_ = 0;
};

// Right behind a launch; `what` names op and shapes. Nothing is waited for.
inline void check_launch(const std::string& what) { DeviceGuard::check(cudaGetLastError(), what); }

// One block per row.
inline unsigned grid_of(int64_t rows, const std::string& what) {
  if (rows > INT32_MAX)
    throw std::invalid_argument(what + ": expected at most 2^31 - 1 rows, got " +
                                std::to_string(rows));
  return static_cast<unsigned>(rows);
}

}  // namespace rlhf::RLHF_ISA
