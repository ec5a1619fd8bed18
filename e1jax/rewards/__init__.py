"""Rewards: is the answer of a solution equivalent to an accepted one?

`tex`, `spelling`, `units` and `marks` bring answers into one form, `agreement` parses and
compares by math-verify, `equivalence` takes lists, choices and equations apart, `worker`
compares under limits, and `grader` passes responses to workers. `function` is for a reward
function of the user's own.
"""

from e1jax.rewards.function import (
    RewardFunction,
    call_function,
    load_function,
    source_digest,
)
from e1jax.rewards.grader import (
    Accepted,
    Grader,
    accepted_texts,
    final_answer,
    grade,
    score,
)

__all__ = [
    "Accepted",
    "Grader",
    "RewardFunction",
    "accepted_texts",
    "call_function",
    "final_answer",
    "grade",
    "load_function",
    "score",
    "source_digest",
]
