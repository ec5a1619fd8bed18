"""Problems of a dataset: from a file, from the hub, or made up (the nano task)."""

import dataclasses
import difflib
import itertools
import math
import re
import reprlib
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import huggingface_hub

from e1jax.cli.files import looking_for
from e1jax.config.buckets import open_path
from e1jax.config.checks import UserError, check_integer, shown
from e1jax.config.texts import check_backslashes, parse_json
from e1jax.data.nano import nano_problems
from e1jax.rewards import final_answer

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


_PROBLEM = "a problem is an object with the fields problem and answer"


_FORM = "a file holds a list of objects, or one object a line"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the texts that are accepted as its answer."""

    id: str | int  # its own, else its index in the dataset
    text: str
    answers: tuple[str, ...]


def load_problems(name: str, limit: int | None = None) -> list[Problem]:
    """The problems of a dataset, the first `limit` of them if that is given.

    `name` is a key of `NANO` or `HUB`, a file (gs:// too), or a hub dataset: owner/name,
    followed by /FILES if it holds several sets of files, like owner/name/data/train. A
    file is a JSON list, JSONL or parquet. A problem has the field `problem`, `question` or `prompt`; the
    field `answer` or `final_answer`, a text, a number or a list of accepted
    ones; and may have `id` or `unique_id`. Of a worked solution, the last `\\boxed{}`
    or the text behind the last `####` is the answer.

    Raises UserError, naming file and line or index (from 0), for whatever is missing,
    broken or empty, for two problems with one id, and for texts of a local file that lost
    a backslash. The users of a hub dataset cannot mend it, and others have measured on it
    as it is: there, a note on stderr counts the damaged texts.
    """
    if limit is not None:
        check_integer("limit", limit, 1)
    if name in NANO:
        held_out, which = NANO[name]
        which = which[:limit]
        made = nano_problems(which.stop, held_out=held_out)[which.start :]
        return [Problem(i, nano.text, (nano.answer,)) for i, nano in enumerate(made)]
    files = dataset_files(HUB.get(name, name))
    published = files != [open_path(name).expanduser()]
    rows = enumerate(row for file in files for row in read_rows(file, _PROBLEM))
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
                f"{where}: an earlier problem has the id {shown(problem.id)} too; ids must "
                "differ, or be left out"
            )
        problems[problem.id] = problem
    if not problems:
        raise UserError(f"the dataset {shown(name)} holds no problems")
    if damaged:
        print(
            f"note: {name} is used as it is published, with {len(damaged)} of its "
            f"problems damaged, the first: {damaged[0]}",
            file=sys.stderr,
        )
    return list(problems.values())


def dataset_files(name: str) -> list[Path]:
    """A local file, or the downloaded files of a hub dataset."""
    with looking_for("dataset", name):
        path = open_path(name).expanduser()
        if path.is_dir():
            raise UserError(
                f"the dataset {shown(name)} is a directory; give a file, of the kind "
                f"{', '.join(FORMATS)}"
            )
        if path.exists():
            return [path]
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+))?", name)
    if path.suffix in FORMATS and not (hub and hub[2]):
        raise UserError(f"there is no file {shown(name)}; check the path")
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
            f"the dataset {shown(name)} is not a file here and cannot be had from the hub "
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
            f"the dataset {shown(name)} has no data on the hub in the formats "
            f"{', '.join(FORMATS)}; check the name of its files there"
        )
    if len(sets) > 1:
        more = ", ..." if len(sets) > 8 else ""
        raise UserError(
            f"the dataset {shown(name)} has several sets of files "
            f"({', '.join(list(sets)[:8])}{more}); say which, like "
            f"{repository}/{next(iter(sets))}"
        )
    return next(iter(sets.values()))


def read_rows(path: Path, rule: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a data file, after its place in words; `rule` says, in the message
    about anything else, what an object is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    read = _parquet_rows if content.startswith(b"PAR1") else _json_rows
    for where, row in read(path, content):
        if not isinstance(row, dict):
            raise UserError(f"{where}: {rule}, not {reprlib.repr(row)}")
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
