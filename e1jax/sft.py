"""Command: supervised fine-tuning of a new model on the nano task.

    python -m e1jax.sft --config configs/nano_sft.yaml

In order:
1. the configuration, checked, and the run directory, which holds it as `config.yaml`
   beside `config.json` and the tokenizer files: the run directory is a model;
2. parameters and optimizer state, new or from the latest checkpoint, on the mesh;
3. each step: a batch from the host (Grain), split by rows over the mesh axis `data`, one
   jitted update with donated state, and a line of `metrics.jsonl`, which is read from the
   device once the next step is on its way;
4. every few steps: how accurate each style of thinking is on held-out problems, and a
   checkpoint with the position in the data, from which the run goes on bit for bit.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.checkpoint.runs import RunCheckpoints, abstract_state
from e1jax.cli.command import run_command
from e1jax.config.checks import UserError
from e1jax.config.load import load_config, record_config
from e1jax.config.model import ModelConfig
from e1jax.config.training import SFTConfig
from e1jax.data.nano import (
    NUM_IDS,
    WORDS,
    Batch,
    NanoProblem,
    encode_prompt,
    nano_problems,
    pad_rows,
    sft_batches,
)
from e1jax.nn.model import abstract_params, forward, init_params, unembed
from e1jax.nn.quantize import Params
from e1jax.sharding.mesh import make_mesh, note_undivided, sharding
from e1jax.sharding.runtime import (
    COMPILER_OPTIONS,
    enough_memory,
    use_compilation_cache,
)
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer
from e1jax.training import (
    apply_gradients,
    jit_update,
    learning_rates,
    make_optimizer,
    owning_run,
    restore_or_init,
    running,
    write_model_files,
)

EVALUATED = 256  # held-out problems on which the styles of thinking are measured
ADVICE = "lower first.batch_size and second.batch_size, or use more devices"


def main() -> None:
    """`python -m e1jax.sft`."""
    train(*load_config(SFTConfig, sys.argv[1:], "python -m e1jax.sft"))


def train(config: SFTConfig, run_dir: Path) -> None:
    """Trains to the last step, from where the run directory left off.

    Raises UserError if the directory was begun with other settings, if another run writes
    there, or once the loss is not a finite number; KeyboardInterrupt, after saving, if
    Ctrl-C came.
    """
    if config.model.vocab_size < NUM_IDS:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small; "
            f"the nano tokenizer has {NUM_IDS} ids"
        )
    mesh = make_mesh(config.mesh, config.model)
    check_rows(config, mesh)
    with owning_run(run_dir):
        _train(config, run_dir, mesh)


def _train(config: SFTConfig, run_dir: Path, mesh: Mesh) -> None:
    tokenizer = prepare(config, run_dir)
    use_compilation_cache()
    styles = style_batches(nano_problems(EVALUATED, held_out=True), tokenizer)
    batches = sft_batches(config, tokenizer)

    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rates(config.optimizer, config.steps)
    shapes = abstract_params(config.model, mesh, jnp.float32)
    note_undivided(config.model, shapes)
    shapes = (shapes, abstract_state(optimizer, shapes, mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    update = make_update(config.model, optimizer, shardings)
    checkpoints = RunCheckpoints(run_dir, config.checkpoint)
    step, params, state = restore_or_init(
        checkpoints,
        optimizer,
        shapes,
        lambda: init_params(config.model, mesh, jnp.float32, config.seed),
        batches,
    )
    with running(
        run_dir,
        config,
        checkpoints,
        step,
        headline=["loss", "token_accuracy"],
        next_command="python -m e1jax.sample",
    ) as run:
        while run.goes_on():
            with enough_memory("an update", ADVICE):
                batch = place(next(batches), mesh)
                params, state, metrics = update(params, state, batch)
                run.add({**metrics, "learning_rate": schedule(run.step)})
            if run.is_due(config.checkpoint.every):
                measured = style_accuracy(config.model, params, styles)
                run.save(params, state, batches.get_state(), measured)
        if run.step > run.saved:
            run.save(params, state, batches.get_state(), {})


def check_rows(config: SFTConfig, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the rows of a batch: each device would compute
    all of them."""
    data = mesh.shape["data"]
    for name, mix in (("first", config.first), ("second", config.second)):
        if mix.batch_size % data:
            raise UserError(
                f"{name}.batch_size={mix.batch_size} is not a multiple of the mesh's "
                f"data={data}; change one of them"
            )


def prepare(config: SFTConfig, run_dir: Path) -> Tokenizer:
    """Makes the run directory a model: writes settings, sizes and tokenizer."""
    record_config(config, run_dir)
    write_model_files(
        run_dir,
        config.model.to_hf("float32"),
        instruction="",
        budget_text=config.stated.text,
        write_tokenizer=lambda directory: write_byte_tokenizer(directory, WORDS),
    )
    return Tokenizer.from_dir(run_dir)


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the devices, its rows split over the mesh axis `data`."""
    return {
        name: jax.device_put(array, sharding(mesh, ("rows", None), array.shape))
        for name, array in batch.items()
    }


def sft_loss(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood of the masked tokens, and metrics of the batch."""
    logits = _logits(config, params, tokens)
    targets, mask = tokens[:, 1:], loss_mask[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (logits.argmax(axis=-1) == targets) * mask
    loss = (nll * mask).sum() / mask.sum()
    accuracy = hits.sum() / mask.sum()
    return loss, {"loss": loss, "token_accuracy": accuracy, "tokens": mask.sum()}


def make_update(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: tuple[Any, Any],
):
    """One jitted step: (params, state, batch) -> (params, state, metrics).

    The first two arguments are donated, and sharded as `shardings` says. It is compiled
    once for each shape of a batch.
    """

    def update(params, state, batch):
        grads, metrics = jax.grad(sft_loss, argnums=1, has_aux=True)(
            config, params, **batch
        )
        params, state, norm = apply_gradients(optimizer, params, state, grads)
        return params, state, metrics | {"grad_norm": norm}

    return jit_update(update, shardings)


def style_batches(
    problems: list[NanoProblem], tokenizer: Tokenizer
) -> dict[str, Batch]:
    """One pass over each problem in either style, as if the model had written it.

    The mask leaves out the second token of a pass, the one that chooses the style.
    """

    def rows(write: Callable[[NanoProblem], str]):
        for problem in problems:
            prompt = encode_prompt(problem, tokenizer)
            ids = tokenizer.encode(write(problem))
            yield prompt + ids, [0] * len(prompt) + [1, 0] + [1] * (len(ids) - 2)

    return {
        "terse": pad_rows(list(rows(NanoProblem.terse)), tokenizer.eos_id),
        "verbose": pad_rows(list(rows(NanoProblem.verbose)), tokenizer.eos_id),
    }


def style_accuracy(
    config: ModelConfig, params: Params, styles: dict[str, Batch]
) -> dict[str, float]:
    """Share of the problems of which the model gets every token right, by style.

    A pass is right if each of its tokens is the most probable one after the tokens before it.
    Reinforcement learning can only raise a style that is accurate to begin with.
    """
    return {
        f"{style}_accuracy": float(_whole_pass(config, params, **batch))
        for style, batch in styles.items()
    }


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def _whole_pass(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    hits = _logits(config, params, tokens).argmax(axis=-1) == tokens[:, 1:]
    return (hits | (loss_mask[:, 1:] == 0)).all(axis=1).mean(dtype=jnp.float32)


def _logits(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T1 V"]:
    """Logits of every next token but the one after the last."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(config, params, tokens, positions)
    return unembed(config, params, hidden[:, :-1])


if __name__ == "__main__":
    run_command(main)
