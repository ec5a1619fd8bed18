"""Ways of training under budgets, compared at nano scale, from data to tables.

    python benchmarks/nano_comparison.py --output runs/nano_comparison

For each of three seeds, the complete pipeline: two base models by fine-tuning, one of which
has budgets stated (`BASES`), and GRPO from them under rollouts of several kinds (`METHODS`):
the paper's one pair of budgets (arXiv 2505.05315), drawn ones, drawn and stated ones, and
several cuts of one thought. Each kind is evaluated twice: as far as it has come at the
wall time that the paper's takes for all of its steps, and at its own last step, at most
three times as late.

Evaluated on 1,024 held-out problems, at twelve thinking budgets with 28 tokens for the
solution, of which the paper's way saw one; at four with 11; at seven with 5, the shortest
answer there is; and without budgets.

A part that is finished is not run again, and one that was interrupted goes on, so the
command can be repeated; `--seeds 0` is a part of it. Over an hour a seed on one CPU core;
wall times are compared, so run nothing beside it on that core. Writes comparison.json, table.md
and a figure for each of both times.
"""

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAPER = "fixed"  # the method whose wall time is given to the others
LONGEST = 3.0  # times the paper's wall time that a method may take
TRAINED = (32, 28)  # tokens of thinking and of the solution, in the paper's way
PROBLEMS = 1024
# Solution budget -> thinking budgets; None is unlimited.
GRID: dict[int | None, tuple[int | None, ...]] = {
    28: (8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96),
    11: (8, 16, 24, 32),
    5: (8, 12, 16, 20, 24, 28, 32),
    None: (None,),
}
# The budgets of the means that sum a method up.
SUMMED = {28: (8, 12, 16, 20, 24, 28, 32), 11: (8, 16, 24, 32)}
DRAWN = "[8, 12, 16, 20, 24, 28, 32]"


@dataclasses.dataclass(frozen=True)
class Method:
    title: str
    base: str
    flags: tuple[str, ...] = ()  # beside configs/nano_grpo.yaml
    steps: int = 120  # of that file


