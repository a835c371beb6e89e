"""KL divergence between a policy and its reference: sampled estimates and the exact value."""

from .one_pass import KLGrad, kl_divergence_and_grad
from .op import KLFull, kl_divergence, kl_divergence_full, kl_estimate

__all__ = [
    "KLFull",
    "KLGrad",
    "kl_divergence",
    "kl_divergence_and_grad",
    "kl_divergence_full",
    "kl_estimate",
]
