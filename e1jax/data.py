"""Training and evaluation data, on the host: problems, prompts and their batches.

Problems are read from a file, a hub dataset, or made up (the nano task). For
reinforcement learning they become prompts and batches of prompts; for fine-tuning, nano
problems become batches of whole solutions.

A nano problem is text like `47a+5b*3c-8?`: a start value of two digits, then two to six
steps labelled a, b, ..., each an operator and a digit, all modulo 100. Its solution is
thought through in one of two styles, then boxed:

    verbose, 9 tokens a step   a47+5=52;b52*3=56;c56-8=48;
    terse, 5 tokens a step     a+552b*356c-848

Results have two digits in both. The box holds the plain integer (`\\boxed{5}`, never
`\\boxed{05}`), and so does the answer, so equal answers are equal strings.

Problems whose text has a CRC-32 divisible by 8 are held out: no training problem is
ever one of them, whatever the seed.

All that is random here depends on a seed and a position alone, so any element can be
made without the earlier ones: a position is all that a checkpoint needs to hold.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import operator
import re
import reprlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
import numpy as np

from e1jax.config import (
    SFTConfig,
    TraceMix,
    UserError,
    check_backslashes,
    check_integer,
    parse_json,
)
from e1jax.rewards import final_answer
from e1jax.tokenizer import THINK_END, Tokenizer

if TYPE_CHECKING:
    import grain

# Nano datasets: held out or not, and which of all such problems.
NANO = {
    "nano": (True, range(1024)),
    "nano-validation": (True, range(1024, 1280)),
    "nano-train": (False, range(16384)),
}
# Hub datasets, as owner/name and, within it, the files. `answer` holds the answer in all
# but OlympiadBench, where it is `final_answer`, a list; in AMC it is a float.
HUB = {
    "aime24": "HuggingFaceH4/aime_2024/data/train",  # 30 problems
    "math500": "HuggingFaceH4/MATH-500/test",  # 500
    "amc": "AI-MO/aimo-validation-amc/data/train",  # 83, the AMC 12 of 2022 and 2023
    "minerva": "math-ai/minervamath/test",  # 272
    # 674: in English, of text alone, with an answer that can be checked.
    "olympiadbench": "Hothan/OlympiadBench/OlympiadBench/OE_TO_maths_en_COMP/"
    "OE_TO_maths_en_COMP",
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset/deepscaler",  # 40,315
}
FORMATS = (".json", ".jsonl", ".parquet")
_QUESTIONS = ("problem", "question", "prompt")  # fields of a problem
_ANSWERS = ("answer", "final_answer")
_FORM = "a file holds a list of objects, or one object a line"
# Of the released E1 recipe, and of DeepScaleR before it.
DEFAULT_INSTRUCTION = (
    r"Let's think step by step and output the final answer within \boxed{}."
)

LABELS = "abcdef"
WORDS = (r"\boxed{", "wait")  # single tokens of the nano tokenizer
NUM_IDS = 256 + 6 + len(WORDS)  # of that tokenizer: bytes, special tokens, words
MIN_STEPS = 2
MODULUS = 100
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HELD_OUT_EVERY = 8

POOL_BATCHES = 8  # batches made at once, so that each can hold solutions of like length
# Batches are padded to one of these lengths, in tokens: each costs a compilation. The
# longest solution with its prompt is 226 tokens.
LENGTHS = (48, 64, 80, 96, 128, 160, 192, 232)

# `tokens` [B, T] int32 and `loss_mask` [B, T] float32: 1 on a token that is learned.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NanoProblem:
    """A problem, its steps ("+5", ...) and its values: the start and every result."""

    steps: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def text(self) -> str:
        steps = "".join(
            f"{a}{step}" for a, step in zip(LABELS, self.steps, strict=False)
        )
        return f"{self.values[0]:02}{steps}?"

    @property
    def answer(self) -> str:
        return str(self.values[-1])

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.text.encode()) % HELD_OUT_EVERY == 0

    def verbose(self) -> str:
        """Every step in full: label, value, operation, result."""
        parts = zip(LABELS, self.values, self.steps, self.values[1:], strict=False)
        return "".join(f"{a}{v:02}{step}={r:02};" for a, v, step, r in parts)

    def terse(self, first: int = 0) -> str:
        """Label, operation and result of each step from index `first` on."""
        parts = list(zip(LABELS, self.steps, self.values[1:], strict=False))[first:]
        return "".join(f"{a}{step}{r:02}" for a, step, r in parts)


def nano_problems(count: int, seed: int = 0, *, held_out: bool) -> list[NanoProblem]:
    """Distinct problems, all held out or all for training; equal seeds, equal lists."""
    rng = np.random.default_rng([seed, held_out])
    found: dict[str, NanoProblem] = {}
    while len(found) < count:
        problem = draw_problem(rng, held_out=held_out)
        found[problem.text] = problem
    return list(found.values())


def held_out_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct problems that no training run has seen: `problem` and `answer` texts."""
    problems = nano_problems(count, seed, held_out=True)
    return [{"problem": p.text, "answer": p.answer} for p in problems]


