"""A kernel for TPUs (Pallas): attention of one query a row over the live blocks of the cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from e1jax.nn.cache import merge_shards
from e1jax.nn.quantize import LANES, dequantize
from e1jax.nn.scores import MASKED, fold, scaled, wide_einsum
from e1jax.sharding.mesh import sharding

# The same on TPUs. Longer blocks cost fewer steps (some 0.35 us each), and read more
# positions that are not live: half a block a row.
TPU_BLOCK_LEN = 512


class Visits(NamedTuple):
    """The blocks of the cache that a decode step reads, the same in all layers: for each
    of the N devices that hold different rows, a list of all live blocks, row after row."""

    count: jax.Array  # [N] int32: how many of the list count
    rows: jax.Array  # [N * most] int32
    blocks: jax.Array  # [N * most] int32


def tpu_block_len(dtype: Any) -> int:
    """Of a cache; int8 takes twice as many positions, which are half as wide."""
    return 2 * TPU_BLOCK_LEN if dtype == jnp.int8 else TPU_BLOCK_LEN


def live_blocks(
    positions: Int[Array, "R 1"],
    capacity: int,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
) -> Visits:
    """The visits of `decode_attention` to a cache of `dtype` and of `capacity` positions a
    row."""
    block_len = min(tpu_block_len(dtype), capacity)

    def local(positions):
        # One for a part that has nothing yet, too: its result has to be something.
        counts = jnp.maximum(positions[:, 0], 0) // block_len + 1
        ends = jnp.cumsum(counts)[None]  # of rows in the list
        steps = jnp.arange(ends.size * pl.cdiv(capacity, block_len))
        passed = ends <= steps[:, None]
        blocks = steps - jnp.where(passed, ends, 0).max(axis=1)
        visits = Visits(ends[0, -1:], passed.sum(axis=1), blocks)
        return jax.lax.optimization_barrier(visits)  # not again in every layer

    if mesh is None:
        return local(positions)
    place = sharding(mesh, ("rows", None), positions.shape).spec
    of_rows = PartitionSpec(place[0])
    return jax.shard_map(local, mesh=mesh, in_specs=place, out_specs=of_rows)(positions)


def decode_attention(
    q: Float[Array, "B H 1 C"],
    k_cache: Num[Array, "L R K S C"],
    v_cache: Num[Array, "L R K S C"],
    layer: Int[Array, ""],
    positions: Int[Array, "R 1"],
    visits: Visits,
    mesh: Mesh | None = None,
    *,
    scales: tuple[Float[Array, "L R K _N _C"], Float[Array, "L R K _N _C"]]
    | None = None,
) -> Float[Array, "B H 1 C"]:
    """`cached_attention` of one query a row, as a kernel for TPUs (Pallas).

    Reads the blocks that a row has filled, and of the others nothing, row by row: the
    longest row does not lengthen the rest. On a mesh, each device takes the rows and
    heads of its own part of the cache.
    """
    shards = k_cache.shape[1] // q.shape[0]
    q = jnp.tile(q, (shards, 1, 1, 1))
    caches = (k_cache, v_cache, *(scales or ()))
    args = (q, caches, layer[None], positions[:, 0], *visits)
    if mesh is None:
        return merge_shards(*_decode_local(*args), shards)
    heads = sharding(mesh, ("rows", "heads", None, None), q.shape).spec
    axes = ("layers", "rows", "kv_heads", None, None)
    of_caches = tuple(sharding(mesh, axes, x.shape).spec for x in caches)
    of_rows = PartitionSpec(heads[0])
    specs = (heads, of_caches, PartitionSpec(), *[of_rows] * 4)
    local = jax.shard_map(
        _decode_local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False
    )
    return merge_shards(*local(*args), shards)


def _decode_local(q, caches, layer, positions, count, rows, blocks):
    """`decode_attention` of one device, and the logarithm of each result's mass; `caches`
    are keys, values and, of int8, the scales of both, `layer` [1], `positions` [R]. The
    grid is the list of visits, so that no step goes to a block that is not live."""
    _, _, kv_heads, capacity, head_dim = caches[0].shape
    block_len = min(tpu_block_len(caches[0].dtype), capacity)
    folded = fold(q, kv_heads)
    group = folded.shape[2]

    def row_at(step, layer, positions, rows, blocks):
        return rows[step], 0, 0, 0

    def block_at(step, layer, positions, rows, blocks):
        return layer[0], rows[step], 0, blocks[step], 0

    of_row = pl.BlockSpec((None, kv_heads, group, head_dim), row_at)
    mass_of_row = pl.BlockSpec((None, kv_heads, group, 1), row_at)
    of_cache = pl.BlockSpec((None, None, kv_heads, block_len, head_dim), block_at)
    scale_rows = max(1, block_len // LANES)
    of_scales = pl.BlockSpec((None, None, kv_heads, scale_rows, LANES), block_at)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(count[0],),
        in_specs=[of_row, of_cache, of_cache, *[of_scales] * (len(caches) - 2)],
        out_specs=(of_row, mass_of_row),
        scratch_shapes=[
            pltpu.VMEM((kv_heads, group, 1), jnp.float32),
            pltpu.VMEM((kv_heads, group, 1), jnp.float32),
            pltpu.VMEM((kv_heads, group, head_dim), jnp.float32),
        ],
    )
    shapes = (
        jax.ShapeDtypeStruct(folded.shape, q.dtype),
        jax.ShapeDtypeStruct((*folded.shape[:3], 1), jnp.float32),
    )
    kernel = pl.pallas_call(
        _visit_block,
        grid_spec=grid,
        out_shape=shapes,
        name="decode_attention",
        cost_estimate=_cost_when_full(folded, caches),
        metadata={"positions": str(capacity), "block_len": str(block_len)},
    )
    scalars = layer, positions, rows, blocks
    out, log_mass = kernel(*scalars, folded, *caches)
    return out.reshape(q.shape), log_mass.reshape(*q.shape[:3], 1)


def _cost_when_full(q, caches) -> pl.CostEstimate:
    """Of rows that have filled the capacity, as which rows have filled how much is known
    only on the device. A reader scales it by the positions filled, rounded up to blocks:
    the kernel's metadata give `positions`, for which it holds, and `block_len`."""
    _, _, _, capacity, _ = caches[0].shape
    one_layer = sum(x.size * x.dtype.itemsize // len(x) for x in caches)
    return pl.CostEstimate(
        flops=4 * q.size * capacity,  # scores, and sums of values
        bytes_accessed=one_layer + 2 * q.size * q.dtype.itemsize,  # q in, sums out
        transcendentals=q.size // q.shape[-1] * capacity,
    )


def _visit_block(layer, positions, rows, blocks, *refs):
    """Merges one block into a row's peak and total [K, G, 1] and sums [K, G, C]."""
    q_ref, k_ref, v_ref, *scales, out_ref, log_mass_ref, peak, total, sums = refs
    step = pl.program_id(0)
    position, block = positions[rows[step]], blocks[step]
    block_len = k_ref.shape[1]

    @pl.when(block == 0)
    def start():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def is_live(shape, dim):
        index = jax.lax.broadcasted_iota(jnp.int32, shape, dim)
        return block * block_len + index <= position

    k, v = (dequantize(ref[...], q_ref.dtype) for ref in (k_ref, v_ref))
    scores = wide_einsum("kgc,ksc->kgs", scaled(q_ref[...]), k)
    if scales:
        scores *= _scale_row(scales[0], block_len)
    scores = jnp.where(is_live(scores.shape, 2), scores, MASKED)
    new_peak = jnp.maximum(peak[...], scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_peak)
    shrink = jnp.exp(peak[...] - new_peak)
    # Values beyond the row's end are arbitrary, and 0 times NaN is NaN.
    v = jnp.where(is_live(v_ref.shape, 1), v, jnp.zeros((), v.dtype))
    peak[...] = new_peak
    total[...] = total[...] * shrink + weights.sum(axis=-1, keepdims=True)
    if scales:
        v_scale = _scale_row(scales[1], block_len)
        weights *= jnp.where(is_live(v_scale.shape, 2), v_scale, 0.0)
    sums[...] = sums[...] * shrink + wide_einsum(
        "kgs,ksc->kgc", weights.astype(v.dtype), v
    )

    @pl.when(block == jnp.maximum(position, 0) // block_len)
    def finish():
        out_ref[...] = (sums[...] / total[...]).astype(out_ref.dtype)
        log_mass_ref[...] = peak[...] + jnp.log(total[...])


def _scale_row(scales, block_len: int) -> jax.Array:
    """[K, N, LANES] of a reference as [K, 1, block_len]."""
    rows = [scales[:, row : row + 1] for row in range(scales.shape[1])]
    return jnp.concatenate(rows, axis=2)[..., :block_len]
