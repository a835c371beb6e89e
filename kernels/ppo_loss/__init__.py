"""Policy, value and PPO losses with their statistics."""

from .op import Loss, policy_loss, ppo_loss, value_loss

__all__ = ["Loss", "policy_loss", "ppo_loss", "value_loss"]