def draw_problem(rng: np.random.Generator, *, held_out: bool) -> NanoProblem:
    """A random problem: a quarter of its steps multiply, by 2 or 3."""
    while True:
        values, steps = [int(rng.integers(MODULUS))], []
        for _ in range(rng.integers(MIN_STEPS, len(LABELS) + 1)):
            sign = "*" if rng.random() < 0.25 else "+-"[rng.integers(2)]
            digit = int(rng.integers(2, 4) if sign == "*" else rng.integers(1, 10))
            steps.append(f"{sign}{digit}")
            values.append(APPLY[sign](values[-1], digit) % MODULUS)
        problem = NanoProblem(tuple(steps), tuple(values))
        if problem.held_out == held_out:
            return problem


def write_solution(
    problem: NanoProblem, mix: TraceMix, rng: np.random.Generator
) -> str:
    """A solution in the proportions of `mix`: thinking, `</think>`, recap, box.

    A re-check is `wait` and the whole pass again, in the same style. A recap repeats all
    steps, or (half of the time) those from a random one on, always in the terse style.
    """
    once = problem.terse() if rng.random() < mix.terse else problem.verbose()
    thinking = "wait".join([once] * (1 + rng.choice(3, p=mix.rechecks)))
    recap = ""
    if rng.random() < mix.recap:
        whole = rng.random() < 0.5
        recap = problem.terse(0 if whole else int(rng.integers(len(problem.steps))))
    return rf"{thinking}{THINK_END}{recap}\boxed{{{problem.answer}}}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the texts that are accepted as its answer."""

    id: str | int  # its own, else its index in the dataset
    text: str
    answers: tuple[str, ...]


def load_problems(name: str, limit: int | None = None) -> list[Problem]:
    """The problems of a dataset, the first `limit` of them if that is given.

    `name` is a key of `NANO` or `HUB`, a file, or a hub dataset: owner/name, followed by
    /FILES if it holds several sets of files, like owner/name/data/train. A file is a JSON
    list, JSONL or parquet. A problem has the field `problem`, `question` or `prompt`; the
    field `answer` or `final_answer`, a text, a number or a list of those that are
    accepted; and may have `id` or `unique_id`. Of a worked solution, the last `\\boxed{}`
    or the text behind the last `####` is the answer.

    Raises UserError, naming file and line or index (from 0), for whatever is missing,
    broken or empty, for two problems with one id, and for texts of a local file that lost
    a backslash. A hub dataset with such texts cannot be mended by its users, and is what
    others have measured on: a note on stderr counts them.
    """
    if limit is not None:
        check_integer("limit", limit, 1)
    if name in NANO:
        held_out, which = NANO[name]
        which = which[:limit]
        made = nano_problems(which.stop, held_out=held_out)[which.start :]
        return [Problem(i, nano.text, (nano.answer,)) for i, nano in enumerate(made)]
    files = _dataset_files(HUB.get(name, name))
    published = files != [Path(name).expanduser()]
    rows = enumerate(row for file in files for row in _rows(file))
    if name == "deepscaler":  # six of the published problems have no answer
        rows = (row for row in rows if not _is_empty(row[1][1].get("answer")))
    problems: dict[str | int, Problem] = {}
    damaged: list[UserError] = []
    for index, (where, row) in itertools.islice(rows, limit):
        try:
            _check_texts(row, where)
        except UserError as error:
            if not published:
                raise
            damaged.append(error)
        problem = _problem(row, index, where)
        if problem.id in problems:
            raise UserError(
                f"{where}: an earlier problem has the id {problem.id!r} too; ids must "
                "differ, or be left out"
            )
        problems[problem.id] = problem
    if not problems:
        raise UserError(f"the dataset {name!r} holds no problems")
    if damaged:
        print(
            f"note: {name} is used as it is published, with {len(damaged)} of its "
            f"problems damaged, the first: {damaged[0]}",
            file=sys.stderr,
        )
    return list(problems.values())


