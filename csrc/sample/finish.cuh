// The kept set of a row on CUDA, and the draw from it, without sorting: edges are found by radix
// selection, over tokens for top-k, over their mass for top-p, over ids among the last equals.
#pragma once

#include "sample/race.cuh"

namespace rlhf::cuda {
namespace {

// Where the kept set ends: a token stays if it lies less than `depth` below the largest u, or just
// as far and has no higher id than `last`.
struct Cut {
  uint32_t depth = ~0u;
  int last = INT32_MAX;

  RLHF_HD bool keeps(uint32_t at, int id) const {
    return at < depth || (at == depth && id <= last);
  }
};

// Probabilities among some tokens, rounded to float: 1 / sum e, and the sum of what was rounded.
struct Masses {
  double rate;
  uint64_t whole;
};

RLHF_HD int bits_of_number(uint32_t x) { return x ? 32 - __clz(x) : 1; }

// Of the tokens that `cut` keeps.
template <int BLOCKS, class T, class Tokens>
RLHF_HD Masses masses_of(const Row<T>& row, Tokens& tokens, const Cut& cut) {
  uint64_t total = 0, whole = 0;
  tokens.each([&](float, float u, int, int) {
    if (row.depth(u) <= cut.depth) total += Row<T>::weight_of(row.e(u));
  });
  tokens.rate = kUnits / static_cast<double>(sum_team<BLOCKS>(total));
  tokens.each([&](float, float u, int, int place) {
    if (row.depth(u) > cut.depth) return;
    const float q = static_cast<float>(row.e(u) * tokens.rate);
    tokens.keep(place, q);
    whole += Row<T>::mass_of(q);
  });
  return {tokens.rate, sum_team<BLOCKS>(whole)};
}

// Whether top-p keeps a token with the mass `before` above it; the first one always.
template <class T>
RLHF_HD bool stays(const Row<T>& row, const Masses& masses, uint64_t before) {
  const float limit = static_cast<float>(1.0 - row.s.top_p);
  return before == 0 || static_cast<float>(masses.whole - before) * 0x1p-62f > limit;
}

// Top-p among the tokens that `cut` keeps, which has all of its last equals.
template <int BLOCKS, class T, class Tokens>
RLHF_HD Cut nucleus(const Row<T>& row, const Tokens& tokens, const Masses& masses, const Cut& cut,
                    int bits, Histogram& histogram) {
  const auto kept = [&](uint64_t before) { return stays(row, masses, before); };
  const Edge edge = select<BLOCKS>(
      histogram, bits,
      [&](const auto& add) {
        tokens.each([&](float, float u, int, int place) {
          const uint32_t depth = row.depth(u);
          if (depth <= cut.depth) add(depth, Row<T>::mass_of(tokens.q(place, u)));
        });
      },
      kept);
  // The last equals: as many as stay, the lowest ids first.
  uint64_t equals = 0;
  tokens.each([&](float, float u, int, int) { equals += row.depth(u) == edge.key ? 1 : 0; });
  equals = sum_team<BLOCKS>(equals);
  const uint64_t each =
      Row<T>::mass_of(static_cast<float>(row.e(row.at_depth(edge.key)) * masses.rate));
  uint64_t few = 1, many = equals;  // `few` stay; more than `many` do not
  while (few < many) {
    const uint64_t middle = (few + many + 1) / 2;
    if (kept(edge.before + (middle - 1) * each))
      few = middle;
    else
      many = middle - 1;
  }
  if (few == equals) return {edge.key, INT32_MAX};
  const Edge last = select<BLOCKS>(
      histogram, bits_of_number(row.vocabulary),
      [&](const auto& add) {
        tokens.each([&](float, float u, int id, int) {
          if (row.depth(u) == edge.key) add(id, 1);
        });
      },
      [&](uint64_t before) { return before < few; });
  return {edge.key, static_cast<int>(last.key)};
}

// What the kept set comes to.
struct Draw {
  uint64_t part;  // the sum of e, in units of 1 / kUnits
  Winner winner;  // of this block
};

// `bits`: of the largest depth. `known`: the masses of all tokens, for top-p without top-k.
template <int BLOCKS, class T, class Tokens>
RLHF_HD Draw draw_from(const Row<T>& row, Tokens& tokens, const Masses& known, int bits,
                       Histogram& histogram) {
  const RowSettings& s = row.s;
  Cut cut;
  if (s.top_k > 0)
    cut.depth = select<BLOCKS>(
                    histogram, bits,
                    [&](const auto& add) {
                      tokens.each([&](float, float u, int, int) { add(row.depth(u), 1); });
                    },
                    [&](uint64_t before) { return before < static_cast<uint64_t>(s.top_k); })
                    .key;
  if (s.top_p < 1.0) {
    Masses masses = known;
    if (s.top_k > 0) {
      masses = masses_of<BLOCKS>(row, tokens, cut);
    } else {
      tokens.rate = known.rate;
      tokens.each([&](float, float u, int, int place) {
        tokens.keep(place, static_cast<float>(row.e(u) * known.rate));
      });
    }
    cut = nucleus<BLOCKS>(row, tokens, masses, cut, bits, histogram);
  }
  const float min_p = static_cast<float>(s.min_p);
  const double log_min_p = min_p > 0.0f ? log(static_cast<double>(min_p)) : 0.0;
  const auto kept = [&](float u, int id) {
    return cut.keeps(row.depth(u), id) && (min_p == 0.0f || is_likely(row.d(u), min_p, log_min_p));
  };
  Draw draw = {};
  Contender own;
  const auto score = [&](float z, int id) {
    return score_of((z - row.top) * row.rate2, high_word(row.key, id));
  };
  tokens.each([&](float z, float u, int id, int) {
    if (!kept(u, id)) return;
    draw.part += Row<T>::weight_of(row.e_of(z));
    own.offer(score(z, id), id);
  });
  draw.part = sum_team<BLOCKS>(draw.part);
  draw.winner = settle_block(row, own, 0.0f, [&](const auto& f) {
    tokens.each([&](float z, float u, int id, int) {
      if (kept(u, id)) f(u, id, score(z, id));
    });
  });
  return draw;
}

// The same for a list of no more tokens than threads: each compares its own one with all others, so
// that the definition is computed as it stands, with few barriers.
template <class T>
RLHF_HD Draw draw_from_few(const Row<T>& row, List& list, int count, const Masses& known) {
  __shared__ uint32_t depths[kThreads];
  __shared__ uint64_t masses[kThreads];
  const RowSettings& s = row.s;
  const int i = threadIdx.x;
  const bool there = i < count;
  const float z = there ? list.z[i] : row.top, u = there ? row.u(z) : row.top_u;
  const int id = there ? list.id[i] : 0;
  const uint32_t depth = row.depth(u);
  bool kept = there && u > -kInfinity;
  depths[i] = kept ? depth : ~0u;
  __syncthreads();
  if (s.top_k > 0 && kept) {
    int before = 0;
    for (int j = 0; j < count; ++j) before += depths[j] < depth ? 1 : 0;
    kept = before < s.top_k;
  }
  const double e = kept ? row.e(u) : 0.0;
  if (s.top_p < 1.0) {
    Masses all = known;
    if (s.top_k > 0) all.rate = kUnits / static_cast<double>(sum_block(Row<T>::weight_of(e)));
    const uint64_t mass = kept ? Row<T>::mass_of(static_cast<float>(e * all.rate)) : 0;
    if (s.top_k > 0) all.whole = sum_block(mass);
    masses[i] = mass;
    __syncthreads();
    if (kept) {
      uint64_t before = 0;
      for (int j = 0; j < count; ++j)
        if (depths[j] < depth || (depths[j] == depth && list.id[j] < id)) before += masses[j];
      kept = stays(row, all, before);
    }
  }
  kept = kept && static_cast<float>(e) >= static_cast<float>(s.min_p);
  Draw draw;
  draw.part = sum_block(kept ? Row<T>::weight_of(row.e_of(z)) : uint64_t{0});
  Winner mine = {kInfinity, -1};
  if (kept) settle(row, u, id, mine);
  draw.winner = best_in_block(mine);
  return draw;
}

}  // namespace
}  // namespace rlhf::cuda
