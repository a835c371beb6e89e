"""Token log-probabilities and entropy from logits: checks, schemas, fakes, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch

for _op in ("logprob", "logprob_entropy"):
    _dispatch.implementations(_op, __package__)

ARGUMENTS = (
    "Tensor logits, Tensor ids, Tensor? mask, float temperature, Tensor? temperatures, "
    "float? softcap, int ignore_index"
)


class LogprobEntropy(NamedTuple):
    """What `logprob_entropy` returns; both of the shape of `ids`, in nats."""

    logprob: torch.Tensor
    entropy: torch.Tensor


def check_token_values(logits, ids, mask, temperatures, ignore_index) -> None:
    """Raise for ids out of range and temperatures that are not positive, where the mask counts."""
    live = ids != ignore_index
    if mask is not None:
        live = live & mask
    vocabulary = logits.shape[-1]
    bad = live & ((ids < 0) | (ids >= vocabulary))
    if bad.any():
        value = int(ids[bad][0])
        raise IndexError(f"ids: expected values in [0, {vocabulary}), got {value}")
    if temperatures is not None:
        bad = live & ~((temperatures > 0) & temperatures.isfinite())
        if bad.any():
            value = float(temperatures[bad][0])
            raise ValueError(f"temperature: expected positive finite values, got {value}")


def _check(logits, ids, mask, temperature, temperatures, softcap, ignore_index, backend) -> None:
    check_token_values(logits, ids, mask, temperatures, ignore_index)


def _row(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(ids.shape, dtype=_args.compute_dtype(logits.dtype))


def _fake_logprob(logits, ids, *_):
    return _row(logits, ids), _row(logits, ids), _row(logits, ids)


def _fake_logprob_entropy(logits, ids, *_):
    return _row(logits, ids), _row(logits, ids), _row(logits, ids), _row(logits, ids)


def _fake_backward(grad_logprob, grad_entropy, logits, *_):
    return logits.new_empty(logits.shape)


_dispatch.define(
    "logprob",
    f"logprob({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_logprob,
    check=_check,
)
_dispatch.define(
    "logprob_entropy",
    f"logprob_entropy({ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_logprob_entropy,
    check=_check,
)
_dispatch.define(
    "logprob",
    f"logprob_backward(Tensor grad_logprob, Tensor? grad_entropy, {ARGUMENTS}, Tensor row_max, "
    "Tensor log_sum, Tensor? entropy, str backend) -> Tensor",
    fake=_fake_backward,
    dtype_of=2,
)
_dispatch.once_differentiable("logprob_backward")


def _setup_context(ctx, inputs, output) -> None:
    logits, ids, mask, temperature, temperatures, softcap, ignore_index, backend = inputs
    *values, row_max, log_sum = output
    entropy = values[1] if len(values) == 2 else None
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(logits, ids, mask, temperatures, row_max, log_sum, entropy)
    ctx.scalars = temperature, softcap, ignore_index, backend


def _gradient(ctx, grad_logprob, grad_entropy):
    logits, ids, mask, temperatures, row_max, log_sum, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index, backend = ctx.scalars
    grad = torch.ops.rlhf_fast.logprob_backward(
        grad_logprob, grad_entropy, logits, ids, mask, temperature, temperatures, softcap,
        ignore_index, row_max, log_sum, entropy, backend,
    )  # fmt: skip
    return grad, None, None, None, None, None, None, None


def _backward_logprob(ctx, grad_logprob, *_):
    return _gradient(ctx, grad_logprob, None)


def _backward_logprob_entropy(ctx, grad_logprob, grad_entropy, *_):
    return _gradient(ctx, grad_logprob, grad_entropy)


_dispatch.differentiable("logprob", setup_context=_setup_context, backward=_backward_logprob)
_dispatch.differentiable(
    "logprob_entropy", setup_context=_setup_context, backward=_backward_logprob_entropy
)


def as_temperature(
    temperature: float | torch.Tensor, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[float, torch.Tensor | None]:
    """Split `temperature` into (number, None) or (1.0, contiguous tensor of `shape`)."""
    if not isinstance(temperature, torch.Tensor):
        return _args.number("temperature", temperature, low=0.0, exclusive_low=True), None
    if temperature.device != device and temperature.ndim > 0:
        raise ValueError(f"temperature: expected device {device}, got {temperature.device}")
    leading = (1,) * (len(shape) - temperature.ndim) + tuple(temperature.shape)
    if len(leading) != len(shape) or any(
        t not in (1, n) for t, n in zip(leading, shape, strict=True)
    ):
        raise ValueError(
            f"temperature: expected a shape that broadcasts to {tuple(shape)} (that of ids), "
            f"got {tuple(temperature.shape)}"
        )
    values = temperature.detach().to(device=device, dtype=dtype)
    return 1.0, values.expand(shape).contiguous()


def prepare(logits, ids, temperature, mask, ignore_index, softcap):
    _args.check_float_tensor("logits", logits)
    _args.check_ids("ids", ids)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    _args.check_shape("ids", ids, logits.shape[:-1], "logits' shape without V")
    _args.check_device("ids", ids, logits.device, "logits")
    mask = _args.as_mask("mask", mask, ids.shape, ids.device, "that of ids")
    if softcap is not None:
        softcap = _args.number("softcap", softcap, low=0.0, exclusive_low=True)
    number, tensor = as_temperature(
        temperature, ids.shape, ids.device, _args.compute_dtype(logits.dtype)
    )
    return logits, ids, mask, number, tensor, softcap, _args.integer("ignore_index", ignore_index)


def logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-probability of each token under its row of logits, in nats.

        u = softcap * tanh(logits / softcap) / temperature
        logprob[...] = u[..., ids] - log sum_v exp(u[..., v])

    The logits are read once (log-sum-exp with a running maximum: Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018) and never copied or upcast in memory.

    Args:
        logits: `[..., V]` float64, float32, float16 or bfloat16, of any strides; -inf is legal.
        ids: `[...]` int32 or int64 token ids in [0, V).
        temperature: a positive number, or a tensor that broadcasts to `ids`.
        mask: `[...]` bool, integer or float; where it is 0 the result and the gradient are 0.
        ignore_index: an id that counts as masked.
        softcap: cap c of `c * tanh(z / c)`, applied before the temperature; None is off.

    Returns:
        `[...]` float32 (float64 for float64 logits). The gradient has the dtype of `logits`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature.
        IndexError: an id out of range that is neither masked nor `ignore_index` (on CPU).

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    >>> rlhf_fast.logprob(logits, torch.tensor([1, 0]))
    tensor([-0.6931,  0.0000])
    """
    arguments = prepare(logits, ids, temperature, mask, ignore_index, softcap)
    return torch.ops.rlhf_fast.logprob(*arguments, _dispatch.requested("logprob"))[0]


def logprob_entropy(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> LogprobEntropy:
    """Log-probability of each token and the entropy of its distribution, in nats, in one pass.

        entropy[...] = -sum_v p_v log p_v,   p = softmax(u),   u as in `logprob`

    Both results are differentiable in `logits`: d entropy / du_j = -p_j (log p_j + entropy). A
    logit of -inf contributes 0 to the entropy and gets no gradient; a row that is all -inf has
    entropy 0.

    Args and Raises: those of `logprob`.

    Returns:
        `LogprobEntropy(logprob, entropy)`, each `[...]` float32 (float64 for float64 logits).

    >>> rlhf_fast.logprob_entropy(torch.zeros(1, 4), torch.tensor([2])).entropy
    tensor([1.3863])
    """
    arguments = prepare(logits, ids, temperature, mask, ignore_index, softcap)
    out = torch.ops.rlhf_fast.logprob_entropy(*arguments, _dispatch.requested("logprob_entropy"))
    return LogprobEntropy(out[0], out[1])
