"""Architecture and sizes of a model, read from and written to Hugging Face's config.json."""

import dataclasses
from typing import Any, Literal, get_args

from e1jax.config.architectures import ARCHITECTURES, Architecture
from e1jax.config.checks import (
    UNLIMITED,
    UserError,
    check_choice,
    check_integer,
    check_number,
    shown,
)

QuantizedForm = Literal["int8"]  # of weights; see e1jax.nn.quantize
QUANTIZED = get_args(QuantizedForm)


KVDtype = Literal["float32", "bfloat16", "int8"]  # of cached keys and values
KV_DTYPES = get_args(KVDtype)


# Keys of a Hugging Face config.json that say how a model computes, and the only values
# implemented here; an architecture may have more.
_ONLY_VALUES = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder, all read from config.json; none is assumed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    architecture: str = "qwen2"
    """The table that says the rest, in config/architectures.py: qwen2 or qwen3."""

    def __post_init__(self):
        check_choice("architecture", self.architecture, list(ARCHITECTURES))
        # Far above any model, and low enough that listing its tensors takes no time.
        largest = {"num_layers": 1000, "max_position_embeddings": UNLIMITED}
        for field in dataclasses.fields(self):
            if field.type is int:
                high = largest.get(field.name, 2**24)
                check_integer(field.name, getattr(self, field.name), 1, high)
        check_number("rope_theta", self.rope_theta, "above 0", lambda v: v > 0)
        check_number("rms_norm_eps", self.rms_norm_eps, "above 0", lambda v: v > 0)
        if not isinstance(self.tie_word_embeddings, bool):
            raise UserError(
                f"tie_word_embeddings must be true or false, not {shown(self.tie_word_embeddings)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is odd; rotary position embedding turns pairs of dimensions"
            )

    @property
    def table(self) -> Architecture:
        """Tensors, biases and norms of the architecture."""
        return ARCHITECTURES[self.architecture]

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Sizes from a Hugging Face config, in the old or new spelling of RoPE.

        Raises UserError naming the first key whose value asks for something that is not
        implemented.
        """
        architecture = hf.get("model_type")
        if architecture not in list(ARCHITECTURES):
            raise UserError(
                f"{where}: model_type={shown(architecture)} is not implemented; e1jax runs "
                f"{' and '.join(map(repr, ARCHITECTURES))}"
            )
        table = ARCHITECTURES[architecture]
        for key, allowed in {**_ONLY_VALUES, **table.only_values}.items():
            value = hf.get(key, allowed[0])
            if value not in allowed:
                raise UserError(
                    f"{where}: {key}={shown(value)} is not implemented; e1jax runs {key}={allowed[0]!r}"
                )
        kinds = hf.get("layer_types") or []
        kinds = kinds if isinstance(kinds, list) else [kinds]
        others = [kind for kind in kinds if kind != "full_attention"]
        if others:
            raise UserError(
                f"{where}: layer_types holds {shown(others[0])}, which is not implemented (full_attention is)"
            )
        try:
            num_heads = hf["num_attention_heads"]
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=hf.get("num_key_value_heads") or num_heads,
                head_dim=hf.get("head_dim")
                or table.default_head_dim
                or hf["hidden_size"] // max(num_heads, 1),
                max_position_embeddings=hf["max_position_embeddings"],
                rope_theta=_rope_theta(hf, where),
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
                architecture=architecture,
            )
        except KeyError as error:
            raise UserError(f"{where}: the key {error.args[0]!r} is missing") from None
        except TypeError as error:
            raise UserError(f"{where}: a size has the wrong type ({error})") from None
        except UserError as error:
            raise (
                error
                if str(error).startswith(where)
                else UserError(f"{where}: {error}")
            ) from None

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both read."""
        return {
            "architectures": [self.table.hf_class],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": False,
            **{key: allowed[0] for key, allowed in self.table.only_values.items()},
            "attention_dropout": 0.0,
            "torch_dtype": dtype,
        }


def _rope_theta(hf: dict[str, Any], where: str) -> float:
    """The RoPE base: `rope_theta` (transformers 4) or `rope_parameters` (5).

    Qwen2.5 relatives share every shape and differ in it (1e4 against 1e6), which no
    shape check can see, so it is never assumed.
    """
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"{where}: RoPE type {shown(kind)} is not implemented; e1jax runs 'default', without scaling"
        )
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{where}: neither rope_theta nor rope_parameters.rope_theta is there"
        )
    check_number("rope_theta", theta, "above 0", lambda v: v > 0)
    return float(theta)
