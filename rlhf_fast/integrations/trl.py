"""TRL: log-probs and entropies of every trainer, and the helpers of its PPO while it had one.

TRL 1.13 removed PPO; 1.12.0 is the last version with `trl.experimental.ppo`. Its GAE and its loss
are written inline in `PPOTrainer.train` and cannot be replaced from outside.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.integrations._rebind import Patch, Target, entropy, patch_project, rows_fit

KNOWN = ("1.12.0", "1.16.0")

# No id is ever ignored: TRL looks every one of them up.
_NO_ID = torch.iinfo(torch.int32).min
_NOT_OURS = {"log_sum_sq_probs", "mean_logits", "is_top1"}


def _result_type(original: Callable) -> Callable[[torch.Tensor], torch.dtype]:
    """TRL's dtype of results: the logits', but float32 where TRL runs a fused kernel of its own."""
    fused = hasattr(sys.modules.get(original.__module__), "_supports_trl_loss_kernel")

    def result_type(logits: torch.Tensor) -> torch.dtype:
        half = logits.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if fused and logits.is_cuda and half else logits.dtype

    return result_type


def _options(temperature: float = 1.0, row_mask: torch.Tensor | None = None) -> dict[str, Any]:
    return {"temperature": temperature, "mask": row_mask, "ignore_index": _NO_ID}


def _selective_log_softmax(original: Callable) -> Callable:
    result_type = _result_type(original)

    @functools.wraps(original)
    def selective_log_softmax(logits, index, *args, **kwargs):
        if not rows_fit(logits, index):  # K ids a row, for one
            return original(logits, index, *args, **kwargs)
        out = rlhf_fast.logprob(logits, index, **_options(*args, **kwargs))
        return out.to(result_type(logits))

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Callable) -> Callable:
    result_type = _result_type(original)

    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, *args, **kwargs
    ):
        if not rows_fit(logits, index):
            return original(logits, index, entropy_requires_grad, *args, **kwargs)
        out = rlhf_fast.logprob_entropy(logits, index, **_options(*args, **kwargs))
        entropies = out.entropy if entropy_requires_grad else out.entropy.detach()
        return out.logprob.to(result_type(logits)), entropies.to(result_type(logits))

    return selective_log_softmax_and_entropy


def _entropy_from_logits(original: Callable) -> Callable:
    result_type = _result_type(original)

    @functools.wraps(original)
    def entropy_from_logits(logits, chunk_size=128):
        return entropy(logits).to(result_type(logits))

    return entropy_from_logits


def _head_fits(hidden: torch.Tensor, weight: torch.Tensor, outputs: tuple[str, ...]) -> bool:
    """Whether `linear_logprob_entropy` computes what is asked for, in the precision asked for."""
    device = hidden.device.type
    mixed = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != hidden.dtype
    return (
        not _NOT_OURS.intersection(outputs)
        and device in ("cpu", "cuda")
        and hidden.dtype == weight.dtype
        and not mixed
        # DeepSpeed's ZeRO-3 gathers the weight again in the backward pass: only TRL's own asks it.
        and not hasattr(weight, "ds_id")
    )


def _chunked(original: Any) -> Any:
    """TRL's autograd function over the head, which trainers call as `.apply(hidden, weight, ...)`.

    1.16 returns (logprobs, entropy, three statistics that we do not compute); 1.12 has no bias and
    returns (logprobs, entropy), the entropy without gradient.
    """
    signature = inspect.signature(original.forward)
    with_bias = "bias" in signature.parameters

    class ChunkedLogProbFunction:
        """`trl.trainer.utils._ChunkedLogProbFunction` through rlhf_fast's linear ops."""

        @staticmethod
        def apply(*args):
            bound = signature.bind(None, *args)
            bound.apply_defaults()
            _, hidden, weight = list(bound.arguments.values())[:3]
            named = bound.arguments
            outputs = named.get("outputs", ("entropy",))
            if not _head_fits(hidden, weight, outputs):
                return original.apply(*args)
            bias, scale = named.get("bias"), named["logit_scale"]
            # TRL's bias stands before the scale, ours behind it.
            bias = bias if bias is None or scale == 1.0 else bias * scale
            options = {
                "bias": bias,
                "temperature": named["temperature"],
                "softcap": named["final_logit_softcapping"],
                "logit_scale": scale,
                "ignore_index": _NO_ID,
            }
            if "entropy" not in outputs:
                out = rlhf_fast.linear_logprob(hidden, weight, named["targets"], **options)
                return out.float(), None, None, None, None
            both = rlhf_fast.linear_logprob_entropy(hidden, weight, named["targets"], **options)
            logprob, entropies = both.logprob.float(), both.entropy.float()
            if not with_bias:
                return logprob, entropies.detach()
            return logprob, entropies, None, None, None

    return ChunkedLogProbFunction


def _masked_whiten(original: Callable) -> Callable:
    @functools.wraps(original)
    def masked_whiten(values, mask, shift_mean=True):
        if values.requires_grad or mask.shape != values.shape:
            return original(values, mask, shift_mean)
        return rlhf_fast.whiten(values, mask, shift_mean=shift_mean).to(values.dtype)

    return masked_whiten


def _masked_mean(original: Callable) -> Callable:
    @functools.wraps(original)
    def masked_mean(values, mask, axis=None):
        dims = tuple(range(values.ndim)) if axis is None else axis
        count = mask.sum(dims)
        total = (torch.where(mask != 0, values, 0.0) * mask).sum(dims)
        return total / torch.where(count == 0, 1, count)

    return masked_mean


_UTILS = "trl.trainer.utils"
_PPO = "trl.experimental.ppo.ppo_trainer"
_TARGETS = (
    Target(_UTILS, "selective_log_softmax", _selective_log_softmax),
    Target(_UTILS, "selective_log_softmax_and_entropy", _selective_log_softmax_and_entropy),
    Target(_UTILS, "entropy_from_logits", _entropy_from_logits),
    Target(_UTILS, "_ChunkedLogProbFunction", _chunked),
    Target(_PPO, "masked_whiten", _masked_whiten),
    Target(_PPO, "masked_mean", _masked_mean),
)


def patch(force: bool = False) -> Patch:
    """Make TRL's trainers call rlhf_fast, until the returned handle's `undo()`.

    Replaced in `trl.trainer.utils` and wherever it was imported from there:
    `selective_log_softmax`, `selective_log_softmax_and_entropy`, `entropy_from_logits` and
    `_ChunkedLogProbFunction` (the head of GRPO, RLOO and other trainers); in 1.12 also
    `masked_whiten` and `masked_mean` of the PPO trainer. Results keep TRL's dtypes. What we do not
    compute goes to TRL's own code: K ids a row, a head that is also asked for `log_sum_sq_probs`,
    `mean_logits` or `is_top1` (SFT asks for is_top1), mixed precision (autocast to another dtype
    than the weight's), and DeepSpeed ZeRO-3.

    Differences: a -inf logit adds 0 to the entropy (TRL: NaN). `masked_whiten` gives 0 where masked
    (its callers overwrite these), and 0 instead of an error or NaN for one token or none. A NaN
    under the mask does not spread through `masked_mean`, which is 0 where nothing counts.

    Args:
        force: patch a version that was not tested, as far as its names are known.

    Returns:
        A handle with `sites` and `undo()`, which is a context manager too. While a patch is in
        force, `patch()` returns the same handle.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a version other than 1.12.0 and 1.16.0 without `force`.

    >>> with rlhf_fast.integrations.trl.patch() as patched:
    ...     trainer.train()
    """
    return patch_project("trl", KNOWN, _TARGETS, force=force)
