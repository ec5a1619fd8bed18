"""Parameters in shards over the mesh axis `data`, and functions of them (FSDP).

A function is mapped over `data`; inside, parameters are all-gathered where they are
needed, and gradients are summed and scattered back.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e1jax.sharding.mesh import sharding


def default_mesh(devices: int) -> str:
    """All on `data`: an update gathers the weights layer by layer, and each device takes
    complete sequences."""
    return f"data={devices},tensor=1"


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


def map_over_rows_and_heads(
    function: Callable, mesh: Mesh, *args: jax.Array | None
) -> Any:
    """`function(*args)` with each device's own rows and heads of every argument
    [B, H, ...], or rows [B, S] of numbers; of None, None. The result is sharded as
    the first argument. Where the caller is in a `shard_map` over `data`, the rows are its
    own already."""
    inside = set(jax.sharding.get_abstract_mesh().manual_axes)
    rows = None if "data" in inside else "rows"

    def spec(x):
        heads = "heads" if x.ndim == 4 else None
        axes = (rows, heads, None, None)[: x.ndim]
        return sharding(mesh, axes, x.shape).spec

    mapped = jax.shard_map(
        function,
        mesh=None if inside else mesh,
        in_specs=tuple(map(spec, [x for x in args if x is not None])),
        out_specs=spec(args[0]),
        axis_names=set(mesh.axis_names) - inside,
        check_vma=False,
    )
    return mapped(*(x for x in args if x is not None))


def data_specs(shardings: Any) -> Any:
    """Specs for `map_over_data` that name the mesh axis `data` alone."""

    def spec(sharding: NamedSharding) -> PartitionSpec:
        return PartitionSpec(*["data" if _on_data(p) else None for p in sharding.spec])

    return jax.tree.map(spec, shardings)


def make_gather_params(
    shardings: dict[str, Any], dtype: Any
) -> Callable[[Any, str], Any]:
    """(part, name) -> part, its arrays gathered and cast to `dtype` (one, or one for each of
    `shardings`), within `map_over_data`.

    `part` are the shards of the parameters under `name`, stacked layers or one of them.
    Their gradients are summed over `data` in float32, and only the own shard's sum is
    sent to each device (reduce-scatter); left to the compiler, a gathered parameter gets
    an all-reduce of its full gradient, in `dtype`.
    """

    def from_end(sharding: NamedSharding) -> int:  # 0: no dim is sharded
        places = [_on_data(p) for p in sharding.spec]
        return places.index(True) - len(places) if any(places) else 0

    dims, dtypes = (
        jax.tree.map(from_end, shardings),
        jax.tree.broadcast(dtype, shardings),
    )
    columns = grid_columns(jax.tree.leaves(shardings)[0].mesh)

    def gather_params(part: Any, name: str) -> Any:
        def gather(x: jax.Array, dim: int, dtype: Any) -> jax.Array:
            return _gather(x, dim, dtype, columns)

        return jax.tree.map(gather, part, dims[name], dtypes[name])

    return gather_params


def sum_over_data(tree: Any) -> Any:
    """Sums over the mesh axis `data`, in `map_over_data`."""
    if _one_shard():
        return tree
    return jax.tree.map(lambda x: jax.lax.psum(x, "data"), tree)


def grid_columns(mesh: Mesh) -> int:
    """Columns of the grid of devices in which gradients are summed over `data`.

    On a TPU, a row of the grid is a line of the torus (`make_mesh` puts neighbours beside
    each other), so that sums go over direct links. Elsewhere, and where `data` is on one
    line, the grid is as square as possible.
    """
    devices = list(mesh.devices[:, 0])
    on_line = line_length([getattr(device, "coords", None) for device in devices])
    if 1 < on_line < len(devices) and len(devices) % on_line == 0:
        return on_line
    root = math.isqrt(len(devices))
    return next(n for n in range(root, 0, -1) if len(devices) % n == 0)


def line_length(coords: Sequence[Any]) -> int:
    """How many devices, from the first on, differ from it in one and the same coordinate
    of the torus; 1 for devices without coordinates (None)."""
    first, *others = coords
    if first is None or not others or others[0] is None:
        return 1
    moved = [axis for axis, at in enumerate(first) if at != others[0][axis]]
    if len(moved) != 1:
        return 1

    def without_moved(point: Sequence[int]) -> list[int]:
        return [at for axis, at in enumerate(point) if axis != moved[0]]

    line = without_moved(first)
    on_line = itertools.takewhile(lambda point: without_moved(point) == line, coords)
    return sum(1 for _ in on_line)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, dim: int, dtype: Any, columns: int) -> jax.Array:
    x = x.astype(dtype)
    if not dim or _one_shard():
        return x
    return jax.lax.all_gather(x, "data", axis=x.ndim + dim, tiled=True)


def _gather_forward(x, dim, dtype, columns):
    return _gather(x, dim, dtype, columns), jnp.zeros(0, x.dtype)


def _gather_backward(dim, dtype, columns, like, grad):
    grad = grad.astype(jnp.float32)
    if not dim or _one_shard():
        grad = sum_over_data(grad)
    else:
        grad = jnp.moveaxis(grad, dim, 0)
        # The first dim in memory too: a scattered last one gets an all-reduce on TPUs.
        grad = with_layout_constraint(grad, Layout(tuple(range(grad.ndim))))
        grad = jnp.moveaxis(_sum_and_scatter(grad, columns), 0, dim)
    return (grad.astype(like.dtype),)


def _sum_and_scatter(x: jax.Array, columns: int) -> jax.Array:
    """This device's share, of the first dim, of the sum over `data`.

    In two steps, over the columns and then the rows of a grid of devices: one step over
    4 x 4 or 8 x 8 TPUs is compiled to an all-reduce of everything.
    """
    size = jax.lax.axis_size("data")
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
