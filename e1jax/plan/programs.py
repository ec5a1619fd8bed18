"""Programs compiled for a TPU that is not there, and their memory."""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e1jax.config.training import GRPOConfig
from e1jax.sharding.mesh import replicated


class Program(NamedTuple):
    """A program that was compiled, or did not fit."""

    fits: bool
    total: int  # bytes on each device
    seconds: float  # of compiling
    temporaries: int = 0
    aliased: int = 0
    text: str | None = None  # None: the compiler cannot print it


def compile_for_tpu(traced: Any) -> Program:
    """Compiles the result of `jax.jit(...).trace`."""
    start = time.perf_counter()
    lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = used_when_too_large(str(error))
        if used is None:
            raise
        return Program(False, used, time.perf_counter() - start)
    memory = compiled.memory_analysis()
    temporaries, aliased = memory.temp_size_in_bytes, memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + temporaries
    total += memory.output_size_in_bytes - aliased
    try:
        with _silenced():
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    seconds = time.perf_counter() - start
    return Program(True, total, seconds, temporaries, aliased, text)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Where the compiler cannot print a program, it writes a stack trace to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def used_when_too_large(message: str) -> int | None:
    """Bytes that a program would use (0: not said), from the compiler's refusal of it;
    None if that is not about memory."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available", message
    )
    if not found:
        return 0
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Shapes of arrays that are replicated on every device."""
    place = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place), tree
    )


def device_bytes(tree: Any) -> int:
    """The bytes of shapes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bisect(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, or 0, asking as little as possible near `guess`."""
    low, high = 0, None  # the largest that fits, the smallest that does not
    at, step = max(1, guess), 1
    while high is None or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        else:
            at = (low + high) // 2 if low else max(1, high - step)
        step *= 2
    return low


def computed_dtype(config: GRPOConfig) -> Any:
    """The dtype of the computation on a TPU, where the configuration leaves it open."""
    return jnp.dtype(config.dtype or "bfloat16")
