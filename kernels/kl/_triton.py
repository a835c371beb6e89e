"""KL divergence in Triton: the launches of `_triton_exact.py`, what is compiled ahead of time."""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.launch import flat, gradient_of, inverse, on_device_of, rows_of

from ._triton_estimate import BLOCK, estimate_kernel, kl_estimate, kl_estimate_backward
from ._triton_exact import backward_kernel, forward_kernel, one_pass_kernel
from .reference import IGNORE_INDEX

__all__ = [
    "kl_divergence",
    "kl_divergence_and_grad",
    "kl_divergence_and_grad_inplace",
    "kl_divergence_backward",
    "kl_divergence_full",
    "kl_estimate",
    "kl_estimate_backward",
]

# (largest vocabulary, log2 of the lanes, warps): 8 lanes per thread, as in the log-prob room, where
# a lane's state is now seven numbers. Both passes in one kernel take 4 per thread: it spills with
# 8, and with 512 threads on sm_80. From that reasoning alone: not tuned on a GPU.
SHAPES = ((1024, 8, 1), (4096, 9, 2), (32768, 10, 4), (None, 11, 8))
ONE_PASS_SHAPES = ((1024, 8, 2), (4096, 9, 4), (None, 10, 8))


# --------------------------------------------------------------------------- ahead of time


def _aot(kernel, dtype, constants, warps, *, ref_dtype=None, without=()):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    types = {name: "*fp32:16" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {
        "logits_ptr": f"*{dtype}:16", "ref_logits_ptr": f"*{ref_dtype or dtype}:16",
        "out_ptr": f"*{dtype}:16", "ids_ptr": "*i64:16", "mask_ptr": "*i1:16", "V": "i32:16",
        "inner": "i32", "stride_outer": "i32:16", "stride_inner": "i32:16", "ref_inner": "i32",
        "ref_stride_outer": "i32:16", "ref_stride_inner": "i32:16", "ignore_index": "i32",
        "inv_temperature": "fp32", "size": "i32", "clamp_in": "fp32", "clamp_out": "fp32",
    }  # fmt: skip
    names = [name for name in kernel.arg_names if name not in constants and name not in without]
    return kernel, {name: types[name] for name in names}, constants, warps


def _aot_rows(dtype, log2_lanes, warps, **options):
    """Forward and backward of exact KL at one shape."""
    return (
        _aot(forward_kernel, dtype, {"LOG2_LANES": log2_lanes}, warps, **options),
        _aot(backward_kernel, dtype, {"BLOCK_V": 2 << log2_lanes}, warps, **options),
    )


def _aot_one_pass(dtype, log2_lanes, warps, **options):
    sizes = {"LOG2_LANES": log2_lanes, "BLOCK_V": 2 << log2_lanes}
    return _aot(one_pass_kernel, dtype, sizes, warps, **options)


_BESIDE_KL = (
    "ids_ptr", "logprob_ptr", "ref_logprob_ptr", "entropy_ptr", "grad_logprob_ptr",
    "grad_entropy_ptr",
)  # fmt: skip

# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot(estimate_kernel, "fp32", {"ESTIMATOR": 3, "BLOCK": BLOCK}, 4, without=without)
      for without in ((), ("grad_ptr",))),
    *(entry
      for _, log2_lanes, warps in SHAPES
      for entry in _aot_rows("bf16", log2_lanes, warps, without=("temperatures_ptr",))),
    *_aot_rows("fp32", *SHAPES[-1][1:], without=("temperatures_ptr", *_BESIDE_KL)),
    *_aot_rows("bf16", *SHAPES[-1][1:], ref_dtype="fp32"),
    *(_aot_one_pass("bf16", *shape[1:], without=("temperatures_ptr",))
      for shape in ONE_PASS_SHAPES),
    _aot_one_pass("fp32", *ONE_PASS_SHAPES[-1][1:], without=("grad_logprob_ptr",)),
    _aot_one_pass("bf16", *ONE_PASS_SHAPES[-1][1:], ref_dtype="fp32"),
]  # fmt: skip


# --------------------------------------------------------------------------- launchers


def _shape(vocabulary: int, shapes=SHAPES) -> tuple[int, int]:
    """(log2 of the lanes, warps)."""
    for largest, log2_lanes, warps in shapes:
        if largest is None or vocabulary <= largest:
            return log2_lanes, warps
    raise AssertionError("the last entry has None")


def _forward(logits, ref_logits, ids, mask, temperature, temperatures):
    rows, vocabulary = logits.shape[:-1], logits.shape[-1]

    def vector():
        return torch.empty(rows, dtype=torch.float32, device=logits.device)

    beside = (vector(), vector(), vector()) if ids is not None else (None, None, None)
    kl, *stats = (vector() for _ in range(5))
    if kl.numel():
        log2_lanes, warps = _shape(vocabulary)
        logits, *strides = rows_of(logits)
        ref_logits, *ref_strides = rows_of(ref_logits)
        with on_device_of(logits):
            forward_kernel[(kl.numel(),)](
                logits, ref_logits, flat(ids), flat(mask), flat(temperatures), kl, *beside, *stats,
                *strides, *ref_strides, vocabulary, IGNORE_INDEX, inverse(temperature), log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return kl, *beside, *stats


def kl_divergence(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, row_max, log_sum, ref_row_max, ref_log_sum), each of the shape of a row index."""
    out = _forward(logits, ref_logits, None, mask, temperature, temperatures)
    return out[0], *out[4:]


def kl_divergence_full(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum)."""
    return _forward(logits, ref_logits, ids, mask, temperature, temperatures)


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
    out = gradient_of(logits, out)
    if out.numel():
        vocabulary = logits.shape[-1]
        log2_lanes, warps = _shape(vocabulary)
        logits, *strides = rows_of(logits)
        ref_logits, *ref_strides = rows_of(ref_logits)
        saved = map(flat, (row_max, log_sum, ref_row_max, ref_log_sum, kl, entropy))
        with on_device_of(logits):
            backward_kernel[(kl.numel(),)](
                flat(grad_kl), flat(grad_logprob), flat(grad_entropy), logits, ref_logits,
                flat(ids), flat(mask), flat(temperatures), *saved, out, *strides, *ref_strides,
                vocabulary, IGNORE_INDEX, inverse(temperature), 2 << log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _one_pass(logits, ref_logits, ids, grads, mask, temperature, temperatures, out):
    values = [torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(8)]
    out = gradient_of(logits, out)
    if ids.numel():
        vocabulary = logits.shape[-1]
        log2_lanes, warps = _shape(vocabulary, ONE_PASS_SHAPES)
        logits, *strides = rows_of(logits)
        ref_logits, *ref_strides = rows_of(ref_logits)
        with on_device_of(logits):
            one_pass_kernel[(ids.numel(),)](
                *map(flat, grads), logits, ref_logits, flat(ids), flat(mask), flat(temperatures),
                *values, out, *strides, *ref_strides, vocabulary, IGNORE_INDEX,
                inverse(temperature), log2_lanes, 2 << log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
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