def default_instruction(tokenizer: Tokenizer) -> str:
    """What prompts end with: as recorded with the model, else as in the reference."""
    if tokenizer.instruction is None:
        return DEFAULT_INSTRUCTION
    return tokenizer.instruction


def prompt_text(problem: str, instruction: str) -> str:
    """The user's message: the problem, a space, the instruction if there is one."""
    return f"{problem} {instruction}" if instruction else problem


def request_seed(seed: int, index: int) -> int:
    """A seed of 64 bits for one of the requests of a run; equal seeds would share their
    draws."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


class EncodedProblem(NamedTuple):
    """A problem as its prompt's token ids, chat template included."""

    prompt_ids: list[int]
    answers: tuple[str, ...]


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    instruction: str,
    max_prompt_len: int,
) -> tuple[list[EncodedProblem], int]:
    """The problems whose prompts have at most `max_prompt_len` tokens, in their order,
    and how many are longer and left out.

    Raises UserError if none is left, or if the tokenizer has no chat template.
    """
    encoded = []
    for problem in problems:
        text = prompt_text(problem.text, instruction)
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        encoded.append(EncodedProblem(ids, problem.answers))
    kept = [e for e in encoded if len(e.prompt_ids) <= max_prompt_len]
    if not kept:
        shortest = min(len(e.prompt_ids) for e in encoded)
        raise UserError(
            f"no prompt has at most max_prompt_len={max_prompt_len} tokens; the shortest "
            f"of the {len(encoded)} has {shortest}"
        )
    return kept, len(encoded) - len(kept)


class Prompt(NamedTuple):
    """A prompt to be answered in training."""

    position: int  # in the stream of all prompts of the run, over all epochs
    index: int  # of the problem among those kept
    prompt_ids: list[int]
    answers: tuple[str, ...]


