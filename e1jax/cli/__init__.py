"""The commands' shared parts: how they run, stop and print, their flags and their files."""

from e1jax.cli.command import Parser, check_command, run_command, stop_signals
from e1jax.cli.files import read_json, read_text
from e1jax.cli.flags import EngineFlags, aligned, flag, parse_budget, read_flags
from e1jax.cli.outputs import JsonlOutput, Progress, digest

__all__ = [
    "EngineFlags",
    "JsonlOutput",
    "Parser",
    "Progress",
    "aligned",
    "check_command",
    "digest",
    "flag",
    "parse_budget",
    "read_flags",
    "read_json",
    "read_text",
    "run_command",
    "stop_signals",
]
