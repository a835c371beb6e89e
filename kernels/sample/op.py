"""Seeded sampling from logits and its differentiable twin: checks, schemas, fakes, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch

from ._checks import check_logits

_dispatch.implementations("sample", __package__)
_dispatch.implementations(
    "replay_logprob", __package__, cuda="there is none; on a GPU triton serves it"
)

_TEMPERATURE = "float temperature, Tensor? temperatures"
_PARAMETERS = (
    f"{_TEMPERATURE}, int top_k, Tensor? top_ks, float top_p, Tensor? top_ps, float min_p, "
    "Tensor? min_ps"
)
_SEED_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
               torch.uint32, torch.uint64)  # fmt: skip


class Sample(NamedTuple):
    """What `sample` returns; all `[B]`, log-probs and entropy in nats."""

    ids: torch.Tensor
    logprob: torch.Tensor
    log_mass: torch.Tensor
    entropy: torch.Tensor


def _fake_sample(logits, *_):
    rows = logits.new_empty(logits.shape[:1], dtype=_args.compute_dtype(logits.dtype))
    ids = torch.empty_like(rows, dtype=torch.int64)
    return ids, rows, torch.empty_like(rows), torch.empty_like(rows)


def _fake_replay(logits, ids, *_):
    def row(dtype):
        return logits.new_empty(ids.shape, dtype=dtype)

    dtype = _args.compute_dtype(logits.dtype)
    return row(dtype), row(dtype), row(dtype), row(torch.int64), row(dtype), row(dtype)


def _fake_backward(grad_logprob, grad_log_mass, logits, *_):
    return logits.new_empty(logits.shape)


def _refuse(name: str, values: torch.Tensor | None, good, expected: str) -> None:
    """Raise if a parameter tensor has a value for which `good` is not true."""
    if values is not None and not (fine := good(values)).all():
        raise ValueError(f"{name}: expected {expected}, got {values[~fine][0].item()}")


def _check_parameters(temperatures, top_ks, top_ps, min_ps) -> None:
    _refuse("temperature", temperatures, lambda x: (x >= 0) & x.isfinite(), "finite values >= 0")
    _refuse("top_k", top_ks, lambda x: x >= 0, "values >= 0")
    _refuse("top_p", top_ps, lambda x: (x > 0) & (x <= 1), "values in ]0, 1]")
    _refuse("min_p", min_ps, lambda x: (x >= 0) & (x <= 1), "values in [0, 1]")


def _check_sample(
    logits, mask, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps, *rest
) -> None:
    _check_parameters(temperatures, top_ks, top_ps, min_ps)
    # The CPU kernel looks itself, in the one pass that it makes.
    served = _dispatch.choose("sample", logits.device.type, logits.dtype, rest[-1])
    if logits.is_cuda or not served.__module__.endswith("._native"):
        check_logits(logits, mask)


def _check_replay(
    logits, ids, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps, backend
) -> None:
    _check_parameters(temperatures, top_ks, top_ps, min_ps)
    vocabulary = logits.shape[-1]
    bad = (ids < 0) | (ids >= vocabulary)
    if bad.any():
        value = int(ids[bad][0])
        raise IndexError(f"ids: expected values in [0, {vocabulary}), got {value}")


_dispatch.define(
    "sample",
    f"sample(Tensor logits, Tensor? logit_mask, {_PARAMETERS}, int seed, Tensor? seeds, "
    "int position, Tensor? positions, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_sample,
    check=_check_sample,
)
_dispatch.define(
    "replay_logprob",
    f"replay_logprob(Tensor logits, Tensor ids, {_PARAMETERS}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_replay,
    check=_check_replay,
)
_dispatch.define(
    "replay_logprob",
    "replay_logprob_backward(Tensor grad_logprob, Tensor grad_log_mass, Tensor logits, Tensor ids, "
    f"{_TEMPERATURE}, Tensor tau, Tensor last, Tensor log_kept, Tensor log_sum, str backend) "
    "-> Tensor",
    fake=_fake_backward,
    dtype_of=2,
)
_dispatch.once_differentiable("replay_logprob_backward")


def _setup_replay(ctx, inputs, output) -> None:
    logits, ids, temperature, temperatures, *_, backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, ids, temperatures, *output[2:])
    ctx.scalars = temperature, backend


def _backward_replay(ctx, grad_logprob, grad_log_mass, *_):
    logits, ids, temperatures, *stats = ctx.saved_tensors
    temperature, backend = ctx.scalars
    grad = torch.ops.rlhf_fast.replay_logprob_backward(
        grad_logprob, grad_log_mass, logits, ids, temperature, temperatures, *stats, backend
    )
    return grad, *(None,) * 10


_dispatch.differentiable("replay_logprob", setup_context=_setup_replay, backward=_backward_replay)


def _per_row(name: str, x: torch.Tensor, rows: Sequence[int], like, broadcast: bool):
    """A parameter tensor of shape `rows` (or, with `broadcast`, one that expands to it)."""
    if broadcast:
        leading = (1,) * (len(rows) - x.ndim) + tuple(x.shape)
        fits = len(leading) == len(rows) and all(
            a in (1, b) for a, b in zip(leading, rows, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name}: expected a shape that broadcasts to {tuple(rows)} (that of ids), "
                f"got {tuple(x.shape)}"
            )
    else:
        _args.check_shape(name, x, rows, "one per row of logits")
    if x.ndim > 0:
        _args.check_device(name, x, like.device, "logits")
    return x.detach().to(like.device).expand(rows)


def _numbers(name, value, rows, like, broadcast, dtype, default, **bounds):
    """Split a parameter into (number, None) or (default, contiguous tensor of shape `rows`)."""
    if not isinstance(value, torch.Tensor):
        return _args.number(name, value, **bounds), None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected numbers, got {str(value.dtype)[6:]}")
    return default, _per_row(name, value, rows, like, broadcast).to(dtype).contiguous()


def _top_k(value, rows, like, broadcast):
    """Split `top_k` into (number, None) or (0, contiguous int64 tensor of shape `rows`)."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _SEED_TYPES:
            raise TypeError(f"top_k: expected integers, got {str(value.dtype)[6:]}")
        return 0, _per_row("top_k", value, rows, like, broadcast).to(torch.int64).contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"top_k: expected an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"top_k: expected an integer >= 0, got {value}")
    return min(value, 2**31 - 1), None


