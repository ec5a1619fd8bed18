"""The layers of a model as Flax modules: linear, norm, attention, mlp, block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from e1jax.config.model import ModelConfig
from e1jax.nn.cache import KVCache
from e1jax.nn.heads import Vectors
from e1jax.nn.lora import adapted_product
from e1jax.nn.paths import Operations, Path
from e1jax.nn.scores import keep


class Linear(nnx.Module):
    """x @ kernel, and perhaps a bias; `axes` are the logical axes of the kernel [in, out].

    The kernel may have an adapter; see nn.lora."""

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
        self, x: Float[Array, "B T I"], operations: Operations, apart: bool = False
    ) -> Float[Array, "B T O"]:
        """The product alone: a bias is left to `Path.prepare`. With `apart`, the compiler
        folds nothing that follows into it: for TPUs it would copy the weights of all
        layers into the layout that a split of the result into heads asks for."""
        # A product of two matrices: into one of three dimensions, XLA on a CPU does not fold
        # the transposes of the backward pass, and copies the activations column by column.
        rows = x.reshape(-1, x.shape[-1])
        y = adapted_product(operations.product, rows, self.kernel.get_value())
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
    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(None,))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "... D"], operations: Operations
    ) -> Float[Array, "... D"]:
        return operations.normalise(x, self.scale.get_value(), self.eps)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, c, table = config.hidden_size, config.head_dim, config.table
        heads, kv_heads = config.num_heads * c, config.num_kv_heads * c

        def linear(size: int, axis: str) -> Linear:
            use_bias = table.attention_bias
            return Linear((d, size), ("embed", axis), use_bias=use_bias, rngs=rngs)

        def norm() -> RMSNorm | None:
            return RMSNorm(c, config.rms_norm_eps) if table.head_norm else None

        self.q, self.q_norm = linear(heads, "heads"), norm()
        self.k, self.k_norm = linear(kv_heads, "kv_heads"), norm()
        self.v = linear(kv_heads, "kv_heads")
        self.o = Linear((heads, d), ("heads", "embed"), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache | None,
        layer: Int[Array, ""],
        path: Path,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        linears, apart = (self.q, self.k, self.v), cache is not None
        products = [linear(x, path.operations, apart) for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        norms = [norm.scale for norm in (self.q_norm, self.k_norm) if norm is not None]
        vectors = Vectors(*([x.get_value() for x in xs] for xs in (biases, norms)))
        q, k, v, cache = path.prepare(products, vectors, cache, layer)
        attended = path.attend(q, k, v, cache, layer)
        return self.o(attended, path.operations), cache


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate = Linear((d, f), ("embed", "mlp"), rngs=rngs)
        self.up = Linear((d, f), ("embed", "mlp"), rngs=rngs)
        self.down = Linear((f, d), ("mlp", "embed"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], operations: Operations
    ) -> Float[Array, "B T D"]:
        products = (linear(x, operations) for linear in (self.gate, self.up))
        gate, up = (gradient_apart(keep(product)) for product in products)
        return self.down(jax.nn.silu(gate) * up, operations)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache | None,
        layer: Int[Array, ""],
        path: Path,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        x = path.place(x)
        normed = self.attention_norm(x, path.operations)
        attended, cache = self.attention(normed, cache, layer, path)
        x = path.place(keep(x + attended))
        normed = self.mlp_norm(x, path.operations)
        return x + self.mlp(normed, path.operations), cache
