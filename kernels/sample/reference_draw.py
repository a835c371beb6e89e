"""The draw in plain PyTorch: an exponential race whose numbers are keyed on the token id.

The kept token with the smallest r wins, the lowest id on a tie (Gumbel's trick without the second
logarithm). With u the tempered logits and m their row's largest:

    r_v = -log1p(-x_v) / exp(u_v - m)                          in float64
    x_v = min(n_hi 2^-32 + (n_lo + 1/2) 2^-64, 1 - 2^-53)      in float64
    n_hi = words(0)[v & 3],  n_lo = words(1)[v & 3]
    words(c) = Philox4x32-10(counter = (v >> 2, position & (2^32 - 1), position >> 32, c),
                             key = (seed & (2^32 - 1), seed >> 32))

One call of Philox serves four neighbouring ids; seed and position are taken as unsigned 64-bit
numbers. x_v has the full resolution of a double near 0, where a race is won (a token of probability
1e-15 wins as often as it should), and a token's r does not depend on what else is kept. The integer
part is exact, and x_v is one correctly rounded sum of exact products, with or without fused
multiply-add. Implementations may thus differ in `log1p` and `exp` alone: they draw the same id
unless the two best r are within a few ulp of float64 of each other, one draw in about 1e15.

The high words alone bound r from below, which leaves one or two contenders of a whole vocabulary:
only these need their low words (and, in a kernel that bounds r in float32 with a margin, float64).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch

_LOW32 = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words from four counter and two key words, all in [0, 2**32).

    Words are int64 tensors that broadcast to each other; only those that are multiplied next need
    their upper half cleared. A product overflows int64, but its 64 bits are right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _LOW32, ((p0 >> 32) ^ c3 ^ k1) & _LOW32
        c1, c3 = p1, p0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1 & _LOW32, c2, c3 & _LOW32


def _words(group: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, half: int) -> tuple:
    """The high (`half` 0) or low (1) words of the ids 4 group to 4 group + 3."""
    tag = torch.full_like(position, half)
    counter = group, position & _LOW32, (position >> 32) & _LOW32, tag
    return philox(counter, (seed & _LOW32, (seed >> 32) & _LOW32))


def _exponential(high: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """Exponential numbers in float64 from two words each; without `low` a lower bound of them."""
    x = high.double() * 2.0**-32
    if low is not None:
        x = x + (low.double() + 0.5) * 2.0**-64
    # x rounds to 1 once in 2**54 draws; the token then loses, but it does not become impossible.
    return -torch.log1p(-x.clamp_(max=1 - 2.0**-53))


def exponentials(ids: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The exponential number of each token id; `seed` and `position` have the shape of `ids`."""
    place = (ids & 3).unsqueeze(0)
    high, low = (
        torch.stack(_words(ids >> 2, seed, position, half)).gather(0, place)[0] for half in (0, 1)
    )
    return _exponential(high, low)


def all_exponentials(
    vocabulary: int, seed: torch.Tensor, position: torch.Tensor, *, bound: bool = False
) -> torch.Tensor:
    """[N, V] exponential numbers of every id, or only their lower bounds by the high words."""
    group = torch.arange((vocabulary + 3) // 4, device=seed.device)
    words = [
        torch.stack(_words(group, seed.unsqueeze(-1), position.unsqueeze(-1), half), -1)
        .flatten(-2)[:, :vocabulary]
        for half in ((0,) if bound else (0, 1))
    ]  # fmt: skip
    return _exponential(words[0], None if bound else words[1])


def shifted(u: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """u - max, with rows that are all -inf left at -inf instead of NaN."""
    return u - torch.where(top == -torch.inf, 0.0, top)


def _contenders(
    u: torch.Tensor, top: torch.Tensor, kept: torch.Tensor, seed: torch.Tensor, position
) -> torch.Tensor:
    """The kept tokens that can still win when only their high words are known, as a mask."""
    e = shifted(u.double(), top.double()).exp()
    lower = all_exponentials(u.shape[-1], seed, position, bound=True) / e
    lower = torch.where(kept, lower, torch.inf)
    first = lower.argmin(-1)
    r = exponentials(first, seed, position).unsqueeze(-1) / e.gather(-1, first.unsqueeze(-1))
    return kept & (lower <= r * (1 + 1e-12))  # a margin for the rounding of log1p


def race(
    u: torch.Tensor, top: torch.Tensor, kept: torch.Tensor, seed: torch.Tensor, position
) -> torch.Tensor:
    """[N] ids of the winners among the kept tokens; -1 where nothing is kept."""
    rows, vocabulary = u.shape
    if u.is_cuda:  # without a list of tokens, whose length the host would have to wait for
        e = shifted(u.double(), top.double()).exp()
        r = torch.where(kept, all_exponentials(vocabulary, seed, position) / e, torch.inf)
        best = r.amin(-1, keepdim=True)
        ids = torch.arange(vocabulary, device=u.device)
        winner = torch.where(kept & (r == best), ids, vocabulary).amin(-1)
        return torch.where(winner == vocabulary, -1, winner)
    if 4 * int(kept.sum()) > kept.numel():
        kept = _contenders(u, top, kept, seed, position)
    row, ids = kept.nonzero(as_tuple=True)
    e = (u[row, ids].double() - top[row, 0].double()).exp()
    r = exponentials(ids, seed[row], position[row]) / e
    best = r.new_full((rows,), torch.inf).scatter_reduce(0, row, r, "amin")
    ids = torch.where(r == best[row], ids, vocabulary)
    winner = ids.new_full((rows,), vocabulary).scatter_reduce(0, row, ids, "amin")
    return torch.where(winner == vocabulary, -1, winner)
