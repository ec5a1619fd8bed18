"""The record of a model and of its engine, beside a file of completions."""

from typing import Any

from e1jax.checkpoint.load import LoadedModel
from e1jax.config.sampling import SamplingParams
from e1jax.sampling.engine import Engine


def model_record(loaded: LoadedModel, engine: Engine) -> dict[str, Any]:
    """What decides, besides requests, which completions come: the weights, by their
    content, and how the engine computes. JSON, under the names of the flags."""
    return {
        **loaded.record(),
        "kv_dtype": engine.kv_dtype,
        "cache_len": engine.cache_len,
        "budget_text": engine.tokenizer.budget_text,
    }


def upgrade_record(settings: dict[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """Settings of an earlier run, of which an older version did not record all.

    A parameter of sampling that there was none of then has its default. e1jax 0.1
    recorded no digest of the weights, so that they are taken for the same ones; as
    `model`, `evaluate` wrote the directory of the weights.
    """
    upgraded = {**SamplingParams().record(), **settings}
    if "weights" not in settings:
        today = loaded.record()
        upgraded |= {name: today[name] for name in ("step", "weights")}
        if settings.get("model") == str(loaded.files.weights.resolve()):
            upgraded["model"] = today["model"]
    return upgraded