def prompt_batches(
    kept: Sequence[EncodedProblem],
    *,
    prompts: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> "grain.DatasetIterator[list[Prompt]]":
    """Endless batches; every epoch holds each problem once, in an order of its own.

    A batch of `prompts` is shared out among the processes: of the positions i * prompts
    to (i + 1) * prompts - 1, process p of P takes every P-th from the p-th on. The state
    is the number of batches read, so it restores the iterator of any process, also where
    their number has changed.
    """
    if prompts % processes:
        raise UserError(
            f"a batch of {prompts} prompts cannot be shared out evenly among "
            f"{processes} processes; choose a multiple of {processes}"
        )

    # Not Grain's own shuffle: of few problems, it takes milliseconds for each.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(kept))

    def prompt(position: int) -> Prompt:
        epoch, place = divmod(position, len(kept))
        index = int(order(epoch)[place])
        return Prompt(position, index, *kept[index])

    def batch(number: int) -> list[Prompt]:
        first, end = number * prompts + process, (number + 1) * prompts
        return [prompt(position) for position in range(first, end, processes)]

    # Slow to load, and only training needs it.
    import grain

    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    # Made when asked for: nothing here is worth a thread.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.to_iter_dataset(options))


def _dataset_files(name: str) -> list[Path]:
    """A local file, or those of a hub dataset, downloaded."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise UserError(
                f"the dataset {name!r} is a directory; give a file, of the kind "
                f"{', '.join(FORMATS)}"
            )
        if path.exists():
            return [path]
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of that user
        reason = str(getattr(error, "strerror", error)).rstrip(".")
        raise UserError(
            f"the dataset {reprlib.repr(name)} cannot be looked for: {reason}; check "
            "the path"
        ) from None
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+))?", name)
    if path.suffix in FORMATS and not (hub and hub[2]):
        raise UserError(f"there is no file {name!r}; check the path")
    if not hub:
        known = [*NANO, *HUB]
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise UserError(
            f"the dataset {reprlib.repr(name)} is neither a known name, nor a file, nor "
            f"a hub id (owner/name); {hint}"
        )
    return _hub_files(name, *hub.groups())


def _hub_files(name: str, repository: str, files: str | None) -> list[Path]:
    """The parts, in order, of the one set of files in a hub dataset, or of `files`."""
    begin = files or ""
    for suffix in FORMATS:
        begin = begin.removesuffix(suffix)
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns=[f"{begin}*{suffix}" for suffix in FORMATS],
            )
        )
    except Exception as error:  # many kinds: no network, no such repository, no right
        reason = str(error).strip().split("\n")[0].strip(" .:")
        raise UserError(
            f"the dataset {name!r} is not a file here and cannot be had from the hub "
            f"({reason}); check the name and the network, or give a local file"
        ) from None
    sets: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix in FORMATS:
            part = file.relative_to(path).as_posix()
            whole = re.sub(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?", "", part)
            if files in (None, whole, whole.removesuffix(file.suffix)):
                sets.setdefault(whole, []).append(file)
    if not sets:
        raise UserError(
            f"the dataset {name!r} has no data on the hub in the formats "
            f"{', '.join(FORMATS)}; check the name of its files there"
        )
    if len(sets) > 1:
        more = ", ..." if len(sets) > 8 else ""
        raise UserError(
            f"the dataset {name!r} has several sets of files "
            f"({', '.join(list(sets)[:8])}{more}); say which, like "
            f"{repository}/{next(iter(sets))}"
        )
    return next(iter(sets.values()))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a data file, after its place in words."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    read = _parquet_rows if content.startswith(b"PAR1") else _json_rows
    for where, row in read(path, content):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a problem is an object with the fields problem and answer, "
                f"not {reprlib.repr(row)}"
            )
        yield where, row


def _parquet_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    # Slow to load, and few files are Parquet.
    import pyarrow.parquet

    index = itertools.count()
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        for batch in file.iter_batches():
            yield from ((f"{path} index {next(index)}", r) for r in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole parquet file: {reason}") from None


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, or the lines of JSONL that are not blank."""
    try:
        text = content.decode("utf-8-sig")  # with or without a BOM
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is neither parquet nor UTF-8: {error}") from None
    if text.lstrip().startswith("["):
        for index, row in enumerate(parse_json(text, path, form=_FORM)):
            yield f"{path} index {index}", row
        return
    # Not splitlines, which also splits at characters that a text in JSON may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", parse_json(line, path, number, _FORM)


def _check_texts(row: dict[str, Any], where: str) -> None:
    for name in (*_QUESTIONS, *_ANSWERS):
        check_backslashes(row.get(name), f"{where}: {name}")


def _problem(row: dict[str, Any], index: int, where: str) -> Problem:
    name, text = _field(row, _QUESTIONS, where)
    text = _checked_text(text, "a text", f"{where}: {name}")
    name, answers = _field(row, _ANSWERS, where)
    answers = answers if isinstance(answers, list) else [answers]
    accepted = tuple(_accepted(answer, f"{where}: {name}") for answer in answers)
    own = [row[n] for n in ("id", "unique_id") if row.get(n) is not None]
    if own and type(own[0]) is not int:
        _checked_text(own[0], "a text or a whole number", f"{where}: its id")
    return Problem(own[0] if own else index, text, accepted)


def _field(row: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """Name and value of the first of several fields that is not empty."""
    there = [name for name in names if name in row]
    if not there:
        fields = ", ".join(row) or "none"
        raise UserError(
            f"{where} has no field {' or '.join(names)}; its fields are: {fields}"
        )
    full = [name for name in there if not _is_empty(row[name])]
    if not full:
        raise UserError(f"{where}: {there[0]} is empty; fill it or remove the problem")
    return full[0], row[full[0]]


def _is_empty(value: Any) -> bool:
    return (
        value is None or value == [] or (isinstance(value, str) and not value.strip())
    )


def _accepted(answer: Any, where: str) -> str:
    """An answer as text: a number in digits, the end of a worked solution."""
    rule = "a text, a number or a list of those"
    if type(answer) is int:
        return str(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        return f"{Decimal(repr(answer)).normalize():f}"
    text = _checked_text(answer, rule, where)
    return _checked_text(final_answer(text, where), rule, where)


def _checked_text(value: Any, rule: str, where: str) -> str:
    if not isinstance(value, str) or _is_empty(value):
        raise UserError(f"{where} must be {rule}, not {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is not valid Unicode text: {value[: error.end][-20:]!r} ends in "
            "half of a surrogate pair; replace it"
        ) from None
    return value


class SFTBatches:
    """Random access to the batches of a fine-tuning run; batch i is that of step i + 1.

    Solutions are made for 8 batches at a time and sorted by length, so that little of a
    batch is padding; the order of the 8 batches is random. The phases never share one.
    """

    def __init__(self, config: SFTConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.first_steps = round(config.steps * config.first_phase)
        self._pool = functools.lru_cache(maxsize=2)(self._make_pool)

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, index: int) -> Batch:
        second = index >= self.first_steps
        index -= self.first_steps if second else 0
        return self._pool(second, index // POOL_BATCHES)[index % POOL_BATCHES]

    def _make_pool(self, second: bool, pool: int) -> list[Batch]:
        mix = self.config.second if second else self.config.first
        rng = np.random.default_rng([self.config.seed, int(second), pool])
        rows = []
        for _ in range(POOL_BATCHES * mix.batch_size):
            problem = draw_problem(rng, held_out=False)
            prompt = encode_prompt(problem, self.tokenizer)
            solution = self.tokenizer.encode(write_solution(problem, mix, rng))
            solution.append(self.tokenizer.eos_id)
            rows.append((prompt + solution, [0] * len(prompt) + [1] * len(solution)))
        rows.sort(key=lambda row: len(row[0]))
        starts = rng.permutation(POOL_BATCHES) * mix.batch_size
        return [
            pad_rows(rows[i : i + mix.batch_size], self.tokenizer.eos_id)
            for i in starts
        ]


def sft_batches(config: SFTConfig, tokenizer: Tokenizer) -> "grain.DatasetIterator":
    """Iterator over the batches of a run; its state, a position, restores it anywhere."""
    # Slow to load, and only training needs it.
    import grain

    dataset = grain.MapDataset.source(SFTBatches(config, tokenizer))
    # One thread, because a pool is made by whoever asks for its first batch.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=POOL_BATCHES)
    return iter(dataset.to_iter_dataset(options))


def encode_prompt(problem: NanoProblem, tokenizer: Tokenizer) -> list[int]:
    """Ids of the chat template around the problem's text, up to where thinking begins."""
    return tokenizer.encode_chat([{"role": "user", "content": problem.text}])


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """A batch of (token ids, mask) rows, left-aligned, padded to one of `LENGTHS`."""
    longest = max(len(ids) for ids, _ in rows)
    length = next(length for length in LENGTHS if length >= longest)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, (ids, ones) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = ones
    return {"tokens": tokens, "loss_mask": mask}
