"""Gradients of a batch, optimizers, their learning rates, and the step that they take."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from e1jax.config.training import AdamWConfig, LossConfig, MuonConfig
from e1jax.sharding.fsdp import sum_over_data
from e1jax.sharding.runtime import COMPILER_OPTIONS


def learning_rates(config: AdamWConfig | MuonConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step, counted from 0, of a run of `steps` steps.

    Muon: linear from 0 to the peak, then a cosine down to `final` times the peak.
    AdamW: linear up to the peak, which the last warm-up step has; then `schedule`, which
    would be 0 one step after the last.
    """
    if isinstance(config, MuonConfig):
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=int(config.warmup * steps),
            decay_steps=steps,
            end_value=config.learning_rate * config.final,
        )
    warmup = config.warmup_steps
    falls = {
        "constant": lambda left: 1.0,
        "linear": lambda left: left,
        "cosine": lambda left: 0.5 - 0.5 * jnp.cos(jnp.pi * left),
    }

    # Optax's linear and cosine schedules round differently: a run that was begun with
    # these rates would not go on bit for bit.
    def rate(step):
        left = (steps - step) / max(1, steps - warmup)
        fall = falls[config.schedule](jnp.clip(left, 0, 1))
        rise = jnp.minimum(1, (step + 1) / max(1, warmup))
        return config.learning_rate * rise * fall

    return rate


def entropy_coefs(config: LossConfig, steps: int) -> optax.Schedule:
    """Weight of the entropy at each step, counted from 0, of a run of `steps` steps:
    constant, or linear to `entropy_coef_end`, which the last step has."""
    if config.entropy_coef_end is None:
        return optax.constant_schedule(config.entropy_coef)
    return optax.linear_schedule(
        config.entropy_coef, config.entropy_coef_end, max(1, steps - 1)
    )


def make_optimizer(
    config: AdamWConfig | MuonConfig, steps: int, updates_per_step: int = 1
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps, after the gradient is clipped by its norm.

    All updates of a step have the learning rate of that step.
    """
    schedule = learning_rates(config, steps)

    def rates(count):
        return schedule(jnp.asarray(count) // updates_per_step)

    if isinstance(config, MuonConfig):
        # Not clip_by_norm, which rounds differently: the bundled model was made so.
        clip = optax.clip_by_global_norm(config.max_grad_norm)
        return optax.chain(clip, muon(config, rates))
    adamw = optax.adamw(
        rates, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    return optax.chain(clip_by_norm(config.max_grad_norm), adamw)


def muon(
    config: MuonConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the layers.

    Layers are stacked, so a matrix is one index of the leading dim of an array
    [L, in, out], and each is orthogonalised on its own. Everything else, the embedding
    included, is updated by Adam. Updates are scaled to the root mean square that Adam's
    have (arXiv 2502.16982, section 2.2), so both share a learning rate.
    """

    def matrices(params: optax.Params) -> Any:
        each_layer = optax.contrib.MuonDimensionNumbers(1, 2)
        return jax.tree.map(lambda p: each_layer if p.ndim == 3 else None, params)

    return optax.contrib.muon(
        learning_rate,
        adam_b2=config.adam_b2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm by one factor for all gradients. That one divides by
    the norm first, which is one pass more over arrays as large as the parameters."""

    def clip(grads, _):
        factor = jnp.minimum(1, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clip)


def sum_gradients(
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: optax.Params,
    microbatches: Any,
) -> tuple[optax.Params, dict[str, jax.Array]]:
    """Sums, over micro-batches, of the gradients and metrics of `loss(params, microbatch)`.

    For use in `map_over_data`, with micro-batches stacked on the leading dim of arrays
    [M, ...]. Gradients are float32 and of this place's shards; metrics are summed over
    `data` too. A mean is a loss whose weights sum to 1 over all of them.
    """

    def add(grads, microbatch):
        new, metrics = jax.grad(loss, has_aux=True)(params, microbatch)
        return jax.tree.map(jnp.add, grads, new), metrics

    # So that gradients are of float32, whatever the parameters are.
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    if len(jax.tree.leaves(microbatches)[0]) == 1:
        # XLA goes through a loop of one step twice (0.10.2).
        grads, metrics = add(zeros, jax.tree.map(lambda x: x[0], microbatches))
        return grads, sum_over_data(metrics)
    grads, metrics = jax.lax.scan(add, zeros, microbatches)
    return grads, sum_over_data(jax.tree.map(jnp.sum, metrics))


def apply_gradients(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    grads: optax.Params,
) -> tuple[optax.Params, optax.OptState, Float[Array, ""]]:
    """New parameters and optimizer state, and the norm of the gradients, unclipped.

    Gradients may have another dtype than the parameters; the optimizer gets them in
    the parameters' dtype.
    """
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, norm


def jit_update(update: Callable[..., Any], shardings: tuple[Any, Any]) -> Any:
    """An update, (params, state, ...) -> (params, state, metrics), compiled.

    The first two arguments are donated; the new ones have `shardings`.
    """
    return jax.jit(
        update,
        donate_argnums=(0, 1),
        out_shardings=(*shardings, None),
        compiler_options=COMPILER_OPTIONS,
    )
