"""Flags that several commands share, and tables that they print."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from e1jax.config.model import KV_DTYPES, QUANTIZED


def quantize_flags(flag: Callable[..., Any]) -> None:
    """Adds the flags of every command that samples; `flag` is a parser's add_argument."""
    flag(
        "--quantize",
        choices=QUANTIZED,
        help="of the weights of sampling, with a scale per output channel: half the "
        "memory of bfloat16 (default: not quantized, unless they are stored so)",
    )
    flag(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="of the cached keys and values; int8 has a scale per token and head "
        "(default: that of the computation)",
    )


def parse_budget(text: str) -> int | None:
    """A budget flag: a number of tokens, or "none" for unlimited."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens (0 or more) or none"
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
