"""Shared parts of all forms of attention: blocks of positions, folded heads, scores, and the
activations that a backward pass keeps.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_LEN = 128  # cache positions that are visited at a time


MASKED = -1e30  # finite, so that a block without any valid key gives zeros and no NaN


KEPT = "kept"  # checkpoint name of the activations saved for the backward pass


def keep(x: jax.Array) -> jax.Array:
    """Marks an array to be kept for the backward pass; see model.forward."""
    return checkpoint_name(x, KEPT)


def scaled(q: jax.Array) -> jax.Array:
    """Queries divided by the square root of the head's size."""
    return q * q.shape[-1] ** -0.5


def fold(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, T, C] -> [B, K, G*T, C]; heads of one group are neighbours."""
    batch, heads, length, size = q.shape
    return q.reshape(batch, kv_heads, heads // kv_heads * length, size)


def wide_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums in float32, and the products of float32 in full: stated here because a
    setting around the forward pass does not reach a backward pass of our own."""
    precision = "highest" if b.dtype == jnp.float32 else "default"
    return jnp.einsum(
        subscripts, a, b, precision=precision, preferred_element_type=jnp.float32
    )
