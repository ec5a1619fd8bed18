"""Rows of results.json: accuracy and lengths at a budget, and tables of them."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from e1jax.cli.files import read_json
from e1jax.cli.flags import aligned
from e1jax.cli.locks import owning
from e1jax.cli.outputs import writing_output
from e1jax.config.checks import UNLIMITED, UserError

Budgets = tuple[int | None, int | None]  # thinking, solution; None is unlimited


Row = dict[str, Any]  # one of results.json


class Outcome(NamedTuple):
    """The fields of a completion that the statistics need."""

    reward: float
    tokens: int  # length of token_ids, forced ones included
    thinking_tokens: int  # sampled ones
    solution_tokens: int
    forced: bool  # `</think>` was: the budget or EOS ended the thinking


def result_row(budgets: Budgets, problems: Sequence[Sequence[Outcome]]) -> Row:
    """A row of results.json, from the samples of each problem."""
    means = np.array([np.mean(samples, axis=0) for samples in problems])
    accuracy, tokens, thinking, solution, forced = means.mean(axis=0).tolist()
    stderr = None
    if len(problems) > 1:
        stderr = float(means[:, 0].std(ddof=1)) / math.sqrt(len(problems))
    solved = [any(outcome.reward for outcome in samples) for samples in problems]
    return {
        "thinking_budget": budgets[0],
        "solution_budget": budgets[1],
        "accuracy": accuracy,
        "stderr": stderr,
        "pass_at_n": sum(solved) / len(solved),
        "mean_tokens": tokens,
        "mean_thinking_tokens": thinking,
        "mean_solution_tokens": solution,
        "forced_share": forced,
    }


def budget_size(budgets: Budgets) -> list[int]:
    """Orders budgets, unlimited ones last."""
    return [UNLIMITED if budget is None else budget for budget in budgets]


def results_table(rows: Sequence[Row], n: int) -> str:
    """Aligned text; budgets are thinking + solution, means are in tokens."""
    pass_at_n = f"pass@{n} %"
    names = ("tokens", "thinking", "solution", "forced %")
    lines: list[tuple[str, ...]] = [("budgets", "accuracy %", pass_at_n, *names)]
    for row in rows:
        cells = (
            shown_budgets(budgets_of(row)),
            _accuracy(row),
            f"{100 * row['pass_at_n']:.1f}",
            f"{row['mean_tokens']:.1f}",
            f"{row['mean_thinking_tokens']:.1f}",
            f"{row['mean_solution_tokens']:.1f}",
            f"{100 * row['forced_share']:.1f}",
        )
        lines.append(cells)
    return aligned(lines)


def comparison(curves: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Aligned text: accuracy in percent and, in brackets, mean tokens of a response, with
    a column for each (label, rows) and a line for each pair of budgets."""
    columns = [
        {budgets_of(r): f"{_accuracy(r)} ({r['mean_tokens']:.1f})" for r in rows}
        for _, rows in curves
    ]
    lines = [("budgets", *(label for label, _ in curves))]
    for budgets in sorted({b for column in columns for b in column}, key=budget_size):
        lines.append((shown_budgets(budgets), *(c.get(budgets, "-") for c in columns)))
    return aligned(lines)


def budgets_of(row: Row) -> Budgets:
    """Thinking and solution budget of a row, in tokens; None is unlimited."""
    return row["thinking_budget"], row["solution_budget"]


def _accuracy(row: Row) -> str:
    spread = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def shown_budgets(budgets: Budgets) -> str:
    """Budgets as text: `1024+none`."""
    return "+".join("none" if budget is None else str(budget) for budget in budgets)


def read_results(path: Path) -> dict[str, Any]:
    """A results.json; raises UserError if the figure needs values that it lacks."""
    results = read_json(path)
    rows = results.get("rows")
    whole = isinstance(rows, list) and rows and all(map(_can_be_drawn, rows))
    if not (whole and isinstance(results.get("model"), str)):
        raise UserError(
            f"{path} is not a results.json of evaluate: that has a model, and rows with "
            "thinking_budget, solution_budget, accuracy, stderr and mean_tokens"
        )
    return results


def _can_be_drawn(row: Any) -> bool:
    try:
        accuracy, stderr, tokens = (
            row["accuracy"],
            0 if row["stderr"] is None else row["stderr"],
            row["mean_tokens"],
        )
        known = all(type(budget) in (int, type(None)) for budget in budgets_of(row))
        numbers = all(type(v) in (int, float) for v in (accuracy, stderr, tokens))
        in_range = 0 <= accuracy <= 1 and 0 <= stderr <= 1 and 1 <= tokens <= UNLIMITED
        return numbers and in_range and known
    except (KeyError, TypeError):
        return False


@contextlib.contextmanager
def owned_directory(path: Path | None) -> Iterator[None]:
    """Makes the directory of --output, if one is given; while the context is entered, no
    other evaluation writes there. Raises UserError if that cannot be."""
    if path is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        with writing_output(path):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(owning(path, inside=True))
        yield
