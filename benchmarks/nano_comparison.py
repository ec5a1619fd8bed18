"""The claim of Elastic Reasoning (arXiv 2505.05315) at nano scale, from data to table.

    python benchmarks/nano_comparison.py --output runs/nano_comparison

For each of three seeds, the whole pipeline:
- base: fine-tuning (configs/nano_sft.yaml);
- budget: GRPO from it, rollouts under one pair of budgets (configs/nano_grpo.yaml);
- unconstrained: the same with rollouts without budgets, stopped at the same wall time;
- each of the three evaluated on 1,024 held-out problems at twelve thinking budgets, of
  which training saw one, and unconstrained.
For the first seed also: unconstrained GRPO for the same number of steps, and budget GRPO
that trains on forced tokens too.

A part that is finished is not run again, and one that was interrupted goes on, so the
command can be repeated. About 80 minutes on 2 idle CPU cores; wall times are compared, so
run nothing beside it. Writes comparison.json, table.md and comparison.png.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
STEPS = 120  # of configs/nano_grpo.yaml
TRAINED = 32  # tokens of thinking in training
BUDGETS = (8, 12, 16, 20, 24, 28, TRAINED, 40, 48, 64, 80, 96)
SOLUTION_BUDGET = 28
PROBLEMS = 1024
WITHOUT_BUDGETS = [
    *("--rollout.thinking_budget", "null"),
    *("--rollout.solution_budget", "null"),
]
VARIANTS = ("base", "unconstrained", "budget")  # of every seed
TITLES = {
    "base": "base",
    "unconstrained": "GRPO, unconstrained rollouts",
    "budget": f"GRPO, rollouts at {TRAINED} + {SOLUTION_BUDGET}",
    "unconstrained-steps": "GRPO, unconstrained rollouts, equal steps",
    "budget-forced": "GRPO, as before, also trained on forced tokens",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/nano_comparison"), help="directory"
    )
    output = parser.parse_args().output
    for seed in SEEDS:
        run_seed(output / f"seed{seed}", seed)
    run_more(output / f"seed{SEEDS[0]}", SEEDS[0])
    results = {
        variant: [
            merge(output / f"seed{seed}" / "results" / variant)
            for seed in (SEEDS if variant in VARIANTS else SEEDS[:1])
        ]
        for variant in TITLES
    }
    report(output, results)


def run_seed(folder: Path, seed: int) -> None:
    """The pipeline of one seed, each part only if its result is not there."""
    base = folder / "base"
    train("sft", "nano_sft", base, seed)
    evaluate(base, folder / "results" / "base")
    train("train", "nano_grpo", folder / "budget", seed, "--model", str(base))
    last = folder / "budget" / "checkpoints" / str(STEPS)
    evaluate(last, folder / "results" / "budget")

    run = folder / "unconstrained"
    flags = ["--model", str(base), *WITHOUT_BUDGETS]
    results = folder / "results" / "unconstrained"
    if not is_evaluated(results):
        until = wall_time(folder / "budget")
        if wall_time(run) < until:
            train("train", "nano_grpo", run, seed, *flags, until=until)
        # It was stopped after a whole step, which it saved.
        last = metrics(run)[-1]["step"]
        evaluate(run / "checkpoints" / str(last), results)


def run_more(folder: Path, seed: int) -> None:
    """What only one seed has: equal steps, and training on forced tokens."""
    base, run = folder / "base", folder / "unconstrained"
    train("train", "nano_grpo", run, seed, "--model", str(base), *WITHOUT_BUDGETS)
    last = run / "checkpoints" / str(STEPS)
    evaluate(last, folder / "results" / "unconstrained-steps")
    flags = ["--model", str(base), "--loss.train_on_forced", "true"]
    train("train", "nano_grpo", folder / "budget-forced", seed, *flags)
    last = folder / "budget-forced" / "checkpoints" / str(STEPS)
    evaluate(last, folder / "results" / "budget-forced")


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
    """Accuracy at every budget, and unconstrained, into two folders of results."""
    argv = [sys.executable, "-m", "e1jax.evaluate", "--model", str(model)]
    argv += ["--dataset", "nano", "--limit", str(PROBLEMS), "-n", "1"]
    argv += ["--temperature", "0.6", "--top-p", "1", "--slots", "128"]
    argv += ["--cache-len", "512"]
    for name, budgets, solution in (
        ("budgets", ",".join(map(str, BUDGETS)), str(SOLUTION_BUDGET)),
        ("unconstrained", "none", "none"),
    ):
        if not (results / name / "results.json").exists():
            more = ["--budgets", budgets, "--solution-budget", solution]
            more += ["--output", str(results / name)]
            print(" ".join([*argv[1:], *more]), flush=True)
            subprocess.run([*argv, *more], check=True)


def is_evaluated(results: Path) -> bool:
    parts = ("budgets", "unconstrained")
    return all((results / part / "results.json").exists() for part in parts)


def merge(results: Path) -> list[dict]:
    """The rows of a model: every budget, then unconstrained."""
    parts = ("budgets", "unconstrained")
    files = [results / part / "results.json" for part in parts]
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def metrics(run_dir: Path) -> list[dict]:
    """The finished lines of a run's metrics."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wall_time(run_dir: Path) -> float:
    """Seconds that the steps of a run have taken, compilation included."""
    return sum(line["seconds"] for line in metrics(run_dir))


def report(output: Path, results: dict[str, list[list[dict]]]) -> None:
    """comparison.json, table.md and comparison.png; the table goes to stdout too."""
    means = {variant: mean_rows(runs) for variant, runs in results.items()}
    record = {"per_seed": results, "mean": means}
    (output / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(means)
    (output / "table.md").write_text(table)
    print(table)
    files = []
    for variant in VARIANTS:
        summary = {
            **{"model": TITLES[variant], "dataset": "nano", "n": 1},
            "rows": means[variant],
        }
        files.append(output / f"{variant}.json")
        files[-1].write_text(json.dumps(summary, indent=1) + "\n")
    argv = [sys.executable, "-m", "e1jax.evaluate", "plot", *map(str, files)]
    subprocess.run([*argv, "--output", str(output / "comparison.png")], check=True)


def mean_rows(runs: list[list[dict]]) -> list[dict]:
    """Means over seeds. The standard error is that over seeds, or of one seed its own
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
        "| thinking + solution | " + " | ".join(TITLES[v] for v in means) + " |",
        "|---|" + "--:|" * len(means),
    ]
    for rows in zip(*means.values(), strict=True):
        budget = rows[0]["thinking_budget"]
        name = "unconstrained" if budget is None else f"{budget} + {SOLUTION_BUDGET}"
        name = f"**{name} (trained)**" if budget == TRAINED else name
        cells = [
            f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} "
            f"({row['mean_tokens']:.1f})"
            for row in rows
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
