"""Qwen2 in Flax, with a fixed-shape key/value cache.

Dimensions: B rows, T tokens, R rows of the cache, S positions of one, L layers,
D hidden ("embed"), F mlp, H query heads, K key/value heads, C head dim, V vocabulary.
*axis* is a logical or mesh axis, *dim* a dimension of an array.

The Flax API stays inside this file. Everybody else holds `params`, a nested dict of
arrays whose layers are stacked on a leading dim L, and calls `forward` and `unembed`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from e1jax import attention, quantize
from e1jax.attention import keep
from e1jax.config import ModelConfig
from e1jax.sharding import on_cpu, on_tpu, sharding

# Nested dicts of arrays. Those of "layers" are stacked on a leading dim L, or of a list
# with a dict per layer, as quantize.unstack gives it.
Params = dict[str, Any]
Whole = Callable[[Any, str], Any]

_ROWS = Layout((0, 1))  # of a matrix, one after the other


class KVCache(NamedTuple):
    """Keys and values of all layers.

    Rows are left-aligned: position p of a row lies at index p of dim S. Where a mesh has
    more places for rows than there are rows, one is several here, R = N * B, and else
    R = B: see attention.sequence_shards. As int8, each vector has a scale; as uint16, the
    bits are those of bfloat16: see quantize.
    """

    k: jax.Array  # [L, R, K, S, C]
    v: jax.Array  # [L, R, K, S, C]
    # [L, R, K, ceil(S / LANES), LANES] float32, of int8 only
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


CACHE_AXES = ("layers", "rows", "kv_heads", None, None)


class Linear(nnx.Module):
    """x @ kernel (+ bias), with the logical axes of the kernel [in, out]."""

    def __init__(
        self,
        sizes: tuple[int, int],
        axes: tuple[str | None, str],
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), sizes, jnp.float32), axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(sizes[1:], jnp.float32), axes=axes[1:])
            if use_bias
            else None
        )

    def __call__(
        self, x: Float[Array, "B T I"], mesh: Mesh | None, apart: bool = False
    ) -> Float[Array, "B T O"]:
        y = self.product(x, mesh, apart)
        return y if self.bias is None else y + self.bias[None, None]

    def product(
        self, x: Float[Array, "... I"], mesh: Mesh | None, apart: bool = False
    ) -> Float[Array, "... O"]:
        """Without the bias. With `apart`, the compiler folds nothing that follows into
        it: for TPUs it would copy the weights of all layers into the layout that a split
        of the result into heads asks for."""
        # A product of two matrices: into one of three dimensions, XLA on a CPU does not fold
        # the transposes of the backward pass, and copies the activations column by column.
        rows, kernel = x.reshape(-1, x.shape[-1]), self.kernel.get_value()
        plain = not isinstance(kernel, quantize.Packed)
        product = _product_on_cpu if plain and on_cpu(mesh) else quantize.matmul
        y = product(rows, kernel)
        y = jax.lax.optimization_barrier(y) if apart else y
        return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product_on_cpu(
    x: Float[Array, "N I"], kernel: Float[Array, "I O"]
) -> Float[Array, "N O"]:
    """x @ kernel, with a backward pass for CPUs, where XLA has two libraries for
    products: the faster one does not sum over rows, as the gradient of the kernel does,
    unless one of the two is transposed first."""
    return x @ kernel


def _product_backward(residuals, grad):
    x, kernel = residuals
    with _matmul_precision(x.dtype):
        if kernel.shape[0] > kernel.shape[1]:  # two smaller transposes take less time
            return grad @ kernel.T, _transposed(_transposed(grad) @ x)
        return grad @ kernel.T, _transposed(x) @ grad


def _transposed(x: jax.Array) -> jax.Array:
    """By an operation of its own: see sharding.backward_options. Without the constraint
    it may be a view, which whatever stores it turns round on the way."""
    transposed = with_layout_constraint(jax.lax.optimization_barrier(x).T, _ROWS)
    return jax.lax.optimization_barrier(transposed)


_product_on_cpu.defvjp(
    lambda x, kernel: (_product_on_cpu(x, kernel), (x, kernel)), _product_backward
)


@jax.custom_vjp
def gradient_apart(x: jax.Array) -> jax.Array:
    """x, whose gradient is an array of its own: fused into the two products that need
    it, a TPU would compute it again for every tile of theirs."""
    return x


gradient_apart.defvjp(
    lambda x: (x, None), lambda _, grad: (jax.lax.optimization_barrier(grad),)
)


class RMSNorm(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(
            jnp.ones((config.hidden_size,), jnp.float32), axes=(None,)
        )
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: Float[Array, "B T D"], mesh: Mesh | None = None
    ) -> Float[Array, "B T D"]:
        normalise = _normalise_on_cpu if on_cpu(mesh) else _normalise
        return normalise(x, self.scale.get_value(), self.eps)


def _normalise(
    x: Float[Array, "B T D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "B T D"]:
    """In float32: a bfloat16 mean of squares keeps two or three digits."""
    wide = x.astype(jnp.float32)
    return (wide * _inverse_norm(wide, eps)).astype(x.dtype) * scale[None, None]


def _inverse_norm(x: Float[Array, "B T D"], eps: float) -> Float[Array, "B T 1"]:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


_normalise_on_cpu = jax.custom_vjp(_normalise, nondiff_argnums=(2,))


def _normalise_backward(eps, residuals, grad):
    """The gradients of both are sums over one product, which is an array of its own:
    sums of products, fused, take XLA on a CPU ten times as long."""
    x, scale = residuals
    wide, wide_grad = x.astype(jnp.float32), grad.astype(jnp.float32)
    inverse = _inverse_norm(wide, eps)
    normed = wide * inverse
    product = jax.lax.optimization_barrier(wide_grad * normed)
    mean = (product @ scale.astype(jnp.float32))[..., None] / x.shape[-1]
    grad_x = inverse * (wide_grad * scale[None, None] - normed * mean)
    return grad_x.astype(x.dtype), product.sum(axis=(0, 1)).astype(scale.dtype)


_normalise_on_cpu.defvjp(
    lambda x, scale, eps: (_normalise(x, scale, eps), (x, scale)), _normalise_backward
)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, c = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * c, config.num_kv_heads * c
        self.q = Linear((d, heads), ("embed", "heads"), use_bias=True, rngs=rngs)
        self.k = Linear((d, kv_heads), ("embed", "kv_heads"), use_bias=True, rngs=rngs)
        self.v = Linear((d, kv_heads), ("embed", "kv_heads"), use_bias=True, rngs=rngs)
        self.o = Linear((heads, d), ("heads", "embed"), rngs=rngs)
        self.head_dim = c

    def __call__(
        self, x, rope, cache: KVCache | None, layer, places, mesh, attend, groups
    ):
        apart = cache is not None
        linears = self.q, self.k, self.v
        if cache is not None and isinstance(rope, attention.Heads):
            products = [linear.product(x[:, 0], mesh, apart) for linear in linears]
            q, caches = attention.decode_heads(
                products, (cache.k, cache.v), layer, places, rope, mesh
            )
            k, v, cache = None, None, KVCache(*caches)  # that holds the new k and v
        else:
            wide = [linear(x, mesh, apart) for linear in linears]
            if groups is not None:  # from here on to the result, a pair of each
                wide = [groups.split(y) for y in wide]
            q, k, v = (jax.tree.map(self._heads, y) for y in wide)
            q, k = (jax.tree.map(attention.apply_rope, y, rope) for y in (q, k))
            q, k, v = jax.tree.map(keep, (q, k, v))
            if cache is not None:
                cache = write(cache, layer, k, v, places, mesh)
        out = jax.tree.map(self._join_heads, attend(q, k, v, cache, layer))
        out = out if groups is None else groups.join(out)
        return self.o(out, mesh), cache

    def _join_heads(self, x: Float[Array, "B H T C"]) -> Float[Array, "B T N"]:
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)

    def _heads(self, x: Float[Array, "B T N"]) -> Float[Array, "B H T C"]:
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.head_dim).swapaxes(1, 2)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate = Linear((d, f), ("embed", "mlp"), rngs=rngs)
        self.up = Linear((d, f), ("embed", "mlp"), rngs=rngs)
        self.down = Linear((f, d), ("mlp", "embed"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mesh: Mesh | None
    ) -> Float[Array, "B T D"]:
        linears = self.gate, self.up
        gate, up = (gradient_apart(keep(linear(x, mesh))) for linear in linears)
        return self.down(jax.nn.silu(gate) * up, mesh)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x, rope, cache: KVCache | None, layer, places, mesh, attend, groups
    ):
        x = x if cache is None else _of_all_rows(x, mesh)
        normed = self.attention_norm(x, mesh)
        attended, cache = self.attention(
            normed, rope, cache, layer, places, mesh, attend, groups
        )
        x = keep(x + attended)
        x = x if cache is None else _of_all_rows(x, mesh)
        return x + self.mlp(self.mlp_norm(x, mesh), mesh), cache


class Qwen2(nnx.Module):
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
        self.norm = RMSNorm(config)
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
    remat: bool = False,
    whole: Whole = lambda part, name: part,
    groups: attention.Groups | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Final hidden states, and the cache with the keys and values written.

    With a cache, row b's tokens are written at `positions[b]` (consecutive) and see
    every position up to their own (one token each, where rows lie in shards); without
    one, tokens see the earlier ones of the same call, which `from_start` (`positions`
    begin at 0) asks for with a cache too. `mesh` is where the arrays lie: on TPUs,
    attention then takes their kernels. `whole` makes parameters usable that are shards,
    when and where they are needed; see sharding.make_whole. With `groups`, B is 1 and its
    tokens are those of several prompts and responses; without a cache, and not on TPUs.

    For the backward pass a layer keeps what is expensive (the heads, the result of
    attention, both products of the mlp), and computes norms, scores and the activation
    function again; with `remat`, only the inputs of the layers are kept.
    """
    rope: Any = attention.rope_angles(
        positions, attention.rope_frequencies(config.head_dim, config.rope_theta)
    )

    if groups is not None:
        cos, sin = (groups.split(x[:, 0]) for x in rope)
        rope = tuple((c[:, None], s[:, None]) for c, s in zip(cos, sin, strict=True))
    visits, last, places = None, positions, positions
    if cache is not None:
        shards, capacity = cache.k.shape[1] // len(tokens), cache.k.shape[3]
        last, places = attention.sequence_shards(positions, shards, capacity)
        if tokens.shape[1] == 1 and on_tpu(mesh):
            visits = attention.live_blocks(last, capacity, mesh, cache.k.dtype)
            if attention.takes_heads(mesh, cache.k):
                stacked = params["layers"]["attention"]
                biases = [stacked[name]["bias"] for name in ("q", "k", "v")]
                rope = attention.prepare_heads(rope, biases, shards)

    def attend(q, k, v, cache, layer):
        if groups is not None:
            return attention.grouped_attention(q, k, v, groups)
        if cache is None or from_start:
            return attention.causal_attention(q, k, v, mesh)
        args = (q, cache.k, cache.v, layer, last)
        scales = None if cache.k_scale is None else (cache.k_scale, cache.v_scale)
        if visits is not None:
            return attention.decode_attention(*args, visits, mesh, scales=scales)
        return attention.cached_attention(*args, scales=scales)

    def apply(x, cache, layer, weights):
        block = _module(config, "layers", weights)
        return block(x, rope, cache, layer, places, mesh, attend, groups)

    stacked = isinstance(params["layers"], dict)
    layers, packed = quantize.split(params["layers"]) if stacked else ({}, {})

    def layer_step(carry, weights):
        x, cache, layer = carry
        weights = whole(weights, "layers")
        weights = _vectors_apart(weights) if on_cpu(mesh) else weights
        weights = quantize.join(weights, packed, layer, mesh)
        return (*apply(x, cache, layer, weights), layer + 1), None

    names = () if remat else (attention.KEPT,)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    step = jax.checkpoint(layer_step, policy=policy, prevent_cse=False)
    embedding = whole(params["embedding"], "embedding")
    x = quantize.take_rows(embedding, tokens, compute_dtype(params))
    start = (x, cache, jnp.int32(0))
    with _matmul_precision(x.dtype):
        # The cache is part of the carry, not of the scanned inputs and outputs: as such
        # it would be copied layer by layer, in and out, at every step.
        if stacked:
            (x, cache, _), _ = jax.lax.scan(step, start, layers)
        else:
            for layer, weights in enumerate(params["layers"]):
                weights = quantize.join(*quantize.split(weights), None, mesh)
                x, cache = apply(x, cache, jnp.int32(layer), weights)
    norm = _module(config, "norm", whole(params["norm"], "norm"))
    return norm(x, mesh), cache


