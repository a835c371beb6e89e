"""Rollouts: sampled responses of a live transformers model, with the log-probs of each draw.

Read `api.py` first; then `loop.py` (the decode loop), `slots.py` (KV cache and attention),
`models.py` (which models can be driven, and how they are put back) and `rescore.py`.
"""

from rlhf_fast.rollout.api import Rollout, RolloutOutput, generate, rollout

__all__ = ["Rollout", "RolloutOutput", "generate", "rollout"]
