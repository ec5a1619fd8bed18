"""Causal attention on GPUs by cuDNN's flash attention, which makes no scores in memory."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.nn.scores import keep
from e1jax.sharding.fsdp import map_over_rows_and_heads
from e1jax.sharding.mesh import on_gpu


def takes_gpu_flash(mesh: Mesh | None, dtype: Any, head_dim: int) -> bool:
    """Whether causal attention takes cuDNN's: bfloat16 on GPUs, heads of up to 128."""
    return on_gpu(mesh) and dtype == jnp.bfloat16 and head_dim in range(8, 129, 8)


def gpu_flash_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segments: Int[Array, "B S"] | None = None,
    *,
    mesh: Mesh,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B H T C"]:
    """`causal_attention` by `jax.nn.dot_product_attention`.

    Each device takes its own rows and heads. Where the caller is in a `shard_map` over
    `data`, the rows are its own already. The `implementation` "xla" runs without a GPU.
    """
    local = functools.partial(_flash_local, implementation=implementation)
    return keep(map_over_rows_and_heads(local, mesh, q, k, v, segments))


def _flash_local(q, k, v, segments=None, *, implementation) -> jax.Array:
    mask = None
    if segments is not None:
        # Queries belong to the last keys: a mask, as cuDNN counts from the first.
        length, before = q.shape[2], k.shape[2] - q.shape[2]
        is_own = segments[:, before:, None] == segments[:, None]
        is_earlier = jnp.tri(length, k.shape[2], before, dtype=bool)
        mask = (is_own & is_earlier[None])[:, None]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        mask=mask,
        is_causal=mask is None,
        implementation=implementation,
    )
    return out.swapaxes(1, 2)
