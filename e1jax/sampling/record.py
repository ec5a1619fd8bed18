"""The record of a model and of its engine, beside a file of completions."""

from typing import Any

from e1jax.checkpoint.load import LoadedModel
from e1jax.sampling.engine import Engine


def model_record(loaded: LoadedModel, engine: Engine) -> dict[str, Any]:
    """What decides, besides requests, which completions come: the weights, by their
    content, and how the engine computes. JSON, under the names of the flags."""
    return {
        **loaded.record(),
        "kv_dtype": engine.kv_dtype,
        "cache_len": engine.cache_len,
    }


def older_record(loaded: LoadedModel) -> dict[str, Any]:
    """Values of `model_record` as `evaluate` of e1jax 0.1 wrote them, without a digest:
    the directory of the weights, so that of a run its step counted."""
    return {"model": str(loaded.files.weights.resolve())}
