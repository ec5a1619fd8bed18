"""Parts that `sft` and `train` share: the optimizer and its schedule, and the run."""

from e1jax.training.frozen import (
    ALL_TRAINED,
    Frozen,
    starting_params,
    trained_shapes,
)
from e1jax.training.optimizer import (
    apply_gradients,
    clip_by_norm,
    entropy_coefs,
    jit_update,
    learning_rates,
    make_optimizer,
    sum_gradients,
)
from e1jax.training.run import (
    Run,
    check_processes,
    computed_in,
    load_trainable,
    owning_run,
    prepare_run,
    record_origin,
    restore_or_init,
    running,
    write_model_files,
)

__all__ = [
    "ALL_TRAINED",
    "Frozen",
    "Run",
    "apply_gradients",
    "check_processes",
    "clip_by_norm",
    "computed_in",
    "entropy_coefs",
    "jit_update",
    "learning_rates",
    "load_trainable",
    "make_optimizer",
    "owning_run",
    "prepare_run",
    "record_origin",
    "restore_or_init",
    "running",
    "starting_params",
    "sum_gradients",
    "trained_shapes",
    "write_model_files",
]
