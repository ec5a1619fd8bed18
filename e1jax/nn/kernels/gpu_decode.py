"""A kernel for GPUs (Pallas, Triton): attention of one query a row over the live blocks of the
cache, in splits that run side by side.

As Flash-Decoding (Dao et al., 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html): a GPU has
more processors than there are rows and heads, so the positions of a row are divided among
several programs, and their results are merged by the mass of each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from e1jax.nn.cache import CACHE_AXES, merge_shards
from e1jax.nn.quantize import dequantize
from e1jax.nn.scores import BLOCK_LEN, MASKED, fold, scaled, wide_einsum
from e1jax.sharding.mesh import on_gpu, sharding

# Two programs for each processor of an H100, and the most for one row's head.
PROGRAMS = 264


MOST_SPLITS = 32


_LEAST_ROWS = 16  # of a product in Triton


def takes_gpu_decode(mesh: Mesh | None, k_cache: jax.Array) -> bool:
    """Whether decode steps on the mesh take this kernel with caches of this shape: Triton
    loads blocks whose sizes are powers of two."""
    if mesh is None or not on_gpu(mesh):
        return False
    place = sharding(mesh, CACHE_AXES, k_cache.shape)
    num_bytes = k_cache.dtype.itemsize
    for size in place.shard_shape(k_cache.shape):
        num_bytes *= size
    # Pallas counts elements in 32 bits up to 4 GiB (jax 0.10.2), of which one bit is the
    # sign: enough for two bytes an element, and not for one.
    overflows = k_cache.dtype.itemsize == 1 and 2**31 < num_bytes <= 2**32
    return not overflows and _fits_blocks(*k_cache.shape[3:])


def _fits_blocks(capacity: int, head_dim: int) -> bool:
    is_power = head_dim & (head_dim - 1) == 0
    return is_power and head_dim >= _LEAST_ROWS and capacity % BLOCK_LEN == 0


def gpu_decode_attention(
    q: Float[Array, "B H 1 C"],
    k_cache: Num[Array, "L R K S C"],
    v_cache: Num[Array, "L R K S C"],
    layer: Int[Array, ""],
    positions: Int[Array, "R 1"],
    mesh: Mesh | None = None,
    *,
    scales: tuple[Float[Array, "L R K _N _C"], Float[Array, "L R K _N _C"]]
    | None = None,
    interpret: bool = False,
) -> Float[Array, "B H 1 C"]:
    """`cached_attention` of one query a row, as a kernel for GPUs (Pallas, Triton).

    Reads the blocks that a row has filled, and of the others nothing. S is a multiple of
    BLOCK_LEN, C a power of two of at least 16. On a mesh, each device takes the rows and
    heads of its own part of the cache. `interpret` runs it without a GPU.
    """
    shards = k_cache.shape[1] // q.shape[0]
    args = (
        jnp.tile(scaled(q), (shards, 1, 1, 1)),
        (k_cache, v_cache, *(scales or ())),
        layer[None],
        positions[:, 0],
    )
    local = functools.partial(_decode_local, interpret=interpret)
    if mesh is not None:
        heads = sharding(mesh, ("rows", "heads", None, None), args[0].shape).spec
        of_caches = tuple(sharding(mesh, CACHE_AXES, x.shape).spec for x in args[1])
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, of_caches, PartitionSpec(), PartitionSpec(heads[0])),
            out_specs=PartitionSpec(None, *heads),
            check_vma=False,
        )
    out, log_mass = local(*args)
    parts = len(out) * shards
    out, log_mass = (x.reshape(-1, *x.shape[2:]) for x in (out, log_mass))
    return merge_shards(out, log_mass, parts).astype(q.dtype)


def _decode_local(q, caches, layer, positions, *, interpret: bool):
    """Attention of each split on one device, [N, R, H, 1, C] float32, and the logarithm of
    the mass of each, [N, R, H, 1, 1]; `q` is scaled, `layer` [1], `positions` [R]."""
    _, rows, kv_heads, capacity, head_dim = caches[0].shape
    splits = num_splits(rows * kv_heads, capacity)
    folded = fold(q, kv_heads)
    group = folded.shape[2]
    padded = max(_LEAST_ROWS, 1 << (group - 1).bit_length())
    folded = jnp.pad(folded, ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def of_split(width):
        shape = (splits, rows, kv_heads, padded, width)
        block = pl.BlockSpec(
            (None, None, None, *shape[3:]), lambda r, k, s: (s, r, k, 0, 0)
        )
        return block, jax.ShapeDtypeStruct(shape, jnp.float32)

    everything = pl.BlockSpec(memory_space=pl.ANY)
    of_head = pl.BlockSpec((None, None, padded, head_dim), lambda r, k, s: (r, k, 0, 0))
    out_specs, out_shapes = zip(of_split(head_dim), of_split(1), strict=True)
    kernel = pl.pallas_call(
        functools.partial(_attend_to_split, splits=splits),
        grid=(rows, kv_heads, splits),
        in_specs=[everything, everything, of_head, *[everything] * len(caches)],
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="gpu_decode_attention",
        interpret=interpret,
    )
    results = kernel(layer, positions, folded, *caches)
    return tuple(
        x[:, :, :, :group].reshape(splits, rows, -1, 1, x.shape[-1]) for x in results
    )


def num_splits(heads: int, capacity: int) -> int:
    """Into how many parts the positions of each head of each row are divided. From shapes
    alone: the same program serves rows of any length."""
    return max(1, min(capacity // BLOCK_LEN, MOST_SPLITS, PROGRAMS // heads))


def _attend_to_split(layer_ref, positions_ref, q_ref, *refs, splits: int):
    """Blocks s, s + splits, ... of a row's head, for split s, by online softmax."""
    k_ref, v_ref, *scales, out_ref, log_mass_ref = refs
    row, head, split = (pl.program_id(axis) for axis in range(3))
    layer, position = layer_ref[0], positions_ref[row]
    q = q_ref[...]

    def visit(index, carry):
        peak, mass, sums = carry
        block = split + index * splits
        at = pl.ds(block * BLOCK_LEN, BLOCK_LEN)
        is_live = block * BLOCK_LEN + jnp.arange(BLOCK_LEN) <= position
        k = dequantize(k_ref[layer, row, head, at, :], q.dtype)
        scores = wide_einsum("gc,sc->gs", q, k)
        if scales:
            scores *= scales[0][layer, row, head, block, :][None]
        scores = jnp.where(is_live[None], scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - new_peak)
        shrink = jnp.exp(peak - new_peak)
        mass = mass * shrink + weights.sum(axis=1, keepdims=True)
        if scales:
            v_scale = scales[1][layer, row, head, block, :]
            weights *= jnp.where(is_live, v_scale, 0.0)[None]
        # Values beyond the row's end are arbitrary, and 0 times NaN is NaN.
        v = dequantize(v_ref[layer, row, head, at, :], q.dtype)
        v = jnp.where(is_live[:, None], v, jnp.zeros((), v.dtype))
        product = wide_einsum("gs,sc->gc", weights.astype(v.dtype), v)
        return new_peak, mass, sums * shrink + product

    start = (
        jnp.full((len(q), 1), MASKED, jnp.float32),
        jnp.zeros((len(q), 1), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    live_blocks = (position + BLOCK_LEN) // BLOCK_LEN  # none where position is -1
    count = (live_blocks - split + splits - 1) // splits
    peak, mass, sums = jax.lax.fori_loop(0, count, visit, start)
    divisor = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)
    out_ref[...] = sums / divisor
    log_mass_ref[...] = jnp.where(mass > 0, peak + jnp.log(divisor), MASKED)
