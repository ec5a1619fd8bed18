"""A decoder in Flax, with a fixed-shape key/value cache.

Dimensions: B rows, T tokens, R rows of the cache, S positions of one, L layers,
D hidden ("embed"), F mlp, H query heads, K key/value heads, C head dim, V vocabulary.
*axis* is a logical or mesh axis, *dim* a dimension of an array.

The Flax API stays inside this file and `layers`. Everybody else holds `params`, a nested
dict of arrays whose layers are stacked on a leading dim L, and calls `forward` and
`unembed`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from e1jax.config.adapter import NO_ADAPTER, AdapterConfig
from e1jax.config.model import ModelConfig
from e1jax.nn.attention import SharedPrompts
from e1jax.nn.cache import KVCache
from e1jax.nn.cpu import matmul_precision
from e1jax.nn.layers import Block, Linear, RMSNorm
from e1jax.nn.lora import PARTS, add_adapter, attach_adapters
from e1jax.nn.paths import choose_operations, choose_path
from e1jax.nn.quantize import (
    Params,
    join,
    map_kernels,
    matmul,
    matmul_transposed,
    pack,
    split,
    take_rows,
)
from e1jax.nn.scores import KEPT
from e1jax.sharding.mesh import sharding

GatherParams = Callable[[Any, str], Any]


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs):
            return Block(config, rngs=rngs)

        init = nnx.initializers.normal(0.02)
        sizes = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            init(rngs.params(), sizes, jnp.float32), axes=("vocab", None)
        )
        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear((sizes[1], sizes[0]), (None, "vocab"), rngs=rngs)
        )


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache | None = None,
    *,
    mesh: Mesh | None = None,
    from_start: bool = False,
    cache_only: bool = False,
    remat: bool = False,
    gather_params: GatherParams = lambda part, name: part,
    shared: SharedPrompts | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Final hidden states, and the cache with the keys and values written.

    With a cache, row b's tokens are written at `positions[b]` (consecutive) and see
    every position up to their own (one token each, where rows are sharded); without
    one, tokens see the earlier ones of the same call, which `from_start` (`positions`
    begin at 0) asks for with a cache too. `mesh` holds the arrays: on TPUs,
    attention then takes their kernels. `gather_params` all-gathers sharded parameters
    just before their use; see sharding.fsdp.make_gather_params. With `shared`, B
    is 1 and `tokens` holds several prompts and their responses (no cache). With
    `segments`, a token sees only tokens of its row with the same number (no cache). A
    caller that needs no hidden states says so by `cache_only`, and drops them: of the last
    layer, XLA then computes the keys and values alone.

    For the backward pass a layer keeps expensive results (the heads, attention's,
    both products of the mlp), and computes norms, scores and the activation
    function again; with `remat`, only the inputs of the layers are kept.
    """
    embedding = gather_params(params["embedding"], "embedding")
    x = take_rows(embedding, tokens, compute_dtype(params))
    path = choose_path(
        config,
        params,
        positions,
        cache,
        x.dtype,
        mesh=mesh,
        from_start=from_start,
        shared=shared,
        segments=segments,
    )
    in_slabs = path.operations.in_slabs

    def apply(x, cache, layer, weights):
        return _module(config, "layers", weights)(x, cache, layer, path)

    stacked = isinstance(params["layers"], dict)
    layers, packed = params["layers"], {}
    if stacked and cache is not None:  # else a layer's kernels are gathered with it
        layers, packed = split(layers)

    def layer_step(carry, weights):
        x, cache, layer = carry
        weights = path.operations.take_layer(gather_params(weights, "layers"))
        weights = attach_adapters(join(weights, packed, layer, in_slabs))
        return (*apply(x, cache, layer, weights), layer + 1), None

    names = () if remat else (KEPT,)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    step = jax.checkpoint(layer_step, policy=policy, prevent_cse=False)
    start = (x, cache, jnp.int32(0))
    with matmul_precision(x.dtype):
        # The cache is part of the carry, not of the scanned inputs and outputs: as such
        # it would be copied layer by layer, in and out, at every step.
        if stacked and cache_only:
            last = config.num_layers - 1
            carry = jax.lax.fori_loop(
                0, last, lambda i, carry: layer_step(carry, _layer(layers, i))[0], start
            )
            (x, cache, _), _ = layer_step(carry, _layer(layers, last))
        elif stacked:
            (x, cache, _), _ = jax.lax.scan(step, start, layers)
        else:
            for layer, weights in enumerate(params["layers"]):
                weights = attach_adapters(join(weights, {}, None, in_slabs))
                x, cache = apply(x, cache, jnp.int32(layer), weights)
    norm = _module(config, "norm", gather_params(params["norm"], "norm"))
    return norm(x, path.operations), cache


