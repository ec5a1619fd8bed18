"""Workarounds for XLA on CPUs: forms of products and sums that it runs fast, and bfloat16 as
bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from e1jax.nn.norm import inverse_norm, over_last, rms_normalise
from e1jax.nn.quantize import Packed, Params, map_kernels, matmul

_ROWS = Layout((0, 1))  # of a matrix, one after the other


@jax.custom_vjp
def product_on_cpu(
    x: Float[Array, "N I"], kernel: Float[Array, "I O"]
) -> Float[Array, "N O"]:
    """x @ kernel, with a backward pass for CPUs, where XLA has two libraries for
    products: the faster one does not sum over rows, as the gradient of the kernel does,
    unless one of the two is transposed first."""
    return x @ kernel


def _product_backward(residuals, grad):
    x, kernel = residuals
    with matmul_precision(x.dtype):
        if kernel.shape[0] > kernel.shape[1]:  # two smaller transposes take less time
            return grad @ kernel.T, _transposed(_transposed(grad) @ x)
        return grad @ kernel.T, _transposed(x) @ grad


def _transposed(x: jax.Array) -> jax.Array:
    """By an operation of its own. Without the constraint it may be a view, which whatever stores it turns round on the way."""
    transposed = with_layout_constraint(jax.lax.optimization_barrier(x).T, _ROWS)
    return jax.lax.optimization_barrier(transposed)


product_on_cpu.defvjp(
    lambda x, kernel: (product_on_cpu(x, kernel), (x, kernel)), _product_backward
)


def matmul_on_cpu(
    x: Float[Array, "N I"], kernel: jax.Array | Packed
) -> Float[Array, "N O"]:
    """`product_on_cpu` of a kernel that is an array, and `matmul` of a packed one."""
    return (matmul if isinstance(kernel, Packed) else product_on_cpu)(x, kernel)


normalise_on_cpu = jax.custom_vjp(rms_normalise, nondiff_argnums=(2,))


def _normalise_backward(eps, residuals, grad):
    """The gradients of both are sums over one product, which is an array of its own:
    sums of products, fused, take XLA on a CPU ten times as long."""
    x, scale = residuals
    wide, wide_grad = x.astype(jnp.float32), grad.astype(jnp.float32)
    inverse = inverse_norm(wide, eps)
    normed = wide * inverse
    product = jax.lax.optimization_barrier(wide_grad * normed)
    axes = tuple(range(x.ndim - 1))
    mean = (product @ scale.astype(jnp.float32))[..., None] / x.shape[-1]
    grad_x = inverse * (wide_grad * over_last(scale, x) - normed * mean)
    return grad_x.astype(x.dtype), product.sum(axis=axes).astype(scale.dtype)


normalise_on_cpu.defvjp(
    lambda x, scale, eps: (rms_normalise(x, scale, eps), (x, scale)),
    _normalise_backward,
)


def vectors_apart(weights: Params) -> Params:
    """Of a layer: its biases and scales as arrays of their own. XLA on a CPU would look
    them up in the stack of all layers for every element that they are added to."""

    def apart(x: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(x) if x.ndim == 1 else x

    return jax.tree.map(apart, weights)


def matmul_precision(dtype: Any):
    """float32 products in full: else a TPU rounds inputs to bfloat16, a GPU to tf32."""
    wide = dtype == jnp.float32
    return jax.default_matmul_precision("highest" if wide else "default")


def as_bits(params: dict[str, Any]) -> dict[str, Any]:
    """bfloat16 parameters on CPUs as the decoding there takes them: the bits of kernels
    and embedding, without a copy, and the rest as float32."""

    def bits(x, axis):
        shards = [
            jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device)
            for shard in x.addressable_shards
        ]
        whole = jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
        return {"values": whole}

    def wide(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float32) if is_float else leaf

    return jax.tree.map(wide, map_kernels(bits, params))


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters on a single CPU with a list of layers in place of the stack: views of
    it, but for arrays of odd sizes, which are small."""
    stacks, structure = jax.tree.flatten(params["layers"])
    stacks = [np.asarray(stack.addressable_data(0)) for stack in stacks]
    device = next(iter(params["norm"]["scale"].devices()))
    layers = [
        structure.unflatten([jax.device_put(stack[i], device) for stack in stacks])
        for i in range(len(stacks[0]))
    ]
    return params | {"layers": layers}
