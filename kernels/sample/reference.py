"""Sampling and replay in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
With z the logits (-inf where `logit_mask` forbids a token) and t the temperature:

    u = z / t,   m = max u,   e = exp(u - m)
    top-k    keeps u >= the k-th largest u, with all its ties
    top-p    removes a token if the mass of top-k's tokens at or below its rank is <= 1 - p
    min-p    keeps e >= min_p
    logprob  = u_y - m - log sum_kept e
    log_mass = log (sum_kept e / sum e)
    entropy  = log sum e - sum e (u - m) / sum e

Rank is by descending u, among equals by ascending id, and its first token always stays. What is
kept is therefore the beginning of the ranking, and two numbers per row say how far it goes:
`tau`, the smallest kept u, and `last`, the largest kept id among the tokens that have it.

Cuts by mass go by probabilities rounded to the arithmetic's type, summed in float64 and compared in
that type again, which is where Hugging Face's processors round: equal logits are then cut as there
(30 of them at p = 0.9 leave 28). With everything else in float64, implementations differ at most
where a number lies within 1e-15 of a midpoint between two floats. In float32:

    q_v = float32(e_v / sum e)                                         over top-k's tokens
    top-p removes v if float32(sum of q ranked at or below v) <= float32(1 - p), but not the first
    min-p keeps v if float32(e_v) >= float32(min_p)

u itself is the float32 quotient, correctly rounded. The draw is in reference_draw.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from rlhf_fast._args import compute_dtype

from .reference_draw import race, shifted

# Rows are taken in blocks of about this many logits: float64 copies of a block stay in the caches.
_BLOCK = 1 << 18
# The first attempt of top-p ranks this many tokens; a full sort of 50257 takes 10 times as long.
_HEAD = 1024


class _Settings(NamedTuple):
    """The parameters as columns [N, 1]; None for what is off in every row.

    Greedy rows have temperature 1 and `greedy` set.
    """

    temperature: torch.Tensor
    greedy: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None

    def rows(self, block: slice) -> _Settings:
        return _Settings(*(None if x is None else x[block] for x in self))


def _settings(
    logits: torch.Tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps
) -> _Settings:
    rows, vocabulary = logits.shape

    def column(value, values, dtype):
        if values is None:
            return logits.new_full((rows, 1), value, dtype=dtype)
        return values.reshape(rows, 1).to(dtype)

    no_k = top_ks is None and not 0 < top_k < vocabulary
    t = column(temperature, temperatures, compute_dtype(logits.dtype))
    greedy = t == 0 if temperatures is not None or temperature == 0 else None
    return _Settings(
        t if greedy is None else torch.where(greedy, 1.0, t),
        greedy,
        None if no_k else column(top_k, top_ks, torch.int64),
        None if top_ps is None and top_p == 1 else column(top_p, top_ps, torch.float64),
        None if min_ps is None and min_p == 0 else column(min_p, min_ps, torch.float64),
    )


def _blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _BLOCK // vocabulary)
    return (slice(start, start + step) for start in range(0, rows, step))


def _row_sums(x: torch.Tensor) -> torch.Tensor:
    """Row sums [N, 1]. A row alone would be split among threads: other bits than in a batch."""
    return x.sum(-1, keepdim=True) if len(x) != 1 else torch.cat((x, x)).sum(-1, keepdim=True)[:1]


def _tempered(z: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(u [N, V], its row maximum [N, 1]).

    Where a tiny temperature makes the largest quotient overflow, it becomes 0 instead.
    """
    top = z.amax(-1, keepdim=True)
    overflows = top.isfinite() & (top / t).isinf()
    u = (z - torch.where(overflows, top, 0.0)) / t
    return u, torch.where(overflows, 0.0, top / t)


