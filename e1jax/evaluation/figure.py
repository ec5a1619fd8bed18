"""Accuracy against tokens, as a figure."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e1jax.cli.locks import owning
from e1jax.cli.outputs import replace_file, writing_output
from e1jax.config.buckets import in_bucket
from e1jax.evaluation.results import Row

FIGURE_FORMATS = (".png", ".pdf", ".svg")


def draw_figure(curves: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
    """Accuracy against mean tokens of a response: a line for each (label, rows).

    Points with a thinking budget are joined, the one without is a star. After the
    figures of arXiv 2505.05315.
    """
    # Imported here, because it takes long, and most runs draw nothing.
    from matplotlib import figure, lines, ticker

    # Not of pyplot, which would look for a screen.
    page = figure.Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = page.add_subplot()
    dot: dict[str, Any] = {"marker": "o", "markersize": 5}
    star: dict[str, Any] = {"marker": "*", "markersize": 12, "linestyle": "none"}
    handles = []
    for number, (label, rows) in enumerate(curves):
        color = f"C{number}"
        for style, unconstrained in ((dot, False), (star, True)):
            points = [
                (row["mean_tokens"], 100 * row["accuracy"], 100 * (row["stderr"] or 0))
                for row in rows
                if (row["thinking_budget"] is None) == unconstrained
            ]
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                axes.errorbar(
                    x, y, error, color=color, elinewidth=1, capsize=2, **style
                )
        # A dollar sign would begin a formula.
        name = label.replace("$", r"\$")
        handles.append(lines.Line2D([], [], color=color, label=name, **dot))
    every = [row for _, rows in curves for row in rows]
    if any(row["thinking_budget"] is None for row in every):
        name = "thinking unconstrained"
        handles.append(lines.Line2D([], [], color="0.4", label=name, **star))
    # From one power of two to another, so that there are ticks to read the points by.
    sizes = [math.log2(row["mean_tokens"]) for row in every]
    low, high = math.floor(min(sizes)), math.floor(max(sizes)) + 1
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.1), 2 ** (high + 0.1))
    axes.set_xticks([2**i for i in range(low, high + 1)])
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("mean tokens per response")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, frameon=False, fontsize="small")
    drawn = io.BytesIO()
    page.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    if not in_bucket(path):
        path = Path(os.path.realpath(path))
    with writing_output(path), owning(path):
        replace_file(path, drawn.getvalue())
