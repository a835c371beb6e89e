"""Token log-probabilities and entropy from logits."""

from .one_pass import LogprobEntropyGrad, logprob_entropy_and_grad
from .op import LogprobEntropy, logprob, logprob_entropy

__all__ = [
    "LogprobEntropy",
    "LogprobEntropyGrad",
    "logprob",
    "logprob_entropy",
    "logprob_entropy_and_grad",
]
