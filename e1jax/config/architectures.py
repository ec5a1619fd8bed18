"""Architectures, each as a table: its tensors by name, its biases and norms, and the values
of a config.json that it is implemented for.

All are decoders with RMSNorm before each part, RoPE, grouped-query attention and a gated
MLP; `ModelConfig` holds the sizes, from which the shapes follow (`nn.layers`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Tensor(NamedTuple):
    """Where Hugging Face's files hold a parameter."""

    name: str  # "{}" stands for the number of the layer
    turned: bool = False  # a torch Linear's weight [out, in], which is [in, out] here

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a first dim of layers, each a tensor of its own."""
        return "{}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """The names of all tensors that the parameter holds."""
        return [self.name.format(i) for i in range(num_layers if self.stacked else 1)]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The properties that set a family of models apart; see ARCHITECTURES."""

    hf_class: str  # in transformers
    tensors: Mapping[str, Tensor]  # by the name of our parameter
    # Keys of config.json that only this family has, and the only values implemented.
    only_values: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    # Where config.json gives none, as in transformers; None: hidden_size / num_heads.
    default_head_dim: int | None = None

    @property
    def attention_bias(self) -> bool:
        """Whether the products of q, k and v have biases."""
        return "layers/attention/q/bias" in self.tensors

    @property
    def head_norm(self) -> bool:
        """Whether every head of q and k goes through an RMSNorm before RoPE."""
        return "layers/attention/q_norm/scale" in self.tensors


_ALL = {
    "embedding": Tensor("model.embed_tokens.weight"),
    "layers/attention_norm/scale": Tensor("model.layers.{}.input_layernorm.weight"),
    "layers/attention/q/kernel": Tensor(
        "model.layers.{}.self_attn.q_proj.weight", True
    ),
    "layers/attention/k/kernel": Tensor(
        "model.layers.{}.self_attn.k_proj.weight", True
    ),
    "layers/attention/v/kernel": Tensor(
        "model.layers.{}.self_attn.v_proj.weight", True
    ),
    "layers/attention/o/kernel": Tensor(
        "model.layers.{}.self_attn.o_proj.weight", True
    ),
    "layers/mlp_norm/scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
    "layers/mlp/gate/kernel": Tensor("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/mlp/up/kernel": Tensor("model.layers.{}.mlp.up_proj.weight", True),
    "layers/mlp/down/kernel": Tensor("model.layers.{}.mlp.down_proj.weight", True),
    "norm/scale": Tensor("model.norm.weight"),
    "lm_head/kernel": Tensor("lm_head.weight", True),  # not of tied embeddings
}


# By model_type in config.json.
ARCHITECTURES = {
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        _ALL
        | {
            "layers/attention/q/bias": Tensor("model.layers.{}.self_attn.q_proj.bias"),
            "layers/attention/k/bias": Tensor("model.layers.{}.self_attn.k_proj.bias"),
            "layers/attention/v/bias": Tensor("model.layers.{}.self_attn.v_proj.bias"),
        },
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        _ALL
        | {
            "layers/attention/q_norm/scale": Tensor(
                "model.layers.{}.self_attn.q_norm.weight"
            ),
            "layers/attention/k_norm/scale": Tensor(
                "model.layers.{}.self_attn.k_norm.weight"
            ),
        },
        only_values={"attention_bias": (False, None)},
        default_head_dim=128,
    ),
}
