"""Budgeted reasoning on TPUs: Elastic Reasoning (arXiv 2505.05315) in JAX."""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "e1jax.sampling.engine",
    "Completion": "e1jax.sampling.completion",
    "Event": "e1jax.sampling.completion",
    "SamplingParams": "e1jax.config.sampling",
}
__all__ = ["Completion", "Engine", "Event", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from e1jax.config.sampling import SamplingParams
    from e1jax.sampling.completion import Completion, Event
    from e1jax.sampling.engine import Engine


def interrupted(*_: Any) -> None:
    """Handles Ctrl-C where nothing is to be saved: no traceback, and nothing swallows it."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# Python names a module "-m" until it has found it: a command, which imports for seconds
# before it runs (`cli.command.run_command`).
if (
    getattr(sys, "argv", [""])[0] == "-m"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, interrupted)


def __getattr__(name: str):
    # On first use, so that importing one module does not import them all.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'e1jax' has no attribute {name!r}")
