"""Fused kernels for the half of RLHF that comes after the logits."""

import importlib

from rlhf_fast._dispatch import backends, use_backend
from rlhf_fast._invariant import batch_invariant
from rlhf_fast.head import Head, causal_lm_head, model_logprob, model_policy_loss
from rlhf_fast.kernels.advantages import (
    Advantages,
    group_advantages,
    ppo_advantages,
    shaped_rewards,
    whiten,
)
from rlhf_fast.kernels.decode_attention import Prefix, decode_attention
from rlhf_fast.kernels.decode_linear import decode_linear
from rlhf_fast.kernels.gae import GAE, discounted_returns, gae, gae_packed
from rlhf_fast.kernels.kl import (
    KLFull,
    KLGrad,
    kl_divergence,
    kl_divergence_and_grad,
    kl_divergence_full,
    kl_estimate,
)
from rlhf_fast.kernels.linear_head import (
    linear_kl,
    linear_logprob,
    linear_logprob_entropy,
    linear_ppo_loss,
)
from rlhf_fast.kernels.logprob import (
    LogprobEntropy,
    LogprobEntropyGrad,
    logprob,
    logprob_entropy,
    logprob_entropy_and_grad,
)
from rlhf_fast.kernels.ppo_loss import Loss, policy_loss, ppo_loss, value_loss
from rlhf_fast.kernels.ranking_loss import ranking_loss
from rlhf_fast.kernels.sample import Sample, replay_logprob, sample
from rlhf_fast.presets import preset

# The name `rollout` is the function, as in `rlhf_fast.rollout(model)`. It takes the place of the
# sub-package of that name, bound by this very import; `import rlhf_fast.rollout` and
# `from rlhf_fast.rollout import ...` find the package in sys.modules and never bind it again.
from rlhf_fast.rollout import Rollout, RolloutOutput, generate, rollout

__version__ = "0.1.0"

__all__ = [
    "GAE",
    "Advantages",
    "Head",
    "KLFull",
    "KLGrad",
    "LogprobEntropy",
    "LogprobEntropyGrad",
    "Loss",
    "Prefix",
    "Rollout",
    "RolloutOutput",
    "Sample",
    "backends",
    "batch_invariant",
    "causal_lm_head",
    "decode_attention",
    "decode_linear",
    "discounted_returns",
    "gae",
    "gae_packed",
    "generate",
    "group_advantages",
    "kl_divergence",
    "kl_divergence_and_grad",
    "kl_divergence_full",
    "kl_estimate",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_entropy",
    "linear_ppo_loss",
    "logprob",
    "logprob_entropy",
    "logprob_entropy_and_grad",
    "model_logprob",
    "model_policy_loss",
    "policy_loss",
    "ppo_advantages",
    "ppo_loss",
    "preset",
    "ranking_loss",
    "replay_logprob",
    "rollout",
    "sample",
    "shaped_rewards",
    "use_backend",
    "value_loss",
    "whiten",
]


def __getattr__(name: str) -> object:
    # Loaded when first used; they import other projects only when `patch()` is called.
    if name == "integrations":
        return importlib.import_module("rlhf_fast.integrations")
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")
