"""Arrays that are read from their files piece by piece, straight into an Orbax checkpoint."""

import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from e1jax.config.checks import UserError, shortened

# Chunks of a checkpoint are small, because the reader loads every chunk that its shard
# touches: a chip of a large mesh should read little more than its own shard.
_CHUNK_BYTES = 5 * 10**6


_PARTS_IN_FLIGHT = 16  # blocks in memory, read but not yet written


THREADS = min(8, max(2, os.cpu_count() or 1))


Index = tuple[slice, ...]  # a part of an array: start and stop per dim


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array in a file, read block by block on demand."""

    shape: tuple[int, ...]
    dtype: Any
    parts: tuple[int, ...]  # shape of the blocks in which reading is efficient
    read: Callable[[Index], np.ndarray]


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax handler that writes and restores a LazyArray block by block."""

    async def serialize(self, values: Sequence[Any], infos, args=None):
        tasks = []
        for value, info in zip(values, infos, strict=True):
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=bool(info.is_ocdbt_checkpoint),
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=0,
            )
            spec["metadata"]["chunks"] = chunks_of(value.shape, value.dtype)
            store = await tensorstore.open(spec, create=True, context=info.ts_context)
            whole = tuple(slice(0, size) for size in value.shape)
            tasks += [(store, value, part) for part in parts_of(value, whole)]
        room = threading.Semaphore(_PARTS_IN_FLIGHT)

        def write(task: tuple[Any, LazyArray, Index]) -> Any:
            store, value, part = task
            room.acquire()
            try:
                array = value.read(part)
                written = store[part].write(
                    array, can_reference_source_data_indefinitely=True
                )
            except BaseException:
                room.release()
                raise
            written.add_done_callback(lambda _: room.release())
            return written

        try:
            # Reading, hashing and copying leave Python's lock alone, as writing does.
            with ThreadPoolExecutor(THREADS) as pool:
                for written in pool.map(write, tasks):
                    written.result()
        finally:  # wait, or a late write would recreate a directory being removed
            for _ in range(_PARTS_IN_FLIGHT):
                room.acquire()
        return []

    async def deserialize(self, infos, args=None):
        arrays = []
        for info in infos:
            spec = ocp.type_handlers.get_json_tspec_read(
                info, use_ocdbt=bool(info.is_ocdbt_checkpoint)
            )
            store: Any = await tensorstore.open(spec, context=info.ts_context)
            parts = store.chunk_layout.read_chunk.shape
            read = functools.partial(_read, store, str(info.parent_dir))
            dtype = store.dtype.numpy_dtype
            arrays.append(LazyArray(store.shape, dtype, parts, read))
        return arrays


def _read(store: tensorstore.TensorStore, path: str, part: Index) -> np.ndarray:
    try:
        return store[part].read().result()
    except Exception as error:
        raise UserError(f"{broken_checkpoint(path)}: {in_short(error)}") from None


def chunks_of(shape: Sequence[int], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of the chunks that an array is written in: all of it if it is small, else
    a layer, halved until it is small enough."""
    chunks = list(shape)
    if len(shape) == 3 and math.prod(shape) * dtype.itemsize > _CHUNK_BYTES:
        chunks[0] = 1
    # On a mesh, kernels of layers are cut along both dims, so these are halved in turns;
    # of the rest only the vocabulary is cut, the longer dim.
    full = shape if len(shape) == 3 else [1] * len(shape)
    while math.prod(chunks) * dtype.itemsize > _CHUNK_BYTES:
        dims = [dim for dim, size in enumerate(chunks) if size > 1]
        dim = max(dims, key=lambda dim: (chunks[dim] / full[dim], dim))
        chunks[dim] = -(-chunks[dim] // 2)
    return tuple(chunks)


def parts_of(array: LazyArray, index: Index) -> Iterator[Index]:
    """Splits `index` at the block boundaries of the array (`LazyArray.parts`)."""
    cuts = []
    for span, step in zip(index, array.parts, strict=True):
        inner = range((span.start // step + 1) * step, span.stop, step)
        pairs = itertools.pairwise([span.start, *inner, span.stop])
        cuts.append([slice(*pair) for pair in pairs])
    return itertools.product(*cuts)


def registry() -> ocp.type_handlers.TypeHandlerRegistry:
    """Orbax handlers by which LazyArrays are saved as arrays are."""
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (LazyArray, _LazyHandler())
    )


def broken_checkpoint(path: Path | str) -> str:
    """The sentence for a directory that Orbax cannot read."""
    return f"{path} is not a whole Orbax checkpoint, convert or save it again"


def in_short(error: Exception) -> str:
    """An error's text in one line of at most some 300 characters."""
    return shortened(
        " ".join(str(error).split()), 300
    )  # tensorstore ends with the cause
