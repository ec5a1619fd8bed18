"""Causal attention on TPUs by JAX's splash kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jaxtyping import Array, Float

from e1jax.nn.scores import BLOCK_LEN, KEPT, scaled
from e1jax.sharding.mesh import on_tpu, sharding

SPLASH_BLOCK_LEN = 512


def takes_splash(mesh: Mesh | None, dtype: Any, head_dim: int) -> bool:
    """Whether causal attention takes the splash kernel: bfloat16 on TPUs, wide heads."""
    return on_tpu(mesh) and dtype == jnp.bfloat16 and head_dim % BLOCK_LEN == 0


def splash_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K T C"],
    v: Float[Array, "B K T C"],
    mesh: Mesh,
    *,
    interpret: bool = False,
) -> Float[Array, "B H T C"]:
    """`causal_attention` by JAX's kernel for TPUs, which makes no scores in memory.

    Each device takes its own rows and heads. Where the caller is in a `shard_map` over
    `data`, the rows are its own already. `interpret` runs it without a TPU.
    """

    inside = set(jax.sharding.get_abstract_mesh().manual_axes)
    rows = None if "data" in inside else "rows"

    def spec(x):
        return sharding(mesh, (rows, "heads", None, None), x.shape).spec

    local = jax.shard_map(
        functools.partial(_splash_local, interpret=interpret),
        mesh=None if inside else mesh,
        in_specs=(spec(q), spec(k), spec(v)),
        out_specs=spec(q),
        axis_names=set(mesh.axis_names) - inside,
        check_vma=False,
    )
    return local(q, k, v)


def _splash_local(q, k, v, *, interpret: bool) -> jax.Array:
    length = q.shape[2]
    block_len = min(SPLASH_BLOCK_LEN, -(-length // BLOCK_LEN) * BLOCK_LEN)
    padding = -length % block_len  # at the end, where no real token looks
    pad = ((0, 0), (0, 0), (0, padding), (0, 0))
    q, k, v = (jnp.pad(x, pad) for x in (scaled(q), k, v))
    mask = splash.CausalMask((length + padding, length + padding))
    names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
    blocks: Any = {name: block_len for name in names if name.startswith("block_")}
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(**blocks),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    out: Any = jax.vmap(kernel)(q, k, v)
    return out[:, :, :length]
