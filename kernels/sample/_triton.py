"""Sampling and replay in Triton: small kernels, one program per row, no atomics.

    stats    the largest logit, sum exp, entropy: one pass                     (this file)
    cut      where the kept set ends, if a filter or greed is on              (_triton_cut.py)
    draw     the race among the kept tokens, and what is said of the winner   (_triton_draw.py)
    replay   the same of a given token; backward: its gradient                (this file)

One kernel for everything compiles slowly and needs a stack. Each kernel reads the row again, which
the caches hold. In a row that has NaN, +inf or nothing that can be drawn the sum of exponentials is
not above 0, by which the later kernels know it.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import (
    LN_2,
    LOG2_E,
    expm1,
    online_merge,
    online_step,
)
from rlhf_fast.kernels._common.launch import flat, on_device_of, rows_of

from ._triton_cut import masses_kernel, top_k_kernel, top_p_kernel
from ._triton_draw import draw_kernel, kept_sum, logprob_of, logs_of
from ._triton_rows import (
    is_kept,
    logits_at,
    origin_of,
    rate_of,
    row_at,
    temperature_of,
)

# (largest vocabulary, log2 of the lanes, warps): 4 lanes per thread. A decode step has fewer rows
# than a GPU has multiprocessors, so that a row gets many warps. Not tuned on a GPU.
SHAPES = ((1024, 9, 4), (None, 11, 16))
# Top-p has twice the lanes, and 100 registers: for 4 per thread ptxas aims at 64, and spills.
TOP_P_WIDER = 1
# Top-p keeps the probabilities of this many rows at a time.
ROWS_AT_ONCE = 256


@triton.jit(do_not_specialize=["inner"])
def _stats_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ptr, total_ptr, entropy_ptr, inner, stride_outer,
    stride_inner, mask_stride, V, temperature, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """The largest logit, the sum of exp((z - max) / t), and the entropy if it has a place."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    WEIGHTED: tl.constexpr = entropy_ptr is not None
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    rate = rate_of(t) * LOG2_E
    base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    lane = tl.arange(0, LANES)
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, V, 4 * LANES):
        cols = start + lane
        z0 = logits_at(base, mask_ptr, cols, V)
        z1 = logits_at(base, mask_ptr, cols + LANES, V)
        z2 = logits_at(base, mask_ptr, cols + 2 * LANES, V)
        z3 = logits_at(base, mask_ptr, cols + 3 * LANES, V)
        top, total, weighted = online_step(top, total, weighted, z0, z1, z2, z3, rate, WEIGHTED)
    row_top, row_total, row_weighted = online_merge(
        top, total, weighted, rate, LOG2_LANES, WEIGHTED
    )
    tl.store(top_ptr + row, row_top)
    tl.store(total_ptr + row, row_total)
    if WEIGHTED:
        counts = (row_total > 0.0) & (greedy == 0)
        row_total = tl.where(counts, row_total, 1.0)
        entropy = tl.log(row_total) - row_weighted / row_total * LN_2
        tl.store(entropy_ptr + row, tl.where(counts, entropy, 0.0))


