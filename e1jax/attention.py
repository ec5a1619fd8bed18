"""Rotary position embedding, and grouped-query attention with and without a cache.

Shapes: B rows, T queries, L layers, R rows of the cache (B, or N shards of each: see
`sequence_shards`), S positions of one, H query heads, K key/value heads, G = H / K, C
head dim. Query heads of one group are folded into the query dimension
([B, K, G*T, C]), so that both products are plain batched matrix products: the
five-dimensional einsum runs several times slower on a CPU.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num, Shaped

from e1jax.quantize import LANES, widen
from e1jax.sharding import on_tpu, sharding

BLOCK_LEN = 128  # cache positions that are visited at a time
# The same on TPUs. Longer blocks cost fewer steps (some 0.35 us each), and read more
# positions that are not live: half a block a row.
TPU_BLOCK_LEN = 512
SPLASH_BLOCK_LEN = 512
SUBLANES = 8  # rows of a TPU's registers, and of the tiles of its memory
MAX_PARTS = 8  # of causal attention; each is compiled on its own
MASKED = -1e30  # finite, so that a block without any valid key gives zeros and no NaN


KEPT = "kept"  # name of what a layer keeps for its backward pass


def keep(x: jax.Array) -> jax.Array:
    """Marks an array to be kept for the backward pass; see model.forward."""
    return checkpoint_name(x, KEPT)


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies [C/2], float32, rounded as the Hugging Face code rounds.

    The exponent is rounded to float32 and so is the power, which is then inverted: at
    position 32,767 one unit in the last place of a frequency turns the angle by 2e-3,
    far outside the parity tolerance.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    return np.float32(1) / (theta ** exponent.astype(np.float64)).astype(np.float32)


def rope_angles(
    positions: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Array, Array]:
    """Cosines and sines [B, 1, T, C/2]. Angles are float32: bfloat16 cannot tell
    position 256 from 257."""
    angles = positions[:, None, :, None].astype(jnp.float32)
    angles = angles * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B N T C"], rope: tuple[Array, Array]
) -> Float[Array, "B N T C"]:
    """Turns the pairs (i, i + C/2) of each head by the angle of its position."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)


class Groups(NamedTuple):
    """Rows of two lengths, one after the other on a dim of tokens: N prompts of P, then
    the G responses of R to each. A prompt is gone through once, not with each response."""

    prompt_len: jax.Array  # [N] int32
    samples: int  # G
    longest_prompt: int  # P

    def split(self, x: Shaped[Array, "1 _S D"]) -> tuple[jax.Array, jax.Array]:
        """[1, N*P + N*G*R, D] -> [N, P, D] and [N*G, R, D]"""
        num = len(self.prompt_len)
        prompts, responses = jnp.split(x[0], [num * self.longest_prompt])
        return (
            prompts.reshape(num, self.longest_prompt, -1),
            responses.reshape(num * self.samples, -1, x.shape[-1]),
        )

    def join(self, parts: tuple[jax.Array, jax.Array]) -> Shaped[Array, "1 _S D"]:
        rows = [part.reshape(1, -1, part.shape[-1]) for part in parts]
        return jnp.concatenate(rows, axis=1)


def grouped_attention(
    q: tuple[jax.Array, jax.Array],
    k: tuple[jax.Array, jax.Array],
    v: tuple[jax.Array, jax.Array],
    groups: Groups,
) -> tuple[jax.Array, jax.Array]:
    """`causal_attention` of prompts, and of responses that also see their prompt.

    Heads of each part, [N, H, P, C] and [N*G, H, R, C] or with K heads.
    """

    def all_keys(parts):
        prompts, responses = parts
        prompts = jnp.repeat(prompts, groups.samples, axis=0)
        return jnp.concatenate([prompts, responses], axis=2)

    prompt_len = jnp.repeat(groups.prompt_len, groups.samples)
    return (
        causal_attention(q[0], k[0], v[0]),
        causal_attention(q[1], all_keys(k), all_keys(v), prompt_len=prompt_len),
    )


