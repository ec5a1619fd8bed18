"""Settings of the XLA compiler and runtime: options, compilation cache, memory."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from e1jax.config.checks import UserError
from e1jax.sharding.mesh import on_cpu

# For every program that runs on a mesh. On several CPU devices, XLA's default scheduler
# starts independent collectives in an order of each device's own, and with fewer threads
# than devices they then wait for each other until the process is aborted.
COMPILER_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def backward_options(mesh: Mesh) -> dict[str, Any]:
    """COMPILER_OPTIONS of a program with a backward pass.

    On a CPU, XLA removes optimization barriers before it fuses operations. Here they
    stay: a transpose fused with its operand takes ten times as long.
    """
    if not on_cpu(mesh):
        return COMPILER_OPTIONS
    return COMPILER_OPTIONS | {"xla_disable_hlo_passes": "cse_barrier_expander"}


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs in $JAX_COMPILATION_CACHE_DIR, by default
    ~/.cache/e1jax/xla, and says so on stderr when it starts that directory, or if it
    cannot be written: then nothing is kept."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            path = Path.home() / ".cache" / "e1jax" / "xla"
            new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            writable = os.access(path, os.W_OK)
        except (OSError, RuntimeError):  # RuntimeError: there is no home
            writable = False
        if not writable:
            where = "~/.cache/e1jax/xla cannot be written"
            print(f"note: compiled programs are not kept ({where})", file=sys.stderr)
            return
        if new:
            print(f"note: compiled programs are kept in {path}", file=sys.stderr)
        jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turns an error of devices without room for `what` into one sentence, with `advice`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        raise UserError(
            f"the devices have too little memory for {what}; {advice}"
        ) from None
