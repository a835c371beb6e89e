"""Seeded sampling from logits, and its differentiable twin for the trainer."""

from .op import Sample, replay_logprob, sample

__all__ = ["Sample", "replay_logprob", "sample"]