def _vectors_apart(weights: Params) -> Params:
    """Of a layer: its biases and scales as arrays of their own. XLA on a CPU looks them
    up among those of all layers for every element that they are added to."""

    def apart(x: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(x) if x.ndim == 1 else x

    return jax.tree.map(apart, weights)


def unembed(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "... D"],
    mesh: Mesh | None = None,
) -> Float[Array, "... V"]:
    """Logits, float32; of packed parameters, for hidden states [B, D] only."""
    with _matmul_precision(hidden.dtype):
        if config.tie_word_embeddings:
            embedding = quantize.pack(params["embedding"], mesh)
            return quantize.matmul_transposed(hidden, embedding, jnp.float32)
        kernel = quantize.pack(params["lm_head"]["kernel"], mesh)
        return quantize.matmul(hidden, kernel, jnp.float32)


def compute_dtype(params: Params) -> Any:
    """The dtype of hidden states, which packed kernels do not tell."""
    return params["norm"]["scale"].dtype


def write(
    cache: KVCache,
    layer,
    k: Float[Array, "B K T C"],
    v,
    places: Int[Array, "R T"],
    mesh: Mesh | None = None,
) -> KVCache:
    """The cache with keys and values of a layer written in place, at `places`, which
    are consecutive in a row. On a mesh, each device writes its own rows and heads."""
    shards = cache.k.shape[1] // k.shape[0]
    k, v = (jnp.tile(x, (shards, 1, 1, 1)) for x in (k, v))
    (k, k_scale), (v, v_scale) = (quantize.narrow(x, cache.k.dtype) for x in (k, v))

    def write_scales(buffer, layer, new, places):
        if new.shape[2] > 1:  # a prompt's, of which there is one at a time
            flat = buffer.reshape(*buffer.shape[:3], -1, 1)
            flat = write_one(flat, layer, new[..., None], places)
            return flat.reshape(buffer.shape)
        lanes = jnp.arange(quantize.LANES)[None, None, None]
        is_new = lanes == places[:, :, None, None] % quantize.LANES
        at = places // quantize.LANES
        rows = jnp.arange(len(new))[:, None]
        heads = jnp.arange(new.shape[1])[None]
        old = buffer.at[layer, rows, heads, at].get(mode="clip")
        new = jnp.where(is_new, new[..., None], old[:, :, None])
        return write_one(buffer, layer, new, at)

    def write_one(buffer, layer, new, places):
        # XLA on a CPU copies the whole cache for a scatter.
        if new.shape[2] == 1 and mesh is not None and not on_cpu(mesh):
            # Head by head: for windows of several heads, XLA for TPUs would turn the
            # whole cache into a layout in which these are neighbours, and back.
            heads = new.reshape(-1, new.shape[3])
            by_head = buffer.reshape(buffer.shape[0], -1, *buffer.shape[3:])
            at = jnp.repeat(places[:, 0], new.shape[1])
            by_head = by_head.at[layer, jnp.arange(len(heads)), at].set(
                heads,
                unique_indices=True,
                mode="promise_in_bounds" if shards == 1 else "drop",
                wrap_negative_indices=False,
            )
            return by_head.reshape(buffer.shape)

        def write_row(row, buffer):
            at = (layer, row, 0, places[row, 0], 0)
            update = new[row][None, None]
            if shards > 1:  # where the place is beyond the end, nothing changes
                old = jax.lax.dynamic_slice(buffer, at, update.shape)
                update = jnp.where(places[row, 0] < buffer.shape[3], update, old)
            return jax.lax.dynamic_update_slice(buffer, update, at)

        return jax.lax.fori_loop(0, new.shape[0], write_row, buffer)

    def write_own(buffer, new):
        write = write_one if new.ndim == 4 else write_scales
        if mesh is None:
            return write(buffer, layer, new, places)
        place = sharding(mesh, CACHE_AXES, buffer.shape).spec
        of_new, rows = PartitionSpec(*place[1 : new.ndim + 1]), PartitionSpec(place[1])
        specs = (place, PartitionSpec(), of_new, rows)
        on_own = jax.shard_map(
            write, mesh=mesh, in_specs=specs, out_specs=place, check_vma=False
        )
        return on_own(buffer, layer, new, places)

    return jax.tree.map(write_own, cache, KVCache(k, v, k_scale, v_scale))


