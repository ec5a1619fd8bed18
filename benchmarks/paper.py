"""The paper's figures as the table of the README.

    python benchmarks/paper.py

The figures and their sources are in paper.json: accuracy in percent at each thinking
budget, and the mean tokens of a response whose thinking is unlimited.
"""

import json
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("paper.json")


def main() -> None:
    print(table(json.loads(FIGURES.read_text())))


def table(figures: dict[str, Any]) -> str:
    """Markdown: a column for each thinking budget, a row for each model."""
    budgets = [budget(tokens) for tokens in figures["thinking_budgets"]]
    rows = [["thinking budget", *budgets], ["---", *["--:"] * len(budgets)]]
    for model in figures["models"]:
        role = f" ({model['role']})" if "role" in model else ""
        cells = [f"{percent:.1f} %" for percent in model["accuracy_percent"]]
        cells[-1] += f" at {model['unlimited_tokens']:,} tokens"
        rows.append([model["name"] + role, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join(lines)


def budget(tokens: int | None) -> str:
    return "unlimited" if tokens is None else f"{tokens / 1024:g}k"


if __name__ == "__main__":
    main()
