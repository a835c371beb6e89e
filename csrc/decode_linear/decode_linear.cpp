// A linear layer for few rows on the CPU: each weight is read from memory once and multiplied with
// all rows. A library's product, made for many rows, reads weights at a fifth of the memory's speed
// here. In the lanes of a vector stand the rows, and outputs where the weight is transposed: no sum
// is over lanes.
//
// A sum runs over `size` in order, in blocks: a row has the same bits whatever rows stand beside
// it, on however many threads.
#include "decode_linear/decode_linear.h"

#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "common/tokens.h"

namespace rlhf::RLHF_ISA {
namespace {

constexpr int64_t kBlock = 256;     // terms that are added one by one, before the sum of the blocks
constexpr int64_t kLine = 16;       // floats of a cache line
constexpr int64_t kTurn = 1 << 15;  // weights of a thread's turn
constexpr int kOutputs = 8;         // chains of sums that hide the latency of an addition
constexpr int kSums = W == 16 ? 16 : 8;  // vectors of them that stay in registers

// For at most 8 rows: with AVX-512 a processor may do two of these in the time of one whole vector.
#if defined(__AVX512F__)
typedef float Narrow __attribute__((vector_size(32)));
using rlhf::RLHF_ISA::fma;
inline Narrow fma(Narrow a, Narrow b, Narrow c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef Vec Narrow;
#endif

template <class F>
constexpr int kLanes = sizeof(F) / sizeof(float);

// Adds weight[n, k] packed[k, :] to sums[n][:], for N rows of the weight and `size` columns of
// `stride`.
template <class F, int V, int N>
inline void add_block(const float* weight, int64_t stride, const float* packed, int64_t size,
                      F (&sums)[N][V]) {
  F block[N][V] = {};
  for (int64_t line = 0; line < size; line += kLine) {
    // The same columns of the next N rows.
    for (int n = 0; n < N; ++n) __builtin_prefetch(weight + (N + n) * stride + line);
    const int64_t end = std::min(line + kLine, size);
    for (int64_t k = line; k < end; ++k) {
      F x[V];
      for (int v = 0; v < V; ++v) std::memcpy(&x[v], packed + (k * V + v) * kLanes<F>, sizeof(F));
      for (int n = 0; n < N; ++n) {
        const F w = weight[n * stride + k] - F{};  // in every lane; x - 0 is x, whatever its sign
        for (int v = 0; v < V; ++v) block[n][v] = fma(w, x[v], block[n][v]);
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) sums[n][v] += block[n][v];
}

// Outputs [first, first + N) of `rows` rows.
template <class F, int V, int N>
void outputs(const DecodeLinearArgs& args, const float* packed, int64_t rows, int64_t first,
             float* out) {
  F sums[N][V] = {};
  const float* const weight = args.weight + first * args.size;
  for (int64_t k = 0; k < args.size; k += kBlock)
    add_block<F, V, N>(weight + k, args.size, packed + k * V * kLanes<F>,
                       std::min(kBlock, args.size - k), sums);
  for (int n = 0; n < N; ++n) {
    float lanes[V * kLanes<F>];
    std::memcpy(lanes, sums[n], sizeof lanes);
    for (int64_t m = 0; m < rows; ++m)
      out[m * args.outputs + first + n] = args.bias ? lanes[m] + args.bias[first + n] : lanes[m];
  }
}

// [size, width]: the rows side by side, zeros behind them.
std::unique_ptr<float[]> side_by_side(const float* x, int64_t rows, int64_t size, int64_t width) {
  std::unique_ptr<float[]> packed(new float[size * width]());
  for (int64_t k = 0; k < size; ++k)
    for (int64_t m = 0; m < rows; ++m) packed[k * width + m] = x[m * size + k];
  return packed;
}

// Up to V vectors of rows.
template <class F, int V>
void group(const DecodeLinearArgs& args, const float* x, int64_t rows, float* out) {
  constexpr int N = std::min(kOutputs, kSums / V);
  const auto packed = side_by_side(x, rows, args.size, V * kLanes<F>);
  const int64_t tiles = (args.outputs + N - 1) / N;
  const int64_t grain = std::max<int64_t>(1, kTurn / (args.size * N));
  parallel_for(tiles, grain, args.threads, [&](int64_t tile) {
    int64_t n = tile * N;
    if (n + N <= args.outputs) return outputs<F, V, N>(args, packed.get(), rows, n, out);
    for (; n < args.outputs; ++n) outputs<F, V, 1>(args, packed.get(), rows, n, out);
  });
}

// Up to V vectors of outputs from `first` on, for R rows of which `rows` exist.
template <int R, int V>
void transposed_outputs(const DecodeLinearArgs& args, const float* packed, int64_t rows,
                        int64_t first, float* out) {
  Vec sums[R][V] = {};
  int count[V];
  for (int v = 0; v < V; ++v)
    count[v] = static_cast<int>(std::clamp<int64_t>(args.outputs - first - v * W, 0, W));
  for (int64_t begin = 0; begin < args.size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, args.size);
    Vec block[R][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      const float* const weight = args.weight + k * args.outputs + first;
      Vec w[V];
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(weight + (V + v) * W, 0, 2);  // of the next outputs; not for L1
        w[v] = load_some(weight + v * W, count[v]);
      }
      for (int r = 0; r < R; ++r) {
        const Vec x = packed[k * R + r] - Vec{};
        for (int v = 0; v < V; ++v) block[r][v] = fma(x, w[v], block[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] += block[r][v];
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int v = 0; v < V; ++v) {
      const int64_t n = first + v * W;
      const Vec bias = args.bias ? load_some(args.bias + n, count[v]) : Vec{};
      store_some(out + m * args.outputs + n, args.bias ? sums[m][v] + bias : sums[m][v], count[v]);
    }
}

// Up to R rows.
template <int R>
void transposed_group(const DecodeLinearArgs& args, const float* x, int64_t rows, float* out) {
  constexpr int V = std::max(1, kSums / R);
  const auto packed = side_by_side(x, rows, args.size, R);
  const int64_t grain = std::max<int64_t>(1, kTurn / (args.size * V * W));
  parallel_for((args.outputs + V * W - 1) / (V * W), grain, args.threads, [&](int64_t tile) {
    transposed_outputs<R, V>(args, packed.get(), rows, tile * V * W, out);
  });
}

}  // namespace

void decode_linear(const DecodeLinearArgs& args) {
  // Many rows are bound by arithmetic: further groups read the weights again at no cost.
  const int64_t most = args.transposed ? kSums : 2 * W;
  for (int64_t m = 0; m < args.rows; m += most) {
    const int64_t rows = std::min(args.rows - m, most);
    const float* const x = args.x + m * args.size;
    float* const out = args.out + m * args.outputs;
    if (args.transposed && rows <= 4)
      transposed_group<4>(args, x, rows, out);
    else if (args.transposed && rows <= 8)
      transposed_group<8>(args, x, rows, out);
    else if (args.transposed)
      transposed_group<kSums>(args, x, rows, out);
    else if (rows <= kLanes<Narrow>)
      group<Narrow, 1>(args, x, rows, out);
    else if (rows <= W)
      group<Vec, 1>(args, x, rows, out);
    else
      group<Vec, 2>(args, x, rows, out);
  }
}

}  // namespace rlhf::RLHF_ISA
