"""Completions that a file holds, and how many answers could not be compared."""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e1jax import rewards
from e1jax.cli.files import INTEGER, NUMBER, TEXT, check_fields
from e1jax.config.checks import UserError, check_integer, shown
from e1jax.config.texts import check_backslashes, parse_json
from e1jax.data.problems import Problem
from e1jax.evaluation.results import Budgets, Outcome

# The fields of a record that `grade` reads: their types, and the same in words.
_FIELDS = {
    "id": ((str, int), "a text or a whole number"),
    "sample": INTEGER,
    "solution": TEXT,
    "token_ids": ((list,), "a list"),
    "thinking_tokens": INTEGER,
    "solution_tokens": INTEGER,
    "thinking_end": ((str, type(None)), "a text or null"),
    "thinking_budget": ((int, type(None)), "a whole number or null"),
    "solution_budget": ((int, type(None)), "a whole number or null"),
    "reward": NUMBER,
}


# Budgets in files of other programs, the reward in files of `sample`.
_MAY_LACK = ("thinking_budget", "solution_budget", "reward")


@contextlib.contextmanager
def noting_grader() -> Iterator[rewards.Grader]:
    """A Grader; at its end, says how many answers it could not compare."""
    with rewards.Grader() as grader:
        yield grader
    for kind, how in (("timeout", "ran into the time limit"), ("crash", "crashed")):
        if count := grader.failures[kind]:
            print(
                f"note: {count} comparison{'s' * (count > 1)} of answers {how}; such an "
                "answer counts as wrong",
                file=sys.stderr,
            )


class Found(NamedTuple):
    """A completion of a file, with the fields that `rewards.grade` looks at."""

    prompt_index: int  # which problem
    solution: str
    budgets: Budgets
    outcome: Outcome  # its reward is not known yet


def read_completions(path: Path, problems: Sequence[Problem]) -> list[Found]:
    """The completions in a file of `sample` or `evaluate`.

    Raises UserError naming the line for one that is broken, has an id that no problem
    has, or has been there before.
    """
    # As written, else as text: 3 and "3" are one id, unless problems have both.
    indices: dict[str | int, int] = {str(p.id): i for i, p in enumerate(problems)}
    indices |= {problem.id: index for index, problem in enumerate(problems)}
    found, first, damaged = [], {}, []
    try:
        with path.open("rb") as file:
            lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in lines:
        at = f"{path} line {number}"
        record = check_completion(parse_json(line.rstrip(), path, number), at)
        try:
            outcome = outcome_of(record, reward=math.nan)
        except UserError as error:
            raise UserError(f"{at}: {error}") from None
        identity = record["id"]
        index = indices.get(identity, indices.get(str(identity)))
        if index is None:
            raise UserError(
                f"{at}: no problem has the id {shown(identity)}; ids must be those of the "
                "dataset's problems or, where these have none, their numbers from 0"
            )
        budgets = record.get("thinking_budget"), record.get("solution_budget")
        before = first.setdefault((index, record["sample"], budgets), number)
        if before != number:
            raise UserError(
                f"{at}: sample {record['sample']} of id {shown(identity)} is in line {before} "
                "already; remove one of them"
            )
        found.append(Found(index, record["solution"], budgets, outcome))
        try:
            check_backslashes(record["solution"], f"{at}: solution")
        except UserError as error:  # a model may have written it so
            damaged.append(str(error))
    if not found:
        raise UserError(f"{path} holds no completion")
    if damaged:
        print(
            f"note: {len(damaged)} of {len(found)} solutions seem to have lost a "
            f"backslash, the first: {damaged[0]}",
            file=sys.stderr,
        )
    return found


def check_completion(record: Any, at: str) -> dict[str, Any]:
    """A record of a completion; raises UserError if it lacks a field that is read here."""
    try:
        return check_fields(record, _FIELDS, at, _MAY_LACK)
    except UserError as error:
        raise UserError(
            f"{error}; give a file of sample --json or --output, or the "
            "completions.jsonl of evaluate"
        ) from None


def outcome_of(record: Mapping[str, Any], reward: float) -> Outcome:
    """The statistics of one completion, from its record and its reward.

    Raises UserError for numbers of tokens that cannot be.
    """
    for name in ("thinking_tokens", "solution_tokens"):
        check_integer(name, record[name], 0)
    return Outcome(
        reward=reward,
        tokens=len(record["token_ids"]),
        thinking_tokens=record["thinking_tokens"],
        solution_tokens=record["solution_tokens"],
        forced=record["thinking_end"] in ("budget", "eos"),
    )
