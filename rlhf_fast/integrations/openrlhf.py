"""OpenRLHF: log-probs, entropy and KL estimates of the actor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import rlhf_fast
from rlhf_fast.integrations._rebind import Patch, Target, entropy, patch_project, rows_fit
from rlhf_fast.presets import preset

KNOWN = ("0.11.2",)


def _log_probs_from_logits(original: Callable) -> Callable:
    @functools.wraps(original)
    def log_probs_from_logits(logits, labels, temperature=1.0):
        if not rows_fit(logits, labels):
            return original(logits, labels, temperature)
        return rlhf_fast.logprob(logits, labels, temperature=temperature).to(logits.dtype)

    return log_probs_from_logits


def _compute_entropy(original: Callable) -> Callable:
    @functools.wraps(original)
    def compute_entropy(logits):
        return entropy(logits).to(logits.dtype)

    return compute_entropy


def _compute_approx_kl(original: Callable) -> Callable:
    # The third positional argument is `log_probs_old` in 0.11.2 and was `kl_estimator` before.
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compute_approx_kl(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        logprob, ref_logprob = list(bound.arguments.values())[:2]
        estimator = bound.arguments["kl_estimator"]
        ours = estimator in ("k1", "k2", "k3") and logprob.shape == ref_logprob.shape
        if not ours or bound.arguments.get("unbiased_gradient", False):
            return original(*args, **kwargs)
        return rlhf_fast.kl_estimate(
            logprob.float(), ref_logprob.float(), estimator=estimator,
            **preset("openrlhf")["kl_estimate"],
        )  # fmt: skip

    return compute_approx_kl


_UTILS = "openrlhf.models.utils"
_TARGETS = (
    Target(_UTILS, "log_probs_from_logits", _log_probs_from_logits),
    Target(_UTILS, "compute_entropy", _compute_entropy),
    Target(_UTILS, "compute_approx_kl", _compute_approx_kl),
)


def patch(force: bool = False) -> Patch:
    """Make OpenRLHF's models call rlhf_fast, until the returned handle's `undo()`.

    Replaced wherever OpenRLHF has bound them: `log_probs_from_logits`, `compute_entropy` and
    `compute_approx_kl` of `openrlhf.models.utils`. Results keep OpenRLHF's dtypes and clamps;
    `unbiased_gradient=True` goes to its own code. GAE and whitening are methods of its experience
    maker, which needs vLLM, and are left alone.

    Differences: a temperature does not divide the logits in place. A -inf logit adds 0 to the
    entropy (OpenRLHF: NaN), and where both log-probs are -inf the KL is 0 (OpenRLHF: NaN).

    Ray workers are other processes: make them call `patch()` too, for example in Ray's
    `runtime_env` as `worker_process_setup_hook`.

    Args:
        force: patch a version that was not tested, as far as its names are known.

    Returns:
        A handle with `sites` and `undo()`, which is a context manager too. While a patch is in
        force, `patch()` returns the same handle.

    Raises:
        ImportError: OpenRLHF is not installed.
        RuntimeError: a version other than 0.11.2 without `force`.

    >>> with rlhf_fast.integrations.openrlhf.patch() as patched:
    ...     print(patched.sites)
    """
    return patch_project("openrlhf", KNOWN, _TARGETS, force=force)
