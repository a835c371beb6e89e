"""Token log-probability and entropy in Triton: one program per row.

The forward reads each logit once and keeps a softmax state per lane; the backward reads once and
writes once, from the end of the row, which a forward in the same program read last. Nothing crosses
rows, nothing is atomic, and no sum's order depends on the layout of the input, so a row gives the
same bits in any batch. `row_max` is here the largest logit before the temperature: (z - max) / t
loses nothing under a common offset, where z / t - max / t would.

On CUDA, where ids are not checked, an id out of range reads no memory and gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import (
    LN_2,
    LOG2_E,
    NOT_HERE,
    expm1,
    online_merge,
    online_step,
    row_rate,
    softcapped,
)
from rlhf_fast.kernels._common.launch import flat, gradient_of, inverse, on_device_of, rows_of

# (largest vocabulary, log2 of the lanes, warps). Every entry gives a thread 8 lanes: one 16-byte
# load of half-precision logits, and few enough registers (SHAPES x architectures in
# tests/data/triton_resources.json) for 20 or more warps on a multiprocessor. Small vocabularies get
# few lanes so that one step covers the row. From this reasoning alone: not tuned on a GPU.
SHAPES = ((1024, 8, 1), (4096, 9, 2), (32768, 10, 4), (None, 11, 8))


@triton.jit
def _token(ids_ptr, mask_ptr, ignore_index, row):
    """(id, whether the token counts)."""
    token = tl.load(ids_ptr + row).to(tl.int64)
    live = token != ignore_index
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)
    return token, live


@triton.jit
def _logits(base, cols, limit, softcap, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(base + cols, mask=(cols >= 0) & (cols < limit), other=float("-inf")).to(tl.float32)
    if HAS_SOFTCAP:
        z, _ = softcapped(z, softcap)
    return z


@triton.jit(do_not_specialize=["ignore_index", "inner"])
def _forward_kernel(
    logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    inner, stride_outer, stride_inner, V, ignore_index, inv_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    WEIGHTED: tl.constexpr = entropy_ptr is not None
    token, live = _token(ids_ptr, mask_ptr, ignore_index, row)
    if live:
        rate = row_rate(inv_temperature, temperatures_ptr, row)
        base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
        lane = tl.arange(0, LANES)
        top = tl.full([LANES], float("-inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        weighted = tl.zeros([LANES], tl.float32)
        for start in range(0, V, 4 * LANES):
            cols = start + lane
            x0 = _logits(base, cols, V, softcap, HAS_SOFTCAP)
            x1 = _logits(base, cols + LANES, V, softcap, HAS_SOFTCAP)
            x2 = _logits(base, cols + 2 * LANES, V, softcap, HAS_SOFTCAP)
            x3 = _logits(base, cols + 3 * LANES, V, softcap, HAS_SOFTCAP)
            top, total, weighted = online_step(
                top, total, weighted, x0, x1, x2, x3, rate * LOG2_E, WEIGHTED
            )
        row_max, total_sum, weighted_sum = online_merge(
            top, total, weighted, rate * LOG2_E, LOG2_LANES, WEIGHTED
        )
        empty = total_sum == 0.0
        total_sum = tl.where(empty, 1.0, total_sum)
        log_sum = tl.log(total_sum)
        chosen = _logits(base, token, V, softcap, HAS_SOFTCAP)
        chosen = tl.where((token >= 0) & (token < V), chosen, float("nan"))
        shift = tl.where(empty, 0.0, row_max)
        tl.store(logprob_ptr + row, (chosen - shift) * rate - log_sum)
        tl.store(max_ptr + row, row_max)
        tl.store(log_sum_ptr + row, log_sum)
        if WEIGHTED:
            tl.store(entropy_ptr + row, log_sum - weighted_sum / total_sum * LN_2)
    else:
        tl.store(logprob_ptr + row, 0.0)
        tl.store(max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        if WEIGHTED:
            tl.store(entropy_ptr + row, 0.0)


@triton.jit(do_not_specialize=["ignore_index", "inner"])
def _backward_kernel(
    grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, max_ptr,
    log_sum_ptr, entropy_ptr, out_ptr, places_ptr, inner, stride_outer, stride_inner, V,
    ignore_index, inv_temperature, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row
    if places_ptr is not None:
        place = tl.load(places_ptr + row)
    out_ptr += place * V
    lane = tl.arange(0, BLOCK_V)
    token, live = _token(ids_ptr, mask_ptr, ignore_index, row)
    if live & (place >= 0):
        rate = row_rate(inv_temperature, temperatures_ptr, row)
        base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
        row_max = tl.load(max_ptr + row)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        log_sum = tl.load(log_sum_ptr + row)
        logprob = (_logits(base, token, V, softcap, HAS_SOFTCAP) - row_max) * rate - log_sum
        g = tl.load(grad_logprob_ptr + row) * rate
        inside = (token >= 0) & (token < V)
        g = tl.where(inside & (logprob == float("-inf")), 0.0, g)
        g = tl.where(inside | (token == NOT_HERE), g, float("nan"))
        g_token = -g * expm1(logprob)
        if grad_entropy_ptr is not None:
            h = tl.load(grad_entropy_ptr + row) * rate
            mean = log_sum - tl.load(entropy_ptr + row)
        tl.debug_barrier()  # out may be the logits: all warps have read the token's by now
        last = (V - 1) // BLOCK_V * BLOCK_V
        for back in range(0, V, BLOCK_V):
            cols = last - back + lane
            z = tl.load(base + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            if HAS_SOFTCAP:
                z, slope = softcapped(z, softcap)
            u = (z - row_max) * rate
            p = tl.exp2((u - log_sum) * LOG2_E)
            du = tl.where(cols == token, g_token, -g * p)
            if grad_entropy_ptr is not None:
                # p is 0 below -256; the floor keeps 0 * -inf out.
                du -= h * (p * (tl.maximum(u, -256.0) - mean))
            if HAS_SOFTCAP:
                du *= slope
            tl.store(out_ptr + cols, du.to(out_ptr.dtype.element_ty), mask=cols < V)
    elif place >= 0:
        for start in range(0, V, BLOCK_V):
            cols = start + lane
            zeros = tl.zeros([BLOCK_V], out_ptr.dtype.element_ty)
            tl.store(out_ptr + cols, zeros, mask=cols < V)


@triton.jit(do_not_specialize=["ignore_index", "inner"])
def _one_pass_kernel(
    grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ids_ptr, mask_ptr, temperatures_ptr,
    logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr, out_ptr, inner, stride_outer, stride_inner, V,
    ignore_index, inv_temperature, softcap, HAS_SOFTCAP: tl.constexpr, LOG2_LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    _forward_kernel(
        logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, logprob_ptr, entropy_ptr, max_ptr,
        log_sum_ptr, inner, stride_outer, stride_inner, V, ignore_index, inv_temperature, softcap,
        HAS_SOFTCAP, LOG2_LANES,
    )  # fmt: skip
    tl.debug_barrier()  # all warps see what the forward has stored
    _backward_kernel(
        grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ids_ptr, mask_ptr, temperatures_ptr,
        max_ptr, log_sum_ptr, entropy_ptr, out_ptr, None, inner, stride_outer, stride_inner, V,
        ignore_index, inv_temperature, softcap, HAS_SOFTCAP, BLOCK_V,
    )  # fmt: skip


def _aot(
    kernel, dtype, log2_lanes, warps, *, entropy=True, temperatures=False, softcap=False, out="",
    places=False,
):  # fmt: skip
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    vector, scalar = "*fp32:16", "fp32"
    signature = {
        "logits_ptr": f"*{dtype}:16", "ids_ptr": "*i64:16", "mask_ptr": "*i1:16",
        "logprob_ptr": vector, "max_ptr": vector, "log_sum_ptr": vector, "grad_logprob_ptr": vector,
        "out_ptr": f"*{out or dtype}:16", "inner": "i32", "stride_outer": "i32:16",
        "stride_inner": "i32:16", "V": "i32:16", "ignore_index": "i32", "inv_temperature": scalar,
        "softcap": scalar,
    }  # fmt: skip
    if entropy:
        signature |= {"entropy_ptr": vector, "grad_entropy_ptr": vector}
    if temperatures:
        signature["temperatures_ptr"] = vector
    if places:
        signature["places_ptr"] = "*i64:16"
    constants = {"HAS_SOFTCAP": softcap, "LOG2_LANES": log2_lanes, "BLOCK_V": 2 << log2_lanes}
    names = kernel.arg_names
    return (
        kernel,
        {name: signature[name] for name in names if name in signature},
        {name: constants[name] for name in names if name in constants},
        warps,
    )


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    _aot(kernel, dtype, log2_lanes, warps, **options)
    for kernel in (_forward_kernel, _backward_kernel, _one_pass_kernel)
    for dtype, (_, log2_lanes, warps), options in (
        *(("bf16", shape, {}) for shape in SHAPES),
        ("fp32", SHAPES[-1], {}),
        ("bf16", SHAPES[-1], {"entropy": False, "temperatures": True}),
        ("bf16", SHAPES[-1], {"softcap": True}),
    )
] + [
    _aot(_backward_kernel, "fp32", *SHAPES[-1][1:], out="bf16", places=places)
    for places in (False, True)
]


def _shape(vocabulary: int) -> tuple[int, int]:
    """(log2 of the lanes, warps)."""
    for largest, log2_lanes, warps in SHAPES:
        if largest is None or vocabulary <= largest:
            return log2_lanes, warps
    raise AssertionError("SHAPES ends with None")


def _forward(logits, ids, mask, temperature, temperatures, softcap, ignore_index, entropy):
    shape, vocabulary = ids.shape, logits.shape[-1]
    logprob, row_max, log_sum = (
        torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if ids.numel():
        log2_lanes, warps = _shape(vocabulary)
        logits, inner, stride_outer, stride_inner = rows_of(logits)
        with on_device_of(logits):
            _forward_kernel[(ids.numel(),)](
                logits, flat(ids), flat(mask), flat(temperatures), logprob, entropy, row_max,
                log_sum, inner, stride_outer, stride_inner, vocabulary, ignore_index,
                inverse(temperature), softcap or 0.0, softcap is not None, log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
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
    return _forward(logits, ids, mask, temperature, temperatures, softcap, ignore_index, None)


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
    entropy = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    lp, row_max, log_sum = _forward(
        logits, ids, mask, temperature, temperatures, softcap, ignore_index, entropy
    )
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
    out = gradient_of(logits, out, rounded=True, placed=places is not None)
    if ids.numel():
        vocabulary = logits.shape[-1]
        log2_lanes, warps = _shape(vocabulary)
        logits, inner, stride_outer, stride_inner = rows_of(logits)
        with on_device_of(logits):
            _backward_kernel[(ids.numel(),)](
                flat(grad_logprob), flat(grad_entropy), logits, flat(ids), flat(mask),
                flat(temperatures), flat(row_max), flat(log_sum), flat(entropy), out, flat(places),
                inner, stride_outer, stride_inner, vocabulary, ignore_index, inverse(temperature),
                softcap or 0.0, softcap is not None, 2 << log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _one_pass(grad_logprob, grad_entropy, logits, ids, options, out):
    mask, temperature, temperatures, softcap, ignore_index = options
    logprob, entropy, row_max, log_sum = (
        torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    out = gradient_of(logits, out)
    if ids.numel():
        vocabulary = logits.shape[-1]
        log2_lanes, warps = _shape(vocabulary)
        logits, inner, stride_outer, stride_inner = rows_of(logits)
        with on_device_of(logits):
            _one_pass_kernel[(ids.numel(),)](
                flat(grad_logprob), flat(grad_entropy), logits, flat(ids), flat(mask),
                flat(temperatures), logprob, entropy, row_max, log_sum, out, inner, stride_outer,
                stride_inner, vocabulary, ignore_index, inverse(temperature), softcap or 0.0,
                softcap is not None, log2_lanes, 2 << log2_lanes,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return logprob, entropy, out


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
