"""Token log-probabilities and entropy from logits."""

from .op import LogprobEntropy, logprob, logprob_entropy

__all__ = ["LogprobEntropy", "logprob", "logprob_entropy"]
