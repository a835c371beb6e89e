"""Rewards with a KL penalty, whitening, and advantages of groups and of PPO."""

from .op import Advantages, group_advantages, ppo_advantages, shaped_rewards, whiten

__all__ = ["Advantages", "group_advantages", "ppo_advantages", "shaped_rewards", "whiten"]
