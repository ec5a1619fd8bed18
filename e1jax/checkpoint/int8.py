"""Kernels and embedding turned into int8 while they are read."""

import functools
from collections.abc import Mapping

import numpy as np

from e1jax.checkpoint.lazy import Index, LazyArray
from e1jax.nn.quantize import KERNELS, int8_on_host


def as_int8(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Parameters by name, with kernels and embedding as int8; see quantize."""
    packed = {}
    for name, array in arrays.items():
        axis = KERNELS.get(name.rpartition("/")[2])
        if axis is None:
            packed[name] = array
            continue
        parts, sizes = list(array.parts), list(array.shape)
        parts[axis] = sizes[axis]
        values = functools.partial(_int8_values, array, axis)
        packed[f"{name}/values"] = LazyArray(
            array.shape, np.dtype(np.int8), tuple(parts), values
        )
        del parts[axis], sizes[axis]
        scale = functools.partial(_int8_scale, array, axis)
        packed[f"{name}/scale"] = LazyArray(
            tuple(sizes), np.dtype(np.float32), tuple(parts), scale
        )
    return packed


def _int8_values(array: LazyArray, axis: int, part: Index) -> np.ndarray:
    """The int8 values of a part. Full channels are read, because the scale of a channel
    is computed from all of its weights."""
    whole = list(part)
    whole[axis] = slice(0, array.shape[axis])
    cut = [slice(None)] * len(whole)
    cut[axis] = part[axis]
    return int8_on_host(array.read(tuple(whole)), axis)[0][tuple(cut)]


def _int8_scale(array: LazyArray, axis: int, part: Index) -> np.ndarray:
    whole = list(part)
    whole.insert(len(array.shape) + axis, slice(0, array.shape[axis]))
    return int8_on_host(array.read(tuple(whole)), axis)[1]
