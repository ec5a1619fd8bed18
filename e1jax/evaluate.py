"""`python -m e1jax.evaluate`: accuracy at thinking budgets, and its cost in tokens.

Three forms, told apart by the first argument:
- `evaluate --model M --dataset D` samples every problem at every budget and grades it;
- `evaluate grade FILE --dataset D` grades completions that are there already;
- `evaluate plot A.json B.json --output P.png` draws the results of several models.

All budgets of all problems go through the engine as one stream of requests, so that its
slots stay full, and grading overlaps with sampling. Samples are paired: a problem has
the same seed at every budget, and draws the same tokens until its thinking is cut (not
where prompts state their budgets).

Every figure is an average over problems of the average over a problem's samples. The
standard error is the standard deviation over problems (ddof 1), divided by the square
root of their number. So it is clustered: samples of one problem are not
taken for independent ones. With a single problem it is not known, and null.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import e1jax
from e1jax import chat_template, data, rewards
from e1jax.checkpoint.load import LoadedModel, load_flagged
from e1jax.cli.command import check_command, run_command
from e1jax.cli.flags import (
    EngineFlags,
    flag,
    parse_budget,
    read_flags,
    sampling_flags,
)
from e1jax.cli.outputs import JsonlOutput, Progress, digest, replace_file
from e1jax.config.buckets import open_path
from e1jax.config.checks import UserError, check_number, shown
from e1jax.config.sampling import SamplingParams
from e1jax.config.texts import check_backslashes
from e1jax.data.problems import Problem
from e1jax.data.prompts import request_seed
from e1jax.evaluation.figure import FIGURE_FORMATS, draw_figure
from e1jax.evaluation.grading import (
    Found,
    check_completion,
    noting_grader,
    outcome_of,
    read_completions,
)
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
from e1jax.sampling.completion import Completion
from e1jax.sampling.engine import Engine
from e1jax.sampling.record import model_record, upgrade_record
from e1jax.sharding.runtime import use_compilation_cache

PROG = "python -m e1jax.evaluate"
_SLOTS = 32


_PARAMS = ("solution_budget", "n", "temperature", "top_p", "top_k", "seed")


# Fields of a Completion that are not kept, being most of its size. How many tokens were
# forced is the length of token_ids less thinking_tokens and solution_tokens.
_LEFT_OUT = ("prompt_ids", "logprobs", "forced", "prompt_index")


def _parse_budgets(text: str) -> tuple[int | None, ...]:
    """Budgets between commas, the smallest first; each once."""
    budgets = [parse_budget(part) for part in text.split(",")]
    if len(set(budgets)) < len(budgets):
        raise argparse.ArgumentTypeError(f"{shown(text)} names a budget twice")
    return tuple(sorted(budgets, key=lambda budget: budget_size((budget, None))))


_DATASETS = (
    f"{', '.join([*data.NANO, *data.HUB])}, a hub dataset, or a JSON, JSONL or parquet "
    "file with problem and answer; a completion belongs to a problem by its id, else by "
    "its index from 0"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags(EngineFlags):
    """Samples the problems of a dataset at several thinking budgets, grades the answers,
    and shows accuracy and tokens spent. Two other forms need no model: python -m
    e1jax.evaluate grade --help grades completions that are there already; python -m
    e1jax.evaluate plot --help draws several models.

    Columns: accuracy with its standard error (over problems, so that samples of one
    problem do not count as independent); pass@N, the share of problems with a right
    answer among their N samples; mean tokens of a response, forced ones included, and
    sampled tokens of thinking and of the solution; the share of responses in which </think>
    was forced. The seed of a problem is made from --seed and its index. Compiled programs
    are kept between runs in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/e1jax/xla.
    """

    model: str = flag("MODEL")
    dataset: str = flag("NAME|FILE", help=_DATASETS)
    budgets: tuple[int | None, ...] = flag(
        "T,T,...", (512, 1024, 2048, 3072, None), type=_parse_budgets, nargs=None
    )
    """Thinking budgets, each the most tokens sampled before </think> is forced, or none
    (default 512,1024,2048,3072,none)."""
    sampling: SamplingParams = sampling_flags(
        "thinking_budget",
        "end_of_thinking_text",
        "on_thinking_budget",
        "stop",
        n=16,
    )
    limit: int | None = flag("PROBLEMS", None)
    """Only the first so many problems (default: all)."""
    instruction: str | None = flag(
        "TEXT",
        None,
        help="Follows the problem in the prompt, after a space; '' for none (default: "
        f'that of the model\'s training, else "{data.DEFAULT_INSTRUCTION}")',
    )
    output: Path | None = flag("DIR", None)
    """Directory for results.json, accuracy.png and completions.jsonl, which holds what
    sample --json prints, less prompt_ids, logprobs and forced, plus the budgets and the
    reward; run again, what is there is skipped, and more budgets, samples or problems may
    be asked for (default: only the table)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradeFlags:
    """Grades completions that are there already, without a model."""

    completions: Path = flag("COMPLETIONS.jsonl", positional=True)
    """File of sample --json or --output, or the completions.jsonl of evaluate; each
    budget in it makes a row, completions without one a row of null budgets."""
    dataset: str = flag("NAME|FILE", help=_DATASETS)
    output: Path | None = flag("DIR", None)
    """Directory for results.json and accuracy.png (default: only the table)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotFlags:
    """Draws accuracy (%) against mean tokens per response, with standard errors, a line
    for each model, and prints both as a table, a column for each."""

    results: tuple[Path, ...] = flag("RESULTS.json", positional=True)
    """The results.json of an evaluation."""
    output: Path = flag("P.png")
    """Figure to write, as PNG, PDF or SVG by its ending."""


def main() -> None:
    """`python -m e1jax.evaluate`: budgets of a model, or its commands grade and plot."""
    argv = sys.argv[1:]
    command = check_command(argv, ("grade", "plot"), PROG)
    if command == "grade":
        grade(argv[1:])
    elif command == "plot":
        plot(argv[1:])
    else:
        evaluate(argv)


def evaluate(argv: Sequence[str]) -> None:
    """Samples every problem at every budget; goes on from the completions in DIR."""
    args = read_flags(EvaluateFlags, argv, PROG)
    chat_template.warm_up()
    check_backslashes(args.instruction, "--instruction")
    problems = data.load_problems(args.dataset, args.limit)
    with owned_directory(args.output):
        _evaluate(args, problems)


def _evaluate(args: EvaluateFlags, problems: Sequence[Problem]) -> None:
    params = args.sampling
    output = _output(args.output, problems)
    outcomes = output.done if output else {}
    # The longest requests first, so that the slots are full to the end.
    requests = [(i, b) for b in reversed(args.budgets) for i in range(len(problems))]
    keys = [[(problems[i].id, j, b) for j in range(params.n)] for i, b in requests]
    left = sum(key not in outcomes for samples in keys for key in samples)
    loaded = load_flagged(args)
    # Everything is checked before the weights are read, which can take minutes.
    engine = Engine.without_weights(
        loaded,
        cache_len=args.cache_len,
        slots=min(_SLOTS, max(left, 1)) if args.slots is None else args.slots,
        kv_dtype=args.kv_dtype,
    )
    instruction = args.instruction
    if instruction is None:
        instruction = data.default_instruction(loaded.tokenizer)
    settings = _settings(args, instruction, loaded, engine)
    if output:
        output.compare(settings, lambda old: upgrade_record(old, loaded))
    progress = Progress(left, kept_in=output and output.path)
    completions = engine.stream(
        [data.prompt_text(problems[i].text, instruction) for i, _ in requests],
        [_request_params(params, index, budget) for index, budget in requests],
        names=[f"problem {problems[i].id}" for i, _ in requests],
        skip=lambda request, sample: keys[request][sample] in outcomes,
        progress=progress,
    )
    if left:
        use_compilation_cache()
        engine.params = loaded.read_params()
        answers = [problems[i].answers for i, _ in requests]
        with (
            output or contextlib.nullcontext(),
            progress.shown(),
            noting_grader() as grader,
        ):
            for completion, reward in rewards.grade(completions, answers, grader):
                key = keys[completion.prompt_index][completion.sample]
                record = _record(key, params.solution_budget, completion, reward)
                if output:
                    output.append(record)
                outcomes[key] = outcome_of(record, reward)
                progress.step()
        print(progress.summary(), file=sys.stderr)
    elif output:
        with output:  # drops half a line at its end
            print(f"all completions are in {output.path} already", file=sys.stderr)
    rows = []
    for budget in args.budgets:
        samples = [
            [outcomes[p.id, j, budget] for j in range(params.n)] for p in problems
        ]
        rows.append(result_row((budget, params.solution_budget), samples))
    names = {"model": args.model, "dataset": args.dataset}
    counts = {"n": params.n, "problems": len(problems)}
    _report({**settings, **names, **counts, "rows": rows}, args.output)


def grade(argv: Sequence[str]) -> None:
    """Grades completions that a file holds."""
    args = read_flags(GradeFlags, argv, f"{PROG} grade")
    problems = data.load_problems(args.dataset)
    found = read_completions(args.completions, problems)
    with owned_directory(args.output):
        _grade(args, problems, found)


def _grade(
    args: GradeFlags, problems: Sequence[Problem], found: Sequence[Found]
) -> None:
    groups: dict[Budgets, dict[int, list[Outcome]]] = {}  # budgets, index, sample
    answers = [problem.answers for problem in problems]
    with (
        noting_grader() as grader,
        tqdm(total=len(found), disable=None, leave=False) as bar,
    ):
        for item, reward in rewards.grade(found, answers, grader):
            group = groups.setdefault(item.budgets, {})
            outcome = item.outcome._replace(reward=reward)
            group.setdefault(item.prompt_index, []).append(outcome)
            bar.update()
    rows, lacking = [], []
    for budgets in sorted(groups, key=budget_size):
        group = groups[budgets]
        rows.append(result_row(budgets, [group[index] for index in sorted(group)]))
        if len(group) < len(problems):
            lacking.append(f"{len(problems) - len(group)} at {shown_budgets(budgets)}")
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
    args = read_flags(PlotFlags, argv, f"{PROG} plot")
    if args.output.suffix not in FIGURE_FORMATS:
        raise UserError(
            f"--output {args.output} must end in {', '.join(FIGURE_FORMATS)}"
        )
    results = [read_results(path) for path in args.results]
    names = [result["model"] for result in results]
    curves = [
        (f"{name} ({path})" if names.count(name) > 1 else name, result["rows"])
        for path, name, result in zip(args.results, names, results, strict=True)
    ]
    draw_figure(curves, args.output)
    print(comparison(curves))


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
    # A problem's index is a part of it, because its seed depends on that.
    digests = {p.id: digest([p.text, p.answers, i]) for i, p in enumerate(problems)}

    def entry(record: dict[str, Any]) -> tuple[Any, Outcome]:
        check_completion(record, "a record")
        key = record["id"], record["sample"], record["thinking_budget"]
        check_number("reward", record["reward"], "that is finite", lambda v: True)
        return key, outcome_of(record, record["reward"])

    return JsonlOutput(directory / "completions.jsonl", digests, entry)


def _settings(
    args: EvaluateFlags, instruction: str, loaded: LoadedModel, engine: Engine
) -> dict[str, Any]:
    """The settings that change completions, under the names of the flags.

    Not thinking budgets, n and limit: more may be added later.
    """
    dataset = open_path(args.dataset)
    return {
        **model_record(loaded, engine),
        "dataset": str(dataset.resolve()) if dataset.exists() else args.dataset,
        "instruction": instruction,
        **{name: getattr(args.sampling, name) for name in _PARAMS if name != "n"},
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


def _report(results: dict[str, Any], directory: Path | None) -> None:
    """Prints the table; with a directory, writes results.json and accuracy.png."""
    print(results_table(results["rows"], results["n"]))
    if directory is None:
        return
    text = json.dumps({**results, "version": e1jax.__version__}, indent=2) + "\n"
    replace_file(directory / "results.json", text.encode())
    draw_figure([(results["model"], results["rows"])], directory / "accuracy.png")


if __name__ == "__main__":
    run_command(main)
