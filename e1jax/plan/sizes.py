"""Sizes of the models that can be planned without their files."""

import dataclasses
import re
from pathlib import Path

import huggingface_hub

from e1jax.checkpoint.huggingface import read_config
from e1jax.checkpoint.load import resolve
from e1jax.checkpoint.runs import find_params
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError, shown
from e1jax.config.model import ModelConfig


def _qwen2(hidden, mlp, layers, heads, kv_heads, vocab, theta=1e4) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=theta,
    )


# Of models on the hub that the shipped configurations name, and of their kin: so that
# planning needs no network.
_7B = _qwen2(3584, 18944, 28, 28, 4, 152064)


_1_5B = _qwen2(1536, 8960, 28, 12, 2, 151936)


_14B = _qwen2(5120, 13824, 48, 40, 8, 152064, 1e6)


_QWEN3_8B = dataclasses.replace(
    _qwen2(4096, 12288, 36, 32, 8, 151936, 1e6),
    max_position_embeddings=40960,
    architecture="qwen3",
)


SIZES = {
    "Salesforce/E1-Math-1.5B": _1_5B,
    "Salesforce/E1-Math-7B": _7B,
    "Salesforce/E1-Code-14B": _14B,
    "Salesforce/E1-AceReason-14B": _14B,
    "agentica-org/DeepScaleR-1.5B-Preview": _1_5B,
    "agentica-org/DeepCoder-14B-Preview": _14B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _14B,
    "nvidia/AceReason-Nemotron-14B": _14B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Skywork/Skywork-OR1-Math-7B": _7B,
}


def model_sizes(name: str) -> ModelConfig:
    """Sizes of a model; of one on the hub, nothing but config.json is downloaded."""
    if name in SIZES and not Path(name).is_dir():
        return SIZES[name]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        try:
            file = huggingface_hub.hf_hub_download(name, "config.json")
        except Exception as error:  # many kinds: no network, no such repository
            reason = str(error).strip().split("\n")[0].strip(" .:")
            raise UserError(
                f"the sizes of {shown(name)} cannot be had from the hub ({reason}); give a "
                "directory with its config.json as --model"
            ) from None
        return ModelConfig.from_hf(read_json(Path(file)), name)
    path = resolve(name)  # and no more: of a bucket, the weights would be copied
    saved = find_params(path)
    return read_config(saved[1] if saved else path)
