"""`python -m e1jax.evaluate`: accuracy at thinking budgets, and what it costs in tokens.

Three forms, told apart by the first argument:
- `evaluate --model M --dataset D` samples every problem at every budget and grades it;
- `evaluate grade FILE --dataset D` grades completions that are there already;
- `evaluate plot A.json B.json --output P.png` draws the results of several models.

All budgets of all problems go through the engine as one stream of requests, so that its
slots stay full, and grading overlaps with sampling. Samples are paired: a problem has
the same seed at every budget, and draws the same tokens until its thinking is cut.

Every figure is an average over problems of the average over a problem's samples. The
standard error is that of the average over problems: their standard deviation (ddof 1)
over the square root of their number. So it is clustered: samples of one problem are not
taken for independent ones. With a single problem it is not known, and null.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import e1jax
from e1jax import data, rewards
from e1jax.checkpoint import JsonlOutput, Progress, digest, find_params
from e1jax.config import (
    UNLIMITED,
    Parser,
    SamplingParams,
    UserError,
    aligned,
    check_backslashes,
    parse_budget,
    parse_json,
    quantize_flags,
    run_command,
)
from e1jax.convert import LoadedModel, load_model
from e1jax.data import Problem, request_seed
from e1jax.engine import Completion, Engine
from e1jax.sharding import use_compilation_cache
from e1jax.tokenizer import read_json

_SLOTS = 32
_PARAMS = ("solution_budget", "n", "temperature", "top_p", "top_k", "seed")
# Fields of a Completion that are not kept, being most of its size. How many tokens were
# forced is the length of token_ids less thinking_tokens and solution_tokens.
_LEFT_OUT = ("prompt_ids", "logprobs", "forced", "prompt_index")
# What `grade` reads of a record: types, and the same in words.
_FIELDS = {
    "id": ((str, int), "a text or a whole number"),
    "sample": ((int,), "a whole number"),
    "solution": ((str,), "a text"),
    "token_ids": ((list,), "a list"),
    "thinking_tokens": ((int,), "a whole number"),
    "solution_tokens": ((int,), "a whole number"),
    "thinking_end": ((str, type(None)), "a text or null"),
    "thinking_budget": ((int, type(None)), "a whole number or null"),
    "solution_budget": ((int, type(None)), "a whole number or null"),
}
_MAY_LACK = ("thinking_budget", "solution_budget")  # in files of other programs
_FIGURE_FORMATS = (".png", ".pdf", ".svg")

Budgets = tuple[int | None, int | None]  # thinking, solution; None is unlimited
Row = dict[str, Any]  # one of results.json


class Outcome(NamedTuple):
    """What the statistics take from a completion."""

    reward: float
    tokens: int  # length of token_ids, forced ones included
    thinking_tokens: int  # sampled ones
    solution_tokens: int
    forced: bool  # `</think>` was: the budget or EOS ended the thinking


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["grade"]:
        grade(argv[1:])
    elif argv[:1] == ["plot"]:
        plot(argv[1:])
    else:
        evaluate(argv)


def evaluate(argv: Sequence[str]) -> None:
    """Samples every problem at every budget; goes on from what DIR holds already."""
    args = _evaluate_parser().parse_args(argv)
    params = SamplingParams(**{name: getattr(args, name) for name in _PARAMS})
    check_backslashes(args.instruction, "--instruction")
    problems = data.load_problems(args.dataset, args.limit)
    output = _output(args.output, problems)
    outcomes = output.done if output else {}
    # The longest requests first, so that the slots are full to the end.
    requests = [(i, b) for b in reversed(args.budgets) for i in range(len(problems))]
    keys = [[(problems[i].id, j, b) for j in range(args.n)] for i, b in requests]
    left = sum(key not in outcomes for samples in keys for key in samples)
    loaded = load_model(args.model, args.mesh, args.dtype, args.quantize)
    # Everything is checked before the weights are read, which can take minutes.
    engine = Engine(
        *(loaded.config, None, loaded.tokenizer, loaded.mesh),
        cache_len=args.cache_len,
        slots=min(_SLOTS, max(left, 1)) if args.slots is None else args.slots,
        kv_dtype=args.kv_dtype,
    )
    if args.instruction is None:
        args.instruction = data.default_instruction(loaded.tokenizer)
    settings = _settings(args, loaded, engine)
    if output:
        output.compare(settings)
    progress = Progress(left, kept_in=output and output.path)
    completions = engine.stream(
        [data.prompt_text(problems[i].text, args.instruction) for i, _ in requests],
        [_request_params(params, index, budget) for index, budget in requests],
        names=[f"problem {problems[i].id}" for i, _ in requests],
        skip=lambda request, sample: keys[request][sample] in outcomes,
        progress=progress,
    )
    if left:
        use_compilation_cache()
        engine.params = loaded.params
        answers = [problems[i].answers for i, _ in requests]
        with output or contextlib.nullcontext(), progress.shown(), _grader() as grader:
            for completion, reward in rewards.grade(completions, answers, grader):
                key = keys[completion.prompt_index][completion.sample]
                record = _record(key, args.solution_budget, completion, reward)
                if output:
                    output.append(record)
                outcomes[key] = _outcome(record, reward)
                progress.step()
        print(progress.summary(), file=sys.stderr)
    elif output:
        with output:  # drops half a line at its end
            print(f"all completions are in {output.path} already", file=sys.stderr)
    rows = []
    for budget in args.budgets:
        samples = [[outcomes[p.id, j, budget] for j in range(args.n)] for p in problems]
        rows.append(_row((budget, args.solution_budget), samples))
    names = {"model": args.model, "dataset": args.dataset}
    counts = {"n": args.n, "problems": len(problems)}
    _report({**settings, **names, **counts, "rows": rows}, args.output)


def grade(argv: Sequence[str]) -> None:
    """Grades completions that a file holds."""
    args = _grade_parser().parse_args(argv)
    problems = data.load_problems(args.dataset)
    found = _read_completions(args.completions, problems)
    _make_directory(args.output)
    groups: dict[Budgets, dict[int, list[Outcome]]] = {}  # budgets, index, sample
    answers = [problem.answers for problem in problems]
    with _grader() as grader, tqdm(total=len(found), disable=None, leave=False) as bar:
        for item, reward in rewards.grade(found, answers, grader):
            group = groups.setdefault(item.budgets, {})
            outcome = item.outcome._replace(reward=reward)
            group.setdefault(item.prompt_index, []).append(outcome)
            bar.update()
    rows, lacking = [], []
    for budgets in sorted(groups, key=_size):
        group = groups[budgets]
        rows.append(_row(budgets, [group[index] for index in sorted(group)]))
        if len(group) < len(problems):
            lacking.append(f"{len(problems) - len(group)} at {_shown(budgets)}")
    if lacking:
        print(
            f"note: of {len(problems)} problems, {', '.join(lacking)} have no "
            "completion; the figures are about the others",
            file=sys.stderr,
        )
    names = {"model": str(args.completions), "dataset": args.dataset}
    most = max(len(samples) for group in groups.values() for samples in group.values())
    counts = {"n": most, "problems": len(set().union(*groups.values()))}
    _report({**names, **counts, "rows": rows}, args.output)


def plot(argv: Sequence[str]) -> None:
    """Draws the results of several models as one figure, and prints one table."""
    args = _plot_parser().parse_args(argv)
    if args.output.suffix not in _FIGURE_FORMATS:
        raise UserError(
            f"--output {args.output} must end in {', '.join(_FIGURE_FORMATS)}"
        )
    results = [_read_results(path) for path in args.results]
    names = [result["model"] for result in results]
    curves = [
        (f"{name} ({path})" if names.count(name) > 1 else name, result["rows"])
        for path, name, result in zip(args.results, names, results, strict=True)
    ]
    _draw(curves, args.output)
    print(_comparison(curves))


# Sampling.


def _request_params(
    params: SamplingParams, index: int, budget: int | None
) -> SamplingParams:
    # By the problem's index: the same at every budget.
    seed = request_seed(params.seed, index)
    return dataclasses.replace(params, thinking_budget=budget, seed=seed)


def _output(directory: Path | None, problems: Sequence[Problem]) -> JsonlOutput | None:
    """completions.jsonl, whose records are known by id, sample and thinking budget."""
    if directory is None:
        return None
    _make_directory(directory)
    # A problem's index is a part of it, because its seed depends on that.
    digests = {p.id: digest([p.text, p.answers, i]) for i, p in enumerate(problems)}

    def entry(record: dict[str, Any]) -> tuple[Any, Outcome]:
        key = record["id"], record["sample"], record["thinking_budget"]
        return key, _outcome(record, record["reward"])

    return JsonlOutput(directory / "completions.jsonl", digests, entry)


def _settings(
    args: argparse.Namespace, loaded: LoadedModel, engine: Engine
) -> dict[str, Any]:
    """What changes the completions, under the names of the flags.

    Not thinking budgets, n and limit: more may be added later.
    """
    local = Path(loaded.name).exists()
    # Of a run directory it is the step that counts: a later one may be the best.
    saved = find_params(loaded.path)
    path = saved[0] if saved else loaded.path
    dataset = Path(args.dataset)
    return {
        "model": str(path.resolve()) if local else loaded.name,
        "dataset": str(dataset.resolve()) if dataset.exists() else args.dataset,
        "dtype": str(loaded.dtype),
        "quantize": loaded.quantize,
        "kv_dtype": engine.kv_dtype,
        "cache_len": engine.cache_len,
        "instruction": args.instruction,
        **{name: getattr(args, name) for name in _PARAMS if name != "n"},
    }


def _record(
    key: tuple[str | int, int, int | None],
    solution_budget: int | None,
    completion: Completion,
    reward: float,
) -> dict[str, Any]:
    """A line of completions.jsonl."""
    fields = dataclasses.asdict(completion)
    return {
        "id": key[0],
        "sample": key[1],
        "thinking_budget": key[2],
        "solution_budget": solution_budget,
        **{name: value for name, value in fields.items() if name not in _LEFT_OUT},
        "reward": reward,
    }


@contextlib.contextmanager
def _grader() -> Iterator[rewards.Grader]:
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


# Completions of a file.


class _Found(NamedTuple):
    """A completion of a file, with the fields that `rewards.grade` looks at."""

    prompt_index: int  # which problem
    solution: str
    budgets: Budgets
    outcome: Outcome  # its reward is not known yet


def _read_completions(path: Path, problems: Sequence[Problem]) -> list[_Found]:
    """The completions in a file of `sample` or `evaluate`.

    Raises UserError naming the line for one that is broken, has an id that no problem
    has, or has been there before.
    """
    # As written, else as text: 3 and "3" are one id, unless problems have both.
    indices: dict[str | int, int] = {str(p.id): i for i, p in enumerate(problems)}
    indices |= {problem.id: index for index, problem in enumerate(problems)}
    found, first = [], {}
    try:
        with path.open("rb") as file:
            lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in lines:
        at = f"{path} line {number}"
        record = _checked_record(parse_json(line.rstrip(), path, number), at)
        identity = record["id"]
        index = indices.get(identity, indices.get(str(identity)))
        if index is None:
            raise UserError(
                f"{at}: no problem has the id {identity!r}; ids must be those of the "
                "dataset's problems or, where these have none, their numbers from 0"
            )
        budgets = record.get("thinking_budget"), record.get("solution_budget")
        before = first.setdefault((index, record["sample"], budgets), number)
        if before != number:
            raise UserError(
                f"{at}: sample {record['sample']} of id {identity!r} is in line {before} "
                "already; remove one of them"
            )
        outcome = _outcome(record, reward=math.nan)
        found.append(_Found(index, record["solution"], budgets, outcome))
    if not found:
        raise UserError(f"{path} holds no completion")
    return found


def _checked_record(record: Any, at: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{at} is not a JSON object but a {type(record).__name__}")
    for name, (types, rule) in _FIELDS.items():
        if name not in record and name not in _MAY_LACK:
            raise UserError(
                f"{at} has no field {name}; give a file of sample --json or --output, "
                "or the completions.jsonl of evaluate"
            )
        if name in record and type(record[name]) not in types:
            value = reprlib.repr(record[name])
            raise UserError(f"{at}: {name} must be {rule}, not {value}")
    return record


# Statistics.


def _outcome(record: Mapping[str, Any], reward: float) -> Outcome:
    return Outcome(
        reward=reward,
        tokens=len(record["token_ids"]),
        thinking_tokens=record["thinking_tokens"],
        solution_tokens=record["solution_tokens"],
        forced=record["thinking_end"] in ("budget", "eos"),
    )


def _row(budgets: Budgets, problems: Sequence[Sequence[Outcome]]) -> Row:
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


def _size(budgets: Budgets) -> list[int]:
    """Orders budgets, unlimited ones last."""
    return [UNLIMITED if budget is None else budget for budget in budgets]


# What the user sees.


def _report(results: dict[str, Any], directory: Path | None) -> None:
    """Prints the table; with a directory, writes results.json and accuracy.png."""
    print(_table(results["rows"], results["n"]))
    if directory is None:
        return
    text = json.dumps({**results, "version": e1jax.__version__}, indent=2) + "\n"
    with _writing(directory):
        new = directory / "results.json.new"
        new.write_text(text)
        new.replace(directory / "results.json")
    _draw([(results["model"], results["rows"])], directory / "accuracy.png")


def _table(rows: Sequence[Row], n: int) -> str:
    """Aligned text; budgets are thinking + solution, means are in tokens."""
    pass_at_n = f"pass@{n} %"
    names = ("tokens", "thinking", "solution", "forced %")
    lines: list[tuple[str, ...]] = [("budgets", "accuracy %", pass_at_n, *names)]
    for row in rows:
        cells = (
            _shown(_budgets(row)),
            _accuracy(row),
            f"{100 * row['pass_at_n']:.1f}",
            f"{row['mean_tokens']:.1f}",
            f"{row['mean_thinking_tokens']:.1f}",
            f"{row['mean_solution_tokens']:.1f}",
            f"{100 * row['forced_share']:.1f}",
        )
        lines.append(cells)
    return aligned(lines)


def _comparison(curves: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Aligned text: accuracy in percent and, in brackets, mean tokens of a response, with
    a column for each (label, rows) and a line for each pair of budgets."""
    columns = [
        {_budgets(r): f"{_accuracy(r)} ({r['mean_tokens']:.1f})" for r in rows}
        for _, rows in curves
    ]
    lines = [("budgets", *(label for label, _ in curves))]
    for budgets in sorted({b for column in columns for b in column}, key=_size):
        lines.append((_shown(budgets), *(c.get(budgets, "-") for c in columns)))
    return aligned(lines)


