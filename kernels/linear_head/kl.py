"""Exact KL from the hidden states of policy and reference: checks, schemas, fakes, autograd."""

from __future__ import annotations

import torch

from rlhf_fast import _args, _dispatch, _invariant
from rlhf_fast.kernels.kl.op import KLFull
from rlhf_fast.kernels.logprob.op import as_temperature

from .op import check_head, check_head_values, kept_rows, new_gradients
from .reference_kl import IGNORE_INDEX

_dispatch.implementations("linear_kl", __package__)

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor? ids, "
    "Tensor? mask, float temperature, Tensor? temperatures, bool invariant"
)


def _fake(hidden, weight, ref_hidden, *others):
    dtype = _args.compute_dtype(torch.promote_types(hidden.dtype, ref_hidden.dtype))
    rows = tuple(hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(8))
    return *rows, *(hidden.new_empty(others[-2], weight.shape[0], dtype=dtype) for _ in range(2))


def _fake_backward(grad_kl, grad_logprob, grad_entropy, hidden, weight, *others):
    return new_gradients(hidden, (hidden, weight), others[-2])


def _check(hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, temperatures, *_):
    if ids is None:
        ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    check_head_values(hidden, weight, ids, mask, temperatures, IGNORE_INDEX, "")


_dispatch.define(
    "linear_kl",
    f"linear_kl({_ARGUMENTS}, int keep, str backend) -> ({', '.join(['Tensor'] * 10)})",
    fake=_fake,
    check=_check,
)
_dispatch.define(
    "linear_kl",
    "linear_kl_backward(Tensor grad_kl, Tensor grad_logprob, Tensor grad_entropy, "
    f"{_ARGUMENTS}, Tensor kl, Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum, "
    "Tensor ref_row_max, Tensor ref_log_sum, Tensor kept, Tensor ref_kept, bool[] needs, "
    "str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    dtype_of=3,
)
_dispatch.once_differentiable("linear_kl_backward")


def _setup_context(ctx, inputs, output) -> None:
    *heads, temperature, temperatures, invariant, _, backend = inputs
    kl, logprob, ref_logprob, entropy, *stats = output
    ctx.mark_non_differentiable(ref_logprob, *stats)
    ctx.set_materialize_grads(False)  # zeros as large as what is kept
    ctx.save_for_backward(*heads, temperatures, kl, logprob, entropy, *stats)
    ctx.scalars = temperature, invariant, backend


def _backward(ctx, grad_kl, grad_logprob, _, grad_entropy, *__):
    *heads, temperatures, kl, logprob, entropy, a, b, c, d, kept, ref_kept = ctx.saved_tensors
    grad_kl, grad_logprob, grad_entropy = (
        torch.zeros_like(kl) if grad is None else grad
        for grad in (grad_kl, grad_logprob, grad_entropy)
    )
    temperature, invariant, backend = ctx.scalars
    needs = list(ctx.needs_input_grad[:2])
    grads = torch.ops.rlhf_fast.linear_kl_backward(
        grad_kl, grad_logprob, grad_entropy, *heads, temperature, temperatures, invariant, kl,
        logprob, entropy, a, b, c, d, kept, ref_kept, needs, backend,
    )  # fmt: skip
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *grads, *[None] * 9


_dispatch.differentiable("linear_kl", setup_context=_setup_context, backward=_backward)


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
) -> KLFull:
    """Exact KL(policy || reference) from both models' hidden states, without any [N, V] logits.

        p = softmax(hidden weight^T / temperature),  q = softmax(ref_hidden ref_weight^T / ...)
        kl[...] = sum_v p_v (log p_v - log q_v)

    in one sweep over both heads, a tile of logits at a time, with the log-probs of `ids` and the
    policy's entropy beside it. The rules for -inf are those of `kl_divergence`. Source: Kullback
    and Leibler, "On information and sufficiency", 1951.

    Args:
        hidden: `[..., H]` of the policy, float64, float32, float16 or bfloat16.
        weight: `[V, H]` the policy's head, of hidden's dtype.
        ref_hidden: `[..., H']` of the reference; its size and dtype may differ from hidden's.
        ref_weight: `[V, H']` the reference's head, of ref_hidden's dtype.
        ids: `[...]` int32 or int64 token ids in [0, V), or None; -100 counts as masked.
        temperature: a positive number, or a tensor that broadcasts to `[...]`; it tempers both.
        mask: `[...]` bool, integer or float; where it is 0 results and gradients are 0.

    Returns:
        `KLFull(kl, logprob, ref_logprob, entropy)`, each `[...]` float32 (float64 if an input is),
        in nats; both log-probs are None without ids. All but `ref_logprob` are differentiable in
        `hidden` and `weight`; the reference receives no gradient. Rows are bitwise independent of
        each other inside `rlhf_fast.batch_invariant()`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or temperature.
        IndexError: an id out of range that is neither masked nor -100 (on CPU).

    >>> x, w = torch.ones(1, 2), torch.ones(3, 2)
    >>> rlhf_fast.linear_kl(x, w, x, w).kl
    tensor([0.])
    """
    check_head(hidden, weight, ("hidden", "weight"))
    check_head(ref_hidden, ref_weight, ("ref_hidden", "ref_weight"))
    rows = hidden.shape[:-1]
    expected = (*rows, ref_hidden.shape[-1])
    _args.check_shape("ref_hidden", ref_hidden, expected, "hidden's but for the last axis")
    _args.check_device("ref_hidden", ref_hidden, hidden.device, "hidden")
    expected = (weight.shape[0], ref_weight.shape[1])
    _args.check_shape("ref_weight", ref_weight, expected, "[V, H'] with weight's V")
    if ids is not None:
        _args.check_ids("ids", ids)
        _args.check_shape("ids", ids, rows, "hidden's shape without H")
        _args.check_device("ids", ids, hidden.device, "hidden")
    mask = _args.as_mask("mask", mask, rows, hidden.device, "hidden's shape without H")
    dtype = _args.compute_dtype(torch.promote_types(hidden.dtype, ref_hidden.dtype))
    if dtype == torch.float64:  # of either model: both are then computed in it
        hidden, weight, ref_hidden, ref_weight = (
            x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)
        )
    number, tensor = as_temperature(temperature, rows, hidden.device, dtype)
    hidden, ref_hidden = (x.reshape(-1, x.shape[-1]) for x in (hidden, ref_hidden))
    ids, mask = (None if x is None else x.reshape(-1) for x in (ids, mask))
    invariant = _invariant.requested()
    some = hidden, weight, ids, mask, IGNORE_INDEX, invariant
    out = torch.ops.rlhf_fast.linear_kl(
        hidden, weight, ref_hidden.detach(), ref_weight.detach(), ids, mask, number,
        None if tensor is None else tensor.reshape(-1), invariant,
        kept_rows("linear_kl", *some, (hidden, weight), heads=2), _dispatch.requested("linear_kl"),
    )  # fmt: skip
    kl, logprob, ref_logprob, entropy = (x.reshape(rows) for x in out[:4])
    return KLFull(kl, *(None, None) if ids is None else (logprob, ref_logprob), entropy)
