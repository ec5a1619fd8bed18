"""Markdown tables of what the benchmarks wrote.

    python benchmarks/table.py decode.jsonl grpo.jsonl serving.jsonl startup.jsonl

One table for each benchmark, and above it the machine, the date, the load average and the
versions. Where a file holds several runs, the last one counts. A benchmark that `TABLES`
does not know gets a table per `name` of its lines with all that they hold.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Cell = Callable[[Line], str]

# What a line says of its run, and not of its row.
ABOUT = (
    "benchmark",
    "name",
    "versions",
    "cpu_model",
    "cores",
    "device",
    "date",
    "load",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines")
    text = "".join(file.read_text() for file in parser.parse_args().files)
    groups: dict[str, list[Line]] = {}
    for line in map(json.loads, text.splitlines()):
        name = line.get("benchmark", line["name"])
        groups.setdefault(name, []).append(line)
    print("\n".join(table(name, lines) for name, lines in groups.items()))


def table(name: str, lines: Sequence[Line]) -> str:
    """A table with its caption."""
    columns = TABLES.get(name) or everything(lines)
    rows = {}
    for line in lines:
        cells = [cell(line) for cell in columns.values()]
        rows[row_key(line)] = (line, cells)
    lines = [line for line, _ in rows.values()]
    text = [f"**{name}**: {caption(lines)}", ""]
    text += [
        "| " + " | ".join(columns) + " |",
        "|---" + "|--:" * (len(columns) - 1) + "|",
    ]
    text += ["| " + " | ".join(cells) + " |" for _, cells in rows.values()]
    return "\n".join(text) + "\n"


def row_key(line: Line) -> tuple:
    """What makes two lines of different runs the same row: all that is not measured."""
    keys = ("name", "model", "form", "batch", "capacity", "prompt", "remat")
    keys += ("thinking_budget", "checkpoint_gb", "dtype")
    return tuple(line.get(key) for key in keys)


def everything(lines: Sequence[Line]) -> dict[str, Cell]:
    """Columns for all that the lines hold, but lists and tables of it."""
    keys = dict.fromkeys(key for line in lines for key in line)
    shown = [key for key in keys if key not in ABOUT]
    columns = dict(NAME)
    for key in shown:
        if not any(isinstance(line.get(key), dict | list) for line in lines):
            columns[key.replace("_", " ")] = figure(key)
    return columns


def caption(lines: Sequence[Line]) -> str:
    """Machine, date, load and versions of the lines, as far as they say them."""
    parts = []
    if "cpu_model" in lines[0]:
        parts.append(f"{lines[0]['cores']} cores of {lines[0]['cpu_model']}")
    dates = sorted({line["date"][:10] for line in lines if "date" in line})
    parts += [" to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    loads = sorted(line["load"] for line in lines if "load" in line)
    loads = [f"{load:.1f}" for load in (*loads[:1], *loads[-1:])]
    parts += ["load average " + " to ".join(dict.fromkeys(loads))] if loads else []
    versions: dict[str, dict[str, None]] = {}
    for line in lines:
        sides = line.get("versions", {})
        nested = all(isinstance(side, dict) for side in sides.values())
        for side in sides.values() if nested else [sides]:
            for package, version in side.items():
                versions.setdefault(package, {})[version] = None
    parts += [f"{package} {' and '.join(found)}" for package, found in versions.items()]
    return ", ".join(parts)


def number(value: Any) -> str:
    """Three digits or more of a float, anything else as it is."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    integer = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if integer else str(value)


def figure(key: str, scale: float = 1, unit: str = "") -> Cell:
    """The cell of a number, or of one with `median`, `low` and `high`; empty where the
    line has none."""

    def cell(line: Line) -> str:
        value = line.get(key, "")
        if isinstance(value, dict):
            return spread(value, scale, unit)
        is_float = isinstance(value, float)
        return number(value * scale) + unit if is_float else number(value)

    return cell


def spread(values: Line, scale: float = 1, unit: str = "") -> str:
    median, low, high = (number(values[k] * scale) for k in ("median", "low", "high"))
    alone = low == median == high
    return f"{median}{unit}" if alone else f"{median}{unit} ({low} - {high})"


def median(scale: float = 1) -> Cell:
    """The line's own median, with the smallest and the largest."""
    return lambda line: spread(line, scale)


def bounded(key: str, unit: str = "") -> Cell:
    """A number whose smallest and largest are beside it, as `key`_low and `key`_high."""

    def cell(line: Line) -> str:
        low, high = line[f"{key}_low"], line[f"{key}_high"]
        return spread({"median": line[key], "low": low, "high": high}, unit=unit)

    return cell


def part(name: str) -> Cell:
    """One of the `parts` of a line."""
    return lambda line: number(line["parts"][name])


STARTUP = ("interpreter", "imports", "templates", "trace", "compile", "rest")
NAME: dict[str, Cell] = {"": figure("name")}
TABLES: dict[str, dict[str, Cell]] = {
    "decode": {
        **NAME,
        "batch": figure("batch"),
        "cache": figure("capacity"),
        "ms a step": median(1e3),
        "to e1jax": figure("ratio", unit="x"),
        "the same by CPU time": figure("cpu_ratio", unit="x"),
        "ms to the first token": figure("first", 1e3),
        "weights at memory speed / step": lambda line: (
            spread(line["stream_share"]) if line["name"] == "e1jax" else ""
        ),
        "step to that at 512": figure("step_to_512", unit="x"),
        "first token to that at 512": figure("first_to_512", unit="x"),
    },
    "grpo_update": {
        **NAME,
        "prompt": figure("prompt"),
        "remat": figure("remat"),
        "reference s": figure("reference"),
        "update s (ratio: Tunix / e1jax)": figure("update"),
        "CPU s an update": figure("update_cpu"),
        "both s": figure("step"),
        "peak GB": figure("peak_gb"),
        "first update s": figure("first_call"),
    },
    "serving": {
        **NAME,
        "model": figure("model"),
        "requests/s": median(),
        "e1jax is faster by": bounded("ratio", "x"),
        "the same by CPU time": figure("cpu_ratio", unit="x"),
        "useful slot steps": figure("useful_slot_steps"),
    },
    "serve": {
        **NAME,
        "model": figure("model"),
        "tokens/s": median(),
        "to generate": figure("ratio", unit="x"),
        "the same by CPU time": figure("cpu_ratio", unit="x"),
        "decode steps": figure("decode_steps"),
        "first token ms": figure("first_ms"),
        "between pieces ms": figure("between_ms"),
        "per token ms": figure("per_token_ms"),
    },
    "convert": {
        **NAME,
        "checkpoint GB": figure("checkpoint_gb"),
        "s": median(),
        "to cp": bounded("ratio", "x"),
        "CPU s": figure("cpu"),
        "to cp's": figure("cpu_ratio", unit="x"),
        "peak GB": figure("peak_gb"),
        "peak / checkpoint": figure("peak_share"),
    },
    "full_size": {
        "": figure("form"),
        "first call s": figure("first"),
        "s a token": bounded("step"),
        "weights at memory speed s": figure("floor"),
        "weights GB": figure("weights_gb"),
        "peak GB": figure("peak_gb"),
    },
    "startup": {
        **NAME,
        "first word s": figure("first_word"),
        "whole s": median(),
        "CPU s": figure("cpu"),
        **{f"{name} s": part(name) for name in STARTUP},
    },
}

if __name__ == "__main__":
    main()
