"""`python -m e1jax.sample`: budgeted sampling from the command line.

Steps: parse flags, read and check every request, look at what an earlier run left in
the output file, load the model, sample, and hand out each completion as it finishes.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from e1jax import data
from e1jax.config import (
    Parser,
    SamplingParams,
    UserError,
    check_known,
    parse_budget,
    run_command,
)
from e1jax.engine import Completion, Engine, Prompt
from e1jax.sharding import use_compilation_cache
from e1jax.tokenizer import Tokenizer

_PARAMS = [field.name for field in dataclasses.fields(SamplingParams)]
_PROMPTS = ("prompt", "messages", "prompt_ids")
_DEMO_PROBLEMS = 3
_DEMO_BUDGETS = ((32, 28), (1024, 1024))


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: a line of the prompts file, or a prompt of the command line."""

    id: str | int
    prompt: Prompt
    raw: bool  # a text that skips the chat template
    params: SamplingParams

    def encoded(self, tokenizer: Tokenizer) -> Prompt:
        """The prompt as the engine takes it: a raw text as its token ids."""
        if self.raw and isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt)
        return self.prompt

    def digest(self) -> str:
        """Names the request and its parameters but for n: a file may be extended with
        more samples."""
        params = dataclasses.asdict(dataclasses.replace(self.params, n=1))
        text = json.dumps([self.prompt, self.raw, params], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    args = _parser().parse_args()
    defaults = SamplingParams(**{name: getattr(args, name) for name in _PARAMS})
    items = _items(args, defaults)
    output = (
        Output(Path(args.output), _settings(args, defaults), items)
        if args.output
        else None
    )
    use_compilation_cache()
    done = output.done if output else set()
    total = sum(item.params.n for item in items)
    left = total - sum(
        (item.id, j) in done for item in items for j in range(item.params.n)
    )
    if left == 0:
        print(f"all {total} completions are in {args.output} already", file=sys.stderr)
        return
    engine = Engine.from_pretrained(
        args.model,
        mesh=args.mesh,
        cache_len=args.cache_len,
        slots=min(16, left) if args.slots is None else args.slots,
        dtype=args.dtype,
    )
    prompts = [item.encoded(engine.tokenizer) for item in items]
    start = time.monotonic()
    bar = tqdm(
        total=left, unit="completion", file=sys.stderr, disable=not sys.stderr.isatty()
    )
    completions = engine.stream(
        prompts,
        [item.params for item in items],
        skip=lambda index, sample: (items[index].id, sample) in done,
        progress=lambda _: bar.set_postfix_str(_speed(engine, start)),
    )
    count = 0
    try:
        for completion in completions:
            count += 1
            item = items[completion.prompt_index]
            record = _record(item, completion)
            if output:
                output.append(record)
            if args.json:
                _say(bar, json.dumps(record, ensure_ascii=False))
            elif not output:
                _say(
                    bar,
                    _pretty(item, completion, args.logprobs, engine, alone=total == 1),
                )
            bar.update()
    except KeyboardInterrupt:
        kept = (
            f", kept in {args.output}; run the same command again to go on"
            if output
            else ""
        )
        raise KeyboardInterrupt(f"after {count} of {left} completions{kept}") from None
    finally:
        bar.close()
        if output:
            output.close()
    summary = f"{count} completion{'s' * (count != 1)}, {_speed(engine, start)}"
    print(summary, file=sys.stderr if args.json or output else sys.stdout)


class Output:
    """The output file: appended to as completions finish, and read when the command is
    run again.

    Beside it lies FILE.settings.json, which says how it was made, so that a run with
    other settings is refused and not mixed in.
    """

    def __init__(self, path: Path, settings: dict[str, Any], items: list[Item]):
        self.path, self.sidecar = path, path.with_name(path.name + ".settings.json")
        requests = {json.dumps(item.id): item.digest() for item in items}
        self.done, size = self._read()
        if self.sidecar.exists():
            requests = self._check(settings, requests)
        elif size:
            raise UserError(
                f"{path} has content but no {self.sidecar.name} beside it, so it was not made by this command; "
                "choose another --output"
            )
        try:
            self.file: TextIO = path.open("a", encoding="utf-8")
            self.file.truncate(size)
            _replace(
                self.sidecar,
                json.dumps({"settings": settings, "requests": requests}, indent=1)
                + "\n",
            )
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror or error}"
            ) from None

    def append(self, record: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror or error}"
            ) from None

    def close(self) -> None:
        self.file.close()

    def _read(self) -> tuple[set[tuple[str | int, int]], int]:
        """Which (id, sample) are there, and the bytes up to the last whole line: a run
        that was killed while writing leaves half a line, which is written again."""
        done, size = set(), 0
        try:
            lines = (
                self.path.read_bytes().splitlines(keepends=True)
                if self.path.exists()
                else []
            )
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror or error}"
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                done.add((record["id"], record["sample"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path} line {number} is not a completion of this command; choose another --output"
                ) from None
            size += len(line)
        return done, size

    def _check(
        self, settings: dict[str, Any], requests: dict[str, str]
    ) -> dict[str, str]:
        """The requests there and now together; refuses settings or requests that
        differ."""
        try:
            old = json.loads(self.sidecar.read_text(encoding="utf-8"))
            before, old_requests = old["settings"], old["requests"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.sidecar} cannot be read; choose another --output"
            ) from None
        for name in settings:
            if before.get(name) != settings[name]:
                raise UserError(
                    f"{self.path} was made with {name}={before.get(name)!r}, and this run has {settings[name]!r}; "
                    "use the same settings or another --output"
                )
        for name, digest in requests.items():
            if old_requests.get(name, digest) != digest:
                raise UserError(
                    f"{self.path} was made with another prompt or other parameters for id {name}; "
                    "choose another --output"
                )
        return {**old_requests, **requests}


