"""Command: supervised fine-tuning, of a model on examples or of a new one on the nano task.

    python -m e1jax.sft --config configs/nano_traces_sft.yaml
    python -m e1jax.sft --config configs/nano_sft.yaml

In order:
1. the configuration, the model and the examples, checked, and the run directory, which
   holds it as `config.yaml` beside `config.json` and the tokenizer files: the run directory
   is a model;
2. parameters and optimizer state, new or from the latest checkpoint, on the mesh;
3. each step: a batch from the host (Grain), split by rows over the mesh axis `data`, one
   jitted update with donated state, and a line of `metrics.jsonl`, which is read from the
   device once the next step is on its way;
4. every few steps: the loss on held-out examples, or how accurate each style of thinking
   on nano problems is, and a checkpoint with the position in the data, from which the run
   goes on bit for bit.

Settings whose `model` is a name fine-tune that model (`FineTuningConfig`); settings whose
`model` has sizes make a nano model (`SFTConfig`).
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.checkpoint.load import LoadedModel
from e1jax.checkpoint.metrics import import_wandb
from e1jax.checkpoint.runs import RunCheckpoints, abstract_state
from e1jax.cli.command import run_command
from e1jax.config.checks import UserError
from e1jax.config.finetuning import FineTuningConfig
from e1jax.config.load import (
    given_settings,
    load_config,
    load_config_and_flags,
    record_config,
)
from e1jax.config.model import ModelConfig
from e1jax.config.training import HostsConfig, SFTConfig
from e1jax.data.examples import Example, examples_digest, read_examples
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
from e1jax.data.packing import Packed, packed_batches
from e1jax.data.prompts import default_instruction
from e1jax.nn.model import (
    abstract_params,
    forward,
    init_params,
    unembed,
)
from e1jax.nn.quantize import Params
from e1jax.sharding.hosts import is_first, joined
from e1jax.sharding.mesh import make_mesh, note_undivided, sharding
from e1jax.sharding.runtime import (
    COMPILER_OPTIONS,
    enough_memory,
    use_compilation_cache,
)
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer
from e1jax.training import (
    Run,
    apply_gradients,
    check_processes,
    computed_in,
    finetuning,
    jit_update,
    learning_rates,
    load_trainable,
    make_optimizer,
    owning_run,
    prepare_run,
    restore_or_init,
    running,
    starting_params,
    trained_shapes,
    write_model_files,
)

if TYPE_CHECKING:
    import grain

EVALUATED = 256  # held-out problems on which the styles of thinking are measured


NANO_ADVICE = "lower first.batch_size and second.batch_size, or use more devices"


ADVICE = "lower update.microbatch or data.max_len, set update.remat or use more devices"


PROG = "python -m e1jax.sft"


def main() -> None:
    """`python -m e1jax.sft`."""
    argv = sys.argv[1:]
    if not names_model(argv):
        train(*load_config(SFTConfig, argv, PROG))
        return
    config, run_dir, hosts = load_config_and_flags(
        FineTuningConfig, HostsConfig, argv, PROG
    )
    with joined(hosts):
        fine_tune(config, run_dir)


def names_model(argv: Sequence[str]) -> bool:
    """Whether a command line is for FineTuningConfig, which names a model and data, and
    not for SFTConfig; so is one without a file."""
    given = given_settings(argv)
    flags = {word.partition("=")[0] for word in argv}
    is_name = isinstance(given.get("model"), str) or "--model" in flags
    return is_name or not given or "data" in given


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run learns."""

    batches: "grain.DatasetIterator"
    # (params, state, batch) -> (params, state, metrics, tokens to be logged per second)
    update: Callable[..., tuple[Params, Any, dict[str, Any], int | None]]
    schedule: optax.Schedule
    measure: Callable[[Params], dict[str, float]] | None
    every: int  # steps from one measurement, which is saved, to the next
    advice: str  # where memory does not suffice


def take_steps(run: Run, task: Task, params: Params, state: Any) -> None:
    """Learns, measures and saves, until the run ends."""
    while run.goes_on():
        with enough_memory("an update", task.advice):
            batch = next(task.batches)
            params, state, metrics, tokens = task.update(params, state, batch)
            rate = task.schedule(run.step)
            run.add({**metrics, "learning_rate": rate}, tokens)
        measured = {}
        if task.measure and run.is_due(task.every):
            measured = task.measure(params)
        if measured or run.is_due(run.config.checkpoint.every):
            run.save(params, state, task.batches.get_state(), measured)
    if run.step > run.saved:
        run.save(params, state, task.batches.get_state(), {})


# Any model, on examples.


