"""`python -m e1jax.sample`: budgeted sampling from the command line.

Steps: parse flags, read and check every request, read the records of an earlier run in
the output file, sample, and hand out each completion as it finishes.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from e1jax import chat_template, data
from e1jax.checkpoint.load import BUNDLED, LoadedModel, load_flagged
from e1jax.cli.command import run_command
from e1jax.cli.flags import EngineFlags, flag, read_flags, sampling_flags
from e1jax.cli.outputs import JsonlOutput, Progress, digest
from e1jax.config.buckets import open_path
from e1jax.config.checks import UserError, check_known, shown
from e1jax.config.sampling import LATER_FIELDS, SamplingParams
from e1jax.config.texts import check_backslashes, parse_json
from e1jax.sampling.completion import Completion
from e1jax.sampling.engine import Engine
from e1jax.sampling.record import model_record, upgrade_record
from e1jax.sampling.request import Prompt
from e1jax.sharding.runtime import use_compilation_cache
from e1jax.tokenizer import Tokenizer

_PARAMS = [field.name for field in dataclasses.fields(SamplingParams)]
_BUDGETS = ("thinking_budget", "solution_budget")
# The forms of a line's prompt: the rule, and a test of it.
_PROMPTS = {
    "prompt": ("a text", lambda value: isinstance(value, str)),
    "messages": (
        "a list of objects with role and content",
        lambda value: isinstance(value, list) and all(map(_is_message, value)),
    ),
    "prompt_ids": (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(type(i) is int for i in value),
    ),
}
_DEMO_PROBLEMS = 3
_DEMO_BUDGETS = ((32, 28), (1024, 1024))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags(EngineFlags):
    """Samples thinking and solution under separate token budgets.

    Without a prompt, the nano model solves a few problems of its own at two budgets.
    Compiled programs are kept between runs in $JAX_COMPILATION_CACHE_DIR, by default
    ~/.cache/e1jax/xla.
    """

    model: str = flag("MODEL", "nano")
    prompt: tuple[str, ...] = flag("PROMPT", (), positional=True)
    """Text of a prompt, put into the model's chat template."""
    prompts: str | None = flag("FILE.jsonl|-", None)
    """Requests, one JSON object a line: prompt, messages or prompt_ids, and optionally id
    and the sampling settings (thinking_budget, ...; null for an unlimited budget); -
    reads standard input."""
    sampling: SamplingParams = sampling_flags()
    output: Path | None = flag("OUT.jsonl", None)
    """Append completions to this file as they finish, and show none; run again, what is
    there is skipped."""
    json: bool = False
    """Print one JSON object per completion."""
    logprobs: bool = False
    """Show each token with its log-probability, forced ones marked * (JSON and --output
    hold them always)."""
    raw: bool = False
    """Tokenise a text prompt as it is, without the chat template."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: a line of the prompts file, or a prompt of the command line."""

    name: str  # in messages: "prompt 0", or where its line is
    id: str | int
    prompt: Prompt
    raw: bool  # a text that skips the chat template
    params: SamplingParams

    def encoded(self, tokenizer: Tokenizer) -> Prompt:
        """The prompt as the engine takes it: a raw text as its token ids."""
        if not (self.raw and isinstance(self.prompt, str)):
            return self.prompt
        try:
            return tokenizer.encode(self.prompt)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def digest(self) -> str:
        """Names prompt and parameters, but for n: more samples may be added later."""
        params = {
            name: value
            for name, value in dataclasses.replace(self.params, n=1).record().items()
            if name not in LATER_FIELDS or value != LATER_FIELDS[name]
        }
        return digest([self.prompt, self.raw, params])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def main() -> None:
    """`python -m e1jax.sample`."""
    args = read_flags(SampleFlags, sys.argv[1:], "python -m e1jax.sample")
    defaults = args.sampling
    items = _items(args, defaults)
    if not args.raw:
        chat_template.warm_up()
    output = None
    if args.output is not None:
        output = JsonlOutput(
            args.output,
            {item.id: item.digest() for item in items},
            lambda record: ((record["id"], record["sample"]), None),
        )
    done = output.done if output else {}
    keys = [(item.id, j) for item in items for j in range(item.params.n)]
    left = sum(key not in done for key in keys)
    loaded = load_flagged(args)
    # Everything is checked before the weights are read, which can take minutes.
    engine = Engine.without_weights(
        loaded,
        cache_len=args.cache_len,
        slots=min(16, max(left, 1)) if args.slots is None else args.slots,
        kv_dtype=args.kv_dtype,
    )
    if output:
        output.compare(
            _settings(args, loaded, engine, defaults),
            lambda old: upgrade_record(old, loaded),
        )
    progress = Progress(left, kept_in=output and output.path)
    completions = engine.stream(
        [item.encoded(engine.tokenizer) for item in items],
        [item.params for item in items],
        names=[item.name for item in items],
        skip=lambda index, sample: (items[index].id, sample) in done,
        progress=progress,
    )
    if left == 0:
        with output or contextlib.nullcontext():  # drops half a line at its end
            print(f"all {len(keys)} are in {args.output} already", file=sys.stderr)
        return
    use_compilation_cache()
    engine.params = loaded.read_params()
    with (
        output or contextlib.nullcontext(),
        progress.shown(),
        Printer(args, engine, items, progress.bar) as show,
    ):
        for completion in completions:
            record = _record(items[completion.prompt_index], completion)
            if output:
                output.append(record)
            show(completion, record)
            progress.step()
    print(progress.summary(), file=sys.stderr if args.json or output else sys.stdout)