def causal_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mesh: Mesh | None = None,
    prompt_len: Int[Array, " B"] | None = None,
) -> Float[Array, "B H T C"]:
    """Every query sees the keys at its own index and before; for training.

    Rows are left-aligned, so padding at their end is never seen by a real token and
    needs no mask. With `prompt_len`, the queries are those of the last T keys, and of
    the S - T keys before them a row sees so many. Up to MAX_PARTS parts of the queries
    are gone through in turn, each against the keys up to its end: that spares up to 7/16
    of the products, and no more than the scores of one part have to exist at a time, in
    the backward pass too. On TPUs, heads of bfloat16 and whole registers are the work of
    `splash_attention`, without `prompt_len`.
    """
    by_kernel = takes_splash(mesh, q.dtype, q.shape[-1]) and prompt_len is None
    if mesh is not None and by_kernel:
        return splash_attention(q, k, v, mesh)
    seen = None
    if prompt_len is not None:
        index = jnp.arange(k.shape[2])[None]
        before = k.shape[2] - q.shape[2]
        seen = (index < prompt_len[:, None]) | (index >= before)
    return _by_parts(q, k, v, seen)


def takes_splash(mesh: Mesh | None, dtype: Any, head_dim: int) -> bool:
    return on_tpu(mesh) and dtype == jnp.bfloat16 and head_dim % BLOCK_LEN == 0


def splash_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K T C"],
    v: Float[Array, "B K T C"],
    mesh: Mesh,
    *,
    interpret: bool = False,
) -> Float[Array, "B H T C"]:
    """`causal_attention` by JAX's kernel for TPUs, which makes no scores in memory.

    Each device takes its own rows and heads. Where the caller is in a `shard_map` over
    `data`, the rows are its own already. `interpret` runs it without a TPU.
    """

    inside = set(jax.sharding.get_abstract_mesh().manual_axes)
    rows = None if "data" in inside else "rows"

    def spec(x):
        return sharding(mesh, (rows, "heads", None, None), x.shape).spec

    local = jax.shard_map(
        functools.partial(_splash_local, interpret=interpret),
        mesh=None if inside else mesh,
        in_specs=(spec(q), spec(k), spec(v)),
        out_specs=spec(q),
        axis_names=set(mesh.axis_names) - inside,
        check_vma=False,
    )
    return local(q, k, v)


