"""A reward function of the user's own, in place of right or wrong."""

import hashlib
import importlib
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e1jax.config.checks import UserError
from e1jax.rewards.grader import Accepted

# (completions, accepted answers of each) -> a number for each
RewardFunction = Callable[[Sequence[Any], Sequence[Accepted]], Sequence[float]]


def load_function(name: str) -> RewardFunction:
    """The function `package.module:name` of the current directory or an installed package.

    Raises UserError if it cannot be imported, or is not a function.
    """
    module, _, attribute = name.partition(":")
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module may do anything
        raise UserError(
            f"reward.function={name} cannot be imported ({_told(error)}); it must be in "
            "the current directory or in an installed package"
        ) from None
    if not callable(function):
        raise UserError(f"reward.function={name} is {function!r}, not a function")
    return function


def source_digest(name: str) -> str:
    """Names the content of the file of a function's module, once `load_function` has
    imported it; of a module without a file, its name."""
    module = name.partition(":")[0]
    path = getattr(sys.modules[module], "__file__", None)
    content = module.encode() if path is None else Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def call_function(
    function: RewardFunction, completions: Sequence[Any], answers: Sequence[Accepted]
) -> list[float]:
    """The reward of each completion; `answers` holds the accepted ones of each.

    Raises UserError if the function raises, or does not give a finite number for each.
    """
    try:
        rewards = list(function(completions, answers))
    except Exception as error:
        raise UserError(
            f"reward.function failed: {_told(error)}; mend it and run the same command "
            "again, which goes on from the last checkpoint"
        ) from error
    if len(rewards) != len(completions):
        raise UserError(
            f"reward.function gave {len(rewards)} rewards for {len(completions)} "
            "completions; it must give one for each"
        )
    for reward in rewards:
        # Real: NumPy's numbers too.
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise UserError(
                f"reward.function gave {reward!r} as a reward; it must be a finite number"
            )
    return [float(reward) for reward in rewards]


def _told(error: Exception) -> str:
    """The error in one line, with the place that raised it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if f.filename != __file__ and "importlib" not in f.filename
    ]
    return f"{text}, {own[-1].filename} line {own[-1].lineno}" if own else text
