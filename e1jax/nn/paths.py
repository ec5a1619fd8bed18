"""The one place that chooses how a pass of the model computes on a platform.

`choose_operations` chooses the forms of single operations, from the mesh alone, and
`choose_path` how a pass attends, from the mesh, the dtype, the sizes and the cache. The
model calls the functions it is given. A new kernel is a file in `kernels/` and one entry here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.config.model import ModelConfig
from e1jax.nn.attention import (
    SharedPrompts,
    cached_attention,
    causal_attention,
    shared_prompt_attention,
)
from e1jax.nn.cache import KVCache, sequence_shards, write
from e1jax.nn.cpu import matmul_on_cpu, normalise_on_cpu, vectors_apart
from e1jax.nn.heads import Vectors, add_biases, join_heads, make_heads
from e1jax.nn.kernels.decode_attention import decode_attention, live_blocks
from e1jax.nn.kernels.decode_heads import decode_heads, prepare_heads, takes_heads
from e1jax.nn.kernels.gpu_decode import gpu_decode_attention, takes_gpu_decode
from e1jax.nn.kernels.gpu_flash import gpu_flash_attention, takes_gpu_flash
from e1jax.nn.kernels.splash import splash_attention, takes_splash
from e1jax.nn.kernels.top_p import last_ranks, last_ranks_on_tpu
from e1jax.nn.norm import rms_normalise
from e1jax.nn.quantize import Params, matmul
from e1jax.nn.rope import rope_angles, rope_frequencies
from e1jax.sharding.mesh import on_cpu, on_tpu, sharding

# Results of `Path.prepare`: queries [B, H, T, C], keys and values with K heads, and the
# cache with these written. Keys and values are None where attention needs the cache
# alone, and with shared prompts each is a tuple; see SharedPrompts.split.
Prepared = tuple[Any, Any, Any, KVCache | None]


class Operations(NamedTuple):
    """Operations that have another form on some platform."""

    product: Callable[..., jax.Array]  # (x [N, I], kernel [I, O] or Packed) -> [N, O]
    normalise: Callable[..., jax.Array]  # (x [..., D], scale [D], eps) -> [..., D]
    take_layer: Callable[[Params], Params]  # a layer's weights, out of a stack
    in_slabs: bool  # of packed kernels: see quantize
    write_by_head: bool  # of one token a row: see cache.write
    # (gaps [B, V], top_k [B], top_p [B]) -> [B, 1]: see kernels.top_p
    last_ranks: Callable[..., jax.Array]
    draws_again: bool  # until a token is kept, instead of `last_ranks`


class Path(NamedTuple):
    """How a pass goes through the layers, the same way in all of them."""

    operations: Operations
    # Hidden states [B, T, D] where the layers want them on the mesh.
    place: Callable[[jax.Array], jax.Array]
    # (products of q, k and v [B, T, N], vectors of the layer, cache, layer)
    prepare: Callable[..., Prepared]
    # (q, k, v, cache, layer), all as prepared -> [B, T, H * C]
    attend: Callable[..., jax.Array]


def choose_operations(mesh: Mesh | None) -> Operations:
    """Operations for arrays on `mesh`; for callers without a mesh, the forms that run
    everywhere."""
    operations = Operations(
        product=matmul,
        normalise=rms_normalise,
        take_layer=_as_it_is,
        in_slabs=False,
        write_by_head=mesh is not None,
        last_ranks=last_ranks,
        draws_again=True,
    )
    if mesh is not None and on_tpu(mesh):
        kernel = functools.partial(last_ranks_on_tpu, mesh=mesh)
        return operations._replace(last_ranks=kernel, draws_again=False)
    if mesh is not None and on_cpu(mesh):
        return operations._replace(
            product=matmul_on_cpu,
            normalise=normalise_on_cpu,
            take_layer=vectors_apart,
            in_slabs=mesh.size == 1,
            write_by_head=False,
        )
    return operations


def choose_path(
    config: ModelConfig,
    params: Params,
    positions: Int[Array, "B T"],
    cache: KVCache | None,
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    from_start: bool = False,
    shared: SharedPrompts | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Path:
    """The path of a pass with hidden states of `dtype`; see model.forward."""
    operations = choose_operations(mesh)
    rope = rope_angles(positions, rope_frequencies(config.head_dim, config.rope_theta))
    heads = functools.partial(make_heads, config=config, normalise=operations.normalise)
    causal = causal_attention
    if mesh is not None and takes_splash(mesh, dtype, config.head_dim):
        causal = functools.partial(splash_attention, mesh=mesh)
    elif mesh is not None and takes_gpu_flash(mesh, dtype, config.head_dim):
        causal = functools.partial(gpu_flash_attention, mesh=mesh)
    if shared is not None:
        prepare, attend = _with_shared_prompts(heads, rope, shared, causal)
        return Path(operations, _as_it_is, prepare, attend)
    if cache is None:
        causal = functools.partial(causal, segments=segments)
        prepare = _prepare(heads, rope, lambda cache, layer, k, v: cache)
        return Path(operations, _as_it_is, prepare, _attend_to_sequence(causal))

    shards, capacity = cache.k.shape[1] // len(positions), cache.k.shape[3]
    last, write_positions = sequence_shards(positions, shards, capacity)
    prepare = _prepare(
        heads,
        rope,
        functools.partial(
            write,
            write_positions=write_positions,
            mesh=mesh,
            by_head=operations.write_by_head,
        ),
    )
    if from_start:
        attend = _attend_to_sequence(causal)
    elif on_tpu(mesh):
        visits = live_blocks(last, capacity, mesh, cache.k.dtype)
        kernel = functools.partial(decode_attention, visits=visits, mesh=mesh)
        attend = _attend_to_cache(kernel, last)
        if positions.shape[1] == 1 and takes_heads(mesh, cache.k):
            prepare = _prepare_by_kernel(config, params, rope, write_positions, mesh)
    elif positions.shape[1] == 1 and takes_gpu_decode(mesh, cache.k):
        kernel = functools.partial(gpu_decode_attention, mesh=mesh)
        attend = _attend_to_cache(kernel, last)
    else:
        attend = _attend_to_cache(cached_attention, last)
    place = functools.partial(_replicate_rows, mesh=mesh)
    return Path(operations, place, prepare, attend)


def _prepare(
    heads: Callable[..., list[jax.Array]], rope, write_new: Callable[..., Any]
):
    """Heads by XLA, then `write_new(cache, layer, k, v)`."""

    def prepare(products, vectors, cache, layer) -> Prepared:
        q, k, v = heads(add_biases(products, vectors), vectors, rope=rope)
        return q, k, v, write_new(cache, layer, k, v)

    return prepare


def _prepare_by_kernel(
    config: ModelConfig, params: Params, rope, write_positions, mesh: Mesh | None
):
    """Heads and the cache's write of one token a row, by `decode_heads`."""
    vectors = Vectors.of(params["layers"]["attention"])
    shards = len(write_positions) // len(rope[0])
    heads = prepare_heads(rope, vectors, shards)
    kernel = functools.partial(decode_heads, eps=config.rms_norm_eps, mesh=mesh)

    def prepare(products, _, cache, layer) -> Prepared:
        products = [x[:, 0] for x in products]
        caches = cache.k, cache.v
        q, caches = kernel(products, caches, layer, write_positions, heads)
        return q, None, None, KVCache(*caches)

    return prepare


