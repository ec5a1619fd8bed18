"""Parts that `sft` and `train` share: the optimizer and its schedule, and the run."""

from e1jax.training.optimizer import (
    apply_gradients,
    clip_by_norm,
    jit_update,
    learning_rates,
    make_optimizer,
)
from e1jax.training.run import Run, restore_or_init, running, write_model_files

__all__ = [
    "Run",
    "apply_gradients",
    "clip_by_norm",
    "jit_update",
    "learning_rates",
    "make_optimizer",
    "restore_or_init",
    "running",
    "write_model_files",
]
