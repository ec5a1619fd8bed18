"""Adapters on disk: as a run saves them, and as the library peft does.

A run keeps A and B as float32, under the names of the tree ("attention/q/a"). peft keeps a
tensor per layer, each transposed, in `adapter_model.safetensors`, and its settings in
`adapter_config.json`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from e1jax.checkpoint.huggingface import (
    StoredTensor,
    hf_names,
    read_tensors,
    write_json,
)
from e1jax.checkpoint.lazy import LazyArray
from e1jax.checkpoint.params import (
    check_same,
    named_leaves,
    on_one_device,
    read_metadata,
    restore_lazily,
)
from e1jax.cli.files import INTEGER, NUMBER, TEXT, read_json
from e1jax.config.adapter import TARGETS, AdapterConfig, Target
from e1jax.config.checks import UserError, check_known, shown
from e1jax.config.load import read_yaml
from e1jax.config.model import ModelConfig
from e1jax.nn.model import abstract_adapter
from e1jax.nn.quantize import Params

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# Keys of adapter_config.json that change what an adapter computes, and the only values that
# are implemented here.
_ONLY_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


@dataclasses.dataclass(frozen=True)
class AdapterOrigin:
    """An adapter's settings, and the name of the model that it was trained beside."""

    settings: AdapterConfig
    base: str | None


def of_run(run_dir: Path) -> AdapterOrigin | None:
    """Of the adapter that a run trained; None if it trained all parameters."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return None
    config = read_yaml(file)
    settings = config.get("adapter")
    if not isinstance(settings, dict) or not settings.get("rank"):
        return None
    known = [field.name for field in dataclasses.fields(AdapterConfig)]
    check_known(settings, known, f"{file}: adapter")
    if isinstance(settings.get("targets"), list):
        settings["targets"] = tuple(settings["targets"])
    return AdapterOrigin(AdapterConfig(**settings), config.get("model"))


def of_peft(directory: Path) -> AdapterOrigin:
    """Of an adapter in the format of peft. Raises UserError for anything but LoRA of the
    linear layers that `AdapterConfig.targets` names, alike in all of them."""
    file = directory / PEFT_CONFIG
    schema = {"peft_type": TEXT, "r": INTEGER, "lora_alpha": NUMBER}
    saved = read_json(file, schema)
    for key, values in _ONLY_VALUES.items():
        if key in saved and saved[key] not in values:
            raise UserError(
                f"{file} has {key}={shown(saved[key])}, which e1jax does not have; it reads "
                f"{key}={shown(values[0])}"
            )
    rank, alpha = saved["r"], float(saved["lora_alpha"])
    if saved.get("use_rslora"):  # divides by the root of the rank
        alpha *= math.sqrt(rank)
    names = " ".join(read_tensors(directory / PEFT_WEIGHTS))
    targets: tuple[Target, ...] = tuple(
        t for t in TARGETS if re.search(rf"\.{t}_proj\.lora_A\.", names)
    )
    if not targets:
        raise UserError(
            f"{directory / PEFT_WEIGHTS} holds no lora_A of {', '.join(TARGETS)}, so it is "
            "no adapter that e1jax reads"
        )
    base = saved.get("base_model_name_or_path")
    return AdapterOrigin(AdapterConfig(rank, alpha, targets), base)


def check_saved_adapter(
    weights: Path, config: ModelConfig, adapter: AdapterConfig
) -> Mapping[str, Any]:
    """Shape and dtype of every array of an adapter, by its name in the files.

    Raises UserError if it cannot be read, or is of a model of other sizes.
    """
    if _is_peft(weights):
        found, expected = read_tensors(weights / PEFT_WEIGHTS), {}
        for name, array in named_leaves(_on_one(config, adapter)).items():
            turned = array.shape[:0:-1]
            expected |= dict.fromkeys(_peft_names(config, name), turned)
    else:
        found = read_metadata(weights)
        leaves = named_leaves(_on_one(config, adapter))
        expected = {name: array.shape for name, array in leaves.items()}
    shapes = {name: array.shape for name, array in found.items()}
    check_same(shapes, expected, str(weights))
    return found


def read_adapter(
    weights: Path, config: ModelConfig, adapter: AdapterConfig
) -> dict[str, np.ndarray]:
    """The arrays of an adapter by name ("attention/q/a"), float32, in host memory."""
    abstract = _on_one(config, adapter)
    if not _is_peft(weights):
        lazy = restore_lazily(weights, abstract)
        return {name: _whole(array) for name, array in lazy.items()}
    tensors = read_tensors(weights / PEFT_WEIGHTS)

    def stacked(name: str) -> np.ndarray:
        layers = [_read(tensors[one]).T for one in _peft_names(config, name)]
        return np.stack(layers)

    return {name: stacked(name) for name in named_leaves(abstract)}


def write_peft(
    directory: Path,
    config: ModelConfig,
    origin: AdapterOrigin,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes an adapter, as `read_adapter` gives it, in the format of peft."""
    tensors = {
        one: np.ascontiguousarray(layer.T)
        for name, array in arrays.items()
        for one, layer in zip(_peft_names(config, name), array, strict=True)
    }
    file = directory / PEFT_WEIGHTS
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    settings, alpha = origin.settings, origin.settings.alpha
    saved = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.base,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": [f"{name}_proj" for name in settings.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / PEFT_CONFIG, saved)


def merged(
    arrays: Mapping[str, LazyArray],
    adapter: Mapping[str, np.ndarray],
    scale: float,
) -> dict[str, LazyArray]:
    """A model's arrays by name, the kernels with the adapter added: the sum is made in
    float32, of the part that is read, and rounded to the dtype of the kernel."""

    def with_adapter(kernel: LazyArray, a: np.ndarray, b: np.ndarray) -> LazyArray:
        def read(part: tuple[slice, ...]) -> np.ndarray:
            layers, inputs, outputs = part
            added = np.float32(scale) * (a[layers, inputs] @ b[layers, :, outputs])
            return (kernel.read(part).astype(np.float32) + added).astype(kernel.dtype)

        return dataclasses.replace(kernel, read=read)

    joined = dict(arrays)
    for linear in {name.rpartition("/")[0] for name in adapter}:
        kernel, pair = f"layers/{linear}/kernel", (f"{linear}/a", f"{linear}/b")
        joined[kernel] = with_adapter(arrays[kernel], *(adapter[key] for key in pair))
    return joined


def as_adapter(arrays: Mapping[str, np.ndarray], abstract: Params) -> Params:
    """The tree of an adapter's arrays, each on its devices as `abstract` says."""
    leaves = named_leaves(abstract)
    placed = [jax.device_put(arrays[name], leaves[name].sharding) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def _on_one(config: ModelConfig, adapter: AdapterConfig) -> Params:
    return abstract_adapter(config, adapter, on_one_device(config), np.float32)


def _is_peft(weights: Path) -> bool:
    return (weights / PEFT_CONFIG).is_file()


def _whole(array: LazyArray) -> np.ndarray:
    return array.read(tuple(slice(0, size) for size in array.shape))


def _read(tensor: StoredTensor) -> np.ndarray:
    return tensor.map().astype(np.float32)


def _peft_names(config: ModelConfig, name: str) -> list[str]:
    """peft's names of an array of ours ("attention/q/a"), one per layer."""
    linear, _, which = name.rpartition("/")
    suffix = f"lora_{which.upper()}.weight"
    kernels = hf_names(config, f"layers/{linear}/kernel")
    return [f"base_model.model.{k.removesuffix('weight')}{suffix}" for k in kernels]
