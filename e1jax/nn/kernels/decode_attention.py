"""A kernel for TPUs (Pallas): attention over the live blocks of the cache, of one query a
row, or of a piece of a prompt."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from e1jax.nn.cache import merge_shards
from e1jax.nn.quantize import LANES, dequantize
from e1jax.nn.scores import MASKED, scaled, wide_einsum
from e1jax.sharding.mesh import sharding

# Positions of a block on TPUs. Longer blocks cost fewer steps of the grid (some 0.35 us
# each), and read more positions that are not live: half a block a row.
TPU_BLOCK_LEN = 512

# The largest number of queries in a tile, counted over all heads. Each tile reads the row's
# cache once, and its scores against a block are held in VMEM: larger tiles read the cache
# fewer times and need more VMEM.
_MOST_QUERIES = 1024


class Visits(NamedTuple):
    """The blocks of the cache that a pass reads, the same in all layers: for each of the N
    devices that hold different rows, a list of all live blocks, row after row."""

    count: jax.Array  # [N] int32: how many of the list count
    rows: jax.Array  # [N * most] int32
    blocks: jax.Array  # [N * most] int32


def tpu_block_len(dtype: Any) -> int:
    """Of a cache; int8 takes twice as many positions, which are half as wide."""
    return 2 * TPU_BLOCK_LEN if dtype == jnp.int8 else TPU_BLOCK_LEN


def live_blocks(
    positions: Int[Array, "R T"],
    capacity: int,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
) -> Visits:
    """The visits of `decode_attention` to a cache of `dtype` and of `capacity` positions a
    row."""
    block_len = min(tpu_block_len(dtype), capacity)

    def local(positions):
        # One for a part that has nothing yet, too: its result has to be something.
        counts = jnp.maximum(positions[:, -1], 0) // block_len + 1
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
    q: Float[Array, "B H T C"],
    k_cache: Num[Array, "L R K S C"],
    v_cache: Num[Array, "L R K S C"],
    layer: Int[Array, ""],
    positions: Int[Array, "R T"],
    visits: Visits,
    mesh: Mesh | None = None,
    *,
    scales: tuple[Float[Array, "L R K _N _C"], Float[Array, "L R K _N _C"]]
    | None = None,
) -> Float[Array, "B H T C"]:
    """`cached_attention`, as a kernel for TPUs (Pallas).

    Reads the blocks that a row has filled, and of the others nothing, row by row: the
    longest row does not lengthen the rest. The T queries of a row are at consecutive
    `positions`, and computed in tiles of a power of two that divides T (odd T: one query a
    tile). On a mesh, each device takes the rows and heads of its own part of the cache.
    """
    shards = k_cache.shape[1] // q.shape[0]
    q = jnp.tile(q, (shards, 1, 1, 1))
    caches = (k_cache, v_cache, *(scales or ()))
    args = (q, caches, layer[None], positions[:, -1], *visits)
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


def _decode_local(q, caches, layer, last, count, rows, blocks):
    """`decode_attention` of one device, and the logarithm of each result's mass; `caches`
    are keys, values and, of int8, the scales of both, `layer` [1], `last` [R] the position
    of a row's last query. The grid is the list of visits, so that no step goes to a block
    that is not live, once for each tile of the queries."""
    _, _, kv_heads, capacity, head_dim = caches[0].shape
    block_len = min(tpu_block_len(caches[0].dtype), capacity)
    tile_len = _tile_len(q)
    tiles = _in_tiles(q, kv_heads, tile_len)
    num_tiles, _, _, group, _ = tiles.shape

    def row_at(tile, step, layer, last, rows, blocks):
        return tile, rows[step], 0, 0, 0

    def block_at(tile, step, layer, last, rows, blocks):
        return layer[0], rows[step], 0, blocks[step], 0

    of_row = pl.BlockSpec((None, None, kv_heads, group, head_dim), row_at)
    mass_of_row = pl.BlockSpec((None, None, kv_heads, group, 1), row_at)
    of_cache = pl.BlockSpec((None, None, kv_heads, block_len, head_dim), block_at)
    scale_rows = max(1, block_len // LANES)
    of_scales = pl.BlockSpec((None, None, kv_heads, scale_rows, LANES), block_at)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(num_tiles, count[0]),
        in_specs=[of_row, of_cache, of_cache, *[of_scales] * (len(caches) - 2)],
        out_specs=(of_row, mass_of_row),
        scratch_shapes=[
            pltpu.VMEM((kv_heads, group, 1), jnp.float32),
            pltpu.VMEM((kv_heads, group, 1), jnp.float32),
            pltpu.VMEM((kv_heads, group, head_dim), jnp.float32),
        ],
    )
    shapes = (
        jax.ShapeDtypeStruct(tiles.shape, q.dtype),
        jax.ShapeDtypeStruct((*tiles.shape[:4], 1), jnp.float32),
    )
    kernel = pl.pallas_call(
        functools.partial(_visit_block, tile_len=tile_len, length=q.shape[2]),
        grid_spec=grid,
        out_shape=shapes,
        name="decode_attention",
        cost_estimate=_cost_when_full(tiles, caches),
        metadata={"positions": str(capacity), "block_len": str(block_len)},
    )
    results = kernel(layer, last, rows, blocks, tiles, *caches)
    out, log_mass = (_out_of_tiles(x, tile_len, q.shape[1]) for x in results)
    return out, log_mass


def _tile_len(q: jax.Array) -> int:
    """How many queries of each head are in a tile: a power of two that divides T."""
    _, heads, length, _ = q.shape
    fitting = max(1, _MOST_QUERIES // heads)
    return math.gcd(length, 1 << fitting.bit_length() - 1)


def _in_tiles(q: jax.Array, kv_heads: int, tile_len: int) -> jax.Array:
    """[B, H, N * tile_len, C] -> [N, B, K, G * tile_len, C]"""
    rows, heads, length, size = q.shape
    num_tiles = length // tile_len
    x = q.reshape(rows, heads, num_tiles, tile_len, size)
    return x.transpose(2, 0, 1, 3, 4).reshape(num_tiles, rows, kv_heads, -1, size)


def _out_of_tiles(x: jax.Array, tile_len: int, heads: int) -> jax.Array:
    """[N, B, K, G * tile_len, C] -> [B, H, N * tile_len, C]: undoes `_in_tiles`."""
    num_tiles, rows, *_, size = x.shape
    x = x.reshape(num_tiles, rows, heads, tile_len, size).transpose(1, 2, 0, 3, 4)
    return x.reshape(rows, heads, num_tiles * tile_len, size)


def _cost_when_full(q, caches) -> pl.CostEstimate:
    """Of rows that have filled the capacity, as which rows have filled how much is known
    only on the device. A reader scales it by the positions filled, rounded up to blocks:
    the kernel's metadata give `positions`, for which it holds, and `block_len`."""
    _, _, _, capacity, _ = caches[0].shape
    one_layer = sum(x.size * x.dtype.itemsize // len(x) for x in caches)
    return pl.CostEstimate(
        flops=4 * q.size * capacity,  # scores, and sums of values
        # The cache for each tile; q in, sums out.
        bytes_accessed=len(q) * one_layer + 2 * q.size * q.dtype.itemsize,
        transcendentals=q.size // q.shape[-1] * capacity,
    )


def _visit_block(layer, last, rows, blocks, *refs, tile_len: int, length: int):
    """Merges one block of the cache into peak and total [K, G, 1] and sums [K, G, C] of a
    tile. A row has `length` queries; G counts a tile's queries for each key/value head."""
    q_ref, k_ref, v_ref, *scales, out_ref, log_mass_ref, peak, total, sums = refs
    step = pl.program_id(1)
    end, block = last[rows[step]], blocks[step]
    block_len = k_ref.shape[1]
    positions = end  # of the row's only query, or of the tile's queries [1, G, 1]
    if length > 1:
        index = jax.lax.broadcasted_iota(jnp.int32, (1, q_ref.shape[1], 1), 1)
        first = end - length + 1 + pl.program_id(0) * tile_len
        positions = first + index % tile_len

    @pl.when(block == 0)
    def start():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def is_live(shape, dim, positions=end):
        index = jax.lax.broadcasted_iota(jnp.int32, shape, dim)
        return block * block_len + index <= positions

    k, v = (dequantize(ref[...], q_ref.dtype) for ref in (k_ref, v_ref))
    scores = wide_einsum("kgc,ksc->kgs", scaled(q_ref[...]), k)
    if scales:
        scores *= _scale_row(scales[0], block_len)
    scores = jnp.where(is_live(scores.shape, 2, positions), scores, MASKED)
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

    @pl.when(block == jnp.maximum(end, 0) // block_len)
    def finish():
        out_ref[...] = (sums[...] / total[...]).astype(out_ref.dtype)
        log_mass_ref[...] = peak[...] + jnp.log(total[...])


def _scale_row(scales, block_len: int) -> jax.Array:
    """[K, N, LANES] of a reference as [K, 1, block_len]."""
    rows = [scales[:, row : row + 1] for row in range(scales.shape[1])]
    return jnp.concatenate(rows, axis=2)[..., :block_len]
