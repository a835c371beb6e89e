"""KL divergence between a policy and its reference: checks, schemas, fakes, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.logprob.op import as_temperature, check_token_values

from .reference import IGNORE_INDEX

ESTIMATORS = ("k1", "abs", "k2", "k3")

for _op in ("kl_estimate", "kl_divergence", "kl_divergence_full"):
    _dispatch.implementations(_op, __package__)

_ESTIMATE = "Tensor? mask, str estimator, float? clamp_in, float? clamp_out, str backend"
_PAIR = "Tensor logits, Tensor ref_logits"
_TOKENS = "Tensor? mask, float temperature, Tensor? temperatures"


class KLFull(NamedTuple):
    """What `kl_divergence_full` and `linear_kl` return; all of one shape, in nats.

    `linear_kl` without ids has None for both log-probs.
    """

    kl: torch.Tensor
    logprob: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    entropy: torch.Tensor


def _fake_estimate(logprob, *_):
    return logprob.new_empty(logprob.shape)


def _fake_estimate_backward(grad, logprob, *_):
    return logprob.new_empty(logprob.shape)


def _rows(logits: torch.Tensor, ref_logits: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    dtype = _args.compute_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(count))


def _fake_divergence(logits, ref_logits, *_):
    return _rows(logits, ref_logits, 5)


def _fake_full(logits, ref_logits, *_):
    return _rows(logits, ref_logits, 8)


def _fake_backward(grad_kl, grad_logprob, grad_entropy, logits, *_):
    return logits.new_empty(logits.shape)


def _check_divergence(logits, ref_logits, mask, temperature, temperatures, backend) -> None:
    if temperatures is not None:
        ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        check_token_values(logits, ids, mask, temperatures, IGNORE_INDEX)


def _check_full(logits, ref_logits, ids, mask, temperature, temperatures, backend) -> None:
    check_token_values(logits, ids, mask, temperatures, IGNORE_INDEX)


_dispatch.define(
    "kl_estimate",
    f"kl_estimate(Tensor logprob, Tensor ref_logprob, {_ESTIMATE}) -> Tensor",
    fake=_fake_estimate,
)
_dispatch.define(
    "kl_estimate",
    f"kl_estimate_backward(Tensor grad, Tensor logprob, Tensor ref_logprob, {_ESTIMATE}) -> Tensor",
    fake=_fake_estimate_backward,
    dtype_of=1,
)
_dispatch.define(
    "kl_divergence",
    f"kl_divergence({_PAIR}, {_TOKENS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_divergence,
    check=_check_divergence,
)
_dispatch.define(
    "kl_divergence_full",
    f"kl_divergence_full({_PAIR}, Tensor ids, {_TOKENS}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_full,
    check=_check_full,
)
_dispatch.define(
    "kl_divergence",
    "kl_divergence_backward(Tensor grad_kl, Tensor? grad_logprob, Tensor? grad_entropy, "
    f"{_PAIR}, Tensor? ids, {_TOKENS}, Tensor row_max, Tensor log_sum, Tensor ref_row_max, "
    "Tensor ref_log_sum, Tensor kl, Tensor? entropy, str backend) -> Tensor",
    fake=_fake_backward,
    dtype_of=3,
)
_dispatch.once_differentiable("kl_estimate_backward")
_dispatch.once_differentiable("kl_divergence_backward")


def _setup_estimate(ctx, inputs, output) -> None:
    logprob, ref_logprob, mask, *options = inputs
    ctx.save_for_backward(logprob, ref_logprob, mask)
    ctx.options = options


def _backward_estimate(ctx, grad):
    grad = torch.ops.rlhf_fast.kl_estimate_backward(grad, *ctx.saved_tensors, *ctx.options)
    wants, ref_wants, *_ = ctx.needs_input_grad
    return grad if wants else None, -grad if ref_wants else None, None, None, None, None, None


def _setup_divergence(ctx, inputs, output) -> None:
    logits, ref_logits, mask, temperature, temperatures, backend = inputs
    kl, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.save_for_backward(logits, ref_logits, mask, temperatures, *stats, kl)
    ctx.scalars = temperature, backend


def _backward_divergence(ctx, grad_kl, *_):
    logits, ref_logits, mask, temperatures, *stats = ctx.saved_tensors
    temperature, backend = ctx.scalars
    grad = torch.ops.rlhf_fast.kl_divergence_backward(
        grad_kl, None, None, logits, ref_logits, None, mask, temperature, temperatures, *stats,
        None, backend,
    )  # fmt: skip
    return grad, None, None, None, None, None


def _setup_full(ctx, inputs, output) -> None:
    logits, ref_logits, ids, mask, temperature, temperatures, backend = inputs
    kl, _, ref_logprob, entropy, *stats = output
    ctx.mark_non_differentiable(ref_logprob, *stats)
    ctx.save_for_backward(logits, ref_logits, ids, mask, temperatures, *stats, kl, entropy)
    ctx.scalars = temperature, backend


def _backward_full(ctx, grad_kl, grad_logprob, grad_ref, grad_entropy, *_):
    logits, ref_logits, ids, mask, temperatures, *stats = ctx.saved_tensors
    temperature, backend = ctx.scalars
    grad = torch.ops.rlhf_fast.kl_divergence_backward(
        grad_kl, grad_logprob, grad_entropy, logits, ref_logits, ids, mask, temperature,
        temperatures, *stats, backend,
    )  # fmt: skip
    return grad, None, None, None, None, None, None


_dispatch.differentiable("kl_estimate", setup_context=_setup_estimate, backward=_backward_estimate)
_dispatch.differentiable(
    "kl_divergence", setup_context=_setup_divergence, backward=_backward_divergence
)
_dispatch.differentiable("kl_divergence_full", setup_context=_setup_full, backward=_backward_full)


def clamp_bounds(clamp: tuple[float | None, float | None] | None) -> tuple:
    """The two entries of `clamp=(in, out)`, each a number >= 0 or None."""
    if clamp is None:
        return None, None
    if not isinstance(clamp, tuple | list):
        raise TypeError(f"clamp: expected None or a pair (in, out), got {type(clamp).__name__}")
    if len(clamp) != 2:
        raise ValueError(f"clamp: expected two entries (in, out), got {len(clamp)}")
    return tuple(c if c is None else _args.number("clamp", c, low=0.0) for c in clamp)


def kl_estimate(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    *,
    estimator: str = "k1",
    mask: torch.Tensor | None = None,
    clamp: tuple[float | None, float | None] | None = None,
) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each sampled token, in nats.

        d   = logprob - ref_logprob,  clamped to +-in
        k1  = d                         unbiased, can be negative
        abs = |d|
        k2  = d^2 / 2                   its gradient is that of the KL, in expectation
        k3  = expm1(-d) + d             unbiased and never negative

    and the result is clamped to +-out. Source: Schulman, "Approximating KL divergence", 2020.

    Where both log-probs are the same infinity d is 0. A token that only the policy can draw
    (d = +inf) gives +inf under every estimator; one that only the reference can draw (d = -inf)
    gives -inf under k1 and +inf under the others, unless a clamp bounds it. The gradient is 0
    beyond either clamp and where a log-prob is infinite.

    Args:
        logprob: `[...]` log-probs of the tokens under the policy, in nats.
        ref_logprob: `[...]` the same under the reference.
        estimator: "k1", "abs", "k2" or "k3".
        mask: `[...]` bool, integer or float; where it is 0 result and gradients are 0.
        clamp: `(in, out)`, each a number >= 0 or None; None is off.

    Returns:
        `[...]` float32 (float64 if an input is). Differentiable in both log-probs.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, estimator or clamp.

    >>> lp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    >>> rlhf_fast.kl_estimate(lp, ref, estimator="k3")
    tensor([0.1065, 0.0000])
    """
    _args.check_float_tensor("logprob", logprob)
    _args.check_float_tensor("ref_logprob", ref_logprob)
    _args.check_shape("ref_logprob", ref_logprob, logprob.shape, "that of logprob")
    _args.check_device("ref_logprob", ref_logprob, logprob.device, "logprob")
    _args.choice("estimator", estimator, ESTIMATORS)
    mask = _args.as_mask("mask", mask, logprob.shape, logprob.device, "that of logprob")
    clamp_in, clamp_out = clamp_bounds(clamp)
    dtype = _args.compute_dtype(torch.promote_types(logprob.dtype, ref_logprob.dtype))
    return torch.ops.rlhf_fast.kl_estimate(
        logprob.to(dtype).contiguous(), ref_logprob.to(dtype).contiguous(), mask, estimator,
        clamp_in, clamp_out, _dispatch.requested("kl_estimate"),
    )  # fmt: skip


