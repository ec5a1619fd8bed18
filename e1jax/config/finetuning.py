"""Settings of fine-tuning a model on examples: YAML keys and flags of `sft`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from e1jax.config.adapter import NO_ADAPTER, AdapterConfig
from e1jax.config.checks import UNLIMITED, UserError, check_integer
from e1jax.config.texts import check_backslashes
from e1jax.config.training import AdamWConfig, CheckpointConfig


def is_for_sft(settings: Mapping[str, Any]) -> bool:
    """Whether settings, as a file holds them, are of `sft` and not of `train`."""
    data = settings.get("data")
    has_examples = isinstance(data, dict) and "examples" in data
    return has_examples or isinstance(settings.get("model"), dict)


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Examples to learn from."""

    examples: str
    """A file (JSON list, JSONL, parquet) or hub dataset (owner/name). A record holds
    messages, prompt and completion, or problem, thinking and solution."""
    instruction: str | None = None
    """Text after every problem; null: the one recorded with the model."""
    raw: bool = False
    """Whether a prompt is used as it is, without the chat template."""
    max_len: int = 4096
    """Tokens of a row, which several examples share; longer examples are left out, and
    counted."""

    def __post_init__(self):
        check_backslashes(self.instruction, "data.instruction")
        check_integer("data.max_len", self.max_len, 2, UNLIMITED)


@dataclasses.dataclass(frozen=True)
class FineTuningUpdateConfig:
    """How rows of examples are turned into parameter updates."""

    param_dtype: ClassVar[str] = "float32"  # as UpdateConfig has it

    batch_size: int = 32
    """Rows of data.max_len tokens in a step, on all devices together."""
    microbatch: int = 8
    """Rows of them that go through the model at a time."""
    remat: bool = True
    """Whether a layer's activations are computed again in the backward pass."""

    def __post_init__(self):
        for name in ("batch_size", "microbatch"):
            check_integer(f"update.{name}", getattr(self, name), 1)
        if self.batch_size % self.microbatch:
            raise UserError(
                f"update.batch_size={self.batch_size} is not a multiple of "
                f"update.microbatch={self.microbatch}; change one of them"
            )


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Loss on examples that are not trained on."""

    examples: str | None = None
    """As data.examples; null: no validation, the latest checkpoint is the best."""
    every: int = 100
    """Steps from one validation to the next; each is followed by a checkpoint, and the
    one with the lowest validation_loss is kept as the best."""

    def __post_init__(self):
        check_integer("validation.every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class FineTuningConfig:
    """Supervised fine-tuning of a model on examples. A new model on the nano task, whose
    settings give its sizes and not its name, is explained by --help with its --config, like
    configs/nano_sft.yaml."""

    model: str
    """Model to start from: hub id, Hugging Face or e1jax directory, run, nano."""
    data: ExamplesConfig
    steps: int | None = None
    """Optimizer steps of the whole run; set this or epochs."""
    epochs: int | None = None
    """Passes over the examples, each in an order of its own; set this or steps."""
    seed: int = 0
    """Fixes the order of the examples."""
    optimizer: AdamWConfig = AdamWConfig(learning_rate=1e-5)  # noqa: RUF009 (frozen)
    update: FineTuningUpdateConfig = FineTuningUpdateConfig()
    adapter: AdapterConfig = NO_ADAPTER
    validation: HeldOutConfig = HeldOutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()  # noqa: RUF009 (frozen)
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; null: float32 on a CPU, bfloat16 elsewhere."""
    mesh: str | None = None
    """Device mesh, like data=4,tensor=2; by default all devices on data."""
    wandb: str | None = None
    """Weights & Biases project that gets the metrics too; null: none."""

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            both = "neither is" if self.steps is None else "both are"
            raise UserError(f"set steps or epochs, one of them; {both} set")
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
