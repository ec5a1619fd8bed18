"""The model: layers, attention and the key/value cache, and the kernels below them.

The other floors call `model.forward` and `model.unembed`.
"""

from e1jax.nn.cache import KVCache, init_cache
from e1jax.nn.model import (
    Params,
    abstract_params,
    forward,
    init_params,
    unembed,
)

__all__ = [
    "KVCache",
    "Params",
    "abstract_params",
    "forward",
    "init_cache",
    "init_params",
    "unembed",
]
