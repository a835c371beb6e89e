"""verl: log-probs, entropies, KL penalty, GAE with whitening, value loss."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import torch

import rlhf_fast
from rlhf_fast.integrations._rebind import Patch, Target, entropy, patch_project, rows_fit
from rlhf_fast.presets import preset

KNOWN = ("0.9.1",)

_ESTIMATORS = {
    "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3",
}  # fmt: skip


def _logprobs_from_logits(original: Callable) -> Callable:
    module = sys.modules.get(original.__module__)

    @functools.wraps(original)
    def logprobs_from_logits(logits, labels, inplace_backward=True):
        if not rows_fit(logits, labels):
            return original(logits, labels, inplace_backward)
        out = rlhf_fast.logprob(logits, labels)
        flash = getattr(module, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
        if flash and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1":
            return out  # verl's flash-attention path gives float32 too
        return out.to(logits.dtype)

    return logprobs_from_logits


def _entropy_from_logits(original: Callable) -> Callable:
    @functools.wraps(original)
    def entropy_from_logits(logits):
        return entropy(logits).to(logits.dtype)

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original: Callable) -> Callable:
    @functools.wraps(original)
    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        return entropy(logits).float()

    return entropy_from_logits_with_chunking


def _masked_whiten(original: Callable) -> Callable:
    @functools.wraps(original)
    def masked_whiten(values, mask, shift_mean=True):
        if values.requires_grad or mask.shape != values.shape:
            return original(values, mask, shift_mean)
        out = rlhf_fast.whiten(values, mask, shift_mean=shift_mean, **preset("verl")["whiten"])
        return out.to(values.dtype)

    return masked_whiten


def _compute_gae_advantage_return(original: Callable) -> Callable:
    @functools.wraps(original)
    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        advantages, returns = rlhf_fast.gae(
            token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=response_mask,
            **preset("verl")["gae"],
        )  # fmt: skip
        return rlhf_fast.whiten(advantages, response_mask, **preset("verl")["whiten"]), returns

    return compute_gae_advantage_return


def _kl_penalty(original: Callable) -> Callable:
    @functools.wraps(original)
    def kl_penalty(logprob, ref_logprob, kl_penalty):
        estimator = _ESTIMATORS.get(kl_penalty.removesuffix("+"))
        if estimator is None or logprob.shape != ref_logprob.shape:
            return original(logprob, ref_logprob, kl_penalty)
        clamp = preset("verl")["kl_estimate"]["clamp"] if estimator == "k3" else None
        kl = rlhf_fast.kl_estimate(logprob, ref_logprob, estimator=estimator, clamp=clamp)
        if kl_penalty.endswith("+") and estimator != "k2":
            # The value of this estimator with the gradient of k2.
            k2 = rlhf_fast.kl_estimate(logprob, ref_logprob, estimator="k2")
            kl = k2 - k2.detach() + kl.detach()
        return kl.to(torch.promote_types(logprob.dtype, ref_logprob.dtype))

    return kl_penalty


def _compute_value_loss(original: Callable) -> Callable:
    clipped = rlhf_fast.Loss.stats_names.index("value_clip_fraction")

    @functools.wraps(original)
    def compute_value_loss(
        vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean",
        dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None,
    ):  # fmt: skip
        reduction = loss_agg_mode.removesuffix("-norm")
        count = batch_num_tokens if reduction == "token-mean" else global_batch_size
        if reduction == "token-sum":
            count = 1
        if count is None and dp_size > 1:
            return original(
                vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, dp_size,
                batch_num_tokens, global_batch_size, loss_scale_factor,
            )  # fmt: skip
        out = rlhf_fast.value_loss(
            vpreds, values, returns, response_mask, clip=cliprange_value, reduction=reduction,
            normalizer=None if count is None else count / dp_size,
        )  # fmt: skip
        loss = out.loss
        if reduction != loss_agg_mode:
            loss = loss / (loss_scale_factor or response_mask.shape[-1])
        return loss, out.stats[clipped]

    return compute_value_loss


_FUNCTIONAL = "verl.utils.torch_functional"
_ALGOS = "verl.trainer.ppo.core_algos"
_TARGETS = (
    Target(_FUNCTIONAL, "logprobs_from_logits", _logprobs_from_logits),
    Target(_FUNCTIONAL, "entropy_from_logits", _entropy_from_logits),
    Target(_FUNCTIONAL, "entropy_from_logits_with_chunking", _entropy_from_logits_with_chunking),
    Target(_FUNCTIONAL, "masked_whiten", _masked_whiten),
    Target(_ALGOS, "compute_gae_advantage_return", _compute_gae_advantage_return),
    Target(_ALGOS, "kl_penalty", _kl_penalty),
    Target(_ALGOS, "compute_value_loss", _compute_value_loss),
)


def patch(force: bool = False) -> Patch:
    """Make verl's trainer call rlhf_fast, until the returned handle's `undo()`.

    Replaced wherever verl has bound them: `logprobs_from_logits`, `entropy_from_logits` (with and
    without chunking) and `masked_whiten` of `verl.utils.torch_functional`;
    `compute_gae_advantage_return`, `kl_penalty` and `compute_value_loss` of
    `verl.trainer.ppo.core_algos`. Results keep verl's dtypes, k3 its clamps, estimators with a "+"
    the gradient of k2. NPUs stay on verl's own code.

    Differences: `inplace_backward=True` does not destroy the logits. A -inf logit adds 0 to the
    entropy (verl: NaN). Advantages, returns and whitened values are 0 where masked (verl: numbers
    that its losses multiply by 0). One token or none whitens to 0 (verl raises).

    Ray workers are other processes: make them call `patch()` too, for example through the
    environment variable `VERL_USE_EXTERNAL_MODULES`, which names a module that verl imports in
    each of them.

    Args:
        force: patch a version that was not tested, as far as its names are known.

    Returns:
        A handle with `sites` and `undo()`, which is a context manager too. While a patch is in
        force, `patch()` returns the same handle.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: a version other than 0.9.1 without `force`.

    >>> handle = rlhf_fast.integrations.verl.patch()
    >>> handle.sites[0]
    'verl.utils.torch_functional:logprobs_from_logits'
    >>> handle.undo()
    """
    return patch_project("verl", KNOWN, _TARGETS, force=force)