def _parameters(temperature, top_k, top_p, min_p, rows, like, broadcast) -> tuple:
    """The eight arguments of the torch ops that hold the parameters.

    Probabilities stay in float64, so that a number and a tensor of it cut alike.
    """
    dtype, double = _args.compute_dtype(like.dtype), torch.float64
    where = rows, like, broadcast
    return (
        *_numbers("temperature", temperature, *where, dtype, 1.0, low=0.0),
        *_top_k(top_k, *where),
        *_numbers("top_p", top_p, *where, double, 1.0, low=0.0, high=1.0, exclusive_low=True),
        *_numbers("min_p", min_p, *where, double, 0.0, low=0.0, high=1.0),
    )


def _counter(name: str, value: int | torch.Tensor, rows: int, like) -> tuple:
    """Split `seed` or `position` into (number, None) or (0, int64 tensor [B]), 64 bits as they are.

    Numbers from -2**63 up to 2**64 - 1 are taken modulo 2**64.
    """
    if isinstance(value, torch.Tensor):
        if value.dtype not in _SEED_TYPES:
            raise TypeError(f"{name}: expected integers, got {str(value.dtype)[6:]}")
        value = _per_row(name, value, (rows,), like, False).contiguous()
        same_bits = value.dtype in (torch.int64, torch.uint64)
        return 0, value.view(torch.int64) if same_bits else value.to(torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer or a tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: expected a number of 64 bits, got {value}")
    return value - 2**64 if value >= 2**63 else value, None


def _check_logits(logits: torch.Tensor) -> None:
    _args.check_float_tensor("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")


def sample(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor,
    position: int | torch.Tensor,
    logit_mask: torch.Tensor | None = None,
) -> Sample:
    """Draw one token per row of logits, with its log-prob under the distribution it came from.

        p        = softmax(logits / temperature)     over the tokens that `logit_mask` allows
        K        = top-k, then top-p of what is left, then min-p of what is left
        ids      ~ q,   q_v = p_v / sum_K p for v in K, 0 elsewhere
        logprob  = log q_ids,   log_mass = log sum_K p,   entropy = -sum_v p_v log p_v

    so that `logprob + log_mass` is the tempered log-prob over all allowed tokens. The filters are
    those of Hugging Face's processors in their order: top-k keeps all ties of the k-th logit;
    top-p keeps the smallest set of top-k's renormalised distribution whose mass reaches p, at
    least one token, and among equal logits at its edge the lowest ids; min-p keeps what has at
    least min_p times the probability of the likeliest token.

    The draw depends on (the row's logits, seed, position) alone, not on the batch, the slot, the
    device or the backend: the token v in K with the smallest E_v / p_v wins, where the exponential
    number E_v comes from Philox4x32-10 keyed on (seed, position, v). `reference_draw.py` beside
    this file lays down the bits. Sources: Salmon et al., "Parallel random numbers: as easy as 1,
    2, 3", 2011; Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p);
    Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.

    Args:
        logits: `[B, V]` float64, float32, float16 or bfloat16, of any strides; -inf is legal.
        temperature: a number >= 0 or `[B]`; 0 is greedy: the largest logit, the lowest id on a tie.
        top_k: an integer >= 0 or `[B]`; 0 and anything >= V are off.
        top_p: a number in ]0, 1] or `[B]`; 1 is off.
        min_p: a number in [0, 1] or `[B]`; 0 is off.
        seed: an integer or `[B]` of any integer dtype; all 64 bits count.
        position: likewise; a caller counts it up, so that no two draws of a seed share it.
        logit_mask: `[B, V]` or `[V]` bool, integer or float; where it is 0 a token is never drawn
            and its logit is not looked at.

    Returns:
        `Sample(ids, logprob, log_mass, entropy)`, each `[B]`: int64, then float32 (float64 for
        float64 logits), detached. Under temperature 0 the last three are 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or parameter; on CPU also a NaN or +inf
            logit and a row in which nothing can be drawn. On CUDA such a row gets id -1, log-prob
            -inf, log_mass and entropy 0.

    >>> logits = torch.tensor([[0.0, 1.0, -torch.inf], [5.0, 5.0, 0.0]])
    >>> rlhf_fast.sample(logits, temperature=0.0, seed=1, position=0).ids
    tensor([1, 0])
    """
    _check_logits(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape [B, V], got {tuple(logits.shape)}")
    rows = logits.shape[0]
    if isinstance(logit_mask, torch.Tensor) and logit_mask.ndim == 1:
        _args.check_shape("logit_mask", logit_mask, logits.shape[1:], "[V] or [B, V] of logits")
        logit_mask = logit_mask.expand(logits.shape)
    mask = _args.as_mask("logit_mask", logit_mask, logits.shape, logits.device, "that of logits")
    out = torch.ops.rlhf_fast.sample(
        logits.detach(), mask,
        *_parameters(temperature, top_k, top_p, min_p, (rows,), logits, False),
        *_counter("seed", seed, rows, logits), *_counter("position", position, rows, logits),
        _dispatch.requested("sample"),
    )  # fmt: skip
    return Sample(*out)


def replay_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token under the distribution that `sample` draws from, differentiable.

        logprob[...] = u[..., ids] - log sum_K exp(u),   u = logits / temperature
        log_mass[...] = log sum_K exp(u) - log sum_v exp(u[..., v])

    with the kept set K of `sample` under the same parameters, which the gradient holds fixed (Liu
    et al., "DeepSeek-V3.2", 2025, replay the sampler's set in the same way). Their sum is the
    tempered log-prob over the whole vocabulary. A token outside K, and any token of a row in which
    nothing can be drawn, has log-prob -inf without a gradient; temperature 0 makes K the largest
    logit alone, with both results constant. A NaN or +inf logit makes its row's results NaN.

    Args:
        logits: `[..., V]` float64, float32, float16 or bfloat16, of any strides; -inf is legal.
        ids: `[...]` int32 or int64 token ids in [0, V).
        temperature, top_k, top_p, min_p: as in `sample`, each a number or a tensor that broadcasts
            to `ids`.

    Returns:
        `(logprob, log_mass)`, each `[...]` float32 (float64 for float64 logits). The gradient has
        the dtype of `logits`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or parameter.
        IndexError: an id out of range (on CPU).

    >>> logits = torch.tensor([[0.0, 0.0, 0.0, -9.0]])
    >>> rlhf_fast.replay_logprob(logits, torch.tensor([1]), top_p=0.5)
    (tensor([-0.6931]), tensor([-0.4055]))
    """
    _check_logits(logits)
    _args.check_ids("ids", ids)
    _args.check_shape("ids", ids, logits.shape[:-1], "logits' shape without V")
    _args.check_device("ids", ids, logits.device, "logits")
    out = torch.ops.rlhf_fast.replay_logprob(
        logits, ids, *_parameters(temperature, top_k, top_p, min_p, ids.shape, logits, True),
        _dispatch.requested("replay_logprob"),
    )  # fmt: skip
    return out[0], out[1]
