"""TPU chips and slices, and topologies that the compiler knows without a TPU."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from e1jax.cli.flags import aligned
from e1jax.config.checks import UserError, shown
from e1jax.config.model import ModelConfig
from e1jax.sharding.mesh import make_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The abilities of one JAX device of a kind of TPU; a tpu7x chip is two of them."""

    hbm_bytes: int  # that the compiler lets a program use
    bytes_per_second: float
    flops_per_second: float  # bfloat16
    hertz: float
    # Of a link of the interconnect (ICI), each way. A chip's bandwidth, which is both
    # ways and of all its links, by Google's documentation (docs.cloud.google.com/tpu/docs/
    # v5e, v6e, v5p: 400, 800 and 1200 GB/s), divided by 2 and by its 4, 4 or 6 links. The JAX scaling book (jax-ml.github.io/scaling-book/tpus) has a tenth less.
    ici_bytes_per_second: float
    devices: int  # JAX devices to a chip
    slices: tuple[str, ...]  # that the compiler can describe, from small to large

    def seconds(self, num_bytes: float, flops: float) -> float:
        """That so much takes at least: the traffic or the work, whichever is longer."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def _chip(gib, gb, tflops, ghz, ici_gb, slices, devices=1) -> Chip:
    return Chip(
        hbm_bytes=int(gib * GIB),
        bytes_per_second=gb * 1e9,
        flops_per_second=tflops * 1e12,
        hertz=ghz * 1e9,
        ici_bytes_per_second=ici_gb * 1e9,
        devices=devices,
        slices=tuple(slices.split()),
    )


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"


_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"


CHIPS = {
    "v5e": _chip(15.75, 819, 197, 1.5, 50, _FLAT),
    "v6e": _chip(31.24, 1640, 918, 1.75, 100, _FLAT),
    "v5p": _chip(95.73, 2765, 459, 1.75, 100, _CUBES),
    # Its clock and links are not needed: the compiler does not print programs for it.
    "tpu7x": _chip(94.74, 3690, 1153.5, math.nan, math.nan, _CUBES, devices=2),
}


TOPOLOGIES = [f"{chip}:{shape}" for chip in CHIPS for shape in CHIPS[chip].slices]


class Slice(NamedTuple):
    """A TPU slice that programs can be compiled for."""

    topology: str
    chip: Chip
    devices: Sequence[Any]

    @property
    def is_ring(self) -> tuple[bool, ...]:
        """On which axes the last chip is linked to the first one too: in 2D axes of 16,
        in 3D all if the slice is made of cubes of 4x4x4, else none
        (jax-ml.github.io/scaling-book/tpus, "TPU networking")."""
        sizes = [int(size) for size in self.topology.partition(":")[2].split("x")]
        if len(sizes) == 2:
            return tuple(size == 16 for size in sizes)
        return (all(size % 4 == 0 for size in sizes),) * 3

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len({device.process_index for device in self.devices})


def topology_table() -> str:
    """The known topologies, a line each."""
    rows = [("topology", "chips", "devices", "HBM GiB", "GB/s", "bf16 TFLOP/s")]
    for name, chip in CHIPS.items():
        for shape in chip.slices:
            chips = _chips(shape)
            rows.append(
                (
                    f"{name}:{shape}",
                    f"{chips}",
                    f"{chips * chip.devices}",
                    f"{chip.hbm_bytes / GIB:.2f}",
                    f"{chip.bytes_per_second / 1e9:.0f}",
                    f"{chip.flops_per_second / 1e12:.0f}",
                )
            )
    return f"{aligned(rows)}\nHBM and speeds are those of one device, as JAX sees it."


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def check_topology(topology: str) -> Chip:
    """The chip of a known topology; raises UserError naming the nearest ones."""
    if topology in TOPOLOGIES:
        return CHIPS[topology.partition(":")[0]]
    near = difflib.get_close_matches(topology.lower(), TOPOLOGIES, n=3, cutoff=0.4)
    rented = re.fullmatch(r"(v5litepod|v5e|v6e|v5p|tpu7x)-(\d{1,6})", topology)
    if rented:  # an accelerator type, whose number is one of chips, or of their cores
        name = {"v5litepod": "v5e"}.get(rented[1], rented[1])
        chips = int(rented[2]) // (2 if name in ("v5p", "tpu7x") else 1)
        shapes = [s for s in CHIPS[name].slices if _chips(s) == chips]
        near = [f"{name}:{shape}" for shape in shapes] or near
    hint = f"the nearest are {', '.join(near)}" if near else "it is like v5e:2x4"
    raise UserError(
        f"the topology {shown(topology)} is not known; {hint} (all of them: "
        "python -m e1jax.plan topologies)"
    )


def describe(topology: str) -> Slice:
    """A slice, from the TPU compiler.

    Raises UserError if the topology is not known or there is no compiler.
    """
    chip = check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan needs the compiler for TPUs, which runs on any Linux machine but is "
            "not installed here; pip install libtpu"
        )
    # No TPU is used, even if there is one: others may be using it.
    jax.config.update("jax_platforms", "cpu")
    for name, value in _COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Eight chips are one host's, as they are rented; the compiler takes them for two.
    options = {"chips_per_host_bounds": [2, 4, 1]} if topology.endswith(":2x4") else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason and ("lock" in reason or "in use" in reason):
            raise UserError(
                "another process holds libtpu; wait for it to end, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from None
        raise UserError(
            f"libtpu cannot describe {topology} ({reason}); try another version of it"
        ) from None
    return Slice(topology, chip, description.devices)


# The compiler asks no metadata server, may be loaded beside a program that uses a TPU,
# and keeps its remarks about this machine to itself.
_COMPILER_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def slice_mesh(slice_: Slice, text: str | None, sizes: ModelConfig) -> Mesh:
    """The mesh over all of a slice's devices; raises UserError if it is not one."""
    try:
        return make_mesh(text, sizes, slice_.devices)
    except UserError as error:
        count = len(slice_.devices)
        hosts = f"{slice_.hosts} hosts of {count // slice_.hosts}"
        raise UserError(
            f"{slice_.topology} has {count} devices on {hosts}: {error}"
        ) from None


def larger_slices(slice_: Slice) -> Iterator[Slice]:
    """Slices of the same chip with more devices, from small to large."""
    name, _, shape = slice_.topology.partition(":")
    for larger in slice_.chip.slices[slice_.chip.slices.index(shape) + 1 :]:
        yield describe(f"{name}:{larger}")


def host_slice(slice_: Slice) -> Slice:
    """The slice that one of a slice's hosts would be alone: a program for a part of a
    slice cannot be compiled."""
    if slice_.hosts == 1:
        return slice_
    name = slice_.topology.partition(":")[0]
    chips = len(slice_.devices) // slice_.hosts // slice_.chip.devices
    return describe(
        next(
            f"{name}:{shape}" for shape in slice_.chip.slices if _chips(shape) == chips
        )
    )
