"""Flags of the commands: dataclasses whose fields and their docstrings are the flags.

argparse parses them. jsonargparse, which reads the settings of training (config/load.py),
would refuse prompts between flags, -n, a bare --json and dashes in names, and it reads
texts as YAML: a mesh named null is none, a seed of 0x1 is 1.
"""

import argparse
import dataclasses
import inspect
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import docstring_parser

from e1jax.cli.command import Parser
from e1jax.config.buckets import open_path
from e1jax.config.checks import UserError, shown
from e1jax.config.model import KVDtype, QuantizedForm
from e1jax.config.sampling import SamplingParams

FlagsT = TypeVar("FlagsT")
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def flag(metavar: str, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """A field of flags whose type does not say all: `settings` are add_argument's, or
    positional=True."""
    metadata = {"metavar": metavar, **settings}
    return dataclasses.field(default=default, metadata=metadata)


def sampling_flags(*left_out: str, **defaults: Any) -> Any:
    """A field of SamplingParams: each of its fields is a flag, except the ones left out."""
    default = SamplingParams(**defaults)
    return dataclasses.field(default=default, metadata={"left_out": left_out})


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeFlags:
    """Flags of every command about sampling."""

    quantize: QuantizedForm | None = None
    """Form of the weights of sampling, with a scale per output channel: half the memory
    of bfloat16 (default: not quantized, unless they are stored so)."""
    kv_dtype: KVDtype | None = None
    """Number format of the cached keys and values; int8 has a scale per token and head
    (default: that of the computation)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFlags(QuantizeFlags):
    """Flags of every command that samples."""

    model: str = flag("MODEL")
    """Hub id, Hugging Face or e1jax directory, run directory (each directory also as
    gs://BUCKET/PATH), nano, nano-e1 or nano-elastic."""
    mesh: str | None = flag("data=1,tensor=4", None)
    """Device mesh: rows over data, heads over tensor (default: all devices, as many on
    tensor as the model's heads allow)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of weights and cache (default: float32 on a CPU, bfloat16
    elsewhere)."""
    slots: int | None = None
    """Rows sampled at a time (default: as many as completions, at most 16, or 32 to
    evaluate)."""
    cache_len: int | None = flag("TOKENS", None)
    """Room for prompt and response in a slot (default 32768, or the model's
    max_position_embeddings if smaller)."""
    no_state_budgets: bool = False
    """Leave budgets out of prompts, also where the model was trained with stated ones."""
    adapter: str | None = flag("DIR", None)
    """Adapter (LoRA) to use beside the model: a run directory of train with an adapter, or a
    peft directory (default: none; a run that trained one may also be the --model alone)."""


def read_flags(cls: type[FlagsT], argv: Sequence[str], prog: str) -> FlagsT:
    """The dataclass that a command line gives; raises UserError for a mistake in it."""
    parser = flags_parser(cls, prog)
    texts = [action.dest for action in parser._actions if action.nargs == "*"]
    if not texts:
        return _instance(cls, vars(parser.parse_args(argv)))
    # Python 3.11 fails to mix flags and texts if "--" comes before all texts.
    end = argv.index("--") if "--" in argv else len(argv)
    values = vars(parser.parse_intermixed_args(argv[:end]))
    values[texts[0]] = (*values[texts[0]], *argv[end + 1 :])
    return _instance(cls, values)


def flags_parser(cls: type, prog: str) -> Parser:
    """A parser of the flags of a dataclass. The first paragraph of the class's docstring
    is the parser's description, the rest its epilog."""
    description, _, epilog = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    parser = Parser(prog=prog, description=description, epilog=epilog)
    _add_flags(parser, cls)
    return parser


def _add_flags(
    parser: Parser, cls: Any, defaults: Any = None, left_out: Sequence[str] = ()
) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, doc in _docs(cls).items():
        kind, metadata = fields[name].type, fields[name].metadata
        default = getattr(defaults, name, fields[name].default)
        if dataclasses.is_dataclass(kind):
            _add_flags(parser, kind, default, **metadata)
        elif name not in left_out:
            settings = {
                "help": doc,
                **_type_settings(kind, default, "positional" in metadata),
                **metadata,
            }
            _add_flag(parser, name, default, **settings)


def _docs(cls: type) -> dict[str, str]:
    """The docstring of each field; the class's own fields stand before its bases'."""
    docs: dict[str, str] = {}
    for base in cls.__mro__[:-1]:
        found = docstring_parser.parse_from_object(base).params
        texts = {doc.arg_name: doc.description or "" for doc in found}
        for name in inspect.get_annotations(base):
            text = " ".join(texts.get(name, "").split()).removesuffix(".")
            docs[name] = docs.get(name) or text
    return docs


def _type_settings(kind: Any, default: Any, positional: bool) -> dict[str, Any]:
    """Settings of add_argument that follow from a field's type."""
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        kind = get_args(kind)[0]  # the other one is None
    if kind is Path:
        return {"type": parse_path}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        kind = parse_path if kind is Path else kind
        if default == () and not positional:
            return {"type": kind, "metavar": _METAVARS.get(kind), "action": "append"}
        return {"type": kind, "nargs": "*" if default == () else "+"}
    if optional and default is not None:  # so None is a value, and needs a word
        return {"type": parse_budget, "metavar": "TOKENS|none"}
    return {"type": kind, "metavar": _METAVARS.get(kind)}


def _add_flag(
    parser: Parser,
    name: str,
    default: Any,
    *,
    help: str,
    positional: bool = False,
    **settings: Any,
) -> None:
    if default is not dataclasses.MISSING:
        settings["default"] = list(default) if default == () else default
    elif not positional:
        settings["required"] = True
        help += "; required"
    if type(default) in _METAVARS and default != "":
        help += f" (default {default})"
    dashes = "" if positional else "-" if len(name) == 1 else "--"
    name = dashes + name.replace("_", "-")
    parser.add_argument(name, help=help.replace("%", "%%"), **settings)


def _instance(cls: Any, values: dict[str, Any]) -> Any:
    """The dataclass of the flags' values, with the dataclasses in it."""
    given = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            given[field.name] = _instance(field.type, values)
        elif field.name in values:
            value = values[field.name]
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**given)


def parse_path(text: str) -> Path:
    """A path flag, which may name a file or directory in a bucket; see `open_path`."""
    try:
        return open_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_budget(text: str) -> int | None:
    """A budget flag: a number of tokens, or "none" for unlimited."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a number of tokens (0 or more) or none"
        )
    return int(text)


def aligned(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Rows of cells as text, in columns that end, or with `left` begin, together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = str.ljust if left else str.rjust
    return "\n".join(
        "  ".join(
            pad(cell, width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
