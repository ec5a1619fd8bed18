"""Settings of the XLA compiler and runtime: options, compilation cache, memory."""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from e1jax.config.checks import UserError

# For every program that runs on a mesh. On several CPU devices, XLA's default scheduler
# starts independent collectives in an order of each device's own, and with fewer threads
# than devices they then wait for each other until the process is aborted.
COMPILER_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}

CACHE_BYTES = 2 * 2**30  # of compiled programs that are kept between runs


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs in $JAX_COMPILATION_CACHE_DIR, by default
    ~/.cache/e1jax/xla, and says so on stderr when it starts that directory, or if it
    cannot be written: then nothing is kept.

    Beyond CACHE_BYTES, or $JAX_COMPILATION_CACHE_MAX_SIZE, the programs that were used
    least recently are dropped. A damaged one is compiled again.
    """
    path = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    if not path.name:
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
    if not os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE"):
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    _add_times(path)
    _drop_damaged(path)


def _add_times(path: Path) -> None:
    """Gives programs without a time of their last use the earliest one: JAX, which keeps
    such times only since there is a limit, cannot drop any program while one lacks it."""
    with contextlib.suppress(OSError):
        for program in path.glob("*-cache"):
            program.with_name(program.name.removesuffix("cache") + "atime").touch()


def _drop_damaged(path: Path) -> None:
    """Has JAX replace a program that it finds damaged: it warns of it, compiles it, and
    writes it only where none is there. Its warnings become notes of one line."""
    show = warnings.showwarning

    def note(message: Warning | str, *where: Any) -> None:
        found = re.match(
            r"Error (read|writ)ing persistent compilation cache entry for '(.+?)': (.*)",
            " ".join(str(message).split()),
        )
        if not found:
            show(message, *where)
            return
        action, name, reason = found.groups()
        if action == "read" and not re.search(r"Timeout|\[Errno", reason):
            for program in path.glob(f"{name}-*-cache"):
                program.unlink(missing_ok=True)
            text = f"the compiled program {name} is damaged ({reason}): compiled again"
        else:
            text = f"the compiled program {name} is not kept ({reason})"
        print(f"note: {text}", file=sys.stderr)

    warnings.showwarning = note


def free_bytes(mesh: Mesh) -> int | None:
    """Memory that is free on the fullest of this process's devices of the mesh; None
    where devices do not say."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    known = [s for s in stats if s and "bytes_limit" in s]
    return min((s["bytes_limit"] - s["bytes_in_use"] for s in known), default=None)


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
