"""Budgeted reasoning on TPUs: Elastic Reasoning (arXiv 2505.05315) in JAX."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Engine": "e1jax.sampling.engine",
    "Completion": "e1jax.sampling.completion",
    "Event": "e1jax.sampling.completion",
    "SamplingParams": "e1jax.config.sampling",
}
__all__ = ["Completion", "Engine", "Event", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from e1jax.config.sampling import SamplingParams
    from e1jax.sampling.completion import Completion, Event
    from e1jax.sampling.engine import Engine


def __getattr__(name: str):
    # On first use, so that importing one module does not import them all.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'e1jax' has no attribute {name!r}")