def read_items(
    lines: Iterator[str], where: str, defaults: SamplingParams, raw: bool
) -> list[Item]:
    """Requests from JSONL; every line is checked before any is run. Raises UserError
    naming the line."""
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at = f"{where} line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{at} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{at} is not a JSON object but a {type(fields).__name__}")
        items.append(_item(fields, len(items), at, defaults, raw))
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        if (first := seen.setdefault(str(item.id), index)) != index:
            raise UserError(
                f"{where}: requests {first} and {index} have the same id {item.id!r}; make ids differ"
            )
    return items


def _item(
    fields: dict[str, Any], index: int, at: str, defaults: SamplingParams, raw: bool
) -> Item:
    check_known(fields, [*_PROMPTS, "id", *_PARAMS], at)
    given = [name for name in _PROMPTS if name in fields]
    if len(given) != 1:
        raise UserError(
            f"{at} needs exactly one of prompt, messages and prompt_ids, not {given or 'none'}"
        )
    kind, prompt = given[0], fields[given[0]]
    if not isinstance(prompt, str if kind == "prompt" else list):
        raise UserError(
            f"{at}: {kind} must be a {'text' if kind == 'prompt' else 'list'}, not {prompt!r}"
        )
    if not prompt:
        raise UserError(f"{at}: {kind} is empty")
    if kind == "messages" and not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt
    ):
        raise UserError(f"{at}: messages must be objects with role and content")
    if kind == "prompt_ids" and not all(
        isinstance(i, int) and not isinstance(i, bool) for i in prompt
    ):
        raise UserError(f"{at}: prompt_ids must be whole numbers")
    identity = fields.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise UserError(f"{at}: id must be a text or a whole number, not {identity!r}")
    try:
        params = dataclasses.replace(
            defaults, **{name: fields[name] for name in _PARAMS if name in fields}
        )
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    return Item(identity, prompt, raw and kind == "prompt", params)


def _items(args: argparse.Namespace, defaults: SamplingParams) -> list[Item]:
    if args.prompt and args.prompts:
        raise UserError("give prompts on the command line or with --prompts, not both")
    if args.prompts == "-":
        return _nonempty(
            read_items(iter(sys.stdin), "standard input", defaults, args.raw)
        )
    if args.prompts:
        try:
            with open(args.prompts, encoding="utf-8") as file:
                return _nonempty(
                    read_items(iter(file), args.prompts, defaults, args.raw)
                )
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts {args.prompts} cannot be read: {error}"
            ) from None
    if args.prompt:
        return [
            _item({"prompt": p}, i, f"prompt {i}", defaults, args.raw)
            for i, p in enumerate(args.prompt)
        ]
    if not args.model.startswith("nano"):
        raise UserError("no prompt was given; write one, or --prompts FILE.jsonl")
    return _demo(defaults)


def _demo(defaults: SamplingParams) -> list[Item]:
    """A few problems that the nano model never saw, each at a tight and at a roomy
    budget."""
    items = []
    for problem in data.held_out_problems(_DEMO_PROBLEMS):
        for thinking, solution in _DEMO_BUDGETS:
            params = dataclasses.replace(
                defaults, thinking_budget=thinking, solution_budget=solution
            )
            identity = f"{problem['problem']} (answer {problem['answer']}) at {thinking}+{solution} tokens"
            items.append(Item(identity, problem["problem"], False, params))
    return items


def _nonempty(items: list[Item]) -> list[Item]:
    if not items:
        raise UserError("the prompts file holds no request")
    return items


