"""Calls of the native log-prob kernels, for tensors on the CPU and on CUDA devices.

This file alone turns tensors of this op into addresses. Logits are addressed by two strides where
that is possible (`rows_of`) and copied where it is not; all else is a small vector per token.
`row_max` is here the largest logit before the temperature, as in `_triton.py`.
"""

from __future__ import annotations

import torch

from rlhf_fast import _C
from rlhf_fast.kernels._common.launch import flat, rows_of

# The numbers of csrc/common/dtype.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _place(x: torch.Tensor) -> tuple[int, ...]:
    """(threads,) of a CPU tensor, (device index, stream) of a CUDA tensor."""
    if x.is_cuda:
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    return (torch.get_num_threads(),)


class _Rows:
    """The logits and what belongs to each row; keeps copies alive until the call is over."""

    def __init__(self, logits, ids, mask, temperature, temperatures, softcap, ignore_index) -> None:
        if logits.dtype not in DTYPES:
            names = ", ".join(str(dtype)[6:] for dtype in DTYPES)
            raise TypeError(f"logits: expected one of {names}, got {str(logits.dtype)[6:]}")
        self.logits, *strides = rows_of(logits)
        self.vectors = flat(ids).to(torch.int64), flat(mask), flat(temperatures)
        self.arguments = (
            self.logits.data_ptr(), DTYPES[logits.dtype], ids.numel(), logits.shape[-1], *strides,
            *map(_address, self.vectors), min(temperature, 3e38), softcap or 0.0, ignore_index,
        )  # fmt: skip


def _forward(kernel, logits, ids, options, entropy):
    logprob, row_max, log_sum = (
        torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if ids.numel():
        rows = _Rows(logits, ids, *options)
        kernel(
            rows.arguments, *_place(logits), logprob.data_ptr(), _address(entropy),
            row_max.data_ptr(), log_sum.data_ptr(),
        )  # fmt: skip
    return logprob, row_max, log_sum


def _with_entropy(kernel, logits, ids, options):
    entropy = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    logprob, row_max, log_sum = _forward(kernel, logits, ids, options, entropy)
    return logprob, entropy, row_max, log_sum


def _backward(kernel, grad_logprob, grad_entropy, logits, ids, options, row_max, log_sum, entropy):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if ids.numel():
        rows = _Rows(logits, ids, *options)
        vectors = [flat(x) for x in (grad_logprob, grad_entropy, row_max, log_sum, entropy)]
        kernel(rows.arguments, *_place(logits), *map(_address, vectors), out.data_ptr())
    return out


def cpu_logprob(
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
    return _forward(_C.cpu_logprob, logits, ids, options, None)


def cpu_logprob_entropy(
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
    return _with_entropy(_C.cpu_logprob, logits, ids, options)


def cpu_logprob_backward(
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
    """Gradient of the logits, contiguous and in their dtype."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    return _backward(
        _C.cpu_logprob_backward, grad_logprob, grad_entropy, logits, ids, options, row_max,
        log_sum, entropy,
    )  # fmt: skip


def cuda_logprob(
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
    return _forward(_C.cuda_logprob, logits, ids, options, None)


def cuda_logprob_entropy(
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
    return _with_entropy(_C.cuda_logprob, logits, ids, options)


def cuda_logprob_backward(
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
    """Gradient of the logits, contiguous and in their dtype."""
    options = (mask, temperature, temperatures, softcap, ignore_index)
    return _backward(
        _C.cuda_logprob_backward, grad_logprob, grad_entropy, logits, ids, options, row_max,
        log_sum, entropy,
    )  # fmt: skip