def _of_all_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> jax.Array:
    """Hidden states that are not divided by rows, as the cache is, but as the weights
    are: else the compiler gathers weights, which also lie over `data`, at every step."""
    if mesh is None:
        return x
    place = sharding(mesh, (None, None, "embed"), x.shape)
    return jax.lax.with_sharding_constraint(x, place)


def abstract_params(
    config: ModelConfig, mesh: Mesh, dtype: Any, quantized: str | None = None
) -> Params:
    """Shape, dtype and sharding of every parameter; no memory is used. `quantized` is
    "int8" for kernels and embedding in that form."""

    def leaf(variable: nnx.Variable):
        axes = variable.get_metadata()["axes"]
        axes = ("layers", *axes) if variable.ndim > len(axes) else axes
        return jax.ShapeDtypeStruct(
            variable.shape, dtype, sharding=sharding(mesh, axes, variable.shape)
        )

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
    return quantize.map_kernels(as_int8, params) if quantized else params


def init_params(config: ModelConfig, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """Random parameters, made where they will lie."""
    abstract = abstract_params(config, mesh, dtype)

    def build():
        params = nnx.to_pure_dict(nnx.state(Qwen2(config, rngs=nnx.Rngs(seed))))
        return jax.tree.map(lambda p: p.astype(dtype), params)

    return jax.jit(build, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))()


def init_cache(config: ModelConfig, rows: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache; `capacity` positions a row, see `attention.cached_attention`."""
    shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
    cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if dtype != jnp.int8:
        return cache
    shape = (*shape[:3], -(-capacity // quantize.LANES), quantize.LANES)
    return cache._replace(k_scale=jnp.zeros(shape), v_scale=jnp.zeros(shape))


def _module(config: ModelConfig, name: str, params: Params) -> Any:
    """The part `name` of the model; of the stacked layers, one of them."""
    return nnx.merge(_structure(config)[0][name], params)


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """Graphs of the parts that are called, and the parameters as shapes with their
    logical axes."""
    model = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    graphs = {name: nnx.graphdef(getattr(model, name)) for name in ("layers", "norm")}
    return graphs, nnx.state(model)


def _matmul_precision(dtype: Any):
    """float32 products in full: else a TPU rounds inputs to bfloat16, a GPU to tf32."""
    wide = dtype == jnp.float32
    return jax.default_matmul_precision("highest" if wide else "default")
