"""A kernel for TPUs (Pallas): biases, norms, RoPE and the cache's write of one token a row."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from e1jax.nn.heads import Vectors
from e1jax.nn.norm import inverse_norm
from e1jax.nn.scores import BLOCK_LEN
from e1jax.sharding.mesh import on_tpu, sharding

SUBLANES = 8  # rows of a TPU's registers, and of the tiles of its memory


class Heads(NamedTuple):
    """Inputs of `decode_heads` besides the products, the same in all layers."""

    turns: jax.Array  # [R, 2 * C] float32: cos, cos, -sin, sin of a row's angles
    numbers: jax.Array  # [R] int32: of the row of the products
    # As far as the architecture has them, see heads.Vectors.
    biases: list[jax.Array]  # of q, k and v, [L, 1, N]
    norms: list[jax.Array]  # scales of q's and k's heads, [L, 1, C]


def takes_heads(mesh: Mesh | None, k_cache: Any) -> bool:
    """Whether a decode step takes `decode_heads`, which needs heads that fill registers
    and a cache [L, B, K, S, C] that fills tiles, not of int8."""
    capacity, head_dim = k_cache.shape[3:]
    whole = head_dim % BLOCK_LEN == 0 and capacity % SUBLANES == 0
    return on_tpu(mesh) and whole and k_cache.dtype != jnp.int8


def prepare_heads(
    rope: tuple[Array, Array], vectors: Vectors, shards: int = 1
) -> Heads:
    """Inputs of `decode_heads`; `rope` has one position a row (see `rope_angles`),
    `vectors` are stacked over all layers, and `shards` is the number of shards of a row (see
    `sequence_shards`)."""
    cos, sin = (x[:, 0, 0] for x in rope)
    turns = jnp.concatenate([cos, cos, -sin, sin], axis=1)
    numbers = jnp.tile(jnp.arange(len(turns), dtype=jnp.int32), shards)
    turns = jnp.tile(turns, (shards, 1))
    # Without the barrier, the compiler computes cheap operations again in every layer.
    biases, norms = ([x[:, None] for x in xs] for xs in vectors)
    return jax.lax.optimization_barrier(Heads(turns, numbers, biases, norms))


def decode_heads(
    products: list[Float[Array, "B _N"]],
    caches: tuple[Float[Array, "L R K S C"], Float[Array, "L R K S C"]],
    layer: Int[Array, ""],
    write_positions: Int[Array, "R 1"],
    heads: Heads,
    mesh: Mesh | None = None,
    *,
    eps: float = 0.0,
) -> tuple[Float[Array, "B H 1 C"], tuple[Array, Array]]:
    """Queries of one token a row, and the caches with its keys and values written in
    place at `write_positions`, as a kernel for TPUs (Pallas): XLA takes some twenty
    operations for that, and each costs its launch.

    `products` are x @ kernel for q, k and v, before the biases; `eps` is for the norms. On
    a mesh, each device has the products of all rows and picks the rows of its own part of
    the cache: XLA would need four more operations to slice them.
    """
    args = (products, caches, layer[None], write_positions[:, 0], *heads)
    kernel = functools.partial(_heads_local, eps=eps)
    if mesh is None:
        return kernel(*args)

    def place(x, *axes):
        return sharding(mesh, axes, x.shape).spec

    names = "heads", "kv_heads", "kv_heads"
    turns = place(heads.turns, "rows", None)
    rows = PartitionSpec(turns[0])
    cache = place(caches[0], "layers", "rows", "kv_heads", None, None)
    of_products = [place(x, None, n) for x, n in zip(products, names, strict=True)]
    biases = [
        place(x, None, None, n) for x, n in zip(heads.biases, names, strict=False)
    ]
    norms = [PartitionSpec()] * len(heads.norms)
    specs = (of_products, cache, PartitionSpec(), rows, turns, rows, biases, norms)
    # A device has shards of all rows, if it has any.
    shards = len(heads.turns) // len(products[0])
    q = PartitionSpec(turns[0] if shards == 1 else None, of_products[0][1], None, None)
    local = jax.shard_map(
        kernel, mesh=mesh, in_specs=specs, out_specs=(q, cache), check_vma=False
    )
    return local(*args)


def _heads_local(
    products, caches, layer, write_positions, turns, numbers, biases, norms, *, eps
):
    """`decode_heads` of one device; `layer` is [1], `write_positions` and `numbers` are
    [R], and `products` has all rows."""
    _, rows, kv_heads, _, size = caches[0].shape
    group = products[0].shape[1] // (kv_heads * size)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    def of_layer(x):
        return pl.BlockSpec(
            (None, *x.shape[1:]), lambda _, layer, *__: (layer[0], 0, 0)
        )

    q = jax.ShapeDtypeStruct((rows, kv_heads, group, size), products[0].dtype)
    in_place = [pl.BlockSpec(memory_space=pl.ANY)] * 2
    tiles = pltpu.VMEM((2, rows, kv_heads, SUBLANES, size), caches[0].dtype)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(1,),
        in_specs=[
            *(*in_place, whole(turns), [whole(x) for x in products]),
            *([of_layer(x) for x in vectors] for vectors in (biases, norms)),
        ],
        out_specs=[*in_place, whole(q)],
        scratch_shapes=[tiles, tiles, pltpu.SemaphoreType.DMA],
    )
    kernel = pl.pallas_call(
        functools.partial(_make_heads, eps=eps),
        grid_spec=grid,
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches), q],
        input_output_aliases={3: 0, 4: 1},  # the caches, after three scalars
        name="decode_heads",
        cost_estimate=_cost(caches, turns, products, (*biases, *norms), q),
    )
    scalars = layer, write_positions, numbers
    *caches, q = kernel(*scalars, *caches, turns, products, biases, norms)
    return q.reshape(rows, -1, 1, size), tuple(caches)


def _cost(caches, turns, products, vectors, q) -> pl.CostEstimate:
    """Of one device and layer; `vectors` are biases and norms [L, 1, N], `q` is
    [R, K, G, C]."""
    _, rows, kv_heads, _, size = caches[0].shape
    tiles = 2 * rows * kv_heads * SUBLANES * size * caches[0].dtype.itemsize
    read = sum(x.size * x.dtype.itemsize for x in (turns, *products))
    read += sum(x.shape[2] * x.dtype.itemsize for x in vectors)
    turned = q.size + rows * kv_heads * size  # queries and keys
    return pl.CostEstimate(
        flops=sum(x.size for x in products) + 3 * turned,
        bytes_accessed=read + q.size * q.dtype.itemsize + 2 * tiles,  # there and back
        transcendentals=0,
    )


def _make_heads(
    layer, write_positions, numbers, _, __, turns, products, biases, norms, *refs, eps
):
    """Gives q [R, K, G, C] and writes k and v. HBM is written tile by tile, so the tiles
    that hold `write_positions`, [2, R, K, SUBLANES, C], are fetched, changed and sent
    back. For a position beyond the cache, the last tile is fetched and stays as it was.
    """
    k_cache, v_cache, q_out, tiles, new, done = refs
    rows, _, group, size = q_out.shape
    cos, sin = turns[:, :size], turns[:, size:]

    def start_of(row):
        last = k_cache.shape[3] - SUBLANES
        return jnp.minimum(write_positions[row] // SUBLANES * SUBLANES, last)

    def copies(row, back=False):
        start = pl.multiple_of(start_of(row), SUBLANES)
        for i, cache in enumerate((k_cache, v_cache)):
            there = cache.at[layer[0], row, :, pl.ds(start, SUBLANES)]
            source, target = (tiles.at[i, row], there)[:: 1 if back else -1]
            yield pltpu.make_async_copy(source, target, done)

    def normalised(x, scale):
        """As `rms_normalise`, whose result is rounded before and after the scale."""
        x = (x * inverse_norm(x, eps)).astype(q_out.dtype)
        return (x * scale[...]).astype(jnp.float32)

    def own_heads(product, bias, norm):
        """[R, C] of each head; in float32, which can be cut at any row."""
        x = product[...] if bias is None else product[...] + bias[...]
        x = x.astype(jnp.float32)
        own = x[:rows]
        for start in range(rows, len(x), rows):
            own = jnp.where(numbers[0] == start, x[start : start + rows], own)
        heads = [own[:, at : at + size] for at in range(0, x.shape[1], size)]
        return heads if norm is None else [normalised(head, norm) for head in heads]

    def turned(x):
        return (x * cos + pltpu.roll(x, size // 2, 1) * sin).astype(q_out.dtype)

    @pl.loop(0, rows)
    def fetch(row):
        for copy in copies(row):
            copy.start()

    biases, norms = biases or [None] * 3, [*(norms or [None] * 2), None]
    q, k, v = map(own_heads, products, biases, norms)
    for head, x in enumerate(q):
        q_out[:, head // group, head % group] = turned(x)
    for i, heads in enumerate(([turned(x) for x in k], v)):
        for head, x in enumerate(heads):
            x = jnp.broadcast_to(x[:, None], (rows, SUBLANES, size))
            new[i, :, head] = x.astype(new.dtype)

    @pl.loop(0, rows)
    def arrive(row):
        for copy in copies(row):
            copy.wait()

    @pl.loop(0, rows)
    def change(row):
        index = jax.lax.broadcasted_iota(jnp.int32, tiles.shape[2:], 1)
        is_new = index == write_positions[row] - start_of(row)
        for i in range(2):
            tiles[i, row] = jnp.where(is_new, new[i, row], tiles[i, row])
        for copy in copies(row, back=True):
            copy.start()

    @pl.loop(0, rows)
    def leave(row):
        for copy in copies(row, back=True):
            copy.wait()
