"""Token log-probability and entropy in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
With z the logits, c the softcap, t the temperature and y the id:

    x = c tanh(z / c)              (-inf stays -inf)
    m = max x,  u = (x - m) / t,  s = log sum exp(u),  p = exp(u - s)
    logprob = u_y - s
    entropy = s - sum p u
    d logprob / du_j = [j = y] - p_j
    d entropy / du_j = -p_j (u_j - (s - entropy))
"""

from __future__ import annotations

import torch

from rlhf_fast._args import compute_dtype


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits in the arithmetic's dtype after the softcap."""
    z = logits.to(compute_dtype(logits.dtype))
    if softcap is None:
        return z
    return torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))


def live_tokens(ids: torch.Tensor, mask: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """True where a token counts."""
    live = ids != ignore_index
    return live if mask is None else live & mask


def _clean(
    logits: torch.Tensor,
    live: torch.Tensor,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """(capped logits, temperature) with 0 and 1 in the rows that do not count."""
    z = capped(torch.where(live.unsqueeze(-1), logits, logits.new_zeros(())), softcap)
    if temperatures is None:
        return z, temperature
    return z, torch.where(live, temperatures, 1.0).unsqueeze(-1)


def shifted(
    z: torch.Tensor, row_max: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """(z - max) / t, with rows that are all -inf left at -inf instead of NaN.

    In this order an offset of the row costs no digits: z / t - max / t would lose those of max / t.
    """
    return (z - torch.where(row_max == -torch.inf, 0.0, row_max).unsqueeze(-1)) / temperature


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, with the same bits for a row alone and inside a batch.

    torch shares the sum of one row among its threads where that row is all there is and has 32768
    elements or more, and never splits one of two rows. The order also follows the strides.
    """
    if x.shape[:-1].numel() != 1:
        return x.contiguous().sum(-1)
    return x.reshape(1, -1).expand(2, -1).sum(-1)[0].view(x.shape[:-1])


def logprob_entropy(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, row_max, log_sum), each of the shape of `ids`; 0 where masked."""
    live = live_tokens(ids, mask, ignore_index)
    z, t = _clean(logits, live, temperature, temperatures, softcap)
    row_max = z.amax(-1)
    u = shifted(z, row_max, t)
    e = u.exp()
    total = row_sum(e)
    empty = total == 0
    log_sum = torch.where(empty, 0.0, total.log())
    weighted = row_sum(torch.where(e == 0, 0.0, e * u)) / torch.where(empty, 1.0, total)
    y = torch.where(live, ids, 0).to(torch.int64).unsqueeze(-1)
    logprob = u.gather(-1, y).squeeze(-1) - log_sum
    zero = torch.zeros_like(log_sum)
    values = (logprob, torch.where(empty, zero, log_sum - weighted), row_max, log_sum)
    return tuple(torch.where(live, value, zero) for value in values)


def logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, row_max, log_sum), each of the shape of `ids`; 0 where a token is masked."""
    lp, _, row_max, log_sum = logprob_entropy(
        logits, ids, mask, temperature, temperatures, softcap, ignore_index
    )
    return lp, row_max, log_sum


def logprob_backward(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the logits, in their dtype.

    A token whose logit is -inf has log-prob -inf, which no logit can change: its gradient is 0.
    At j = y the factor 1 - p_y is -expm1(logprob), which does not cancel when p_y is close to 1.
    """
    live = live_tokens(ids, mask, ignore_index)
    z, t = _clean(logits, live, temperature, temperatures, softcap)
    u = shifted(z, row_max, t)
    p = (u - log_sum.unsqueeze(-1)).exp()
    y = torch.where(live, ids, 0).to(torch.int64).unsqueeze(-1)
    logprob_y = u.gather(-1, y) - log_sum.unsqueeze(-1)
    g = torch.where(live, grad_logprob, 0.0).unsqueeze(-1)
    g = torch.where(logprob_y == -torch.inf, 0.0, g)
    du = torch.scatter(-g * p, -1, y, -g * torch.expm1(logprob_y))
    if grad_entropy is not None:
        h = torch.where(live, grad_entropy, 0.0).unsqueeze(-1)
        mean = (log_sum - entropy).unsqueeze(-1)
        du = du - h * torch.where(p == 0, 0.0, p * (u - mean))
    if softcap is not None:
        z = torch.where(live.unsqueeze(-1), logits, logits.new_zeros(())).to(du.dtype)
        du = du * (1 - torch.tanh(z / softcap) ** 2)
    return torch.where(live.unsqueeze(-1), du / t, 0.0).to(logits.dtype).contiguous()


def logprob_entropy_and_grad(
    logits: torch.Tensor,
    ids: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, gradient of the logits in their dtype), as the two functions above."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    logprob, entropy, *saved = logprob_entropy(logits, ids, *options)
    grad = logprob_backward(grad_logprob, grad_entropy, logits, ids, *options, *saved, entropy)
    return logprob, entropy, grad


def logprob_entropy_and_grad_inplace(
    logits: torch.Tensor,
    ids: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob, entropy); the gradient replaces the logits."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    logprob, entropy, grad = logprob_entropy_and_grad(
        logits, ids, grad_logprob, grad_entropy, *options
    )
    logits.copy_(grad)
    return logprob, entropy
