"""Functions of logits, in chunks, so that logits of all positions never exist."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from e1jax.config.model import ModelConfig
from e1jax.nn.model import unembed
from e1jax.nn.quantize import Params

# Tokens whose logits exist at a time: 152,064 of float32 for each of 512 are 311 MB. With
# fewer, a TPU spends its time on the gradient of the output matrix, which it reads and
# writes once per chunk.
CHUNK_TOKENS = 512


def map_logits(
    function: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    *,
    chunk_len: int | None = None,
) -> tuple[jax.Array, ...]:
    """`function(logits, targets)` of all positions: arrays [B, R], as many as it returns.

    It is called with [B, chunk_len, V] float32 and [B, chunk_len] for `chunk_len` positions
    of each row at a time (None: for about CHUNK_TOKENS tokens), and again in the backward
    pass. Rows are not mixed, so they may be split over devices.
    """
    batch, length = targets.shape
    if chunk_len is None:  # chunks of one size, so that none is mostly padding
        chunk_len = -(-length // max(1, round(batch * length / CHUNK_TOKENS)))
    chunk_len = min(chunk_len, length)
    num_chunks = -(-length // chunk_len)
    padding = num_chunks * chunk_len - length

    def split(x):  # [B, R, ...] to [chunks, B, chunk_len, ...]
        x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, num_chunks, chunk_len, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    @jax.checkpoint
    def step(carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        hidden, targets = chunk
        return carry, function(unembed(config, params, hidden), targets)

    _, results = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return tuple(map(join, results))


def target_logprobs(
    logits: Float[Array, "B R V"], targets: Int[Array, "B R"]
) -> Float[Array, "B R"]:
    """Log-softmax of the logits at the targets, in nats."""
    # Not a gather: it would send the logits of a vocabulary that is sharded over several
    # devices around.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    chosen = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)
