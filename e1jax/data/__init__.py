"""Problems, prompts and their batches, on the host."""

from e1jax.data.nano import held_out_problems, nano_problems
from e1jax.data.problems import HUB, NANO, Problem, load_problems
from e1jax.data.prompts import (
    DEFAULT_INSTRUCTION,
    default_instruction,
    prompt_text,
    request_seed,
)

__all__ = [
    "DEFAULT_INSTRUCTION",
    "HUB",
    "NANO",
    "Problem",
    "default_instruction",
    "held_out_problems",
    "load_problems",
    "nano_problems",
    "prompt_text",
    "request_seed",
]
