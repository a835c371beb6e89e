"""KL divergence between a policy and its reference: sampled estimates and the exact value."""

from .op import KLFull, kl_divergence, kl_divergence_full, kl_estimate

__all__ = ["KLFull", "kl_divergence", "kl_divergence_full", "kl_estimate"]
