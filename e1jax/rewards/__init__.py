"""Rewards: is the answer of a solution equivalent to an accepted one?

`spelling` and `units` bring answers into one form, `equivalence` compares two of them
by math-verify, `worker` does so under limits, and `grader` passes responses to workers.
"""

from e1jax.rewards.grader import (
    Accepted,
    Grader,
    accepted_texts,
    final_answer,
    grade,
    score,
)

__all__ = ["Accepted", "Grader", "accepted_texts", "final_answer", "grade", "score"]