@triton.jit(do_not_specialize=["inner"])
def _replay_kernel(
    logits_ptr, temperatures_ptr, top_ptr, total_ptr, tau_ptr, last_ptr, ids_ptr, logprob_ptr,
    log_mass_ptr, log_kept_ptr, log_sum_ptr, inner, stride_outer, stride_inner, V, temperature,
    LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """Log-prob and log-mass of a given token, and the two logarithms that the gradient needs."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    logprob = float("-inf")
    log_mass = 0.0
    log_kept = 0.0
    log_sum = 0.0
    if total > 0.0:
        tau = tl.load(tau_ptr + row)
        last = tl.load(last_ptr + row).to(tl.int32)
        token = tl.load(ids_ptr + row)
        base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
        origin, _ = origin_of(top, t)
        part = 1.0
        if (tau > float("-inf")) & (greedy == 0):
            part = kept_sum(base, None, V, t, origin, top, tau, last, LANES, LOG2_LANES)
        kept_log, sum_log, mass_log = logs_of(total, part, tau, greedy)
        inside = (token >= 0) & (token < V)
        z = tl.load(base + token, mask=inside, other=float("-inf")).to(tl.float32)
        if is_kept(tl.div_rn(z - origin, t), token, tau, last) & (z > float("-inf")):
            logprob = logprob_of(z, top, t, kept_log)
        log_mass = mass_log.to(tl.float32)
        log_kept = kept_log.to(tl.float32)
        log_sum = sum_log.to(tl.float32)
    elif total != 0.0:
        logprob = float("nan")
        log_mass = tl.where(greedy, 0.0, float("nan"))
        log_kept = float("nan")
        log_sum = float("nan")
    tl.store(logprob_ptr + row, logprob)
    tl.store(log_mass_ptr + row, log_mass)
    tl.store(log_kept_ptr + row, log_kept)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit(do_not_specialize=["inner"])
def _backward_kernel(
    logits_ptr, temperatures_ptr, ids_ptr, grad_logprob_ptr, grad_log_mass_ptr, tau_ptr, last_ptr,
    log_kept_ptr, log_sum_ptr, out_ptr, inner, stride_outer, stride_inner, V, temperature,
    LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's logits: reference.py has the formulas."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    rate = rate_of(t)
    base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
    lane = tl.arange(0, LANES)
    tops = tl.full([LANES], float("-inf"), tl.float32)
    for start in range(0, V, LANES):
        tops = tl.maximum(tops, logits_at(base, None, start + lane, V))
    top = tl.max(tops, axis=0)
    origin, _ = origin_of(top, t)
    top = tl.where(top == float("-inf"), 0.0, top)
    tau = tl.load(tau_ptr + row)
    last = tl.load(last_ptr + row).to(tl.int32)
    log_kept = tl.load(log_kept_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    token = tl.load(ids_ptr + row)
    inside = (token >= 0) & (token < V)
    chosen = tl.load(base + token, mask=inside, other=float("-inf")).to(tl.float32)
    kept = is_kept(tl.div_rn(chosen - origin, t), token, tau, last) & (chosen > float("-inf"))
    logprob = logprob_of(chosen, top, t, log_kept.to(tl.float64))
    g = tl.load(grad_logprob_ptr + row) * rate
    g = tl.where(kept | (log_kept != log_kept), g, 0.0)
    h = tl.where(greedy, 0.0, tl.load(grad_log_mass_ptr + row) * rate)
    g_token = -g * expm1(tl.where(kept, logprob, 0.0 * log_kept))
    out_ptr += row * V
    for start in range(0, V, LANES):
        cols = start + lane
        z = logits_at(base, None, cols, V)
        d = (z - top) * rate
        p = tl.exp2((d - log_sum) * LOG2_E)
        q = tl.exp2((d - log_kept) * LOG2_E)
        q = tl.where(is_kept(tl.div_rn(z - origin, t), cols, tau, last), q, 0.0)
        du = tl.where(cols == token, g_token, -g * q) + h * (q - p)
        tl.store(out_ptr + cols, du.to(out_ptr.dtype.element_ty), mask=cols < V)


def _aot(kernel, dtype, log2_lanes, warps, *, mask=False, per_row=False, cut=True, entropy=True):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    names = kernel.arg_names
    vectors = dict.fromkeys(names, "*fp32:16")
    vectors |= dict.fromkeys(("seeds_ptr", "positions_ptr", "last_ptr", "ids_ptr"), "*i64:16")
    vectors |= {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", "mask_ptr": "*i1:16"}
    vectors |= {"sum_ptr": "*fp64:16", "whole_ptr": "*i64:16"}
    vectors |= {"top_ks_ptr": "*i64:16", "top_ps_ptr": "*fp64:16", "min_ps_ptr": "*fp64:16"}
    numbers = dict.fromkeys(("stride_outer", "stride_inner", "mask_stride", "V"), "i32:16")
    numbers |= dict.fromkeys(("inner", "first", "top_k"), "i32")
    numbers |= dict.fromkeys(("temperature", "limit", "min_p"), "fp32")
    numbers |= dict.fromkeys(("seed", "position"), "i64")
    absent = set() if mask else {"mask_ptr"}
    absent |= set() if cut or kernel is not draw_kernel else {"tau_ptr", "last_ptr"}
    absent |= set() if entropy else {"entropy_ptr"}
    if not per_row:
        absent |= {"temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"}
        absent |= {"seeds_ptr", "positions_ptr"}
    types = {name: {**vectors, **numbers}[name] for name in names if name != "LOG2_LANES"}
    types = {name: kind for name, kind in types.items() if name not in absent}
    log2_lanes += TOP_P_WIDER if kernel is top_p_kernel else 0
    return kernel, types, {"LOG2_LANES": log2_lanes}, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    _aot(kernel, dtype, *SHAPES[size][1:], **options)
    for kernel, variants in (
        (_stats_kernel, ({}, {"entropy": False})),
        (top_k_kernel, ({},)),
        (masses_kernel, ({},)),
        (top_p_kernel, ({},)),
        (draw_kernel, ({}, {"cut": False})),
        (_replay_kernel, ({},)),
        (_backward_kernel, ({},)),
    )
    for dtype, size, options in (
        *(("bf16", 1, options) for options in variants),
        ("bf16", 0, {}),
        ("fp32", 1, {"mask": True, "per_row": True}),
    )
]


class _Rows:
    """The logits and the parameters of each row as the kernels take them."""

    def __init__(self, logits, rows, mask, temperature, temperatures) -> None:
        self.device, self.count, self.vocabulary = logits.device, rows, logits.shape[-1]
        self.logits, *strides = rows_of(logits)
        if mask is not None and mask.stride(-1) != 1 and self.vocabulary > 1:
            mask = mask.contiguous()
        self.mask, self.temperatures = mask, flat(temperatures)
        self.mask_stride = 0 if mask is None else mask.stride(0)
        self.strides = strides
        self.temperature = min(temperature, 3e38)
        lanes = (x for x in SHAPES if x[0] is None or self.vocabulary <= x[0])
        _, self.log2_lanes, warps = next(lanes)
        self.options = {"num_warps": warps, "enable_fp_fusion": False}

    def empty(self, dtype: torch.dtype, *width: int) -> torch.Tensor:
        return torch.empty((self.count, *width), dtype=dtype, device=self.device)

    def stats(self, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(largest logit, sum of exponentials) of each row."""
        top, total = self.empty(torch.float32), self.empty(torch.float32)
        _stats_kernel[(self.count,)](
            self.logits, self.mask, self.temperatures, top, total, entropy, *self.strides,
            self.mask_stride, self.vocabulary, self.temperature, self.log2_lanes, **self.options,
        )  # fmt: skip
        return top, total

    def cut(
        self, top, total, top_k, top_ks, top_p, top_ps, min_p, min_ps
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(tau, last) of each row; None where the parameters cut no row."""
        whole = self.temperatures is None and self.temperature > 0
        whole = whole and top_ks is None and not 0 < top_k < self.vocabulary
        masses = top_ps is not None or top_p < 1
        if whole and not masses and min_ps is None and min_p == 0:
            return None, None
        tau, last = self.empty(torch.float32), self.empty(torch.int64)
        top_ks, top_ps, min_ps = flat(top_ks), flat(top_ps), flat(min_ps)
        limit, min_p = _rounded(1 - top_p), _rounded(min_p)
        sizes = *self.strides, self.mask_stride, self.vocabulary, self.temperature
        rows = self.logits, self.mask, self.temperatures, top, total
        top_k_kernel[(self.count,)](
            *rows, top_ks, top_ps, min_ps, tau, last, *sizes, top_k, limit, min_p, self.log2_lanes,
            **self.options,
        )  # fmt: skip
        if masses:
            step = min(self.count, ROWS_AT_ONCE)
            size = step, self.vocabulary
            q = torch.empty(size, dtype=torch.float32, device=self.device)
            sums, whole = self.empty(torch.float64), self.empty(torch.int64)
            for first in range(0, self.count, step):
                grid = (min(step, self.count - first),)
                masses_kernel[grid](
                    *rows, top_ps, tau, q, sums, whole, *sizes, first, limit, self.log2_lanes,
                    **self.options,
                )  # fmt: skip
                top_p_kernel[grid](
                    *rows, top_ps, min_ps, q, sums, whole, tau, last, *sizes, first, limit, min_p,
                    self.log2_lanes + TOP_P_WIDER, **self.options,
                )  # fmt: skip
        return tau, last


def _rounded(x: float) -> float:
    """The nearest float32."""
    return ctypes.c_float(x).value


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
    """(ids, logprob, log_mass, entropy), each [B]; -1, -inf, 0, 0 in a row without a token."""
    rows = _Rows(logits, logits.shape[0], logit_mask, temperature, temperatures)
    ids = rows.empty(torch.int64)
    logprob, log_mass, entropy = (rows.empty(torch.float32) for _ in range(3))
    if rows.count:
        with on_device_of(logits):
            top, total = rows.stats(entropy)
            tau, last = rows.cut(top, total, top_k, top_ks, top_p, top_ps, min_p, min_ps)
            draw_kernel[(rows.count,)](
                rows.logits, rows.mask, rows.temperatures, top, total, tau, last, seeds, positions,
                ids, logprob, log_mass, *rows.strides, rows.mask_stride, rows.vocabulary,
                rows.temperature, seed, position, rows.log2_lanes, **rows.options,
            )  # fmt: skip
    return ids, logprob, log_mass, entropy


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
    rows = _Rows(logits, ids.numel(), None, temperature, temperatures)
    logprob, log_mass, log_kept, log_sum = (rows.empty(torch.float32) for _ in range(4))
    tau, last = rows.empty(torch.float32), rows.empty(torch.int64)
    if rows.count:
        with on_device_of(logits):
            top, total = rows.stats(None)
            cut = rows.cut(top, total, top_k, top_ks, top_p, top_ps, min_p, min_ps)
            tau, last = cut if cut[0] is not None else (tau.fill_(-torch.inf), last.fill_(-1))
            _replay_kernel[(rows.count,)](
                rows.logits, rows.temperatures, top, total, tau, last, flat(ids), logprob, log_mass,
                log_kept, log_sum, *rows.strides, rows.vocabulary, rows.temperature,
                rows.log2_lanes, **rows.options,
            )  # fmt: skip
    return tuple(x.view(ids.shape) for x in (logprob, log_mass, tau, last, log_kept, log_sum))


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
    rows = _Rows(logits, ids.numel(), None, temperature, temperatures)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows.count:
        vectors = ids, grad_logprob, grad_log_mass, tau, last, log_kept, log_sum
        with on_device_of(logits):
            _backward_kernel[(rows.count,)](
                rows.logits, rows.temperatures, *map(flat, vectors), out, *rows.strides,
                rows.vocabulary, rows.temperature, rows.log2_lanes, **rows.options,
            )  # fmt: skip
    return out
