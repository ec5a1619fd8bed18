"""Reading small files, each checked against a schema, and looking paths up."""

import contextlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from e1jax.config.checks import UserError
from e1jax.config.texts import parse_json

# For each field of a JSON object, the Python types that its value may have, and a name of
# them for messages.
Schema = Mapping[str, tuple[tuple[type, ...], str]]

NUMBER = ((int, float), "a number")
INTEGER = ((int,), "a whole number")
TEXT = ((str,), "a text")
OBJECT = ((dict,), "an object")


def read_json(
    path: Path, schema: Schema | None = None, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON object from a file, which `check_fields` checks; raises UserError if the
    file is missing or holds anything else."""
    value = parse_json(read_text(path), path)
    return check_fields(value, schema or {}, str(path), optional)


def check_fields(
    record: Any, schema: Schema, where: str, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON value, which must be an object with the fields of `schema`; it may have
    others, and lack `optional` ones. Raises UserError, saying `where`, for anything else.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object but a {type(record).__name__}")
    for name, (types, words) in schema.items():
        if name not in record and name not in optional:
            raise UserError(f"{where} has no field {name}")
        if name in record and type(record[name]) not in types:
            value = reprlib.repr(record[name])
            raise UserError(f"{where}: {name} must be {words}, not {value}")
    return record


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
