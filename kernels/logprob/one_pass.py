"""Log-prob, entropy and their gradient in one pass, for an upstream gradient known beforehand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rlhf_fast import _args, _dispatch

from .op import ARGUMENTS, check_token_values, prepare

_OP = "logprob_entropy_and_grad"
_dispatch.implementations(_OP, __package__)


class LogprobEntropyGrad(NamedTuple):
    """What `logprob_entropy_and_grad` returns.

    `logprob` and `entropy` have the shape of `ids`, in nats; `grad` has shape and dtype of the
    logits.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    grad: torch.Tensor


def as_gradient(
    name: str, grad: float | torch.Tensor, shape: torch.Size, like: torch.Tensor
) -> torch.Tensor:
    """An upstream gradient as a tensor of `shape` and the dtype of `like`; a number is expanded."""
    if not isinstance(grad, torch.Tensor):
        return like.new_full((), _args.number(name, grad)).expand(shape)
    _args.check_float_tensor(name, grad)
    _args.check_shape(name, grad, shape, "logits' shape without V")
    _args.check_device(name, grad, like.device, "logits")
    return grad.detach().to(like.dtype)


def check_overwritable(logits: torch.Tensor) -> None:
    """Raise unless a gradient can be written over `logits`."""
    if logits.requires_grad:
        raise ValueError(
            "logits: expected a tensor without requires_grad for inplace=True (logits.detach() of "
            "what a model computed), got one that requires a gradient"
        )
    if not logits.is_contiguous():
        raise ValueError(
            "logits: expected a contiguous tensor for inplace=True, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )


def count_as_written(name: str) -> None:
    """Let the torch op `name` bump the version counter of its first argument, which it overwrites.

    Autograd then refuses to use a tensor that was saved before and is overwritten now.
    """
    op = getattr(torch.ops.rlhf_fast, name).default

    def run(keyset: Any, written: torch.Tensor, *rest: Any) -> Any:
        torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *rest)

    _dispatch.LIB.impl(name, run, "ADInplaceOrView", with_keyset=True)


def _fake_inplace(logits, ids, *_):
    dtype = _args.compute_dtype(logits.dtype)
    return tuple(logits.new_empty(ids.shape, dtype=dtype) for _ in range(2))


def _fake(logits, ids, *_):
    return *_fake_inplace(logits, ids), logits.new_empty(logits.shape)


def _check(logits, ids, grad_logprob, grad_entropy, mask, temperature, temperatures, *rest) -> None:
    check_token_values(logits, ids, mask, temperatures, rest[1])


def _schema(name: str, logits: str, results: str) -> str:
    options = ARGUMENTS.removeprefix("Tensor logits, Tensor ids, ")
    grads = "Tensor grad_logprob, Tensor? grad_entropy"
    return f"{name}({logits} logits, Tensor ids, {grads}, {options}, str backend) -> ({results})"


_dispatch.define(_OP, _schema(_OP, "Tensor", "Tensor, Tensor, Tensor"), fake=_fake, check=_check)
_dispatch.define(
    _OP,
    _schema(f"{_OP}_inplace", "Tensor(a!)", "Tensor, Tensor"),
    fake=_fake_inplace,
    check=_check,
)
count_as_written(f"{_OP}_inplace")


def logprob_entropy_and_grad(
    logits: torch.Tensor,
    ids: torch.Tensor,
    grad_logprob: float | torch.Tensor,
    *,
    grad_entropy: float | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    inplace: bool = False,
) -> LogprobEntropyGrad:
    """Log-prob and entropy of `logprob_entropy`, and the gradient of the logits, in one pass.

        grad = grad_logprob * d logprob / d logits + grad_entropy * d entropy / d logits

    For losses whose derivative by the log-prob is known before the logits are, such as supervised
    fine-tuning, REINFORCE and the first update of PPO, whose ratio is 1: each logit is read from
    memory once, and a separate backward pass would read it again. Nothing here is differentiable.
    With `inplace` the gradient takes the place of the logits, and no second tensor of their size is
    made:

        out = rlhf_fast.logprob_entropy_and_grad(logits.detach(), ids, g, inplace=True)
        logits.backward(out.grad)  # on through what computed the logits

    Args:
        logits, ids, temperature, mask, ignore_index, softcap: as in `logprob`.
        grad_logprob: derivative of the loss by each log-prob, `[...]` like `ids`, or one number.
        grad_entropy: the same by each entropy; None is 0.
        inplace: write the gradient over `logits`, which must be contiguous and not require one.

    Returns:
        `LogprobEntropyGrad(logprob, entropy, grad)`: the first two `[...]` float32 (float64 for
        float64 logits), detached; `grad` `[..., V]` in the dtype of `logits`, 0 in masked rows, and
        `logits` itself with `inplace`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature; with `inplace`, logits
            that cannot be overwritten.
        IndexError: an id out of range that is neither masked nor `ignore_index` (on CPU).

    >>> rlhf_fast.logprob_entropy_and_grad(torch.zeros(1, 2), torch.tensor([1]), -1.0).grad
    tensor([[ 0.5000, -0.5000]])
    """
    logits, ids, *options = prepare(logits, ids, temperature, mask, ignore_index, softcap)
    like = logits.new_empty((), dtype=_args.compute_dtype(logits.dtype))
    grads = [
        None if g is None else as_gradient(name, g, ids.shape, like)
        for name, g in (("grad_logprob", grad_logprob), ("grad_entropy", grad_entropy))
    ]
    backend = _dispatch.requested(_OP)
    if inplace:
        check_overwritable(logits)
        values = torch.ops.rlhf_fast.logprob_entropy_and_grad_inplace(
            logits, ids, *grads, *options, backend
        )
        return LogprobEntropyGrad(*values, logits)
    return LogprobEntropyGrad(
        *torch.ops.rlhf_fast.logprob_entropy_and_grad(
            logits.detach(), ids, *grads, *options, backend
        )
    )
