"""Ranking loss of the reward model."""

from .op import ranking_loss

__all__ = ["ranking_loss"]
