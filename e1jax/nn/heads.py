"""Heads of attention: queries, keys and values made of a layer's products, and joined again.

Shapes: B rows, T tokens, H heads of C values each, N = H * C.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from e1jax.nn.rope import apply_rope
from e1jax.nn.scores import keep


class Vectors(NamedTuple):
    """A layer's vectors that are applied to the products of q, k and v; of stacked
    layers, each has a leading dim L."""

    biases: Sequence[jax.Array]  # of q, k and v, [N]

    @classmethod
    def of(cls, attention: dict[str, Any]) -> "Vectors":
        """From the parameters of attention, of one layer or stacked."""
        return cls([attention[name]["bias"] for name in ("q", "k", "v")])


def add_biases(
    products: Sequence[Float[Array, "B T _N"]], vectors: Vectors
) -> list[Float[Array, "B T _N"]]:
    """Products of q, k and v with their biases."""
    pairs = zip(products, vectors.biases, strict=True)
    return [x + bias[None, None] for x, bias in pairs]


def make_heads(
    biased: Sequence[Float[Array, "B T _N"]],
    head_dim: int,
    rope: tuple[Array, Array],
) -> list[Float[Array, "B _H T C"]]:
    """Queries, keys and values, marked to be kept for the backward pass: split into
    heads, with RoPE (not of values).

    `rope` is for the same tokens, see `rope_angles`.
    """
    q, k, v = (split_heads(x, head_dim) for x in biased)
    return [keep(x) for x in (apply_rope(q, rope), apply_rope(k, rope), v)]


def split_heads(x: Float[Array, "B T N"], head_dim: int) -> Float[Array, "B H T C"]:
    """Heads of `head_dim` values each."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def join_heads(x: Float[Array, "B H T C"]) -> Float[Array, "B T N"]:
    """Undoes `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
