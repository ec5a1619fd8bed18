"""Settings of a low-rank adapter."""

import dataclasses
from typing import Literal, get_args

from e1jax.config.checks import (
    UserError,
    check_choice,
    check_integer,
    check_known,
    check_number,
    shown,
)
from e1jax.config.model import QUANTIZED, QuantizedForm

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]

TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter (LoRA, arXiv 2106.09685), which is trained while the model's own
    parameters are frozen."""

    rank: int = 0
    """Columns of A and rows of B; 0: no adapter, all parameters are trained."""
    alpha: float = 32.0
    """The products with A and B are scaled by alpha / rank."""
    targets: tuple[Target, ...] = TARGETS
    """Linear layers that get an adapter, in every block of the model."""
    quantize: QuantizedForm | None = None
    """Form of the frozen parameters, int8 in half the memory of bfloat16; null: as the
    model is stored."""

    def __post_init__(self):
        check_integer("adapter.rank", self.rank, 0)
        check_number("adapter.alpha", self.alpha, "above 0", lambda v: v > 0)
        if not self.targets:
            raise UserError("adapter.targets is empty; give linear layers, like [q, v]")
        check_known(self.targets, TARGETS, "adapter.targets")
        if len(set(self.targets)) < len(self.targets):
            raise UserError(
                f"adapter.targets names a layer twice: {shown(list(self.targets))}"
            )
        if self.quantize is not None:
            check_choice("adapter.quantize", self.quantize, QUANTIZED)
            if not self.rank:
                raise UserError(
                    "adapter.quantize is for the frozen parameters beside an adapter; set "
                    "adapter.rank, or leave it out"
                )

    @property
    def scale(self) -> float:
        """The factor of the adapter's products."""
        return self.alpha / self.rank


NO_ADAPTER = AdapterConfig()