def _settings(args: argparse.Namespace, defaults: SamplingParams) -> dict[str, Any]:
    """What changes the completions, named as the flags are."""
    flags = {
        name: getattr(args, name) for name in ("model", "dtype", "cache_len", "raw")
    }
    params = dataclasses.asdict(defaults)
    del params["n"]
    return {**flags, **params}


def _record(item: Item, completion: Completion) -> dict[str, Any]:
    record = {"id": item.id, **dataclasses.asdict(completion)}
    del record["prompt_index"]
    # The shortest text that gives the float32 back.
    record["logprobs"] = [float(str(np.float32(p))) for p in completion.logprobs]
    return record


def _pretty(
    item: Item, completion: Completion, logprobs: bool, engine: Engine, *, alone: bool
) -> str:
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    end = "" if completion.thinking_end is None else "</think>"
    head = "" if alone else f"--- {item.id}, sample {completion.sample}\n"
    text = f"{dim}{completion.thinking}{end}{plain}{completion.solution}"
    forced = sum(completion.forced)
    ended = {"budget": " (cut by the budget)", "eos": " (ended by EOS)"}.get(
        completion.thinking_end or "", ""
    )
    counts = (
        f"[{completion.thinking_tokens} thinking{ended} + {forced} forced + {completion.solution_tokens} solution "
        f"tokens, {completion.finish_reason}, answer {completion.answer}]"
    )
    lines = [head + text, counts]
    if logprobs:
        rows = zip(
            completion.token_ids, completion.logprobs, completion.forced, strict=True
        )
        lines += [
            f"{p:10.4f}{' *' if f else '  '} {t:6d} {engine.tokenizer.decode([t])!r}"
            for t, p, f in rows
        ]
    return "\n".join(lines)


def _speed(engine: Engine, start: float) -> str:
    seconds = time.monotonic() - start
    return f"{engine.stats.tokens} tokens in {seconds:.1f} s ({engine.stats.tokens / max(seconds, 1e-9):.0f} tokens/s)"


def _say(bar: tqdm, text: str) -> None:
    bar.clear()
    print(text, flush=True)
    bar.refresh()


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.sample",
        description="Samples thinking and solution under separate budgets.",
        epilog="Compiled programs are kept between runs in $JAX_COMPILATION_CACHE_DIR, by default "
        "~/.cache/e1jax/xla. Without a prompt, the nano model solves a few problems of its own at two budgets.",
    )
    flag = parser.add_argument
    flag(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="text of a prompt, put into the model's chat template",
    )
    flag(
        "--model",
        default="nano",
        help="hub id, Hugging Face or e1jax directory, run directory, or nano (default)",
    )
    flag(
        "--prompts",
        metavar="FILE.jsonl|-",
        help="requests, one JSON object a line: prompt, messages or prompt_ids, and optionally id and the sampling "
        "settings (thinking_budget, ..., null for unlimited); - reads standard input",
    )
    flag(
        "--thinking-budget",
        type=parse_budget,
        default=1024,
        metavar="TOKENS|none",
        help="most tokens sampled before </think>; then it is forced (default 1024)",
    )
    flag(
        "--solution-budget",
        type=parse_budget,
        default=1024,
        metavar="TOKENS|none",
        help="most tokens sampled after </think> (default 1024)",
    )
    flag("-n", type=int, default=1, help="samples of each prompt (default 1)")
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
        help="most probable tokens kept; 0 is off (default 0)",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="seed of every request; the same gives the same tokens (default 0)",
    )
    flag(
        "--slots",
        type=int,
        help="rows sampled at a time (default: as many as completions, at most 16)",
    )
    flag(
        "--cache-len",
        type=int,
        metavar="TOKENS",
        help="room for prompt and response of a slot (default 32768, or the model's maximum if smaller)",
    )
    flag(
        "--mesh",
        metavar="data=1,tensor=4",
        help="device mesh (default: all devices, heads divided first)",
    )
    flag(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of weights and cache (default float32 on CPU, else bfloat16)",
    )
    flag(
        "--output",
        metavar="OUT.jsonl",
        help="append completions to this file; run again, what is there is skipped",
    )
    flag("--json", action="store_true", help="print one JSON object per completion")
    flag(
        "--logprobs",
        action="store_true",
        help="print each token with its log-probability (forced ones marked *)",
    )
    flag(
        "--raw",
        action="store_true",
        help="tokenise a text prompt as it is, without the chat template",
    )
    flag(
        "--end-of-thinking-text",
        default="",
        metavar="TEXT",
        help='inserted before a forced </think>, for example "I have to answer now."',
    )
    return parser


if __name__ == "__main__":
    run_command(main)
