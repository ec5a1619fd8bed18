"""What names the content of files and arrays: a digest of weights on disk, which is cheap
for large files, and a checksum of each array of a run's checkpoint."""

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from e1jax.checkpoint.params import named_leaves
from e1jax.config.checks import UserError
from e1jax.sharding.runtime import COMPILER_OPTIONS

_WHOLE = 2**28  # bytes; a larger file is sampled
_BLOCK, _STRIDE = 2**16, 2**22  # a block of 64 KiB in every 4 MiB


def files_digest(files: Iterable[Path]) -> str:
    """Names the content of files, in their order: 16 hexadecimal digits of SHA-256.

    A file above 256 MiB is read in part, 64 KiB in every 4 MiB: 15 GB would take a minute
    or more from a disk, each time that a command starts. Training changes values
    everywhere, and another model differs everywhere, so that both are seen; a change of
    fewer than 4 MiB may not be. A file that the hub's cache names by its own SHA-256 is
    not read at all. Raises UserError for a file that cannot be read.
    """
    total = hashlib.sha256()
    for file in files:
        try:
            total.update(_file_digest(file.resolve()).encode())
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror or error}"
            ) from None
    return total.hexdigest()[:16]


def _file_digest(file: Path) -> str:
    if re.fullmatch("[0-9a-f]{64}", file.name):
        return file.name
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        content = hashlib.sha256(str(size).encode())
        for start in (*range(0, size, _STRIDE), size - _BLOCK):
            opened.seek(start)
            content.update(opened.read(_BLOCK))
    return content.hexdigest()


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of 32 bits of every array of a tree, by its name.

    It depends on shape, dtype and bits alone, not on how the array is sharded: each
    device sums up its own part. A change of one element always changes it; other changes go
    unseen once in 2^32. Every process of a run calls this at the same time.
    """
    leaves = named_leaves(tree)
    sums = jax.device_get(_sums(leaves))
    return {name: int(value) for name, value in sums.items()}


def check_checksums(
    tree: Any, expected: Mapping[str, Any], where: str, way_out: str
) -> None:
    """Raises UserError, naming the first ones, for arrays that are not as they were saved."""
    found = checksums(tree)
    changed = [name for name, value in found.items() if expected.get(name) != value]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{where} is damaged: by their checksums, {', '.join(changed[:3])}{more} "
            f"are not what was saved; {way_out}"
        )


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _sums(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(array) for name, array in leaves.items()}


def _checksum(array: Array) -> UInt32[Array, ""]:
    """The sum, modulo 2^32, of a hash of each element's bits and place."""
    bits = array.view(f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for dim, size in enumerate(array.shape):
        place = place * jnp.uint32(size)
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    hashed = _mix(bits ^ _mix(place))
    return jnp.sum(hashed, dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3: a permutation of the 32-bit integers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
