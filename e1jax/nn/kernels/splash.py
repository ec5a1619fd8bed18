"""Causal attention on TPUs by JAX's splash kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.nn.scores import BLOCK_LEN, KEPT, scaled
from e1jax.sharding.fsdp import map_over_rows_and_heads
from e1jax.sharding.mesh import on_tpu

SPLASH_BLOCK_LEN = 512


def takes_splash(mesh: Mesh | None, dtype: Any, head_dim: int) -> bool:
    """Whether causal attention takes the splash kernel: bfloat16 on TPUs, wide heads."""
    return on_tpu(mesh) and dtype == jnp.bfloat16 and head_dim % BLOCK_LEN == 0


def splash_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segments: Int[Array, "B S"] | None = None,
    *,
    mesh: Mesh,
    interpret: bool = False,
) -> Float[Array, "B H T C"]:
    """`causal_attention` by JAX's kernel for TPUs, which makes no scores in memory.

    Each device takes its own rows and heads. Where the caller is in a `shard_map` over
    `data`, the rows are its own already. `interpret` runs it without a TPU.
    """
    local = functools.partial(_splash_local, interpret=interpret)
    return map_over_rows_and_heads(local, mesh, q, k, v, segments)


def _splash_local(q, k, v, segments=None, *, interpret: bool) -> jax.Array:
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    (q, block_q), (k, block_kv), (v, _) = map(_whole_blocks, (scaled(q), k, v))
    mask = splash.CausalMask((q.shape[2], k.shape[2]), offset=before)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
    blocks: Any = {
        name: block_q if name.startswith("block_q") else block_kv
        for name in names
        if name.startswith("block_")
    }
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(**blocks),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    if segments is None:
        out: Any = jax.vmap(kernel)(q, k, v)
        return out[:, :, :length]

    def of_row(q, k, v, segments):
        own = jnp.pad(segments[before:], (0, q.shape[1] - length))
        keys = jnp.pad(segments, (0, k.shape[1] - len(segments)))
        return kernel(q, k, v, splash.SegmentIds(own, keys))

    out = jax.vmap(of_row)(q, k, v, segments)
    return out[:, :, :length]


def _whole_blocks(x: jax.Array) -> tuple[jax.Array, int]:
    """`x` padded to a multiple of a block, at the end, where no real token looks; and the
    length of that block."""
    length = x.shape[2]
    block_len = min(SPLASH_BLOCK_LEN, -(-length // BLOCK_LEN) * BLOCK_LEN)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -length % block_len), (0, 0))), block_len
