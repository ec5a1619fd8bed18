"""Device meshes, and the one table that says where every array dimension lies on them.

Model code names logical axes ("embed", "heads", ...); `RULES` maps them to the mesh
axes `data` and `tensor`. Changing the parallelism of the model means changing that
table and nothing else.
"""

import contextlib
import functools
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from e1jax.config import ModelConfig, UserError

MESH_AXES = ("data", "tensor")

# Weights are sharded in two dimensions (hidden over `data`, heads and mlp over
# `tensor`), the cache by rows over `data` and by heads over `tensor`. The embedding
# lies on its vocabulary alone: sharded on the hidden dimension, it costs a relayout
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
    shape = _default_shape(config, len(devices)) if text is None else _parse(text)
    needed = math.prod(shape.values())
    if needed != len(devices):
        hosts = jax.process_count()
        where = f" on {hosts} hosts" if hosts > 1 else ""
        raise UserError(
            f"mesh {_text(shape)} needs {needed} devices, and JAX sees {len(devices)}{where}; "
            "make the sizes multiply to it"
        )
    check_divides(config, shape)
    grid = np.asarray(devices).reshape([shape[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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
    """What it costs each device that the mesh does not divide all matrices, in words;
    None if it does.

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
        f"mesh {_text(mesh.shape)} does not divide {' and '.join(sizes)}, so every device "
        f"keeps {len(kept)} array{'s' * (len(kept) > 1)} of parameters whole in that "
        f"dimension, {_amount(sum(kept))} more than its share"
        + (f"; on {count} devices, {_text(better)} divides all" if count > 1 else "")
    )


def note_undivided(config: ModelConfig, params: Any) -> None:
    """Says on stderr what `undivided` does, if it says something."""
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


def _text(shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())


def _amount(num_bytes: float) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**27 else (2**20, "MiB")
    return f"{num_bytes / unit:.3g} {name}"


def on_tpu(mesh: Mesh | None) -> bool:
    """Whether arrays lie on TPUs, of this machine or of a topology to compile for."""
    return mesh is not None and mesh.devices.flat[0].platform == "tpu"


def on_cpu(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.devices.flat[0].platform == "cpu"


def sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Where an array whose dims have these logical axes lies. A dim that its mesh axes
    do not divide (an odd vocabulary, say) stays whole; see `undivided`."""
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        part = RULES[axis] if axis else None
        names = (part,) if isinstance(part, str) else part or ()
        parts.append(
            part if size % math.prod(mesh.shape[name] for name in names) == 0 else None
        )
    return NamedSharding(mesh, PartitionSpec(*parts))


# For every program that runs on a mesh. On several CPU devices, XLA's default scheduler
# starts independent collectives in an order of each device's own, and with fewer threads
# than devices they then wait for each other until the process is aborted.
COMPILER_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def backward_options(mesh: Mesh) -> dict[str, Any]:
    """COMPILER_OPTIONS of a program with a backward pass.

    On a CPU, XLA removes optimization barriers before it fuses operations. Here they
    stay: a transpose fused with what it transposes takes ten times as long.
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
    """Where the devices have no room for `what`, that and `advice` is one sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise
        raise UserError(
            f"the devices have too little memory for {what}; {advice}"
        ) from None


def map_over_data(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any):
    """`jax.shard_map` over `data` alone: the function sees the shards of one place on
    that axis, and is divided over `tensor` by the compiler."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"data"},
        check_vma=False,
    )


def over_data(shardings: Any) -> Any:
    """What of them lies over `data`, as specs for `map_over_data`."""

    def spec(sharding: NamedSharding) -> PartitionSpec:
        return PartitionSpec(*["data" if _on_data(p) else None for p in sharding.spec])

    return jax.tree.map(spec, shardings)


def make_whole(shardings: dict[str, Any], dtype: Any) -> Callable[[Any, str], Any]:
    """(part, name) -> part with whole arrays of `dtype`, for use in `map_over_data`.

    `part` are the shards of the parameters under `name`, stacked layers or one of them.
    Their gradients are summed over `data` in float32, and only the own shard's sum is
    sent to each device (reduce-scatter); left to the compiler, a gathered parameter gets
    an all-reduce of its whole gradient, in `dtype`.
    """

    def from_end(sharding: NamedSharding) -> int:  # 0: lies on no dim of it
        places = [_on_data(p) for p in sharding.spec]
        return places.index(True) - len(places) if any(places) else 0

    dims = jax.tree.map(from_end, shardings)

    def whole(part: Any, name: str) -> Any:
        return jax.tree.map(lambda x, dim: _gather(x, dim, dtype), part, dims[name])

    return whole


def sum_over_data(tree: Any) -> Any:
    """Sums over the mesh axis `data`, in `map_over_data`."""
    if _one_shard():
        return tree
    return jax.tree.map(lambda x: jax.lax.psum(x, "data"), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, dim: int, dtype: Any) -> jax.Array:
    x = x.astype(dtype)
    if not dim or _one_shard():
        return x
    return jax.lax.all_gather(x, "data", axis=x.ndim + dim, tiled=True)


def _gather_forward(x, dim, dtype):
    return _gather(x, dim, dtype), jnp.zeros(0, x.dtype)


def _gather_backward(dim, dtype, like, grad):
    grad = grad.astype(jnp.float32)
    if not dim or _one_shard():
        grad = sum_over_data(grad)
    else:
        grad = jnp.moveaxis(grad, dim, 0)
        # The first dim in memory too: a scattered last one gets an all-reduce on TPUs.
        grad = with_layout_constraint(grad, Layout(tuple(range(grad.ndim))))
        grad = jnp.moveaxis(_sum_and_scatter(grad), 0, dim)
    return (grad.astype(like.dtype),)


def _sum_and_scatter(x: jax.Array) -> jax.Array:
    """The own share, of the first dim, of the sum over `data`.

    In two steps, over the columns and then the rows of a grid of devices: one step over
    4 x 4 or 8 x 8 TPUs is compiled to an all-reduce of everything.
    """
    size = jax.lax.axis_size("data")
    columns = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    grid = np.arange(size).reshape(-1, columns)
    for groups in (grid.T, grid):
        x = jax.lax.psum_scatter(
            x, "data", axis_index_groups=groups.tolist(), tiled=True
        )
    return x


_gather.defvjp(_gather_forward, _gather_backward)


def _one_shard() -> bool:
    # XLA refuses collectives over one place beside an axis that it divides by itself.
    return jax.lax.axis_size("data") == 1


def _on_data(part: str | tuple[str, ...] | None) -> bool:
    return part == "data" or (isinstance(part, tuple) and "data" in part)


def replicated(mesh: Mesh) -> NamedSharding:
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


def _parse(text: str) -> dict[str, int]:
    shape: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        match = re.fullmatch("(data|tensor)=([1-9][0-9]{0,8})", part.strip())
        if not match:
            raise UserError(
                f"mesh {reprlib.repr(text)}: {reprlib.repr(part)} is not an axis; "
                "write it like data=1,tensor=4"
            )
        shape[match[1]] = int(match[2])
    return shape
