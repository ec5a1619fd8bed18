"""The key/value cache: its layout, its sizes on a mesh, and how a layer's keys and values are
written into it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from e1jax.config.model import ModelConfig
from e1jax.nn.quantize import LANES, quantize_kv
from e1jax.nn.scores import BLOCK_LEN
from e1jax.sharding.mesh import sharding


class KVCache(NamedTuple):
    """Keys and values of all layers.

    Rows are left-aligned: position p of a row is at index p of dim S. Where a mesh has
    more places for rows than there are rows, one is several here, R = N * B, and else
    R = B: see `sequence_shards`. As int8, each vector has a scale; uint16
    holds the bits of bfloat16: see quantize.
    """

    k: jax.Array  # [L, R, K, S, C]
    v: jax.Array  # [L, R, K, S, C]
    # [L, R, K, ceil(S / LANES), LANES] float32, of int8 only
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


def whole_slots(mesh: Mesh, slots: int) -> int:
    """As many slots as asked for, or the few more that divide evenly over `data`."""
    data = mesh.shape["data"]
    return slots if slots < data else -(-slots // data) * data


def cache_sizes(mesh: Mesh, slots: int, cache_len: int) -> tuple[int, int]:
    """Rows of the cache, and positions of each: slots and their positions, unless there
    are fewer slots than places on `data`. See `sequence_shards`."""
    shards = mesh.shape["data"] if slots < mesh.shape["data"] else 1
    return slots * shards, capacity(-(-cache_len // shards))


def prompt_shards(x: jax.Array, shards: int, block: int) -> jax.Array:
    """Keys, values or scales of prompts [L, B, K, P, C] as the N shards of each row,
    [L, N, B, K, P', C]; `block` of P go to one."""
    if shards == 1:
        return x[:, None]
    layers, rows, kv_heads, length, size = x.shape
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, -length % (shards * block)), (0, 0)))
    x = x.reshape(layers, rows, kv_heads, -1, shards, block, size)
    x = x.transpose(0, 4, 1, 2, 3, 5, 6)
    return x.reshape(layers, shards, rows, kv_heads, -1, size)


def prompt_of_shards(x: jax.Array, block: int) -> jax.Array:
    """The N shards of a row [L, N, K, P', C] as keys, values or scales of a prompt,
    [L, 1, K, N * P', C]: undoes `prompt_shards`."""
    layers, shards, kv_heads, _, size = x.shape
    x = x.reshape(layers, shards, kv_heads, -1, block, size)
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(layers, 1, kv_heads, -1, size)


def cache_on_mesh(mesh: Mesh, cache: KVCache | None) -> KVCache:
    """The cache with its arrays constrained to where a mesh holds them."""
    assert cache is not None  # forward gives back the cache that it was given
    shardings = jax.tree.map(lambda x: sharding(mesh, CACHE_AXES, x.shape), cache)
    return jax.lax.with_sharding_constraint(cache, shardings)


