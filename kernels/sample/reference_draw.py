"""The draw in plain PyTorch: an exponential race whose numbers are keyed on the token id.

The kept token with the smallest r wins, the lowest id on a tie (Gumbel's trick without the second
logarithm). With u the tempered logits and m their row's largest:

    r_v = -log1p(-x_v) / exp(u_v - m)                          in float64
    x_v = min(n_hi 2^-32 + (n_lo + 1/2) 2^-64, 1 - 2^-53)      in float64
    n_lo, n_hi = words[2 (v & 1)], words[2 (v & 1) + 1]
    words = Philox4x32-10(counter = (v >> 1, position & (2^32 - 1), position >> 32, 0),
                          key = (seed & (2^32 - 1), seed >> 32))

One call of Philox serves two neighbouring ids; seed and position are taken as unsigned 64-bit
numbers. x_v has the full resolution of a double near 0, where a race is won (a token of probability
1e-15 wins as often as it should), and a token's r does not depend on what else is kept. The integer
part is exact, and x_v is one correctly rounded sum of exact products, with or without fused
multiply-add. Implementations may thus differ in `log1p` and `exp` alone: they draw the same id
unless the two best r are within a few ulp of float64 of each other, one draw in about 1e15. A
kernel may screen in float32 with a margin, as long as float64 decides among what remains.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch

_LOW32 = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four words from four counter and two key words, all in [0, 2**32).

    Words are int64 tensors that broadcast to each other. A product of two words overflows int64,
    but its 64 bits are right, and the masks take out what sign extension does to the upper half.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) & _LOW32) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _LOW32) ^ c3 ^ k1
        c1, c3 = p1 & _LOW32, p0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def _words(pair: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> tuple:
    """Philox's four words for the ids 2 pair and 2 pair + 1."""
    zero = torch.zeros_like(position)
    counter = pair, position & _LOW32, (position >> 32) & _LOW32, zero
    return philox(counter, (seed & _LOW32, (seed >> 32) & _LOW32))


def _exponential(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Exponential numbers in float64 from two words each."""
    x = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    # x rounds to 1 once in 2**54 draws; the token then loses, but it does not become impossible.
    return -torch.log1p(-x.clamp_(max=1 - 2.0**-53))


def exponentials(ids: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The exponential number of each token id; `seed` and `position` have the shape of `ids`."""
    w0, w1, w2, w3 = _words(ids >> 1, seed, position)
    odd = (ids & 1) != 0
    return _exponential(torch.where(odd, w2, w0), torch.where(odd, w3, w1))


def _all_exponentials(vocabulary: int, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[N, V] exponential numbers of every id, with one call of Philox per two of them."""
    pair = torch.arange((vocabulary + 1) // 2, device=seed.device)
    w0, w1, w2, w3 = _words(pair, seed.unsqueeze(-1), position.unsqueeze(-1))
    low, high = (torch.stack(pairs, -1).flatten(-2) for pairs in ((w0, w2), (w1, w3)))
    return _exponential(low[:, :vocabulary], high[:, :vocabulary])


def shifted(u: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """u - max, with rows that are all -inf left at -inf instead of NaN."""
    return u - torch.where(top == -torch.inf, 0.0, top)


def race(
    u: torch.Tensor, top: torch.Tensor, kept: torch.Tensor, seed: torch.Tensor, position
) -> torch.Tensor:
    """[N] ids of the winners among the kept tokens; -1 where nothing is kept."""
    rows, vocabulary = u.shape
    # Only the kept tokens need a number. On CUDA their count is not known without a sync, and
    # where most are kept all of them are cheaper than an index.
    if u.is_cuda or 2 * int(kept.sum()) > kept.numel():
        e = shifted(u.double(), top.double()).exp()
        r = torch.where(kept, _all_exponentials(vocabulary, seed, position) / e, torch.inf)
        best = r.amin(-1, keepdim=True)
        ids = torch.arange(vocabulary, device=u.device)
        winner = torch.where(kept & (r == best), ids, vocabulary).amin(-1)
    else:
        row, ids = kept.nonzero(as_tuple=True)
        e = (u[row, ids].double() - top[row, 0].double()).exp()
        r = exponentials(ids, seed[row], position[row]) / e
        best = r.new_full((rows,), torch.inf).scatter_reduce(0, row, r, "amin")
        ids = torch.where(r == best[row], ids, vocabulary)
        winner = ids.new_full((rows,), vocabulary).scatter_reduce(0, row, ids, "amin")
    return torch.where(winner == vocabulary, -1, winner)
