"""Generalised advantage estimation over padded and packed sequences, and discounted returns."""

from .op import GAE, discounted_returns, gae, gae_packed

__all__ = ["GAE", "discounted_returns", "gae", "gae_packed"]
