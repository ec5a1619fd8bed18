"""GRPO: advantages and loss as pure functions, log-probabilities, rollouts, the learner."""

from e1jax.grpo.loss import group_advantages, policy_loss

__all__ = ["group_advantages", "policy_loss"]