def _splash_local(q, k, v, *, interpret: bool) -> jax.Array:
    length = q.shape[2]
    block_len = min(SPLASH_BLOCK_LEN, -(-length // BLOCK_LEN) * BLOCK_LEN)
    padding = -length % block_len  # at the end, where no real token looks
    pad = ((0, 0), (0, 0), (0, padding), (0, 0))
    q, k, v = (jnp.pad(x, pad) for x in (_scaled(q), k, v))
    mask = splash.CausalMask((length + padding, length + padding))
    names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
    blocks: Any = {name: block_len for name in names if name.startswith("block_")}
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(**blocks),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    out: Any = jax.vmap(kernel)(q, k, v)
    return out[:, :, :length]


@jax.custom_vjp
def _by_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """Causal attention of the last queries over all keys, or those that are `seen`,
    [B, S] bool: not a row's padding between prompt and response.

    The backward pass is that of FlashAttention-2 (arXiv 2307.08691, section 3.1): the
    result and the logarithm of each query's mass give the weights back in one pass.
    """
    return _by_parts_forward(q, k, v, seen)[0]


def _parts(q: jax.Array, k: jax.Array) -> list[tuple[slice, slice]]:
    """Queries of each part, and the keys up to its end; of dim 2."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    part_len = max(BLOCK_LEN, -(-length // MAX_PARTS))
    parts = []
    for start in range(0, length, part_len):
        end = min(start + part_len, length)
        parts.append((slice(start, end), slice(before + end)))
    return parts


def _by_parts_forward(q, k, v, seen):
    results, masses = [], []
    for queries, keys in _parts(q, k):
        own, own_k, own_v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        scores = _visible_scores(own, own_k, seen)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        mass = weights.sum(axis=-1, keepdims=True)
        out = _product("bkqs,bksc->bkqc", weights.astype(v.dtype), own_v) / mass
        results.append(out.astype(q.dtype).reshape(own.shape))
        masses.append((peak + jnp.log(mass)).reshape(*own.shape[:3], 1))
    out, log_mass = (keep(jnp.concatenate(x, axis=2)) for x in (results, masses))
    return out, (q, k, v, seen, out, log_mass)


def _by_parts_backward(residuals, grad):
    q, k, v, seen, out, log_mass = residuals
    kv_heads = k.shape[1]
    # An array of its own: sums of products, fused, take XLA on a CPU ten times as long.
    product = jax.lax.optimization_barrier(grad * out)
    mean = product.astype(jnp.float32).sum(axis=-1, keepdims=True)
    of_queries, of_keys, of_values = [], [], []
    for queries, keys in _parts(q, k):
        own, own_k, own_v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        own_grad, own_mean, own_log_mass = (
            _fold(x[:, :, queries], kv_heads) for x in (grad, mean, log_mass)
        )
        weights = jnp.exp(_visible_scores(own, own_k, seen) - own_log_mass)
        of_values.append(_of_keys(own_grad, weights.astype(v.dtype)))
        grad_weights = _product("bkqc,bksc->bkqs", own_grad, own_v)
        grad_scores = (weights * (grad_weights - own_mean)).astype(k.dtype)
        of_keys.append(_of_keys(_fold(_scaled(own), kv_heads), grad_scores))
        grad_q = _scaled(_product("bkqs,bksc->bkqc", grad_scores, own_k))
        of_queries.append(grad_q.reshape(own.shape))

    def padded(part):  # which is of the keys up to the end of its queries
        missing = k.shape[2] - part.shape[2]
        return jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0)))

    grad_k, grad_v = (
        functools.reduce(jnp.add, map(padded, parts)) for parts in (of_keys, of_values)
    )
    grads = jnp.concatenate(of_queries, axis=2), grad_k, grad_v
    pairs = zip(grads, (q, k, v), strict=True)
    return *(grad.astype(x.dtype) for grad, x in pairs), None


_by_parts.defvjp(_by_parts_forward, _by_parts_backward)


def _of_keys(of_queries: jax.Array, scores: jax.Array) -> jax.Array:
    """Sums over queries for each key, [B, K, S, C]. The result is transposed and not the
    scores, which XLA on a CPU would copy; the barrier keeps it from turning that round."""
    product = _product("bkqc,bkqs->bkcs", of_queries, scores)
    return jax.lax.optimization_barrier(product).swapaxes(2, 3)


def _visible_scores(q: jax.Array, k: jax.Array, seen) -> jax.Array:
    """Scores of the last queries, folded; MASKED where the key comes later, or is one of
    those that are not seen."""
    length, num_keys = q.shape[2], k.shape[2]
    index = jnp.arange(num_keys)
    visible = index[num_keys - length :, None] >= index[None, :]
    visible = jnp.tile(visible, (q.shape[1] // k.shape[1], 1))
    visible = visible[None, None]
    if seen is not None:
        visible &= seen[:, None, None, :num_keys]
    scores = _product("bkqc,bksc->bkqs", _fold(_scaled(q), k.shape[1]), k)
    return jnp.where(visible, scores, MASKED)


def sequence_shards(
    positions: Int[Array, "B T"], shards: int, capacity: int
) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """(last position that is filled, position to write at) of each row of a cache, once
    the tokens at `positions` are in it.

    Both are `positions`, but where a mesh has more places on `data` than there are rows:
    there a row lies in N `shards` of `capacity` positions each, which are rows of the
    cache, R = N * B: shard n of row b is row n * B + b. Blocks of BLOCK_LEN positions go
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
    places = jnp.where(own, last, capacity)
    return last.reshape(-1, 1), places.reshape(-1, 1)


def cached_attention(
    q: Float[Array, "B H T C"],
    k_cache: Num[Array, "L R K S C"],
    v_cache: Num[Array, "L R K S C"],
    layer: Int[Array, ""],
    positions: Int[Array, "R T"],
    *,
    scales: tuple[Float[Array, "L R K _N _C"], Float[Array, "L R K _N _C"]]
    | None = None,
) -> Float[Array, "B H T C"]:
    """Attention of queries over the cached keys at positions up to their own.

    Work follows the filled length, not the capacity S: blocks of BLOCK_LEN positions
    are visited up to the last one that any row has reached (a dynamic trip count in one
    compiled program), and merged by online softmax in float32. A block beyond a row's
    length adds exactly zero to it, so a row's result does not depend on how far the
    others are. S is a multiple of BLOCK_LEN, or smaller than it. R is B, or a multiple
    of it: see `sequence_shards`. `scales` are those of an int8 cache. A cache may also
    hold bits of bfloat16: see quantize.narrow.
    """
    _, rows, kv_heads, capacity, head_dim = k_cache.shape
    block_len = min(BLOCK_LEN, capacity)
    shards = rows // q.shape[0]
    q = jnp.tile(q, (shards, 1, 1, 1))
    folded = _fold(_scaled(q), kv_heads)
    query_positions = jnp.tile(positions, (1, q.shape[1] // kv_heads))[
        :, None, :, None
    ]  # [R, 1, G*T, 1]

    def visit(block, carry):
        peak, total, sums = carry
        start = block * block_len
        at = (layer, 0, 0, start, 0)
        size = (1, rows, kv_heads, block_len, head_dim)

        def block_of(cache):
            return widen(jax.lax.dynamic_slice(cache, at, size)[0], q.dtype)

        def scales_of(scales):  # [R, K, 1, block_len]
            at = (layer, 0, 0, start // LANES, start % LANES)
            size = (1, rows, kv_heads, 1, block_len)
            return jax.lax.dynamic_slice(scales, at, size)[0]

        k, v = block_of(k_cache), block_of(v_cache)
        scores = _product("bkqc,bksc->bkqs", folded, k)
        if scales is not None:
            scores *= scales_of(scales[0])
        key_positions = start + jnp.arange(block_len)[None, None, None]
        scores = jnp.where(key_positions <= query_positions, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_peak)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        if scales is not None:
            weights *= scales_of(scales[1])
        product = _product("bkqs,bksc->bkqc", weights.astype(v.dtype), v)
        return new_peak, total, sums * shrink + product

    each = (*folded.shape[:-1], 1)
    start = (
        jnp.full(each, MASKED, jnp.float32),
        jnp.zeros(each, jnp.float32),
        jnp.zeros(folded.shape, jnp.float32),
    )
    num_blocks = jnp.max(positions) // block_len + 1
    peak, total, sums = jax.lax.fori_loop(0, num_blocks, visit, start)
    out = (sums / total).astype(q.dtype).reshape(q.shape)
    return _merge_shards(out, peak + jnp.log(total), shards)


def _merge_shards(out: jax.Array, log_mass: jax.Array, shards: int) -> jax.Array:
    """[R, H, T, C] -> [B, H, T, C], where `log_mass` has, for each result, the logarithm
    of what its softmax was divided by."""
    if shards == 1:
        return out
    log_mass = log_mass.reshape(shards, -1, *out.shape[1:3], 1)
    weights = jax.nn.softmax(log_mass, axis=0)
    wide = out.reshape(shards, -1, *out.shape[1:]).astype(jnp.float32)
    return (wide * weights).sum(axis=0).astype(out.dtype)


class Heads(NamedTuple):
    """What `decode_heads` needs besides the products, the same in all layers."""

    turns: jax.Array  # [R, 2 * C] float32: cos, cos, -sin, sin of a row's angles
    numbers: jax.Array  # [R] int32: of the row of the products
    biases: list[jax.Array]  # of q, k and v, [L, 1, N]


def takes_heads(mesh: Mesh | None, k_cache: Any) -> bool:
    """Whether a decode step takes `decode_heads`, which is for heads of whole registers
    and a cache [L, B, K, S, C] of whole tiles, not of int8."""
    capacity, head_dim = k_cache.shape[3:]
    whole = head_dim % BLOCK_LEN == 0 and capacity % SUBLANES == 0
    return on_tpu(mesh) and whole and k_cache.dtype != jnp.int8


def prepare_heads(
    rope: tuple[Array, Array], biases: list[Float[Array, "L _N"]], shards: int = 1
) -> Heads:
    """`rope` is that of one position a row, see `rope_angles`; `shards`, see `sequence_shards`."""
    cos, sin = (x[:, 0, 0] for x in rope)
    turns = jnp.concatenate([cos, cos, -sin, sin], axis=1)
    numbers = jnp.tile(jnp.arange(len(turns), dtype=jnp.int32), shards)
    turns = jnp.tile(turns, (shards, 1))
    # Without the barrier, the compiler computes what is cheap again in every layer.
    return jax.lax.optimization_barrier(
        Heads(turns, numbers, [bias[:, None] for bias in biases])
    )


def decode_heads(
    products: list[Float[Array, "B _N"]],
    caches: tuple[Float[Array, "L R K S C"], Float[Array, "L R K S C"]],
    layer: Int[Array, ""],
    places: Int[Array, "R 1"],
    heads: Heads,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B H 1 C"], tuple[Array, Array]]:
    """Queries of one token a row, and the caches with its keys and values written in
    place at `places`, as a kernel for TPUs (Pallas): XLA takes some twenty operations for
    that, and each costs its launch.

    `products` are those of the weights of q, k and v, before the biases. On a mesh, each
    device has them of all rows, and takes those of its own part of the cache: XLA would
    cut these out in four more operations.
    """
    args = (products, caches, layer[None], places[:, 0], *heads)
    if mesh is None:
        return _heads_local(*args)

    def place(x, *axes):
        return sharding(mesh, axes, x.shape).spec

    names = "heads", "kv_heads", "kv_heads"
    turns = place(heads.turns, "rows", None)
    rows = PartitionSpec(turns[0])
    cache = place(caches[0], "layers", "rows", "kv_heads", None, None)
    of_products = [place(x, None, n) for x, n in zip(products, names, strict=True)]
    biases = [place(x, None, None, n) for x, n in zip(heads.biases, names, strict=True)]
    specs = (of_products, cache, PartitionSpec(), rows, turns, rows, biases)
    # A device has shards of all rows, if it has any.
    shards = len(heads.turns) // len(products[0])
    q = PartitionSpec(turns[0] if shards == 1 else None, of_products[0][1], None, None)
    local = jax.shard_map(
        _heads_local, mesh=mesh, in_specs=specs, out_specs=(q, cache), check_vma=False
    )
    return local(*args)


def _heads_local(products, caches, layer, places, turns, numbers, biases):
    """`decode_heads` of one device; `layer` [1], `places` and `numbers` [R]. `products`
    are those of all rows."""
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
            *(*in_place, whole(turns)),
            *(*map(whole, products), *map(of_layer, biases)),
        ],
        out_specs=[*in_place, whole(q)],
        scratch_shapes=[tiles, tiles, pltpu.SemaphoreType.DMA],
    )
    kernel = pl.pallas_call(
        _make_heads,
        grid_spec=grid,
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches), q],
        input_output_aliases={3: 0, 4: 1},  # the caches, after three scalars
        name="decode_heads",
    )
    scalars = layer, places, numbers
    *caches, q = kernel(*scalars, *caches, turns, *products, *biases)
    return q.reshape(rows, -1, 1, size), tuple(caches)


def _make_heads(layer, places, numbers, _, __, turns, *refs):
    """Gives q [R, K, G, C] and writes k and v. HBM takes whole tiles: those of `places`,
    [2, R, K, SUBLANES, C], are fetched, changed and sent back. For a place beyond the
    cache, its last tile is, and stays as it was."""
    *products, q_bias, k_bias, v_bias, k_cache, v_cache, q_out, tiles, new, done = refs
    rows, _, group, size = q_out.shape
    cos, sin = turns[:, :size], turns[:, size:]

    def start_of(row):
        last = k_cache.shape[3] - SUBLANES
        return jnp.minimum(places[row] // SUBLANES * SUBLANES, last)

    def copies(row, back=False):
        start = pl.multiple_of(start_of(row), SUBLANES)
        for i, cache in enumerate((k_cache, v_cache)):
            there = cache.at[layer[0], row, :, pl.ds(start, SUBLANES)]
            source, target = (tiles.at[i, row], there)[:: 1 if back else -1]
            yield pltpu.make_async_copy(source, target, done)

    def own_heads(product, bias):
        """[R, C] of each head; in float32, which can be cut at any row."""
        x = (product[...] + bias[...]).astype(jnp.float32)
        own = x[:rows]
        for start in range(rows, len(x), rows):
            own = jnp.where(numbers[0] == start, x[start : start + rows], own)
        return [own[:, at : at + size] for at in range(0, x.shape[1], size)]

    def turned(x):
        return (x * cos + pltpu.roll(x, size // 2, 1) * sin).astype(q_out.dtype)

    @pl.loop(0, rows)
    def fetch(row):
        for copy in copies(row):
            copy.start()

    q, k, v = map(own_heads, products, (q_bias, k_bias, v_bias))
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
        is_new = index == places[row] - start_of(row)
        for i in range(2):
            tiles[i, row] = jnp.where(is_new, new[i, row], tiles[i, row])
        for copy in copies(row, back=True):
            copy.start()

    @pl.loop(0, rows)
    def leave(row):
        for copy in copies(row, back=True):
            copy.wait()


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
    """What `decode_attention` visits of a cache of `dtype` and of `capacity` positions a
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
        return _merge_shards(*_decode_local(*args), shards)
    heads = sharding(mesh, ("rows", "heads", None, None), q.shape).spec
    axes = ("layers", "rows", "kv_heads", None, None)
    of_caches = tuple(sharding(mesh, axes, x.shape).spec for x in caches)
    of_rows = PartitionSpec(heads[0])
    specs = (heads, of_caches, PartitionSpec(), *[of_rows] * 4)
    local = jax.shard_map(
        _decode_local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False
    )
    return _merge_shards(*local(*args), shards)


def _decode_local(q, caches, layer, positions, count, rows, blocks):
    """`decode_attention` of one device, and the logarithm of each result's mass; `caches`
    are keys, values and, of int8, the scales of both, `layer` [1], `positions` [R]. The
    grid is the list of visits, so that no step goes to a block that is not live."""
    _, _, kv_heads, capacity, head_dim = caches[0].shape
    block_len = min(tpu_block_len(caches[0].dtype), capacity)
    folded = _fold(q, kv_heads)
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
        _visit_block, grid_spec=grid, out_shape=shapes, name="decode_attention"
    )
    scalars = layer, positions, rows, blocks
    out, log_mass = kernel(*scalars, folded, *caches)
    return out.reshape(q.shape), log_mass.reshape(*q.shape[:3], 1)


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

    k, v = (widen(ref[...], q_ref.dtype) for ref in (k_ref, v_ref))
    scores = _product("kgc,ksc->kgs", _scaled(q_ref[...]), k)
    if scales:
        scores *= _scale_row(scales[0], block_len)
    scores = jnp.where(is_live(scores.shape, 2), scores, MASKED)
    new_peak = jnp.maximum(peak[...], scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_peak)
    shrink = jnp.exp(peak[...] - new_peak)
    # What lies beyond the row's end may be anything, and 0 times NaN is NaN.
    v = jnp.where(is_live(v_ref.shape, 1), v, jnp.zeros((), v.dtype))
    peak[...] = new_peak
    total[...] = total[...] * shrink + weights.sum(axis=-1, keepdims=True)
    if scales:
        v_scale = _scale_row(scales[1], block_len)
        weights *= jnp.where(is_live(v_scale.shape, 2), v_scale, 0.0)
    sums[...] = sums[...] * shrink + _product(
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


def _scaled(q: jax.Array) -> jax.Array:
    return q * q.shape[-1] ** -0.5


def _fold(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, T, C] -> [B, K, G*T, C]; heads of one group are neighbours."""
    batch, heads, length, size = q.shape
    return q.reshape(batch, kv_heads, heads // kv_heads * length, size)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums in float32, and the products of float32 in full: stated here because what is
    set around the forward pass does not reach a backward pass of our own."""
    precision = "highest" if b.dtype == jnp.float32 else "default"
    return jnp.einsum(
        subscripts, a, b, precision=precision, preferred_element_type=jnp.float32
    )
