"""Reading small files, and looking paths up."""

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e1jax.config.checks import UserError
from e1jax.config.texts import parse_json


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError if it is missing or is not one."""
    text = read_text(path)
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_text(path: Path) -> str:
    """Text of a UTF-8 file; raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a BOM
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


@contextlib.contextmanager
def looking_for(kind: str, name: str) -> Iterator[None]:
    """Turns an error of looking a path up into a UserError: "the model 'x' cannot ..."."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of that user
        reason = str(getattr(error, "strerror", error)).rstrip(".")
        raise UserError(
            f"the {kind} {reprlib.repr(name)} cannot be looked for: {reason}; check the "
            "path"
        ) from None
