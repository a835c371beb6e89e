// Elementary functions of one number F: a vector of floats on the CPU, a float in a CUDA thread.
//
// F needs +, -, *, /, comparisons, `mask ? a : b`, and splat, max, abs, fma and times_power_of_2.
#pragma once

#if defined(__CUDACC__)
#include "common/device.cuh"
#else
#include <cmath>

#include "common/vec.h"
#endif

namespace rlhf::RLHF_ISA {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;

// exp(x) for x <= 0 to 1 ulp; below -87 it stays at exp(-87) = 1.6e-38, NaN stays NaN.
template <class F>
RLHF_HD F exp_negative(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum's last bits are the nearest integer
  // ln 2 in two parts, the first with 9 trailing zeros: n * kLn2High is exact for |n| <= 126.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = max(splat<F>(-87.0f), x);
  const F shifted = fma(x, splat<F>(kLog2E), splat<F>(kRound));
  const F n = shifted - kRound;
  F r = fma(n, splat<F>(-kLn2High), x);
  r = fma(n, splat<F>(-kLn2Low), r);
  // The polynomial of degree 6 with the least relative error, 0.03 ulp, on |r| <= ln(2) / 2.
  F p = fma(r, splat<F>(1.38144670593e-3f), splat<F>(8.36878041118e-3f));
  p = fma(r, p, splat<F>(4.16683942109e-2f));
  p = fma(r, p, splat<F>(0.166665201078f));
  p = fma(r, p, splat<F>(0.499999934125f));
  p = fma(r, p, splat<F>(1.0f));
  p = fma(r, p, splat<F>(1.0f));
  return times_power_of_2(p, n, shifted);
}

#if !defined(__CUDACC__)
// The exponential where most are taken; on CUDA an instruction of 2 ulp (device.cuh).
inline Vec fast_exp_negative(Vec x) { return exp_negative(x); }
#endif

// exp(x) - 1 for x <= 0; a Taylor series where the difference would cancel.
template <class F>
RLHF_HD F expm1_negative(F x) {
  F series = fma(x, splat<F>(1.0f / 40320), splat<F>(1.0f / 5040));
  series = fma(x, series, splat<F>(1.0f / 720));
  series = fma(x, series, splat<F>(1.0f / 120));
  series = fma(x, series, splat<F>(1.0f / 24));
  series = fma(x, series, splat<F>(1.0f / 6));
  series = fma(x, series, splat<F>(0.5f));
  series = fma(x * x, series, x);
  return x > -0.5f ? series : exp_negative(x) - 1.0f;
}

template <class F>
struct Capped {
  F value, slope;
};

// cap * tanh(z / cap) and its derivative 1 - tanh^2; -inf stays -inf.
//
// With e = exp(-2 |z / cap|), tanh is 1 - 2 e / (1 + e), which cancels near 0; there the Taylor
// series up to y^15 serves, whose relative error at the switch is 1e-8. Errors of tanh come out
// multiplied by cap / temperature, so each step is good to about half an ulp.
template <class F>
RLHF_HD Capped<F> softcapped(F z, float cap) {
  const F y = z / splat<F>(cap);
  const F size = abs(y);
  const F e = exp_negative(size * -2.0f);
  const F above = e + 1.0f;
  F below = splat<F>(1.0f) / above;
  // One step of Newton towards 1 / (1 + e), with what the rounding of 1 + e lost.
  const F lost = e - (above - 1.0f);
  below = fma(below, fma(-below, above, splat<F>(1.0f)) - below * lost, below);
  const F square = y * y;
  F series = fma(square, splat<F>(-929569.0f / 638512875.0f), splat<F>(21844.0f / 6081075.0f));
  series = fma(square, series, splat<F>(-1382.0f / 155925.0f));
  series = fma(square, series, splat<F>(62.0f / 2835.0f));
  series = fma(square, series, splat<F>(-17.0f / 315.0f));
  series = fma(square, series, splat<F>(2.0f / 15.0f));
  series = fma(square, series, splat<F>(-1.0f / 3.0f));
  const F small = fma(y * square, series, y);
  const F large = fma(e * -2.0f, below, splat<F>(1.0f));
  const F tanh = size < 0.5f ? small : (y < 0.0f ? -large : large);
  return {z == -kInfinity ? z : tanh * cap, e * 4.0f * below * below};
}

#if !defined(__CUDACC__) && !defined(__FMA__)
// Without fused multiply-adds the steps above lose too much: number by number in double.
inline Capped<Vec> softcapped(Vec z, float cap) {
  Capped<Vec> out;
  for (int i = 0; i < W; ++i) {
    const double tanh = std::tanh(z[i] / static_cast<double>(cap));
    out.value[i] = z[i] == -kInfinity ? z[i] : static_cast<float>(cap * tanh);
    out.slope[i] = static_cast<float>(1.0 - tanh * tanh);
  }
  return out;
}
#endif

}  // namespace rlhf::RLHF_ISA
