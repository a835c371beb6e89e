"""Rollouts: sampled responses of a live transformers model, with the log-probs of each draw.

Read `api.py` first; then `loop.py` (the decode loop), `slots.py` (KV cache and attention),
`graphs.py` (the decode step as CUDA graphs), `models.py` (which models can be driven, and how they
are put back), `plan.py` (bytes before they are allocated) and `rescore.py`.
"""

from rlhf_fast.rollout.api import Rollout, RolloutOutput, generate, rollout
from rlhf_fast.rollout.plan import Plan

__all__ = ["Plan", "Rollout", "RolloutOutput", "generate", "rollout"]