def capacity(cache_len: int) -> int:
    """Positions that a slot really holds: a multiple of BLOCK_LEN."""
    return -(-cache_len // BLOCK_LEN) * BLOCK_LEN


def write(
    cache: KVCache,
    layer,
    k: Float[Array, "B K T C"],
    v,
    write_positions: Int[Array, "R T"],
    mesh: Mesh | None = None,
    *,
    by_head: bool = False,
) -> KVCache:
    """The cache with keys and values of a layer written in place, at `write_positions`,
    which are consecutive in a row. On a mesh, each device writes its own rows and heads.

    With `by_head`, one token a row is written by a scatter of all heads, and else row
    after row: XLA on a CPU copies the cache for a scatter.
    """
    shards = cache.k.shape[1] // k.shape[0]
    k, v = (jnp.tile(x, (shards, 1, 1, 1)) for x in (k, v))
    (k, k_scale), (v, v_scale) = (quantize_kv(x, cache.k.dtype) for x in (k, v))

    def write_scales(buffer, layer, new, write_positions):
        if new.shape[2] > 1:  # of prompts
            flat = buffer.reshape(*buffer.shape[:3], -1, 1)
            flat = write_one(flat, layer, new[..., None], write_positions)
            return flat.reshape(buffer.shape)
        lanes = jnp.arange(LANES)[None, None, None]
        is_new = lanes == write_positions[:, :, None, None] % LANES
        at = write_positions // LANES
        rows = jnp.arange(len(new))[:, None]
        heads = jnp.arange(new.shape[1])[None]
        old = buffer.at[layer, rows, heads, at].get(mode="clip")
        new = jnp.where(is_new, new[..., None], old[:, :, None])
        return write_one(buffer, layer, new, at)

    def write_one(buffer, layer, new, write_positions):
        if new.shape[2] == 1 and by_head:
            # Head by head: for windows of several heads, XLA for TPUs would turn the
            # cache into a layout in which these are neighbours, and back.
            heads = new.reshape(-1, new.shape[3])
            flat = buffer.reshape(buffer.shape[0], -1, *buffer.shape[3:])
            at = jnp.repeat(write_positions[:, 0], new.shape[1])
            flat = flat.at[layer, jnp.arange(len(heads)), at].set(
                heads,
                unique_indices=True,
                mode="promise_in_bounds" if shards == 1 else "drop",
                wrap_negative_indices=False,
            )
            return flat.reshape(buffer.shape)

        def write_row(row, buffer):
            at = (layer, row, 0, write_positions[row, 0], 0)
            update = new[row][None, None]
            if shards > 1:  # where the place is beyond the end, nothing changes
                old = jax.lax.dynamic_slice(buffer, at, update.shape)
                update = jnp.where(
                    write_positions[row, 0] < buffer.shape[3], update, old
                )
            return jax.lax.dynamic_update_slice(buffer, update, at)

        return jax.lax.fori_loop(0, new.shape[0], write_row, buffer)

    def write_own(buffer, new):
        write = write_one if new.ndim == 4 else write_scales
        if mesh is None:
            return write(buffer, layer, new, write_positions)
        place = sharding(mesh, CACHE_AXES, buffer.shape).spec
        of_new, rows = PartitionSpec(*place[1 : new.ndim + 1]), PartitionSpec(place[1])
        specs = (place, PartitionSpec(), of_new, rows)
        on_own = jax.shard_map(
            write, mesh=mesh, in_specs=specs, out_specs=place, check_vma=False
        )
        return on_own(buffer, layer, new, write_positions)

    return jax.tree.map(write_own, cache, KVCache(k, v, k_scale, v_scale))


def init_cache(config: ModelConfig, rows: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache; `capacity` positions a row, see `attention.cached_attention`."""
    shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
    cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if dtype != jnp.int8:
        return cache
    shape = (*shape[:3], -(-capacity // LANES), LANES)
    return cache._replace(k_scale=jnp.zeros(shape), v_scale=jnp.zeros(shape))


def sequence_shards(
    positions: Int[Array, "B T"], shards: int, capacity: int
) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """(last position that is filled, position to write at) of each row of a cache, once
    the tokens at `positions` are in it.

    Both are `positions`, but where a mesh has more places on `data` than there are rows:
    there a row consists of N `shards` of `capacity` positions each, which are rows of
    the cache, R = N * B: shard n of row b is row n * B + b. Blocks of BLOCK_LEN positions go
    to the shards in turn, so that all are about equally filled, however long a row is. A
    shard that holds nothing yet ends at -1. A shard that does not own the new token
    writes at `capacity`, which is dropped. T is 1 then.
    """
    if shards == 1:
        return positions, positions
    shard = jnp.arange(shards)[:, None, None]
    block, offset = positions[None] // BLOCK_LEN, positions[None] % BLOCK_LEN
    index = (block - shard) // shards  # of the shard's last block
    own = index * shards + shard == block
    last = index * BLOCK_LEN + jnp.where(own, offset, BLOCK_LEN - 1)
    write_positions = jnp.where(own, last, capacity)
    return last.reshape(-1, 1), write_positions.reshape(-1, 1)


def merge_shards(out: jax.Array, log_mass: jax.Array, shards: int) -> jax.Array:
    """[R, H, T, C] -> [B, H, T, C], where `log_mass` has, for each result, the logarithm
    of the divisor of its softmax."""
    if shards == 1:
        return out
    log_mass = log_mass.reshape(shards, -1, *out.shape[1:3], 1)
    weights = jax.nn.softmax(log_mass, axis=0)
    wide = out.reshape(shards, -1, *out.shape[1:]).astype(jnp.float32)
    return (wide * weights).sum(axis=0).astype(out.dtype)