class Printer:
    """Shows completions on stdout: JSON as they finish, text in the prompts' order.

    With an output file and without --json, nothing is shown. A text that still waits for
    its turn when the context is left, by Ctrl-C say, is shown then.
    """

    def __init__(self, args: SampleFlags, engine: Engine, items: list[Item], bar: tqdm):
        self.args, self.engine, self.items, self.bar = args, engine, items, bar
        self.alone = sum(item.params.n for item in items) == 1
        self.held: dict[tuple[int, int], str] = {}
        self.turn = (0, 0)  # prompt and sample to show next

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *error: object) -> None:
        for _, text in sorted(self.held.items()):
            self._say(text)

    def __call__(self, completion: Completion, record: dict[str, Any]) -> None:
        if self.args.json:
            self._say(json.dumps(record))
        elif not self.args.output:
            key = (completion.prompt_index, completion.sample)
            self.held[key] = self._text(completion)
            while self.turn in self.held:
                self._say(self.held.pop(self.turn))
                index, sample = self.turn
                last = sample + 1 == self.items[index].params.n
                self.turn = (index + 1, 0) if last else (index, sample + 1)

    def _say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def _text(self, completion: Completion) -> str:
        terminal = sys.stdout is not None and sys.stdout.isatty()
        dim, plain = ("\x1b[2m", "\x1b[0m") if terminal else ("", "")
        item, how = self.items[completion.prompt_index], completion.thinking_end
        lines = [] if self.alone else [f"--- {item.id}, sample {completion.sample}"]
        text, solution = completion.text, completion.solution
        end = text[len(completion.thinking) : len(text) - len(solution)]
        lines.append(f"{dim}{completion.thinking}{end}{plain}{solution}")
        cut = {"budget": " (cut by the budget)", "eos": " (ended by EOS)"}
        lines.append(
            f"[{completion.thinking_tokens} thinking{cut.get(how or '', '')} + "
            f"{sum(completion.forced)} forced + {completion.solution_tokens} solution "
            f"tokens, {completion.finish_reason}, answer {completion.answer}]"
        )
        if self.args.logprobs:
            columns = (completion.token_ids, completion.logprobs, completion.forced)
            for token, logprob, forced in zip(*columns, strict=True):
                text = self.engine.tokenizer.decode([token])
                lines.append(f"{logprob:10.4f} {'*' * forced:1} {token:6d} {text!r}")
        return "\n".join(lines)


