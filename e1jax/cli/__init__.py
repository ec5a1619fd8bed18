"""What all commands share: how they run, stop and print, their flags and their files."""

from e1jax.cli.command import Parser, run_command, stop_signals
from e1jax.cli.files import read_json, read_text
from e1jax.cli.flags import aligned, parse_budget, quantize_flags
from e1jax.cli.outputs import JsonlOutput, Progress, digest

__all__ = [
    "JsonlOutput",
    "Parser",
    "Progress",
    "aligned",
    "digest",
    "parse_budget",
    "quantize_flags",
    "read_json",
    "read_text",
    "run_command",
    "stop_signals",
]