BASES = {"base": "nano_sft", "stated_base": "nano_stated_sft"}
METHODS = {
    "fixed": Method("fixed (the paper)", "base"),
    "stated": Method("drawn and stated", "stated_base"),
    "drawn": Method("drawn", "base", ("--rollout.thinking_budget", DRAWN), 330),
    "cuts": Method(
        "cuts of one thought",
        "base",
        (
            *("--rollout.thinking_budget", "1024", "--rollout.cuts", "[8, 16, 24, 32]"),
            *("--rollout.samples", "4", "--rollout.solutions_per_cut", "3"),
            *("--rollout.prompts", "8", "--update.microbatch", "104"),
            *("--loss.scale_rewards", "false", "--optimizer.learning_rate", "1.5e-4"),
        ),
        330,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/nano_comparison"), help="directory"
    )
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        run_seed(args.output / f"seed{seed}", seed)
    folders = [args.output / f"seed{seed}" for seed in seeds]
    report(args.output, folders)


def run_seed(folder: Path, seed: int) -> None:
    """The pipeline of one seed, each part only if its result is not there."""
    for base, config in BASES.items():
        train("sft", config, folder / base, seed)
        evaluate(folder / base, folder / "results" / base)
    for name, method in METHODS.items():
        run_method(folder, name, method, seed)


def run_method(folder: Path, name: str, method: Method, seed: int) -> None:
    """GRPO by a method: to the paper's wall time, and then to its own end."""
    run, results = folder / name, folder / "results"
    flags = ["--model", str(folder / method.base), "--steps", str(method.steps)]
    config = "nano_elastic" if name == "stated" else "nano_grpo"
    given = wall_time(folder / PAPER)
    for times, until in (("equal", given), ("end", LONGEST * given)):
        done = results / f"{name}_{times}"
        if is_evaluated(done):
            continue
        if name == PAPER:
            until = None
        if until is None or wall_time(run) < until:
            train("train", config, run, seed, *flags, *method.flags, until=until)
        # If it was stopped, then after a complete step, which it saved.
        last = metrics(run)[-1]
        before = results / f"{name}_equal"
        if times == "end" and trained(before)["step"] == last["step"]:
            shutil.copytree(before, done)
            continue
        evaluate(run / "checkpoints" / str(last["step"]), done)
        summary = {"step": last["step"], "wall_time": wall_time(run)}
        (done / "trained.json").write_text(json.dumps(summary) + "\n")


def train(
    command: str,
    config: str,
    run_dir: Path,
    seed: int,
    *flags: str,
    until: float | None = None,
) -> None:
    """Runs a training command to its end, or until its steps have taken `until` s."""
    argv = [sys.executable, "-m", f"e1jax.{command}"]
    argv += ["--config", str(ROOT / "configs" / f"{config}.yaml")]
    argv += ["--run-dir", str(run_dir), "--seed", str(seed), *flags]
    print(" ".join(argv[1:]), flush=True)
    process = subprocess.Popen(argv)
    while until is not None and process.poll() is None:
        time.sleep(0.2)
        if wall_time(run_dir) >= until:
            process.send_signal(signal.SIGTERM)  # it saves, and ends
            break
    if process.wait():
        sys.exit(f"{command} ended with exit code {process.returncode}")


def evaluate(model: Path, results: Path) -> None:
    """Accuracy at all budgets of GRID, into a folder of results for each of its rows."""
    argv = [sys.executable, "-m", "e1jax.evaluate", "--model", str(model)]
    argv += ["--dataset", "nano", "--limit", str(PROBLEMS), "-n", "1"]
    argv += ["--temperature", "0.6", "--top-p", "1", "--slots", "128"]
    argv += ["--cache-len", "512"]
    for solution, thinking in GRID.items():
        if not results_file(results, solution).exists():
            more = ["--budgets", ",".join(map(text_of, thinking))]
            more += ["--solution-budget", text_of(solution)]
            more += ["--output", str(results_file(results, solution).parent)]
            print(" ".join([*argv[1:], *more]), flush=True)
            subprocess.run([*argv, *more], check=True)


def text_of(budget: int | None) -> str:
    return "none" if budget is None else str(budget)


def results_file(results: Path, solution: int | None) -> Path:
    return results / f"solution_{text_of(solution)}" / "results.json"


def is_evaluated(results: Path) -> bool:
    return (results / "trained.json").exists()


def trained(results: Path) -> dict[str, Any]:
    """Step and wall time of the model that was evaluated."""
    return json.loads((results / "trained.json").read_text())


def rows_of(results: Path) -> list[dict[str, Any]]:
    """The rows of a model, in the order of GRID."""
    files = [results_file(results, solution) for solution in GRID]
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def metrics(run_dir: Path) -> list[dict]:
    """The finished lines of a run's metrics."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wall_time(run_dir: Path) -> float:
    """Seconds that the steps of a run have taken, compilation included."""
    return sum(line["seconds"] for line in metrics(run_dir))


def report(output: Path, folders: Sequence[Path]) -> None:
    """comparison.json, table.md and the figures; the tables go to stdout too."""
    record: dict[str, Any] = {}
    tables = []
    for times, words in (
        ("equal", "at the wall time of the paper's way"),
        ("end", "each at its last step"),
    ):
        names = {name: name for name in BASES}
        names |= {name: f"{name}_{times}" for name in METHODS}
        per_seed = {
            name: [rows_of(f / "results" / part) for f in folders]
            for name, part in names.items()
        }
        work = {
            name: [trained(f / "results" / names[name]) for f in folders]
            for name in METHODS
        }
        means = {name: mean_rows(runs) for name, runs in per_seed.items()}
        record[times] = {"per_seed": per_seed, "mean": means, "trained": work}
        tables += [f"**{words}**\n", markdown(means), summary(per_seed, work)]
        draw(output / f"{times}.png", means)
    (output / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


def draw(file: Path, means: dict[str, list[dict]]) -> None:
    """Accuracy at each thinking budget, with bands of a standard error, where the solution
    has room and where it has little; and against the tokens that are sampled."""
    figure, panels = plt.subplots(
        1, 3, figsize=(13, 4.5), sharey=True, layout="constrained"
    )
    *by_budget, by_tokens = panels
    for name, rows in means.items():
        for panel, solution in zip(by_budget, SUMMED, strict=True):
            same = [row for row in rows if row["solution_budget"] == solution]
            budgets = [row["thinking_budget"] for row in same]
            accuracy = 100 * np.array([row["accuracy"] for row in same])
            error = 100 * np.array([row["stderr"] for row in same])
            (line,) = panel.plot(budgets, accuracy, marker=".", label=title(name))
            low, high = accuracy - error, accuracy + error
            panel.fill_between(budgets, low, high, alpha=0.3, color=line.get_color())
        tokens, best = frontier(rows)
        by_tokens.plot(tokens[1:], 100 * np.array(best[1:]), marker=".")
    for panel, solution in zip(by_budget, SUMMED, strict=True):
        panel.set_xlabel(f"thinking budget, with {solution} for the solution")
    by_tokens.set_xlabel("mean tokens of a response, the best budgets")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(color="0.9")
    by_budget[0].set_ylabel("accuracy (%)")
    lines = by_budget[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(means))
    figure.savefig(file, dpi=110)


def title(name: str) -> str:
    if name in METHODS:
        return METHODS[name].title
    return {"base": "base", "stated_base": "base, stated"}[name]


def mean_rows(runs: list[list[dict]]) -> list[dict]:
    """Means over seeds. The standard error is over seeds too; of one seed, it is its own
    over problems."""
    rows = []
    for same in zip(*runs, strict=True):
        accuracy = [row["accuracy"] for row in same]
        row = dict(same[0])
        for name in ("accuracy", "pass_at_n", "forced_share"):
            row[name] = float(np.mean([r[name] for r in same]))
        for name in ("mean_tokens", "mean_thinking_tokens", "mean_solution_tokens"):
            row[name] = float(np.mean([r[name] for r in same]))
        if len(same) > 1:
            row["stderr"] = float(np.std(accuracy, ddof=1) / np.sqrt(len(same)))
        rows.append(row)
    return rows


def markdown(means: dict[str, list[dict]]) -> str:
    """Accuracy in percent with its standard error, and tokens a response."""
    lines = [
        "| thinking + solution | " + " | ".join(map(title, means)) + " |",
        "|---|" + "--:|" * len(means),
    ]
    for rows in zip(*means.values(), strict=True):
        budgets = rows[0]["thinking_budget"], rows[0]["solution_budget"]
        name = "unlimited" if budgets == (None, None) else "{} + {}".format(*budgets)
        cells = [
            f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} "
            f"({row['mean_tokens']:.1f})"
            for row in rows
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(per_seed: dict[str, list[list[dict]]], trained: dict[str, Any]) -> str:
    """One line a method: mean accuracies over the budgets of SUMMED, accuracy and tokens
    without budgets, the most that accuracy falls below the paper's way at as many tokens,
    and what the training took; means over seeds with standard errors."""
    heads = [f"mean over t, s = {s}" for s in SUMMED]
    heads += ["t = 8, s = 28", "unlimited", "its tokens", "below the paper"]
    heads += ["steps", "seconds"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, runs in per_seed.items():
        cells = [
            spread([mean_accuracy(rows, s, ts) for rows in runs])
            for s, ts in SUMMED.items()
        ]
        cells.append(spread([mean_accuracy(rows, 28, (8,)) for rows in runs]))
        cells.append(spread([mean_accuracy(rows, None, (None,)) for rows in runs]))
        tokens = [row_at(rows, None, None)["mean_tokens"] for rows in runs]
        cells.append(spread(tokens))
        pairs = zip(runs, per_seed[PAPER], strict=True)
        cells.append(spread([100 * most_below(*pair) for pair in pairs]))
        work = trained.get(name, [])
        cells += [spread([w[key] for w in work]) for key in ("step", "wall_time")]
        lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """A mean over seeds with its standard error, if there are several."""
    if not values:
        return ""
    mean = f"{np.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.1f}"


def row_at(rows: list[dict], solution: int | None, thinking: int | None) -> dict:
    budgets = thinking, solution
    return next(
        r for r in rows if (r["thinking_budget"], r["solution_budget"]) == budgets
    )


def mean_accuracy(rows: list[dict], solution: int | None, thinking: tuple) -> float:
    """In percent."""
    return 100 * float(
        np.mean([row_at(rows, solution, t)["accuracy"] for t in thinking])
    )


def most_below(rows: list[dict], paper: list[dict]) -> float:
    """The largest gap of a method's accuracy below the paper's at equal mean tokens, over
    all budgets of the paper's way; 0 if there is none. Between two budgets of the method,
    accuracy is interpolated: using one for some problems and the other for the rest gives
    it."""
    tokens, accuracy = frontier(rows)
    gaps = [
        row["accuracy"] - np.interp(row["mean_tokens"], tokens, accuracy)
        for row in paper
    ]
    return max(0.0, *gaps)


def frontier(rows: list[dict]) -> tuple[list[float], list[float]]:
    """Mean tokens and accuracy of the Pareto-optimal budgets, in order of tokens, after the
    point (0, 0): no response."""
    points = [(0.0, 0.0)]
    for row in sorted(rows, key=lambda r: (r["mean_tokens"], -r["accuracy"])):
        if row["accuracy"] > points[-1][1]:
            points.append((row["mean_tokens"], row["accuracy"]))
    tokens, accuracy = zip(*points, strict=True)
    return list(tokens), list(accuracy)


if __name__ == "__main__":
    main()
