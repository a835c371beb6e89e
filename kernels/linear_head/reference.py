"""Log-prob, entropy, exact KL and PPO loss from hidden states: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
With x the hidden states, W the head, y the id, t the temperature:

    z = softcap(logit_scale * x (W + scaling B A)^T + bias),  u = z / t
    m = max u,  s = log sum exp(u - m),  p = exp(u - m - s)
    logprob = (u_y - m) - s,  entropy = s - sum p (u - m)

and the gradients are those of the rooms logprob and kl in du, carried through t, softcap and the
product. Nothing of size [N, V] exists: see `_tiles.py`.
"""

from .reference_kl import linear_kl, linear_kl_backward
from .reference_logprob import linear_logprob, linear_logprob_backward, linear_logprob_entropy
from .reference_ppo import linear_ppo_loss

__all__ = [
    "linear_kl",
    "linear_kl_backward",
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_entropy",
    "linear_ppo_loss",
]