def fine_tune(config: FineTuningConfig, run_dir: Path) -> None:
    """Trains to the last step, from where the run directory left off.

    Of several processes, each packs the same rows and learns its share of them; the first
    one writes everything but checkpoints, and prints.

    Raises UserError if examples are wrong, if the directory was begun with other settings,
    another model or other examples, if another run writes there, if the processes differ in
    any of these, or once a metric is not a finite number; KeyboardInterrupt, after saving,
    if Ctrl-C came.
    """
    if config.wandb:
        import_wandb(config.wandb)  # or says, now, that it is missing
    loaded = load_trainable(config)
    data = loaded.mesh.shape["data"]
    if config.update.microbatch % data:
        raise UserError(
            f"update.microbatch={config.update.microbatch} is not a multiple of the "
            f"mesh's data={data}; change one of them"
        )
    # The examples state no budgets, and so will no prompt of the model.
    tokenizer = dataclasses.replace(loaded.tokenizer, budget_text=None)
    loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    instruction = config.data.instruction
    if instruction is None:
        instruction = default_instruction(tokenizer)
    examples = kept_examples(config, config.data.examples, tokenizer, instruction)
    held_out = []
    if name := config.validation.examples:
        held_out = kept_examples(config, name, tokenizer, instruction)
    origin = {
        "model": loaded.files.digest,
        "data.examples": examples_digest(examples),
        "validation.examples": examples_digest(held_out),
    }
    check_processes(config, run_dir, origin)
    with owning_run(run_dir):
        prepare_run(config, loaded, instruction, run_dir, origin)
        use_compilation_cache()
        _fine_tune(config, loaded, examples, held_out, run_dir)


def _fine_tune(
    config: FineTuningConfig,
    loaded: LoadedModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    run_dir: Path,
) -> None:
    def batches_of_run():
        return pack(config, examples, config.update.batch_size, config.epochs)

    batches, steps = batches_of_run(), config.steps
    if steps is None:
        steps = sum(1 for _ in batches_of_run())
    optimizer = make_optimizer(config.optimizer, steps)
    frozen, shapes = trained_shapes(config.adapter, loaded)
    shapes = (shapes, abstract_state(optimizer, shapes, loaded.mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    dtype, microbatch = computed_in(config), config.update.microbatch
    update = finetuning.make_update(
        *(loaded.config, optimizer, dtype, shardings),
        remat=config.update.remat,
        frozen=frozen,
    )
    base, init = starting_params(config.adapter, loaded, shapes[0], config.seed)

    def learn(params, state, packed: Packed):
        rows = finetuning.place_rows(packed.rows, microbatch, loaded.mesh)
        params, state, metrics = update(params, state, rows, base)
        metrics["epoch"] = packed.passed / len(examples)
        return params, state, metrics, packed.tokens

    measure = None
    if held_out:
        rows = [packed.rows for packed in pack(config, held_out, microbatch, epochs=1)]
        validate = finetuning.make_validation(
            loaded.config, dtype, shardings[0], rows, frozen
        )
        measure = functools.partial(validate, base=base)
    task = Task(
        batches,
        learn,
        learning_rates(config.optimizer, steps),
        measure,
        config.validation.every,
        ADVICE,
    )
    best = "validation_loss" if held_out else None
    checkpoints = RunCheckpoints(run_dir, config.checkpoint, best, lower_is_better=True)
    step, params, state = restore_or_init(
        checkpoints, optimizer.init, shapes, init, batches
    )
    with running(
        run_dir,
        config,
        checkpoints,
        step,
        steps,
        headline=["loss", "token_accuracy", "epoch"],
        next_command="python -m e1jax.sample",
        wandb=config.wandb,
    ) as run:
        take_steps(run, task, params, state)


def kept_examples(
    config: FineTuningConfig, name: str, tokenizer: Tokenizer, instruction: str
) -> list[Example]:
    """The examples of a file; a note on stderr counts the longer ones, which are left out."""
    longest = config.data.max_len
    examples, dropped = read_examples(
        name, tokenizer, instruction, longest, raw=config.data.raw
    )
    if dropped and is_first():
        print(
            f"note: {dropped} of {len(examples) + dropped} examples of {name} have more "
            f"than {longest} tokens and are left out",
            file=sys.stderr,
        )
    return examples


def pack(
    config: FineTuningConfig,
    examples: Sequence[Example],
    batch_size: int,
    epochs: int | None,
) -> "grain.DatasetIterator[Packed]":
    """Batches of the examples, see `packed_batches`."""
    return packed_batches(
        examples,
        batch_size=batch_size,
        max_len=config.data.max_len,
        seed=config.seed,
        epochs=epochs,
    )


# A new model, on the nano task.


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
    shapes = abstract_params(config.model, mesh, jnp.float32)
    note_undivided(config.model, shapes)
    shapes = (shapes, abstract_state(optimizer, shapes, mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    update = make_update(config.model, optimizer, shardings)
    task = Task(
        batches,
        lambda params, state, batch: (*update(params, state, place(batch, mesh)), None),
        learning_rates(config.optimizer, config.steps),
        functools.partial(style_accuracy, config.model, styles=styles),
        config.checkpoint.every,
        NANO_ADVICE,
    )
    checkpoints = RunCheckpoints(run_dir, config.checkpoint)
    step, params, state = restore_or_init(
        checkpoints,
        optimizer.init,
        shapes,
        lambda: init_params(config.model, mesh, jnp.float32, config.seed),
        batches,
    )
    with running(
        run_dir,
        config,
        checkpoints,
        step,
        config.steps,
        headline=["loss", "token_accuracy"],
        next_command="python -m e1jax.sample",
    ) as run:
        take_steps(run, task, params, state)


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
    local = write_model_files(
        run_dir,
        config.model.to_hf("float32"),
        instruction="",
        budget_text=config.stated.text,
        write_tokenizer=lambda directory: write_byte_tokenizer(directory, WORDS),
    )
    return Tokenizer.from_dir(local)


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
