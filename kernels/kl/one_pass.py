"""Exact KL, log-probs, entropy and their gradient in one pass, upstream gradients being known."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.logprob.one_pass import as_gradient, check_overwritable, count_as_written
from rlhf_fast.kernels.logprob.op import check_token_values

from .op import prepare
from .reference import IGNORE_INDEX

_OP = "kl_divergence_and_grad"
_dispatch.implementations(_OP, __package__)


class KLGrad(NamedTuple):
    """What `kl_divergence_and_grad` returns.

    All but `grad` have the shape of the logits without their vocabulary, in nats; both log-probs
    are None without ids. `grad` has shape and dtype of the logits.
    """

    kl: torch.Tensor
    logprob: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    entropy: torch.Tensor
    grad: torch.Tensor


def _fake_inplace(logits, ref_logits, *_):
    dtype = _args.compute_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(4))


def _fake(logits, ref_logits, *_):
    return *_fake_inplace(logits, ref_logits), logits.new_empty(logits.shape)


def _check(logits, ref_logits, ids, kl, logprob, entropy, mask, temperature, temperatures, _):
    check_token_values(logits, ids, mask, temperatures, IGNORE_INDEX)


def _schema(name: str, logits: str, results: int) -> str:
    return (
        f"{name}({logits} logits, Tensor ref_logits, Tensor ids, Tensor grad_kl, "
        "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? mask, float temperature, "
        f"Tensor? temperatures, str backend) -> ({', '.join(['Tensor'] * results)})"
    )


_dispatch.define(_OP, _schema(_OP, "Tensor", 5), fake=_fake, check=_check)
_dispatch.define(_OP, _schema(f"{_OP}_inplace", "Tensor(a!)", 4), fake=_fake_inplace, check=_check)
count_as_written(f"{_OP}_inplace")


def _tokens(ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Checked ids; without any a token 0 per row, whose log-prob nobody asks for."""
    rows = logits.shape[:-1]
    if ids is None:
        return torch.zeros(rows, dtype=torch.int64, device=logits.device)
    _args.check_ids("ids", ids)
    _args.check_shape("ids", ids, rows, "logits' shape without V")
    _args.check_device("ids", ids, logits.device, "logits")
    return ids


def kl_divergence_and_grad(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    grad_kl: float | torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    grad_logprob: float | torch.Tensor | None = None,
    grad_entropy: float | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    inplace: bool = False,
) -> KLGrad:
    """The values of `kl_divergence_full` and the gradient of the policy's logits, in one pass.

        grad = grad_kl * d kl / d logits + grad_logprob * d logprob / d logits
             + grad_entropy * d entropy / d logits

    For losses whose derivatives are known before the logits are (distillation and KL penalties with
    a fixed coefficient): each logit of both models is read from memory once, where a separate
    backward pass would read both again. Nothing here is differentiable.

    Args:
        logits, ref_logits, temperature, mask: as in `kl_divergence`.
        grad_kl: derivative of the loss by each KL, `[...]` like a mask, or one number.
        ids: `[...]` int32 or int64 token ids in [0, V), or None; -100 counts as masked.
        grad_logprob: derivative by each log-prob of `ids`; None is 0.
        grad_entropy: derivative by each entropy of the policy; None is 0.
        inplace: write the gradient over `logits`, which must be contiguous, not require a gradient
            and share no memory with `ref_logits`.

    Returns:
        `KLGrad(kl, logprob, ref_logprob, entropy, grad)`: values `[...]` float32 (float64 if an
        input is), detached, both log-probs None without `ids`; `grad` `[..., V]` in the dtype of
        `logits`, 0 in masked rows, and `logits` itself with `inplace`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature; `grad_logprob` without
            `ids`; with `inplace`, logits that cannot be overwritten.
        IndexError: an id out of range that is neither masked nor -100 (on CPU).

    >>> z, ref = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> rlhf_fast.kl_divergence_and_grad(z, ref, 1.0).grad
    tensor([[ 0.2500, -0.2500]])
    """
    if grad_logprob is not None and ids is None:
        raise ValueError("grad_logprob: expected ids beside it, got None for them")
    z, ref_logits, *options = prepare(logits, ref_logits, mask, temperature)
    tokens = _tokens(ids, logits)
    dtype = _args.compute_dtype(torch.promote_types(z.dtype, ref_logits.dtype))
    like = z.new_empty((), dtype=dtype)
    named = {"grad_kl": grad_kl, "grad_logprob": grad_logprob, "grad_entropy": grad_entropy}
    grads = [
        None if g is None else as_gradient(name, g, tokens.shape, like) for name, g in named.items()
    ]
    arguments = ref_logits, tokens, *grads, *options, _dispatch.requested(_OP)
    if inplace:
        check_overwritable(logits)
        _args.check_dtype("logits", logits, z.dtype, "ref_logits, with inplace=True")
        values = torch.ops.rlhf_fast.kl_divergence_and_grad_inplace(logits, *arguments)
        grad = logits
    else:
        *values, grad = torch.ops.rlhf_fast.kl_divergence_and_grad(z.detach(), *arguments)
        grad = grad.to(logits.dtype)
    kl, logprob, ref_logprob, entropy = values
    if ids is None:
        logprob = ref_logprob = None
    return KLGrad(kl, logprob, ref_logprob, entropy, grad)
