"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_normalise(
    x: Float[Array, "B T D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "B T D"]:
    """In float32: a bfloat16 mean of squares keeps two or three digits."""
    wide = x.astype(jnp.float32)
    return (wide * inverse_norm(wide, eps)).astype(x.dtype) * scale[None, None]


def inverse_norm(x: Float[Array, "B T D"], eps: float) -> Float[Array, "B T 1"]:
    """1 / sqrt(mean(x ** 2) + eps), over the last dim."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