def _unless(greedy: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x, and 0 in greedy rows."""
    return x if greedy is None else torch.where(greedy, 0.0, x)


def _kth_largest(u: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """[N, 1] the k-th largest u of each row; -inf where top-k is off."""
    vocabulary = u.shape[-1]
    off = (top_k == 0) | (top_k >= vocabulary)
    k = torch.where(off, 1, top_k)
    widest = vocabulary if u.is_cuda else int(k.max())  # on CUDA nothing is read by the host
    return torch.where(off, -torch.inf, u.topk(widest).values.gather(-1, k - 1))


def _ranked(u: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, ids) of the first `width` tokens by descending u, among equals by ascending id."""
    if width == u.shape[-1]:
        return u.sort(dim=-1, descending=True, stable=True)
    ids = u.topk(width, sorted=False).indices.sort(-1).values
    values, order = u.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


def _top_p(
    u: torch.Tensor, top: torch.Tensor, tau: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tau, last) after top-p among the tokens with u >= tau."""
    vocabulary = u.shape[-1]

    inside = (u >= tau) & (u > -torch.inf)
    e = shifted(u.double(), top.double()).exp()
    total = _row_sums(torch.where(inside, e, 0.0))
    whole = _row_sums(torch.where(inside, _rounded(e / total, u.dtype), 0.0))
    off, limit = top_p == 1, (1 - top_p).to(u.dtype)
    widest = vocabulary if u.is_cuda else int(inside.sum(-1).max())
    width = widest if u.is_cuda else min(widest, _HEAD)
    while True:
        values, ids = _ranked(u, width)
        q = _rounded(shifted(values.double(), top.double()).exp() / total, u.dtype)
        above = q.cumsum(-1) - q
        kept = (values >= tau) & ((whole - above).to(u.dtype) > limit)
        kept[:, 0] = True
        end = kept.sum(-1, keepdim=True) - 1
        cut = values.gather(-1, end)
        # A head is enough if every row's cut lies above its last value, which may have more ties.
        if width == widest or ((cut > values[:, -1:]) | off).all():
            last = torch.where(off, vocabulary - 1, ids.gather(-1, end))
            return torch.where(off, tau, cut), last
        width = widest


def _cut(
    u: torch.Tensor, top: torch.Tensor, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tau, last), both [N, 1]: token v is kept if u_v > tau, or u_v == tau and v <= last.

    Where nothing is cut, tau is -inf and last -1: all tokens but those at -inf are kept.
    """
    vocabulary = u.shape[-1]
    tau = torch.full_like(top, -torch.inf)
    if settings.top_k is not None:
        tau = _kth_largest(u, settings.top_k)
    last = torch.full_like(tau, vocabulary - 1, dtype=torch.int64)
    if settings.top_p is not None:
        tau, last = _top_p(u, top, tau, settings.top_p)
    if settings.min_p is not None:
        e = shifted(u.double(), top.double()).exp().to(u.dtype)
        floor = torch.where(e >= settings.min_p.to(u.dtype), u, torch.inf).amin(-1, keepdim=True)
        last = torch.where(floor > tau, vocabulary - 1, last)
        tau = torch.maximum(floor, tau)
    if settings.greedy is not None:
        tau = torch.where(settings.greedy, top, tau)
        last = torch.where(settings.greedy, u.argmax(-1, keepdim=True), last)
    return tau, torch.where(tau == -torch.inf, -1, last)


def _kept(u: torch.Tensor, tau: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(u.shape[-1], device=u.device)
    return (u > tau) | ((u == tau) & (ids <= last))


def _normalisers(e: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(sum e, log sum e, log sum_kept e, log of their quotient), each [N, 1], finite."""
    total, part = _row_sums(e), _row_sums(torch.where(kept, e, 0.0))
    total, part = (torch.where(s == 0, 1.0, s) for s in (total, part))  # a row of -inf alone
    return total, total.log(), part.log(), (part / total).log()


def _logprob(
    d: torch.Tensor, top: torch.Tensor, kept: torch.Tensor, log_kept: torch.Tensor, ids
) -> torch.Tensor:
    """[N, 1] log-probs of `ids`; -inf outside the kept set, NaN where the row has NaN or +inf."""
    y = ids.clamp(0, d.shape[-1] - 1)
    inside = kept.gather(-1, y) & (y == ids) | ~(top < torch.inf)
    return torch.where(inside, d.gather(-1, y) - log_kept, -torch.inf)


def sample(
    logits: torch.Tensor,
    logit_mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    top_k: int,
    top_ks: torch.Tensor | None,
    top_p: float,
    top_ps: torch.Tensor | None,
    min_p: float,
    min_ps: torch.Tensor | None,
    seed: int,
    seeds: torch.Tensor | None,
    position: int,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, logprob, log_mass, entropy), each [B]; -1, -inf, 0, 0 in a row without a token."""
    rows, vocabulary = logits.shape
    dtype = compute_dtype(logits.dtype)
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprob, log_mass, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    settings = _settings(
        logits, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps
    )
    seeds = torch.full_like(ids, seed) if seeds is None else seeds
    positions = torch.full_like(ids, position) if positions is None else positions
    for block in _blocks(rows, vocabulary):
        z, at = logits[block].to(dtype).contiguous(), settings.rows(block)
        if logit_mask is not None:
            z = torch.where(logit_mask[block], z, -torch.inf)
        u, top = _tempered(z, at.temperature)
        kept = _kept(u, *_cut(u, top, at))
        y = race(u, top, kept, seeds[block], positions[block])
        d = shifted(u, top)
        e = d.exp()
        total, log_sum, log_kept, log_ratio = _normalisers(e, kept)
        mean = _row_sums(torch.where(e == 0, 0.0, e * d)) / total
        ids[block] = y
        logprob[block] = _logprob(d, top, kept, log_kept, y.unsqueeze(-1)).squeeze(-1)
        log_mass[block] = _unless(at.greedy, log_ratio).squeeze(-1)
        entropy[block] = _unless(at.greedy, log_sum - mean).squeeze(-1)
    return ids, logprob, log_mass, entropy


def replay_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    temperatures: torch.Tensor | None,
    top_k: int,
    top_ks: torch.Tensor | None,
    top_p: float,
    top_ps: torch.Tensor | None,
    min_p: float,
    min_ps: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(logprob, log_mass, tau, last, log_kept, log_sum), each of the shape of `ids`.

    The last four are what the backward pass needs: the kept set, log sum_kept e and log sum e.
    """
    dtype = compute_dtype(logits.dtype)
    shape, vocabulary = ids.shape, logits.shape[-1]
    logits, ids = logits.reshape(-1, vocabulary), ids.reshape(-1, 1).to(torch.int64)
    rows = len(logits)
    logprob, log_mass, tau, log_kept, log_sum = (
        logits.new_empty((rows, 1), dtype=dtype) for _ in range(5)
    )
    last = logits.new_empty((rows, 1), dtype=torch.int64)
    settings = _settings(
        logits, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps
    )
    for block in _blocks(rows, vocabulary):
        at = settings.rows(block)
        u, top = _tempered(logits[block].to(dtype).contiguous(), at.temperature)
        tau[block], last[block] = _cut(u, top, at)
        kept = _kept(u, tau[block], last[block])
        d = shifted(u, top)
        _, log_sum[block], log_kept[block], log_ratio = _normalisers(d.exp(), kept)
        logprob[block] = _logprob(d, top, kept, log_kept[block], ids[block])
        log_mass[block] = _unless(at.greedy, log_ratio)
    return tuple(x.view(shape) for x in (logprob, log_mass, tau, last, log_kept, log_sum))


def replay_logprob_backward(
    grad_logprob: torch.Tensor,
    grad_log_mass: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    temperatures: torch.Tensor | None,
    tau: torch.Tensor,
    last: torch.Tensor,
    log_kept: torch.Tensor,
    log_sum: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the logits, in their dtype, with the kept set held fixed.

        d logprob  / du_j = [j = y] - q_j,   q = exp(u - m - log_kept) in the kept set, 0 outside
        d log_mass / du_j = q_j - p_j,       p = exp(u - m - log_sum)

    A log-prob of -inf, which no logit can change, has no gradient. At j = y the factor 1 - q_y is
    -expm1(logprob), which does not cancel when q_y is close to 1.
    """
    dtype = compute_dtype(logits.dtype)
    shape, vocabulary = logits.shape, logits.shape[-1]
    logits = logits.reshape(-1, vocabulary)
    columns = (grad_logprob, grad_log_mass, ids.to(torch.int64), tau, last, log_kept, log_sum)
    columns = [x.reshape(-1, 1) for x in columns]
    settings = _settings(logits, temperature, temperatures, 0, None, 1.0, None, 0.0, None)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for block in _blocks(len(logits), vocabulary):
        g, h, y, cut, end, part, whole = (x[block] for x in columns)
        at = settings.rows(block)
        u, top = _tempered(logits[block].to(dtype).contiguous(), at.temperature)
        kept, d = _kept(u, cut, end), shifted(u, top)
        logprob = _logprob(d, top, kept, part, y)
        g = torch.where(logprob == -torch.inf, 0.0, g)
        q = torch.where(kept, (d - part).exp(), 0.0)
        y = y.clamp(0, vocabulary - 1)
        du = torch.scatter(-g * q, -1, y, -g * torch.expm1(logprob))
        du = du + _unless(at.greedy, h) * (q - (d - whole).exp())
        grad[block] = du / at.temperature
    return grad.view(shape)