def _layer(layers: Params, index: Any) -> Params:
    """One layer of a stack."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers
    )


def unembed(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "... D"],
    mesh: Mesh | None = None,
) -> Float[Array, "... V"]:
    """Logits, float32; of packed parameters with a `mesh`, for hidden states [B, D] only."""
    in_slabs = choose_operations(mesh).in_slabs
    with matmul_precision(hidden.dtype):
        if config.tie_word_embeddings:
            embedding = pack(params["embedding"], in_slabs)
            return matmul_transposed(hidden, embedding, jnp.float32)
        kernel = pack(params["lm_head"]["kernel"], in_slabs)
        return matmul(hidden, kernel, jnp.float32)


def compute_dtype(params: Params) -> Any:
    """The dtype of hidden states, which packed kernels do not tell."""
    return params["norm"]["scale"].dtype


def abstract_params(
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any,
    quantized: str | None = None,
    adapter: AdapterConfig = NO_ADAPTER,
) -> Params:
    """Shape, dtype and sharding of every parameter; no memory is used. `quantized` is
    "int8" for kernels and embedding in that form; `adapter` may be beside them."""

    def leaf(variable: nnx.Variable):
        place = sharding(mesh, _axes(variable), variable.shape)
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=place)

    def as_int8(array: jax.ShapeDtypeStruct, axis: int):
        sizes, place = list(array.shape), [*array.sharding.spec]
        del sizes[axis], place[axis]
        place = NamedSharding(mesh, PartitionSpec(*place))
        return {
            "values": jax.ShapeDtypeStruct(
                array.shape, jnp.int8, sharding=array.sharding
            ),
            "scale": jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place),
        }

    _, state = _structure(config)
    params = nnx.to_pure_dict(
        jax.tree.map(leaf, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    )
    params = map_kernels(as_int8, params) if quantized else params
    if not adapter.rank:
        return params
    return add_adapter(params, abstract_adapter(config, adapter, mesh, dtype))


def abstract_adapter(
    config: ModelConfig, adapter: AdapterConfig, mesh: Mesh, dtype: Any
) -> Params:
    """Shape, dtype and sharding of an adapter's arrays, see nn.lora; no memory is used.

    A is sharded as its kernel over the inputs, and B over the outputs; the rank is not. So
    products with both are local, and devices sum nothing wider than the rank.
    """
    state = nnx.to_pure_dict(_structure(config)[1], extract_fn=lambda v: v)
    rank, abstract = adapter.rank, {}
    for name in adapter.targets:
        kernel = state["layers"][PARTS[name]][name]["kernel"]
        (layers, inputs, outputs), (stack, *axes) = kernel.shape, _axes(kernel)
        pair = {
            "a": ((layers, inputs, rank), (stack, axes[0], None)),
            "b": ((layers, rank, outputs), (stack, None, axes[1])),
        }
        abstract.setdefault(PARTS[name], {})[name] = {
            key: jax.ShapeDtypeStruct(
                shape, dtype, sharding=sharding(mesh, axes, shape)
            )
            for key, (shape, axes) in pair.items()
        }
    return abstract


def init_adapter(abstract: Params, seed: int) -> Params:
    """An adapter, each array made in its sharding: A is uniform within 1 / sqrt(I), which
    is peft's Kaiming initialisation, and B is 0.

    A layer's values depend on the seed and its name alone, not on the other targets.
    """

    def build():
        keys = jax.random.split(jax.random.key(seed), len(PARTS))
        by_name = dict(zip(PARTS, keys, strict=True))

        def pair(name: str, like: Params) -> Params:
            a, b = like["a"], like["b"]
            bound = a.shape[1] ** -0.5
            uniform = jax.random.uniform(by_name[name], a.shape, a.dtype, -bound, bound)
            return {"a": uniform, "b": jnp.zeros(b.shape, b.dtype)}

        return {
            part: {name: pair(name, like) for name, like in linears.items()}
            for part, linears in abstract.items()
        }

    return jax.jit(build, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))()


def init_params(config: ModelConfig, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """Random parameters, each made in its sharding."""
    abstract = abstract_params(config, mesh, dtype)

    def build():
        params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(seed))))
        return jax.tree.map(lambda p: p.astype(dtype), params)

    return jax.jit(build, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))()


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes of a parameter, which of a layer's has the dim of layers first."""
    axes = variable.get_metadata()["axes"]
    return ("layers", *axes) if variable.ndim > len(axes) else axes


def _module(config: ModelConfig, name: str, params: Params) -> Any:
    """The part `name` of the model; of the stacked layers, one of them."""
    return nnx.merge(_structure(config)[0][name], params)


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """Graphs of the parts that are called, and the parameters as shapes with their
    logical axes."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphs = {name: nnx.graphdef(getattr(model, name)) for name in ("layers", "norm")}
    return graphs, nnx.state(model)