def prepare(logits, ref_logits, mask, temperature):
    _args.check_float_tensor("logits", logits)
    _args.check_float_tensor("ref_logits", ref_logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    _args.check_shape("ref_logits", ref_logits, logits.shape, "that of logits")
    _args.check_device("ref_logits", ref_logits, logits.device, "logits")
    rows = logits.shape[:-1]
    mask = _args.as_mask("mask", mask, rows, logits.device, "logits' shape without V")
    dtype = _args.compute_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    if dtype == torch.float64:  # one dtype of arithmetic, which the policy's logits decide
        logits, ref_logits = logits.double(), ref_logits.double()
    number, tensor = as_temperature(temperature, rows, logits.device, dtype)
    return logits, ref_logits.detach(), mask, number, tensor


def kl_divergence(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact KL(policy || reference) of each row of logits, over the whole vocabulary, in nats.

        p = softmax(logits / temperature),  q = softmax(ref_logits / temperature)
        kl[...] = sum_v p_v (log p_v - log q_v)

    computed as sum p (u - r) - log-sum u + log-sum r on logits u and r shifted by their row's
    maximum. A token that is -inf in the policy adds 0; one that is -inf in the reference only,
    however small its probability, makes the KL +inf with gradient 0; a row that is all -inf in the
    policy has KL 0. Source: Kullback and Leibler, "On information and sufficiency", 1951.

    Args:
        logits: `[..., V]` of the policy, float64, float32, float16 or bfloat16, of any strides.
        ref_logits: `[..., V]` of the reference, any of these dtypes; it receives no gradient.
        temperature: a positive number, or a tensor that broadcasts to `[...]`; it tempers both.
        mask: `[...]` bool, integer or float; where it is 0 result and gradient are 0.

    Returns:
        `[...]` float32 (float64 if an input is), differentiable in `logits` only.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature.

    >>> rlhf_fast.kl_divergence(torch.tensor([0.0, -torch.inf]), torch.zeros(2))
    tensor(0.6931)
    """
    arguments = prepare(logits, ref_logits, mask, temperature)
    return torch.ops.rlhf_fast.kl_divergence(*arguments, _dispatch.requested("kl_divergence"))[0]


def kl_divergence_full(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> KLFull:
    """Exact KL, both log-probs of `ids` and the policy's entropy, in one pass over both logits.

    `kl` is that of `kl_divergence`; `logprob` and `entropy` are those of `logprob_entropy`;
    `ref_logprob` is the log-prob of `ids` under the reference. All but `ref_logprob` are
    differentiable in `logits`, nothing is in `ref_logits`.

    Args:
        logits, ref_logits, temperature, mask: as in `kl_divergence`.
        ids: `[...]` int32 or int64 token ids in [0, V); -100 counts as masked.

    Returns:
        `KLFull(kl, logprob, ref_logprob, entropy)`, each `[...]` float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature.
        IndexError: an id out of range that is neither masked nor -100 (on CPU).

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> rlhf_fast.kl_divergence_full(z, z, torch.tensor([1])).ref_logprob
    tensor([-0.6931])
    """
    logits, ref_logits, *options = prepare(logits, ref_logits, mask, temperature)
    _args.check_ids("ids", ids)
    _args.check_shape("ids", ids, logits.shape[:-1], "logits' shape without V")
    _args.check_device("ids", ids, logits.device, "logits")
    out = torch.ops.rlhf_fast.kl_divergence_full(
        logits, ref_logits, ids, *options, _dispatch.requested("kl_divergence_full")
    )
    return KLFull(*out[:4])
