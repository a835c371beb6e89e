"""Calls of the native sampling kernels, for tensors on the CPU and, of `sample`, on CUDA devices.

Logits are addressed by two strides where that is possible (`rows_of`) and copied where it is not.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.launch import flat, rows_of
from rlhf_fast.kernels._common.native import address, dtype_number, kernel

from ._checks import check_logits


class _Rows:
    """The logits and the parameters of each row; keeps copies alive until the call is over."""

    def __init__(
        self, logits, rows, temperature, temperatures, top_k=0, top_ks=None, top_p=1.0,
        top_ps=None, min_p=0.0, min_ps=None,
    ) -> None:  # fmt: skip
        dtype = dtype_number("logits", logits)
        self.logits, *strides = rows_of(logits)
        self.vectors = [flat(x) for x in (temperatures, top_ks, top_ps, min_ps)]
        temperatures, top_ks, top_ps, min_ps = map(address, self.vectors)
        self.arguments = (
            self.logits.data_ptr(), dtype, rows, logits.shape[-1], *strides,
            min(temperature, 3e38), temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps,
        )  # fmt: skip


def _empty(shape, device: torch.device, *dtypes: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]


def sample(
    logits: torch.Tensor,
    logit_mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    top_k: int,
    top_ks: torch.Tensor | None,
    top_p: float,
    top_ps: torch.Tensor | None,
    min_p: float,
    min_ps: torch.Tensor | None,
    seed: int,
    seeds: torch.Tensor | None,
    position: int,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, logprob, log_mass, entropy), each [B].

    For a row that cannot be drawn from it raises, or on CUDA says -1, -inf, 0, 0.
    """
    count = logits.shape[0]
    single = torch.float32
    out = _empty((count,), logits.device, torch.int64, single, single, single)
    if count == 0:
        return tuple(out)
    rows = _Rows(
        logits, count, temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps
    )
    mask = logit_mask
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    drawn = kernel("sample", logits)(
        rows.arguments,
        (
            address(mask), 0 if mask is None else mask.stride(0), seed, address(seeds), position,
            address(positions), *(x.data_ptr() for x in out),
        ),
    )  # fmt: skip
    if not (logits.is_cuda or drawn):
        check_logits(logits, logit_mask)
    return tuple(out)


def replay_logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    temperatures: torch.Tensor | None,
    top_k: int,
    top_ks: torch.Tensor | None,
    top_p: float,
    top_ps: torch.Tensor | None,
    min_p: float,
    min_ps: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(logprob, log_mass, tau, last, log_kept, log_sum), each of the shape of `ids`."""
    single = torch.float32
    out = _empty(ids.shape, logits.device, single, single, single, torch.int64, single, single)
    if ids.numel():
        rows = _Rows(
            logits, ids.numel(), temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p,
            min_ps,
        )  # fmt: skip
        y = flat(ids).to(torch.int64)
        kernel("replay_logprob", logits)(rows.arguments, y.data_ptr(), *(x.data_ptr() for x in out))
    return tuple(out)


def replay_logprob_backward(
    grad_logprob: torch.Tensor,
    grad_log_mass: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    temperatures: torch.Tensor | None,
    tau: torch.Tensor,
    last: torch.Tensor,
    log_kept: torch.Tensor,
    log_sum: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the logits, contiguous and in their dtype, with the kept set held fixed."""
    out = torch.empty(logits.shape, dtype=logits.dtype)
    if ids.numel():
        rows = _Rows(logits, ids.numel(), temperature, temperatures)
        vectors = grad_logprob, grad_log_mass, ids.to(torch.int64), tau, last, log_kept, log_sum
        vectors = [flat(x) for x in vectors]
        kernel("replay_logprob_backward", logits)(
            rows.arguments, *map(address, vectors), out.data_ptr()
        )
    return out