def _attend_to_sequence(causal: Callable[..., jax.Array]):
    """`causal(q, k, v)`, joined: tokens see the earlier ones of the same call."""
    return lambda q, k, v, cache, layer: join_heads(causal(q, k, v))


def _attend_to_cache(cached: Callable[..., jax.Array], last: Int[Array, "R T"]):
    """`cached`, called as `cached_attention` is, joined: tokens see the cache up to `last`."""

    def attend(q, k, v, cache, layer):
        scales = None if cache.k_scale is None else (cache.k_scale, cache.v_scale)
        return join_heads(cached(q, cache.k, cache.v, layer, last, scales=scales))

    return attend


def _with_shared_prompts(
    heads: Callable[..., list[jax.Array]],
    rope,
    shared: SharedPrompts,
    causal: Callable[..., jax.Array],
):
    """`prepare` and `attend` of several parts: prompts, responses, solutions."""
    cos, sin = (shared.split(x[:, 0]) for x in rope)
    ropes = [(c[:, None], s[:, None]) for c, s in zip(cos, sin, strict=True)]

    def prepare(products, vectors, cache, layer) -> Prepared:
        biased = map(shared.split, add_biases(products, vectors))
        parts = (
            heads(part, vectors, rope=rope)
            for part, rope in zip(zip(*biased, strict=True), ropes, strict=True)
        )
        q, k, v = zip(*parts, strict=True)
        return q, k, v, cache

    def attend(q, k, v, cache, layer):
        parts = shared_prompt_attention(q, k, v, shared, causal)
        return shared.join([join_heads(part) for part in parts])

    return prepare, attend


def _as_it_is(x: Any) -> Any:
    return x


def _replicate_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> jax.Array:
    """Hidden states that are not divided by rows, as the cache is, but as the weights
    are: else the compiler gathers weights, which are sharded over `data` too, every step."""
    if mesh is None:
        return x
    place = sharding(mesh, (None, None, "embed"), x.shape)
    return jax.lax.with_sharding_constraint(x, place)
