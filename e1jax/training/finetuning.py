"""Fine-tuning on packed examples: the loss, a jitted update, the loss of held-out ones."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from e1jax.config.model import ModelConfig
from e1jax.data.packing import Rows
from e1jax.nn.chunks import map_logits, target_logprobs
from e1jax.nn.model import GatherParams, forward
from e1jax.nn.quantize import Params
from e1jax.sharding.fsdp import data_specs, map_over_data, sum_over_data
from e1jax.sharding.runtime import COMPILER_OPTIONS
from e1jax.training.frozen import ALL_TRAINED, Frozen
from e1jax.training.optimizer import apply_gradients, jit_update, sum_gradients


def place_rows(rows: Rows, microbatch: int, mesh: Mesh) -> Rows:
    """Rows [B, T] on the devices, as micro-batches [M, microbatch, T] whose rows are
    divided over `data`. All processes call it with the same rows, and each device gets its
    own."""
    over_data = NamedSharding(mesh, PartitionSpec(None, "data"))

    def put(x: np.ndarray) -> jax.Array:
        x = x.reshape(-1, microbatch, x.shape[-1])
        return jax.make_array_from_process_local_data(over_data, x, x.shape)

    return jax.tree.map(put, rows)


def token_sums(
    model: ModelConfig,
    params: Params,
    rows: Rows,
    *,
    mesh: Mesh | None = None,
    remat: bool = False,
    gather_params: GatherParams = lambda part, name: part,
) -> dict[str, Float[Array, ""]]:
    """Sums over the learned tokens of rows [B, T]: `loss`, the negative log-likelihood in
    nats, and `token_accuracy`, 1 for each that is the most probable one.

    A token is predicted from the position before it, and sees its own example alone.
    `mesh`, `remat` and `gather_params` go to model.forward.
    """
    hidden, _ = forward(
        model,
        params,
        rows.tokens,
        rows.positions,
        mesh=mesh,
        remat=remat,
        gather_params=gather_params,
        segments=rows.segments,
    )

    def of_chunk(logits, targets):
        logprobs = target_logprobs(logits, targets)
        return logprobs, logits.argmax(axis=-1) == targets

    name = "embedding" if model.tie_word_embeddings else "lm_head"
    head = {name: gather_params(params[name], name)}  # for all chunks at once
    logprobs, hits = map_logits(
        of_chunk, model, head, hidden[:, :-1], rows.tokens[:, 1:]
    )
    learned = rows.loss_mask[:, 1:]
    nll = jnp.where(learned, -logprobs, 0.0).sum()
    return {"loss": nll, "token_accuracy": (hits & learned).sum(dtype=jnp.float32)}


def make_update(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    shardings: tuple[Any, Any],
    *,
    remat: bool,
    frozen: Frozen = ALL_TRAINED,
):
    """One jitted update by the rows of a step: (params, state, rows [M, B, T], base=None) ->
    (params, state, metrics).

    The loss is the mean over all learned tokens of the step, whichever micro-batch and
    device they are in. `base` are the frozen parameters, if there are any. The first two
    arguments are donated, and sharded as `shardings` says. Each place on the mesh axis
    `data` goes through its own rows with the parameters gathered layer by layer, in
    `dtype`; gradients are summed up in float32.
    """
    mesh = jax.tree.leaves(shardings[0])[0].mesh
    gather_params = frozen.make_gather_params(shardings[0], dtype)

    def of_shard(params, base, rows, num_learned):
        def loss(params, microbatch):
            sums = token_sums(
                model,
                frozen.join(base, params),
                microbatch,
                mesh=mesh,
                remat=remat,
                gather_params=gather_params,
            )
            metrics = {name: value / num_learned for name, value in sums.items()}
            return metrics["loss"], metrics

        return sum_gradients(loss, params, rows)

    specs, rows = data_specs(shardings[0]), PartitionSpec(None, "data")
    in_specs = (specs, data_specs(frozen.shardings), rows, PartitionSpec())
    of_shards = map_over_data(of_shard, mesh, in_specs, (specs, PartitionSpec()))

    def update(params, state, rows, base=None):
        num_learned = rows.loss_mask.sum(dtype=jnp.float32)
        grads, metrics = of_shards(params, base, rows, num_learned)
        params, state, norm = apply_gradients(optimizer, params, state, grads)
        return params, state, metrics | {"tokens": num_learned, "grad_norm": norm}

    return jit_update(update, shardings)


def make_validation(
    model: ModelConfig,
    dtype: Any,
    shardings: Any,
    batches: Sequence[Rows],
    frozen: Frozen = ALL_TRAINED,
) -> Callable[..., dict[str, float]]:
    """(params, base=None) -> `validation_loss` and `validation_token_accuracy`, means over
    the learned tokens of all `batches`, each of which ([B, T], on the host) is gone through
    at once; see make_update."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    gather_params = frozen.make_gather_params(shardings, dtype)
    num_learned = sum(int(rows.loss_mask.sum()) for rows in batches)
    placed = [place_rows(rows, len(rows.tokens), mesh) for rows in batches]

    def of_shard(params, base, rows):
        params, only = frozen.join(base, params), jax.tree.map(lambda x: x[0], rows)
        sums = token_sums(model, params, only, mesh=mesh, gather_params=gather_params)
        return sum_over_data(sums)

    specs, rows = data_specs(shardings), PartitionSpec(None, "data")
    in_specs = (specs, data_specs(frozen.shardings), rows)
    of_shards = map_over_data(of_shard, mesh, in_specs, PartitionSpec())
    compiled = jax.jit(of_shards, compiler_options=COMPILER_OPTIONS)

    def validate(params: Params, base: Params | None = None) -> dict[str, float]:
        sums = [compiled(params, base, rows) for rows in placed]
        total = jax.tree.map(lambda *each: np.sum(each, dtype=np.float64), *sums)
        return {
            f"validation_{name}": float(value / num_learned)
            for name, value in total.items()
        }

    return validate
