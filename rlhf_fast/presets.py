"""Conventions of other projects as keyword arguments of our ops."""

from __future__ import annotations

import copy
from typing import Any

# Conventions only: what a user of that project does not choose. Coefficients, clip ranges, gamma,
# lambda and the estimator stay arguments of the call. docs/losses_and_advantages.md has the
# sources, and what no keyword can express.
_CLIPPED_K3 = {"clamp": (20.0, 10.0)}
_CLIPPED_RESULT = {"clamp": (None, 10.0)}
_TOKEN_MEAN = {"reduction": "token-mean"}
_UNBIASED = {"unbiased": True, "eps": 1e-8}
_BIASED = {"unbiased": False, "eps": 1e-8}

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {
        "kl_estimate": {"clamp": None},
        "shaped_rewards": {"clamp": None},
        "gae": {"mask_mode": "zero"},
        "whiten": _UNBIASED,
        "ppo_advantages": {"mask_mode": "zero", "whiten": True, "clamp": None, **_UNBIASED},
        "group_advantages": {"eps": 1e-4},
        "policy_loss": {"dual_clip": None, **_TOKEN_MEAN},
        "value_loss": _TOKEN_MEAN,
        "ppo_loss": {"dual_clip": None, **_TOKEN_MEAN},
    },
    "verl": {
        "kl_estimate": _CLIPPED_K3,
        # The penalty in the reward is k1 by default, which verl does not clamp.
        "shaped_rewards": {"clamp": None},
        "gae": {"mask_mode": "carry"},
        "whiten": _UNBIASED,
        "ppo_advantages": {"mask_mode": "carry", "whiten": True, "clamp": None, **_UNBIASED},
        "group_advantages": {"eps": 1e-6},
        "policy_loss": {"dual_clip": 3.0, **_TOKEN_MEAN},
        "value_loss": _TOKEN_MEAN,
        "ppo_loss": {"dual_clip": 3.0, **_TOKEN_MEAN},
    },
    "openrlhf": {
        "kl_estimate": _CLIPPED_RESULT,
        "shaped_rewards": _CLIPPED_RESULT,
        "gae": {"mask_mode": "zero"},
        "whiten": _BIASED,
        "ppo_advantages": {"mask_mode": "zero", "whiten": True, **_CLIPPED_RESULT, **_BIASED},
        "group_advantages": {"eps": 1e-9},
        "policy_loss": {"dual_clip": None, **_TOKEN_MEAN},
        "value_loss": _TOKEN_MEAN,
        "ppo_loss": {"dual_clip": None, **_TOKEN_MEAN},
    },
    "openai": {
        "kl_estimate": {"clamp": None},
        "shaped_rewards": {"clamp": None},
        "gae": {"mask_mode": "zero"},
        "whiten": _BIASED,
        "ppo_advantages": {"mask_mode": "zero", "whiten": True, "clamp": None, **_BIASED},
        "policy_loss": {"dual_clip": None, **_TOKEN_MEAN},
        "value_loss": _TOKEN_MEAN,
        "ppo_loss": {"dual_clip": None, **_TOKEN_MEAN},
    },
    "deepspeed": {
        "kl_estimate": {"clamp": None},
        "shaped_rewards": {"clamp": None},
        "gae": {"mask_mode": "zero"},
        "ppo_advantages": {"mask_mode": "zero", "whiten": False, "clamp": None},
        "policy_loss": {"dual_clip": None, **_TOKEN_MEAN},
        "value_loss": _TOKEN_MEAN,
        "ppo_loss": {"dual_clip": None, **_TOKEN_MEAN},
    },
}


def preset(name: str) -> dict[str, dict[str, Any]]:
    """The keyword arguments under which our ops follow another project's conventions.

    A mapping from op name to keyword arguments: mask mode, whitening, epsilons, clamps, dual clip,
    reduction. What a user of that project chooses (coefficients, clip ranges, gamma, lambda, the
    KL estimator) is not in it and is passed beside it. An op that the project does not have is not
    in it either, hence the `.get(op, {})` of the example.

    "trl" is TRL 1.12 (its PPO) and 1.16 (groups), "verl" is verl 0.9, "openrlhf" OpenRLHF 0.11,
    "openai" lm-human-preferences, "deepspeed" DeepSpeed-Chat. docs/losses_and_advantages.md lists
    formulas and sources, and what no keyword can express. verl clamps k3 and no other estimator:
    its entry for `kl_estimate` is meant for `estimator="k3"`.

    Args:
        name: "trl", "verl", "openrlhf", "openai" or "deepspeed".

    Returns:
        A fresh dict of fresh dicts; changing it changes no other call.

    Raises:
        ValueError: another name.

    >>> rlhf_fast.preset("verl").get("gae", {})
    {'mask_mode': 'carry'}
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
    return copy.deepcopy(_PRESETS[name])
