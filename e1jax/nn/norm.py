"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_normalise(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """In float32: a bfloat16 mean of squares keeps two or three digits."""
    wide = x.astype(jnp.float32)
    return (wide * inverse_norm(wide, eps)).astype(x.dtype) * over_last(scale, x)


def over_last(scale: Float[Array, " D"], x: jax.Array) -> jax.Array:
    """`scale` with as many dims as `x`, which it multiplies along the last one."""
    return scale[(None,) * (x.ndim - 1)]


def inverse_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x ** 2) + eps), over the last dim."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
