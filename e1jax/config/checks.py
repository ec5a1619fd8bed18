"""Checks of single values: every error names the value, the rule and the way out."""

import contextlib
import difflib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

UNLIMITED = 2**31 - 1
LOCK = ".lock"  # a file of the process that writes a directory, see cli.locks


class UserError(ValueError):
    """A user's mistake; its message is one sentence: the fault, its place, and the way out."""


def check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses a name that is not among the known ones, offering the nearest."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{where}: unknown field {name!r}; {nearest(name, known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises UserError unless the value is an integer from `low` to `high`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)  # NumPy's too
        or int(value) < low
        or (high is not None and int(value) > high)
    ):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(
            f"{name} must be a whole number, {span}, not {reprlib.repr(value)}"
        )


def check_number(name: str, value: Any, rule: str, ok: Callable[[float], bool]) -> None:
    """Raises UserError unless the value is finite and `ok`, which `rule` says in words."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not _is_finite(value)
        or not ok(float(value))
    ):
        raise UserError(f"{name} must be a number {rule}, not {reprlib.repr(value)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_share(name: str, value: Any) -> None:
    """Raises UserError unless the value is a number from 0 to 1."""
    check_number(name, value, "from 0 to 1", lambda v: 0 <= v <= 1)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises UserError unless the value is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be {' or '.join(choices)}, not {value!r}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file cannot be written, because the disk is full, say, is one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}"
        ) from None