def read_items(
    lines: Iterable[str], where: str, defaults: SamplingParams, raw: bool
) -> list[Item]:
    """Requests from JSONL, every line checked; raises UserError naming the line."""
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at = f"{where} line {number}"
        fields = parse_json(line, where, number)
        if not isinstance(fields, dict):
            raise UserError(f"{at} is not a JSON object but a {type(fields).__name__}")
        items.append(_item(fields, len(items), at, defaults, raw))
    if not items:
        raise UserError(f"{where} holds no request")
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        other = first.setdefault(str(item.id), index)
        if other != index:
            raise UserError(
                f"{where}: requests {other} and {index} have the same id {shown(item.id)} "
                "(a request without one has its index); make ids differ"
            )
    return items


def _item(
    fields: dict[str, Any], index: int, at: str, defaults: SamplingParams, raw: bool
) -> Item:
    check_known(fields, [*_PROMPTS, "id", *_PARAMS], at)
    given = [name for name in _PROMPTS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(
            f"{at} needs exactly one of prompt, messages and prompt_ids, not {found}"
        )
    kind, prompt = given[0], fields[given[0]]
    rule, fits = _PROMPTS[kind]
    if not fits(prompt):
        raise UserError(f"{at}: {kind} must be {rule}, not {shown(prompt)}")
    if not prompt:
        raise UserError(f"{at}: {kind} is empty")
    check_backslashes(prompt, f"{at}: {kind}")
    identity = fields.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise UserError(
            f"{at}: id must be a text or a whole number, not {shown(identity)}"
        )
    own = {name: fields[name] for name in _PARAMS if name in fields}
    try:
        params = dataclasses.replace(defaults, **own)
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    return Item(at, identity, prompt, raw and kind == "prompt", params)


def _items(args: SampleFlags, defaults: SamplingParams) -> list[Item]:
    if args.prompt and args.prompts:
        raise UserError("give prompts on the command line or by --prompts, not both")
    if args.prompts:
        name = "standard input" if args.prompts == "-" else args.prompts
        return read_items(_read_lines(args.prompts, name), name, defaults, args.raw)
    if args.prompt:
        return [
            _item({"prompt": text}, i, f"prompt {i}", defaults, args.raw)
            for i, text in enumerate(args.prompt)
        ]
    if args.model not in BUNDLED:
        raise UserError("no prompt was given; write one, or --prompts FILE.jsonl")
    return _demo(defaults)


def _read_lines(source: str, name: str) -> list[str]:
    try:
        if source != "-":
            content = open_path(source).read_bytes()
        elif sys.stdin is None:
            raise UserError("standard input is closed; give it requests, or a file")
        else:
            content = sys.stdin.buffer.read()
        return content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}") from None


def _demo(defaults: SamplingParams) -> list[Item]:
    """Problems that no nano model was trained on, at a tight and a roomy budget."""
    items = []
    for problem in data.held_out_problems(_DEMO_PROBLEMS):
        for thinking, solution in _DEMO_BUDGETS:
            budgets = {"thinking_budget": thinking, "solution_budget": solution}
            params = dataclasses.replace(defaults, **budgets)
            text, answer = problem["problem"], problem["answer"]
            label = f"{text} (answer {answer}) at {thinking}+{solution} tokens"
            items.append(Item(label, label, text, False, params))
    return items


def _settings(
    args: SampleFlags,
    loaded: LoadedModel,
    engine: Engine,
    defaults: SamplingParams,
) -> dict[str, Any]:
    """The settings that change completions, under the names of the flags."""
    params = defaults.record()
    del params["n"]
    return {
        **model_record(loaded, engine),
        "raw": args.raw,
        **params,
    }


def _record(item: Item, completion: Completion) -> dict[str, Any]:
    budgets = {name: getattr(item.params, name) for name in _BUDGETS}
    record = {"id": item.id, **budgets, **dataclasses.asdict(completion)}
    del record["prompt_index"]
    # The shortest text that gives the float32 back.
    record["logprobs"] = [float(str(np.float32(p))) for p in completion.logprobs]
    return record


if __name__ == "__main__":
    run_command(main)
