"""The layers of Qwen2 as Flax modules: linear, norm, attention, mlp, block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from e1jax.config.model import ModelConfig
from e1jax.nn.cache import KVCache, write
from e1jax.nn.cpu import normalise_on_cpu, product_on_cpu
from e1jax.nn.kernels.decode_heads import Heads, decode_heads
from e1jax.nn.norm import rms_normalise
from e1jax.nn.quantize import Packed, matmul
from e1jax.nn.rope import apply_rope
from e1jax.nn.scores import keep
from e1jax.sharding.mesh import on_cpu, sharding


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
        plain = not isinstance(kernel, Packed)
        product = product_on_cpu if plain and on_cpu(mesh) else matmul
        y = product(rows, kernel)
        y = jax.lax.optimization_barrier(y) if apart else y
        return y.reshape(*x.shape[:-1], -1)


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
        normalise = normalise_on_cpu if on_cpu(mesh) else rms_normalise
        return normalise(x, self.scale.get_value(), self.eps)


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
        self,
        x,
        rope,
        cache: KVCache | None,
        layer,
        write_positions,
        mesh,
        attend,
        shared,
    ):
        apart = cache is not None
        linears = self.q, self.k, self.v
        if cache is not None and isinstance(rope, Heads):
            products = [linear.product(x[:, 0], mesh, apart) for linear in linears]
            q, caches = decode_heads(
                products, (cache.k, cache.v), layer, write_positions, rope, mesh
            )
            k, v, cache = None, None, KVCache(*caches)  # that holds the new k and v
        else:
            wide = [linear(x, mesh, apart) for linear in linears]
            if shared is not None:  # from here on to the result, a pair of each
                wide = [shared.split(y) for y in wide]
            q, k, v = (jax.tree.map(self._heads, y) for y in wide)
            q, k = (jax.tree.map(apply_rope, y, rope) for y in (q, k))
            q, k, v = jax.tree.map(keep, (q, k, v))
            if cache is not None:
                cache = write(cache, layer, k, v, write_positions, mesh)
        out = jax.tree.map(self._join_heads, attend(q, k, v, cache, layer))
        out = out if shared is None else shared.join(out)
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
        self,
        x,
        rope,
        cache: KVCache | None,
        layer,
        write_positions,
        mesh,
        attend,
        shared,
    ):
        x = x if cache is None else replicate_rows(x, mesh)
        normed = self.attention_norm(x, mesh)
        attended, cache = self.attention(
            normed, rope, cache, layer, write_positions, mesh, attend, shared
        )
        x = keep(x + attended)
        x = x if cache is None else replicate_rows(x, mesh)
        return x + self.mlp(self.mlp_norm(x, mesh), mesh), cache


def replicate_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> jax.Array:
    """Hidden states that are not divided by rows, as the cache is, but as the weights
    are: else the compiler gathers weights, which also lie over `data`, at every step."""
    if mesh is None:
        return x
    place = sharding(mesh, (None, None, "embed"), x.shape)
    return jax.lax.with_sharding_constraint(x, place)
