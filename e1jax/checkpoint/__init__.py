"""Models and runs on disk: Hugging Face files, Orbax checkpoints, metrics.

`load.load_model` opens a Hugging Face directory, an e1jax checkpoint or a training run;
`runs.RunCheckpoints` writes and restores the checkpoints of a run.
"""

from e1jax.checkpoint.huggingface import (
    StoredTensor,
    hf_shapes,
    lazy_arrays,
    open_hf,
    read_config,
    write_hf_weights,
    write_json,
)
from e1jax.checkpoint.int8 import as_int8
from e1jax.checkpoint.load import (
    FORMAT_VERSION,
    LoadedModel,
    ModelFiles,
    find_model,
    load_model,
    read_manifest,
    read_tokenizer,
    resolve,
)
from e1jax.checkpoint.metrics import MetricsLog, NoLog, check_finite, import_wandb
from e1jax.checkpoint.params import (
    PARAMS,
    as_tree,
    check_saved,
    load_params,
    named_shapes,
    open_params,
    quantized,
    save_params,
)
from e1jax.checkpoint.runs import RunCheckpoints, abstract_state, find_params

__all__ = [
    "FORMAT_VERSION",
    "PARAMS",
    "LoadedModel",
    "MetricsLog",
    "ModelFiles",
    "NoLog",
    "RunCheckpoints",
    "StoredTensor",
    "abstract_state",
    "as_int8",
    "as_tree",
    "check_finite",
    "check_saved",
    "find_model",
    "find_params",
    "hf_shapes",
    "import_wandb",
    "lazy_arrays",
    "load_model",
    "load_params",
    "named_shapes",
    "open_hf",
    "open_params",
    "quantized",
    "read_config",
    "read_manifest",
    "read_tokenizer",
    "resolve",
    "save_params",
    "write_hf_weights",
    "write_json",
]
