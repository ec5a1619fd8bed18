"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the rounding of Hugging Face's code."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
