"""Fused kernels for the half of RLHF that comes after the logits."""

from rlhf_fast._dispatch import backends, use_backend
from rlhf_fast.kernels.gae import GAE, discounted_returns, gae, gae_packed
from rlhf_fast.kernels.logprob import LogprobEntropy, logprob, logprob_entropy

__version__ = "0.1.0"

__all__ = [
    "GAE",
    "LogprobEntropy",
    "backends",
    "discounted_returns",
    "gae",
    "gae_packed",
    "logprob",
    "logprob_entropy",
    "use_backend",
]
