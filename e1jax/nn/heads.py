"""Heads of attention: queries, keys and values made of a layer's products, and joined again.

Shapes: B rows, T tokens, H heads of C values each, N = H * C.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from e1jax.config.model import ModelConfig
from e1jax.nn.rope import apply_rope
from e1jax.nn.scores import keep


class Vectors(NamedTuple):
    """A layer's vectors that are applied to the products of q, k and v, as far as the
    architecture has them; of stacked layers, each has a leading dim L."""

    biases: Sequence[jax.Array]  # of q, k and v, [N]; or none
    norms: Sequence[
        jax.Array
    ]  # scales of the RMSNorm of q's and k's heads, [C]; or none

    @classmethod
    def of(cls, attention: dict[str, Any]) -> "Vectors":
        """From the parameters of attention, of one layer or stacked."""
        biases = [attention[name].get("bias") for name in ("q", "k", "v")]
        norms = [attention.get(name) for name in ("q_norm", "k_norm")]
        return cls(
            [bias for bias in biases if bias is not None],
            [norm["scale"] for norm in norms if norm is not None],
        )


def add_biases(
    products: Sequence[Float[Array, "B T _N"]], vectors: Vectors
) -> Sequence[Float[Array, "B T _N"]]:
    """Products of q, k and v with their biases, if there are any."""
    if not vectors.biases:
        return products
    pairs = zip(products, vectors.biases, strict=True)
    return [x + bias[None, None] for x, bias in pairs]


def make_heads(
    biased: Sequence[Float[Array, "B T _N"]],
    vectors: Vectors,
    config: ModelConfig,
    rope: tuple[Array, Array],
    normalise: Callable[[jax.Array, jax.Array, float], jax.Array],
) -> list[Float[Array, "B _H T C"]]:
    """Queries, keys and values, split into heads. Heads of queries and keys are normalised,
    if the architecture does so, and turned by RoPE.

    `rope` is for the same tokens, see `rope_angles`, and `normalise` as `rms_normalise`.
    The backward pass computes again from the heads kept here.
    """
    q, k, v = (split_heads(x, config.head_dim) for x in biased)
    if not vectors.norms:
        return [keep(x) for x in (apply_rope(q, rope), apply_rope(k, rope), v)]
    q, k = (
        apply_rope(normalise(keep(x), scale, config.rms_norm_eps), rope)
        for x, scale in zip((q, k), vectors.norms, strict=True)
    )
    return [q, k, keep(v)]


def split_heads(x: Float[Array, "B T N"], head_dim: int) -> Float[Array, "B H T C"]:
    """Heads of `head_dim` values each."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def join_heads(x: Float[Array, "B H T C"]) -> Float[Array, "B T N"]:
    """Undoes `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
