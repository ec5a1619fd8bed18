"""Accuracy at budgets: completions of files, statistics, tables and a figure."""

from e1jax.evaluation.figure import FIGURE_FORMATS, draw_figure
from e1jax.evaluation.grading import noting_grader, outcome_of, read_completions
from e1jax.evaluation.results import (
    Budgets,
    Outcome,
    budget_size,
    comparison,
    owned_directory,
    read_results,
    result_row,
    results_table,
    shown_budgets,
)

__all__ = [
    "FIGURE_FORMATS",
    "Budgets",
    "Outcome",
    "budget_size",
    "comparison",
    "draw_figure",
    "noting_grader",
    "outcome_of",
    "owned_directory",
    "read_completions",
    "read_results",
    "result_row",
    "results_table",
    "shown_budgets",
]
