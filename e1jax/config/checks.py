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


LONGEST_MESSAGE = 1500  # in characters


class UserError(ValueError):
    """A user's mistake; its message is one sentence: the fault, its place, and the way out.

    A message beyond LONGEST_MESSAGE loses its middle.
    """

    def __init__(self, message: object):
        super().__init__(shortened(str(message), LONGEST_MESSAGE))


def shortened(text: str, limit: int) -> str:
    """A text of at most about `limit` characters: a longer one loses its middle."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Also of a number with so many digits that Python refuses to write them."""
        digits = int(x.bit_length() * 0.30103)
        return repr(x) if digits < self.maxlong else f"a number of {digits} digits"


_shown = _Shown()
_shown.maxstring = _shown.maxother = 100


def shown(value: Any) -> str:
    """`value` in a message, as repr shows it, but of some 100 characters at most."""
    return _shown.repr(value)


def check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses a name that is not among the known ones, offering the nearest."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(
                f"{where}: unknown field {shown(name)}; {nearest(name, known)}"
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises UserError unless the value is an integer from `low` to `high`, which is
    UNLIMITED if not given: devices count in 32 bits."""
    high, stated = UNLIMITED if high is None else high, high
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)  # NumPy's too
        or int(value) < low
        or int(value) > high
    ):
        too_large = isinstance(value, int) and value > high
        open_ended = stated is None and not too_large
        span = f"{low} or more" if open_ended else f"from {low} to {high}"
        raise UserError(f"{name} must be a whole number, {span}, not {shown(value)}")


def check_number(name: str, value: Any, rule: str, ok: Callable[[float], bool]) -> None:
    """Raises UserError unless the value is finite and `ok`, which `rule` says in words."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not _is_finite(value)
        or not ok(float(value))
    ):
        raise UserError(f"{name} must be a number {rule}, not {shown(value)}")


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
        raise UserError(f"{name} must be {' or '.join(choices)}, not {shown(value)}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file cannot be written, because the disk is full, say, is one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}"
        ) from None
    except Exception as error:
        reason, rust, _ = str(error).partition(" (os error ")  # of tokenizers
        if not rust:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from None
