"""Calls of the native KL kernels, for tensors on the CPU and on CUDA devices.

As in the log-prob room: logits are addressed by two strides where that is possible and copied where
it is not, each model's in its own dtype; all else is a small vector per token.
"""

from __future__ import annotations

import math

import torch

from rlhf_fast.kernels._common.launch import flat, gradient_of, rows_of
from rlhf_fast.kernels._common.native import (
    ESTIMATORS,
    LogitRows,
    address,
    dtype_number,
    kernel,
)

from .reference import IGNORE_INDEX


def _estimate(name, grad, logprob, ref_logprob, mask, estimator, clamp_in, clamp_out):
    out = torch.empty(logprob.shape, dtype=torch.float32, device=logprob.device)
    if out.numel():
        vectors = [flat(x) for x in (logprob, ref_logprob, mask, grad)]
        bounds = (math.inf if bound is None else bound for bound in (clamp_in, clamp_out))
        kernel(name, out)(
            *map(address, vectors), out.data_ptr(), out.numel(), ESTIMATORS[estimator], *bounds,
        )  # fmt: skip
    return out


class _Pair:
    """The rows of both models; keeps copies alive until the call is over."""

    def __init__(self, logits, ref_logits, ids, mask, temperature, temperatures) -> None:
        ref_dtype = dtype_number("ref_logits", ref_logits)
        if ids is None:  # every row counts, and nobody asks for the log-prob of token 0
            ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        self.rows = LogitRows(logits, ids, mask, temperature, temperatures, None, IGNORE_INDEX)
        self.ref_logits, *strides = rows_of(ref_logits)
        ref = (self.ref_logits.data_ptr(), ref_dtype, *strides)
        self.arguments = self.rows.arguments, ref


def _full(logits, ref_logits, ids, mask, temperature, temperatures):
    out = tuple(
        torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device) for _ in range(8)
    )
    if out[0].numel():
        pair = _Pair(logits, ref_logits, ids, mask, temperature, temperatures)
        kernel("kl", logits)(*pair.arguments, [x.data_ptr() for x in out])
    return out


def _divergence(logits, ref_logits, mask, temperature, temperatures):
    kl, _, _, _, *stats = _full(logits, ref_logits, None, mask, temperature, temperatures)
    return kl, *stats


def _backward(grads, logits, ref_logits, ids, mask, temperature, temperatures, saved, out):
    out = gradient_of(logits, out)
    if out.numel():
        pair = _Pair(logits, ref_logits, ids, mask, temperature, temperatures)
        vectors = [flat(x) for x in (*grads, *saved)]
        run = kernel("kl_backward", logits)
        run(*pair.arguments, [address(x) for x in vectors], out.data_ptr())
    return out


def kl_estimate(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """The estimate of each token; 0 where masked."""
    options = (mask, estimator, clamp_in, clamp_out)
    return _estimate("kl_estimate", None, logprob, ref_logprob, *options)


def kl_estimate_backward(
    grad: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """Gradient of `logprob`; that of `ref_logprob` is its negative."""
    options = (mask, estimator, clamp_in, clamp_out)
    return _estimate("kl_estimate_backward", grad, logprob, ref_logprob, *options)


def kl_divergence(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, row_max, log_sum, ref_row_max, ref_log_sum), each of the shape of a row index."""
    return _divergence(logits, ref_logits, mask, temperature, temperatures)


def kl_divergence_full(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum)."""
    return _full(logits, ref_logits, ids, mask, temperature, temperatures)


def kl_divergence_backward(
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    ref_row_max: torch.Tensor,
    ref_log_sum: torch.Tensor,
    kl: torch.Tensor,
    entropy: torch.Tensor | None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the policy's logits, contiguous and in their dtype.

    It is written to `out` where that is given: contiguous, of the shape and dtype of `logits`, and
    either `logits` itself or no part of it.
    """
    return _backward(
        (grad_kl, grad_logprob, grad_entropy), logits, ref_logits, ids, mask,
        temperature, temperatures, (row_max, log_sum, ref_row_max, ref_log_sum, kl, entropy), out,
    )  # fmt: skip


def _one_pass(logits, ref_logits, ids, grads, mask, temperature, temperatures, out):
    values = [torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(8)]
    out = gradient_of(logits, out)
    if ids.numel():
        pair = _Pair(logits, ref_logits, ids, mask, temperature, temperatures)
        grads = [flat(x) for x in grads]
        kernel("kl_and_grad", logits)(
            *pair.arguments, [address(x) for x in values], [address(x) for x in grads],
            out.data_ptr(),
        )  # fmt: skip
    return *values[:4], out


def kl_divergence_and_grad(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, gradient of the policy's logits)."""
    grads = grad_kl, grad_logprob, grad_entropy
    return _one_pass(logits, ref_logits, ids, grads, mask, temperature, temperatures, None)


def kl_divergence_and_grad_inplace(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy); the gradient goes over the logits, contiguous ones."""
    grads = grad_kl, grad_logprob, grad_entropy
    return _one_pass(logits, ref_logits, ids, grads, mask, temperature, temperatures, logits)[:4]
