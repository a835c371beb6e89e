"""Calls of the native log-prob kernels, for tensors on the CPU and on CUDA devices.

`row_max` is here the largest logit before the temperature, as in `_triton.py`.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.launch import flat, gradient_of
from rlhf_fast.kernels._common.native import LogitRows, address, dtype_number, kernel


def _forward(logits, ids, options, entropy):
    logprob, row_max, log_sum = (
        torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if ids.numel():
        rows = LogitRows(logits, ids, *options)
        kernel("logprob", logits)(
            rows.arguments, logprob.data_ptr(), address(entropy),
            row_max.data_ptr(), log_sum.data_ptr(),
        )  # fmt: skip
    return logprob, row_max, log_sum


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
    options = (mask, temperature, temperatures, softcap, ignore_index)
    return _forward(logits, ids, options, None)


def logprob_entropy(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, row_max, log_sum), each of the shape of `ids`; 0 for a masked token."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    entropy = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    lp, row_max, log_sum = _forward(logits, ids, options, entropy)
    return lp, entropy, row_max, log_sum


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
    *,
    out: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the logits, contiguous and in their dtype.

    It is written to `out` where that is given: contiguous, of the shape and dtype of `logits` or,
    for float32 logits, in half precision, and either `logits` itself or no part of it. An id of
    `ELSEWHERE` stands for a token that is not among these columns, possible in the whole vocabulary
    that `row_max`, `log_sum` and `entropy` belong to. With `places` row n of the gradient goes to
    row `places[n]` of `out`, and nowhere where that is negative.
    """
    options = (mask, temperature, temperatures, softcap, ignore_index)
    out = gradient_of(logits, out, rounded=True, placed=places is not None)
    if ids.numel():
        rows = LogitRows(logits, ids, *options)
        vectors = [flat(x) for x in (grad_logprob, grad_entropy, row_max, log_sum, entropy)]
        run = kernel("logprob_backward", logits)
        places = flat(places)
        run(
            rows.arguments, *map(address, vectors), out.data_ptr(),
            dtype_number("out", out), address(places),
        )  # fmt: skip
    return out


def _one_pass(grad_logprob, grad_entropy, logits, ids, options, out):
    values = [torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(4)]
    out = gradient_of(logits, out)
    if ids.numel():
        rows = LogitRows(logits, ids, *options)
        grads = flat(grad_logprob), flat(grad_entropy)
        kernel("logprob_and_grad", logits)(
            rows.arguments, *map(address, values), *map(address, grads),
            out.data_ptr(),
        )  # fmt: skip
    return *values[:2], out


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
    """(logprob, entropy, gradient of the logits)."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    return _one_pass(grad_logprob, grad_entropy, logits, ids, options, None)


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
    """(logprob, entropy); the gradient goes over the logits, which are contiguous."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    return _one_pass(grad_logprob, grad_entropy, logits, ids, options, logits)[:2]