def _budgets(row: Row) -> Budgets:
    return row["thinking_budget"], row["solution_budget"]


def _accuracy(row: Row) -> str:
    spread = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def _shown(budgets: Budgets) -> str:
    return "+".join("none" if budget is None else str(budget) for budget in budgets)


def _read_results(path: Path) -> dict[str, Any]:
    """A results.json; raises UserError if what is drawn of it is not there."""
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
            row["stderr"] or 0,
            row["mean_tokens"],
        )
        known = all(type(budget) in (int, type(None)) for budget in _budgets(row))
        numbers = all(type(v) in (int, float) for v in (accuracy, stderr, tokens))
        in_range = 0 <= accuracy <= 1 and 0 <= stderr <= 1 and 1 <= tokens <= UNLIMITED
        return numbers and in_range and known
    except (KeyError, TypeError):
        return False


def _draw(curves: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
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
    with _writing(path):
        page.savefig(path, dpi=150)


def _make_directory(path: Path | None) -> None:
    if path is not None:
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--output {path} cannot be written: {reason}; choose another one"
        ) from None


# Flags.


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.evaluate",
        description="Samples the problems of a dataset at several thinking budgets, "
        "grades the answers, and shows accuracy and tokens spent. Two other forms need "
        "no model: python -m e1jax.evaluate grade --help grades completions that are "
        "there already; python -m e1jax.evaluate plot --help draws several models.",
        epilog="Columns: accuracy with its standard error (over problems, so that "
        "samples of one problem do not count as independent); pass@N, the share of "
        "problems with a right answer among their N samples; mean tokens of a response, "
        "forced ones included, and those sampled as thinking and as solution; the share "
        "of responses in which </think> was forced. Compiled programs are kept between "
        "runs in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/e1jax/xla.",
    )
    flag = parser.add_argument
    flag(
        "--model",
        required=True,
        help="hub id, Hugging Face or e1jax directory, run directory, or nano; required",
    )
    _dataset_flag(parser)
    flag(
        "--budgets",
        type=_parse_budgets,
        default=[512, 1024, 2048, 3072, None],
        metavar="T,T,...",
        help="thinking budgets, each the most tokens sampled before </think> is forced, "
        "or none (default 512,1024,2048,3072,none)",
    )
    flag(
        "--solution-budget",
        type=parse_budget,
        default=1024,
        metavar="TOKENS|none",
        help="most tokens sampled after </think>, at every thinking budget; room for "
        "them is reserved also where thinking is unlimited (default 1024)",
    )
    flag("-n", type=int, default=16, help="samples of each problem (default 16)")
    flag(
        "--limit",
        type=int,
        metavar="PROBLEMS",
        help="only the first so many problems (default: all)",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="each problem's seed is made from it and the problem's index; the same "
        "gives the same tokens (default 0)",
    )
    flag(
        "--instruction",
        metavar="TEXT",
        help="follows the problem in the prompt, after a space; '' for none (default: "
        f'that of the model\'s training, else "{data.DEFAULT_INSTRUCTION}")',
    )
    flag(
        "--temperature",
        type=float,
        default=0.6,
        help="softmax temperature; 0 is greedy (default 0.6)",
    )
    flag(
        "--top-p",
        type=float,
        default=0.95,
        help="probability mass kept, in (0, 1]; 1 is off (default 0.95)",
    )
    flag(
        "--top-k",
        type=int,
        default=0,
        help="number of most probable tokens kept; 0 is off (default 0)",
    )
    flag(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of weights and cache (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    quantize_flags(flag)
    flag(
        "--mesh",
        metavar="data=1,tensor=4",
        help="device mesh: rows over data, heads over tensor (default: all devices, as "
        "many on tensor as the model's heads allow)",
    )
    flag(
        "--slots",
        type=int,
        help=f"rows sampled at a time (default: as many as completions, at most {_SLOTS})",
    )
    flag(
        "--cache-len",
        type=int,
        metavar="TOKENS",
        help="room for prompt and response in a slot (default 32768, or the model's "
        "max_position_embeddings if smaller)",
    )
    flag(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory for results.json, accuracy.png and completions.jsonl, which "
        "holds what sample --json prints, less prompt_ids, logprobs and forced, plus the "
        "budgets and the reward; run again, what is there is skipped, and more budgets, "
        "samples or problems may be asked for (default: only the table)",
    )
    return parser


def _grade_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.evaluate grade",
        description="Grades completions that are there already, without a model.",
    )
    parser.add_argument(
        "completions",
        type=Path,
        metavar="COMPLETIONS.jsonl",
        help="file of sample --json or --output, or the completions.jsonl of evaluate; "
        "each budget in it makes a row, completions without one a row of null budgets",
    )
    _dataset_flag(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory for results.json and accuracy.png (default: only the table)",
    )
    return parser


def _plot_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.evaluate plot",
        description="Draws accuracy (%) against mean tokens per response, with standard "
        "errors, a line for each model, and prints both as a table, a column for each.",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="results.json of an evaluation",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="P.png",
        help="figure to write, as PNG, PDF or SVG by its ending; required",
    )
    return parser


def _dataset_flag(parser: argparse.ArgumentParser) -> None:
    names = ", ".join([*data.NANO, *data.HUB])
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME|FILE",
        help=f"{names}, a hub dataset, or a JSON, JSONL or parquet file with problem and "
        "answer; a completion belongs to a problem by its id, else by its index from 0; "
        "required",
    )


def _parse_budgets(text: str) -> list[int | None]:
    """Budgets between commas, the smallest first; each once."""
    budgets = [parse_budget(part) for part in text.split(",")]
    if len(set(budgets)) < len(budgets):
        raise argparse.ArgumentTypeError(f"{text!r} names a budget twice")
    return sorted(budgets, key=lambda budget: _size((budget, None)))


if __name__ == "__main__":
    run_command(main)
