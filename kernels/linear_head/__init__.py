"""Log-prob, entropy, exact KL and PPO loss from hidden states: the [N, V] logits never exist."""

from .kl import linear_kl
from .op import linear_logprob, linear_logprob_entropy
from .ppo import linear_ppo_loss

__all__ = ["linear_kl", "linear_logprob", "linear_logprob_entropy", "linear_ppo_loss"]
