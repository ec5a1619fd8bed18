"""Device meshes, and the one table that says how every array dimension is sharded.

Model code names logical axes ("embed", "heads", ...); `RULES` maps them to the mesh
axes `data` and `tensor`. Changing the parallelism of the model means changing that
table and nothing else.
"""

import contextlib
import math
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig

MESH_AXES = ("data", "tensor")


# Weights are sharded in two dimensions (hidden over `data`, heads and mlp over
# `tensor`), the cache by rows over `data` and by heads over `tensor`. The embedding
# is sharded on its vocabulary alone: sharded on the hidden dimension, it costs a relayout
# copy per call.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "rows": "data",
    "embed": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": ("data", "tensor"),
}


def make_mesh(
    text: str | None, config: ModelConfig, devices: Sequence[Any] | None = None
) -> Mesh:
    """The mesh that `text` ("data=1,tensor=4") names; None picks one for the model.

    It takes in all `devices`, which are `jax.devices()` if none are given.

    Raises UserError if it does not match the device count or does not divide the heads.
    """
    devices = jax.devices() if devices is None else devices
    shape = _default_shape(config, len(devices)) if text is None else parse_mesh(text)
    needed = math.prod(shape.values())
    if needed != len(devices):
        hosts = jax.process_count()
        where = f" on {hosts} hosts" if hosts > 1 else ""
        raise UserError(
            f"mesh {mesh_text(shape)} needs {needed} devices, and JAX sees {len(devices)}{where}; "
            "make the sizes multiply to it"
        )
    check_divides(config, shape)
    grid = device_grid(devices, [shape[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_grid(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """The devices in the shape of a mesh. On TPUs of several hosts, devices that are
    neighbours on an axis have a direct link, if each axis of the mesh is a product of axes
    of the torus; `jax.devices()` goes through the torus host by host, in blocks."""
    hosts = {device.process_index for device in devices}
    on_torus = getattr(devices[0], "coords", None) is not None
    if on_torus and len(hosts) > 1:
        with contextlib.suppress(NotImplementedError):
            return mesh_utils.create_device_mesh(shape, devices)
    return np.asarray(devices).reshape(shape)


def check_divides(config: ModelConfig, shape: dict[str, int]) -> None:
    """Refuses a mesh whose `tensor` axis would cut a head or the mlp unevenly."""
    tensor = shape["tensor"]
    for name in ("num_kv_heads", "num_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % tensor:
            fits = [
                str(n)
                for n in range(1, config.num_kv_heads + 1)
                if _divides_all(config, n)
            ]
            raise UserError(
                f"mesh tensor={tensor} does not divide {name}={size}; use tensor={' or '.join(fits)}"
            )


def undivided(config: ModelConfig, params: Any) -> str | None:
    """The cost to each device, in words, of matrices that the mesh does not divide; None if
    it divides all of them.

    `params` are shapes with shardings, as model.abstract_params gives them. Matrices are
    meant to be divided among all devices; biases and norms are small, and are not.
    """
    leaves, _ = jax.tree.flatten_with_path(params)
    names = ("kernel", "embedding", "values")  # the last one: of int8
    matrices = [leaf for keys, leaf in leaves if keys[-1].key in names]
    mesh = matrices[0].sharding.mesh

    def excess(leaf: Any) -> float:
        """Bytes on a device beyond its share."""
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        return (held - leaf.size / mesh.size) * leaf.dtype.itemsize

    kept = [excess(leaf) for leaf in matrices if excess(leaf) > 0]
    if not kept:
        return None
    sizes = [f"{name}={getattr(config, name)}" for name in _uncut(config, mesh.shape)]
    better = _nearest(config, mesh.shape)
    count = math.prod(better.values())
    return (
        f"mesh {mesh_text(mesh.shape)} does not divide {' and '.join(sizes)}, so every device "
        f"keeps {len(kept)} array{'s' * (len(kept) > 1)} of parameters whole in that "
        f"dimension, {_amount(sum(kept))} more than its share"
        + (
            f"; on {count} devices, {mesh_text(better)} divides all"
            if count > 1
            else ""
        )
    )


def note_undivided(config: ModelConfig, params: Any) -> None:
    """Prints the sentence of `undivided` to stderr, if there is one."""
    text = undivided(config, params)
    if text and jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)


def _uncut(config: ModelConfig, shape: Mapping[str, int]) -> list[str]:
    """The sizes that a mesh should divide and does not; see RULES."""
    sizes = {"hidden_size": shape["data"], "vocab_size": math.prod(shape.values())}
    return [name for name, parts in sizes.items() if getattr(config, name) % parts]


def _nearest(config: ModelConfig, shape: Mapping[str, int]) -> dict[str, int]:
    """The mesh that divides everything on as many devices as possible, not more than
    this one has, and of such the one with the most similar `tensor`."""
    tensors = [n for n in range(1, config.num_kv_heads + 1) if _divides_all(config, n)]
    shapes = (
        {"data": count // tensor, "tensor": tensor}
        for count in range(math.prod(shape.values()), 0, -1)
        for tensor in sorted(tensors, key=lambda n: abs(n - shape["tensor"]))
        if count % tensor == 0
    )
    return next(shape for shape in shapes if not _uncut(config, shape))


def mesh_text(shape: Mapping[str, int]) -> str:
    """A mesh as --mesh takes it: `data=2,tensor=4`."""
    return ",".join(f"{name}={size}" for name, size in shape.items())


def _amount(num_bytes: float) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**27 else (2**20, "MiB")
    return f"{num_bytes / unit:.3g} {name}"


def on_tpu(mesh: Mesh | None) -> bool:
    """Whether the mesh is of TPUs, of this machine or of a topology to compile for."""
    return mesh is not None and mesh.devices.flat[0].platform == "tpu"


def on_gpu(mesh: Mesh | None) -> bool:
    """Whether the mesh is of GPUs; not for None."""
    return mesh is not None and mesh.devices.flat[0].platform == "gpu"


def on_cpu(mesh: Mesh | None) -> bool:
    """Whether the mesh is of CPU devices; not for None."""
    return mesh is not None and mesh.devices.flat[0].platform == "cpu"


def sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """The sharding of an array whose dims have these logical axes. A dim that its mesh axes
    do not divide (an odd vocabulary, say) is not sharded; see `undivided`."""
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        part = RULES[axis] if axis else None
        names = (part,) if isinstance(part, str) else part or ()
        parts.append(
            part if size % math.prod(mesh.shape[name] for name in names) == 0 else None
        )
    return NamedSharding(mesh, PartitionSpec(*parts))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def _divides_all(config: ModelConfig, tensor: int) -> bool:
    return not (
        config.num_kv_heads % tensor
        or config.num_heads % tensor
        or config.intermediate_size % tensor
    )


def _default_shape(config: ModelConfig, num_devices: int) -> dict[str, int]:
    """The largest `tensor` that divides devices and model; the rest is `data`."""
    sizes = [
        n
        for n in range(1, num_devices + 1)
        if num_devices % n == 0 and _divides_all(config, n)
    ]
    return {"data": num_devices // max(sizes), "tensor": max(sizes)}


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of the axes that `text` names. Raises UserError if it is no mesh."""
    shape: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch("(data|tensor)=([1-9][0-9]{0,8})", part.strip())
        if not match:
            raise UserError(
                f"mesh {reprlib.repr(text)}: {reprlib.repr(part)} is not an axis; "
                "write it like data=1,tensor=4"
            )
        if match[1] in shape:
            raise UserError(
                f"mesh {reprlib.repr(text)} names the axis {match[1]} twice; give its size "
                "once"
            )
        shape[match[1]] = int(match[2])
    return {axis: shape.get(axis, 1) for axis in MESH_AXES}
