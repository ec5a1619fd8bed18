"""Configuration: frozen dataclasses that are YAML keys, command-line flags and API fields at once.

Every rule about a value is checked here, before any work is done, and this module imports no JAX, so a
mistake is reported at once.
"""

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

UNLIMITED = 2**31 - 1


class UserError(ValueError):
    """A mistake in the user's input: its message is one sentence saying what, where and the way out."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line: a user's mistake is one sentence on stderr and exit code 2, Ctrl-C is 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone: not a fault, and Python would complain once more at exit.
        sys.stderr.close()
        sys.exit(0)


def check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses a name that is not among the known ones, offering the nearest."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            )
            raise UserError(f"{where}: unknown field {name!r}; {hint}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} must be a whole number, {span}, not {value!r}")


def check_number(name: str, value: Any, rule: str, ok: Callable[[float], bool]) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not ok(value)
    ):
        raise UserError(f"{name} must be a number {rule}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one prompt is sampled. Budgets are in sampled tokens; None means unlimited."""

    thinking_budget: int | None = 1024
    solution_budget: int | None = 1024
    n: int = 1  # samples of the prompt
    temperature: float = 0.6  # 0 is greedy
    top_p: float = 0.95  # in (0, 1]; 1 is off
    top_k: int = 0  # 0 is off
    seed: int = 0
    end_of_thinking_text: str = (
        ""  # inserted, unsampled, right before a forced </think>
    )

    def __post_init__(self):
        for name in ("thinking_budget", "solution_budget"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, UNLIMITED - 1)
        check_integer("n", self.n, 1, UNLIMITED)
        check_number("temperature", self.temperature, "of 0 or more", lambda v: v >= 0)
        check_number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        check_integer("top_k", self.top_k, 0, UNLIMITED)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.end_of_thinking_text, str):
            raise UserError(
                f"end_of_thinking_text must be a string, not {self.end_of_thinking_text!r}"
            )


# Keys of a Hugging Face config.json that say how a model computes, and the only values implemented here.
_ONLY_VALUES = {
    "model_type": ("qwen2",),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen2 decoder; `from_hf` reads them all from config.json, none is assumed."""

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

    def __post_init__(self):
        sizes = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        ]
        for name in [*sizes, "head_dim", "max_position_embeddings"]:
            check_integer(name, getattr(self, name), 1)
        check_number("rope_theta", self.rope_theta, "above 0", lambda v: v > 0)
        check_number("rms_norm_eps", self.rms_norm_eps, "above 0", lambda v: v > 0)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is odd; rotary position embedding turns pairs of dimensions"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Sizes from a Hugging Face config of a Qwen2 model, in the old and the new spelling of RoPE.

        Raises UserError naming the first key whose value asks for something that is not implemented.
        """
        for key, allowed in _ONLY_VALUES.items():
            value = hf.get(key, allowed[0] if key != "model_type" else None)
            if value not in allowed:
                raise UserError(
                    f"{where}: {key}={value!r} is not implemented; e1jax runs {key}={allowed[0]!r}"
                )
        others = sorted(
            {kind for kind in hf.get("layer_types") or [] if kind != "full_attention"}
        )
        if others:
            raise UserError(
                f"{where}: layer_types holds {others[0]!r}, which is not implemented (full_attention is)"
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
                head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
                max_position_embeddings=hf["max_position_embeddings"],
                rope_theta=float(_rope_theta(hf, where)),
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
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
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
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
            "attention_dropout": 0.0,
            "torch_dtype": dtype,
        }


def _rope_theta(hf: dict[str, Any], where: str) -> float:
    """The RoPE base: `rope_theta` (transformers 4) or `rope_parameters` (transformers 5).

    Qwen2.5 relatives share every shape and differ in it (1e4 against 1e6), which no shape check can see, so
    it is never assumed.
    """
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"{where}: RoPE type {kind!r} is not implemented; e1jax runs 'default', without scaling"
        )
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{where}: neither rope_theta nor rope_parameters.rope_theta is there"
        )
    return theta
