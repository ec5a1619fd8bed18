"""Configuration: frozen dataclasses that are YAML keys, flags and API fields at once.

Every rule about a value is checked here, before any work is done, and this module
imports no JAX, so a mistake is reported at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import numbers
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import jsonargparse
import yaml

UNLIMITED = 2**31 - 1
QUANTIZED = ("int8",)  # forms of weights; see e1jax.quantize
KV_DTYPES = ("float32", "bfloat16", "int8")  # of cached keys and values


class UserError(ValueError):
    """A user's mistake; its message is one sentence: what, where, and the way out."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake is one sentence and exit code 2, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted {error}".rstrip(), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Not sys.exit: taking JAX down while a device still computes can crash.
        os._exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone: no fault, but Python would complain at exit.
        sys.stderr.close()
        sys.exit(0)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors instead of a usage dump."""

    def __init__(self, **settings: Any):
        # --prompt, say, must not be taken for an abbreviation of --prompts.
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def quantize_flags(flag: Callable[..., Any]) -> None:
    """Adds the flags of every command that samples; `flag` is a parser's add_argument."""
    flag(
        "--quantize",
        choices=QUANTIZED,
        help="of the weights of sampling, with a scale per output channel: half the "
        "memory of bfloat16 (default: not quantized, unless they are stored so)",
    )
    flag(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="of the cached keys and values; int8 has a scale per token and head "
        "(default: that of the computation)",
    )


def parse_budget(text: str) -> int | None:
    """A budget flag: a number of tokens, or "none" for unlimited."""
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens (0 or more) or none"
        )
    return int(text)


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
        or not isinstance(value, numbers.Integral)  # NumPy's too
        or int(value) < low
        or (high is not None and int(value) > high)
    ):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(
            f"{name} must be a whole number, {span}, not {reprlib.repr(value)}"
        )


def check_number(name: str, value: Any, rule: str, ok: Callable[[float], bool]) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not _is_finite(value)
        or not ok(float(value))
    ):
        raise UserError(f"{name} must be a number {rule}, not {reprlib.repr(value)}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def check_share(name: str, value: Any) -> None:
    check_number(name, value, "from 0 to 1", lambda v: 0 <= v <= 1)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be {' or '.join(choices)}, not {value!r}")


# LaTeX commands, by the control character that JSON and YAML make of their backslash and
# first letter. No ordinary line, of a program either, goes on like them after it: hence
# the exceptions for "<tab>an apple", "go<tab>o" and "<newline>eq_1 = ...".
_COMMANDS = {
    "\t": r"""
        tan(?!\s+[a-z]{3}) tanh tag tau tbinom text text(?:bf|it|rm|sf|tt|sc|up|md|sl)
        text(?:normal|style|color|circled|less|greater|subscript|superscript) tfrac theta
        therefore thickapprox thicksim thinspace tilde times tiny to(?![\t\n]|$) top
        triangle triangle(?:down|q|left|right|lefteq|righteq) twohead(?:left|right)arrow
        """,
    "\n": r"""
        nabla natural ncong nearrow neq(?!\d*\s*[=:,._]) newcommand newline ngeq ngeqslant
        ngtr nleq nleqslant noalign nobreak noindent nolimits nonumber normalsize not
        notag notin nprec npreceq nshortmid nsubset nsubseteq nsucc nsucceq nsupset
        nsupseteq ntriangle(?:left|right) nvdash nvDash nVdash nVDash nwarrow
        n(?:left|right|leftright|Left|Right|Leftright)arrow
        """,
    "\r": r"""
        raisebox rangle rbrace rbrack rceil ref renewcommand rfloor rgroup rhd rho right
        right(?:arrow|arrowtail|harpoonup|harpoondown|leftarrows|leftharpoons)
        right(?:rightarrows|squigarrow) risingdotseq rlap rm root rtimes rule rvert rVert
        """,
}
# Lines often begin like these without their first letter, but not within $...$. A price
# in dollars may be followed by "<newline>i) ...".
_COMMANDS_IN_MATH = "ne neg nexists ni(?![).]) nless nmid nparallel nsim nu"


def _remains(control: str, commands: str) -> str:
    """A pattern of the control character and what follows it of one of the commands."""
    rests = "|".join(command[1:] for command in commands.split())
    return rf"{control}(?:{rests})(?![A-Za-z])"


# The five before a letter need no table. Elsewhere they may be meant: a page that breaks
# between lines, the colours of a terminal.
_LOST_BACKSLASH = re.compile(
    "([\a\b\v\f\x1b](?:[A-Za-z]{1,20}|{)|"
    + "|".join(_remains(*item) for item in _COMMANDS.items())
    + ")"
)
_IN_MATH = _remains("\n", _COMMANDS_IN_MATH)
# All math, so that its dollars are paired; of the kind that counts, a group.
_MATH = re.compile(
    rf"\$\$[^$]*\$\$|\$(?:[^$\n]*({_IN_MATH})(?:[^$\n]|{_IN_MATH})*|[^$]*)\$"
)
_CONTROLS = {
    "\a": ("a", "a bell"),
    "\b": ("b", "a backspace"),
    "\t": ("t", "a tab"),
    "\n": ("n", "a newline"),
    "\v": ("v", "a vertical tab"),
    "\f": ("f", "a form feed"),
    "\r": ("r", "a carriage return"),
    "\x1b": ("e", "an escape character"),
}


def check_backslashes(value: Any, where: str) -> None:
    r"""Refuses LaTeX whose backslash was read as the beginning of an escape.

    In JSON, in double quotes of YAML and in Python, "\frac" is a form feed and "rac".
    `value` is a text, or a list or dict of texts. Not found are commands that the tables
    above lack, and "\\" that became "\".
    """
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            check_backslashes(item, where)
    elif isinstance(value, str):
        in_math = (math for math in _MATH.finditer(value) if math[1])
        found = _LOST_BACKSLASH.search(value) or next(in_math, None)
        if found:
            letter, control = _CONTROLS[found[1][0]]
            command = f"\\{letter}{found[1][1:]}"
            raise UserError(
                f"{where} holds {control} where {command} seems to be meant; in JSON, "
                rf"YAML and Python write \{command}, or remove that character"
            )


def parse_json(
    text: str | bytes, path: Path | str, line: int = 1, form: str = ""
) -> Any:
    """The value of a JSON text that begins at a line of a file.

    Raises UserError naming the line, and ending in `form`, which says what is expected.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}"
        if "escape" in error.msg:
            start = error.doc.rfind("\\", 0, error.pos + 1)
            form = _two_backslashes(error.doc[start:])
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        reason = str(error)
    hint = f"; {form}" if form else ""
    raise UserError(f"{path} line {line} is not JSON ({reason}){hint}")


def _two_backslashes(text: str) -> str:
    """The way out where a text begins with a backslash that should be two."""
    command = text[:1] + re.sub("(?s)([A-Za-z]+|.).*", r"\1", text[1:])
    return rf"write \{command}, with two backslashes"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one prompt is sampled. Budgets are in sampled tokens, None is unlimited."""

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
        check_integer("n", self.n, 1, 10**6)
        check_number("temperature", self.temperature, "of 0 or more", lambda v: v >= 0)
        check_number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        check_integer("top_k", self.top_k, 0, UNLIMITED)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.end_of_thinking_text, str):
            raise UserError(
                f"end_of_thinking_text must be a string, not {self.end_of_thinking_text!r}"
            )
        check_backslashes(self.end_of_thinking_text, "end_of_thinking_text")
        # NumPy's numbers become Python's: sums of those of 8 or 32 bits would overflow.
        for name, value in list(vars(self).items()):
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))


# Keys of a Hugging Face config.json that say how a model computes, and the only values
# implemented here.
_ONLY_VALUES = {
    "model_type": ("qwen2",),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen2 decoder, all read from config.json; none is assumed."""

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
                f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}"
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

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Sizes from a Hugging Face config, in the old or new spelling of RoPE.

        Raises UserError naming the first key whose value asks for something that is not
        implemented.
        """
        for key, allowed in _ONLY_VALUES.items():
            value = hf.get(key, allowed[0] if key != "model_type" else None)
            if value not in allowed:
                raise UserError(
                    f"{where}: {key}={value!r} is not implemented; e1jax runs {key}={allowed[0]!r}"
                )
        kinds = hf.get("layer_types") or []
        kinds = kinds if isinstance(kinds, list) else [kinds]
        others = [kind for kind in kinds if kind != "full_attention"]
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
                head_dim=hf.get("head_dim") or hf["hidden_size"] // max(num_heads, 1),
                max_position_embeddings=hf["max_position_embeddings"],
                rope_theta=_rope_theta(hf, where),
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
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
    """The RoPE base: `rope_theta` (transformers 4) or `rope_parameters` (5).

    Qwen2.5 relatives share every shape and differ in it (1e4 against 1e6), which no
    shape check can see, so it is never assumed.
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
    check_number("rope_theta", theta, "above 0", lambda v: v > 0)
    return float(theta)


# Training. A field's docstring is its text in --help; its default holds where the YAML
# file is silent.


@dataclasses.dataclass(frozen=True)
class TraceMix:
    """How the solutions of one phase of nano fine-tuning are written, and batched."""

    batch_size: int = 32
    """Solutions in a step."""
    terse: float = 0.5
    """Share of solutions thought through in the terse style, the rest being verbose."""
    rechecks: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Probabilities that the thinking is checked again 0, 1, 2 times; sum to 1."""
    recap: float = 0.0
    """Share of solutions that repeat steps, tersely, between </think> and the box."""

    def __post_init__(self):
        check_integer("batch_size", self.batch_size, 1)
        for name in ("terse", "recap"):
            check_share(name, getattr(self, name))
        for share in self.rechecks:
            check_share("rechecks", share)
        if not math.isclose(sum(self.rechecks), 1, abs_tol=1e-6):
            raise UserError(f"rechecks must sum to 1, not {sum(self.rechecks)}")


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices in the layers, Adam for embeddings, norms and biases."""

    learning_rate: float = 4e-3
    """Peak learning rate of both."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0 to its peak."""
    final: float = 0.02
    """Learning rate of the last step, as a share of the peak; in between a cosine."""
    adam_b2: float = 0.98
    """Decay of Adam's second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    def __post_init__(self):
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), "above 0", lambda v: v > 0)
        check_share("final", self.final)
        for name in ("warmup", "adam_b2"):
            value = getattr(self, name)
            check_number(name, value, "from 0 to below 1", lambda v: 0 <= v < 1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 100
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep: int = 2
    """Latest checkpoints kept."""

    def __post_init__(self):
        check_integer("every", self.every, 1)
        check_integer("keep", self.keep, 1)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a new model on the nano task, in two phases."""

    model: ModelConfig
    steps: int
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Fixes the initial parameters and the data."""
    first_phase: float = 0.5
    """Share of the steps that train on the mix `first`; the others on `second`."""
    first: TraceMix = TraceMix()
    second: TraceMix = TraceMix()
    optimizer: MuonConfig = MuonConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: str | None = None
    """Device mesh, like data=4,tensor=1; by default one that suits the model."""

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        check_share("first_phase", self.first_phase)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Problems to train on."""

    problems: str = "deepscaler"
    """Built-in name, or a file (JSON list, JSONL, parquet) with problem and answer."""
    instruction: str | None = None
    """Text after every problem; null: the one recorded with the model."""
    max_prompt_len: int = 1024
    """Tokens of the longest prompt; longer ones are dropped, and counted."""

    def __post_init__(self):
        check_backslashes(self.instruction, "data.instruction")
        check_integer("max_prompt_len", self.max_prompt_len, 1, UNLIMITED)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled for training: under one fixed pair of budgets."""

    prompts: int = 128
    """Prompts in a step."""
    samples: int = 8
    """Responses to each prompt, whose rewards are compared with each other."""
    thinking_budget: int | None = 1024
    """Tokens sampled before </think> is forced; null: unlimited."""
    solution_budget: int | None = 1024
    """Tokens sampled after </think>; null: unlimited."""
    temperature: float = 0.6
    """Above 0; log-probabilities in training are at this temperature too."""
    slots: int = 64
    """Responses that are sampled at a time, by each host of several."""
    cache_len: int | None = None
    """Positions of a slot, prompt included; null: the longest that budgets allow."""

    def __post_init__(self):
        check_integer("prompts", self.prompts, 1)
        check_integer("samples", self.samples, 2)
        for name in ("thinking_budget", "solution_budget"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, UNLIMITED - 1)
        check_number("temperature", self.temperature, "above 0", lambda v: v > 0)
        check_integer("slots", self.slots, 1)
        if self.cache_len is not None:
            check_integer("cache_len", self.cache_len, 1, 2**30)
        elif None in (self.thinking_budget, self.solution_budget):
            raise UserError(
                "a rollout without a budget needs rollout.cache_len, which then ends it"
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective of GRPO; see e1jax.grpo."""

    clip: Literal["ppo", "none"] = "ppo"
    """ppo: clipped surrogate; none: as the reference code of E1, which drops the clip."""
    clip_low: float = 0.2
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above 1 + clip_high."""
    kl_coef: float = 0.001
    """Weight of the divergence (k3) from the model that training began with."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, which is raised."""
    aggregate: Literal["token", "sequence"] = "token"
    """token: mean over all tokens; sequence: mean over responses of their means."""
    train_on_forced: bool = False
    """Whether forced tokens count, though the policy did not choose them."""
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"
    """recomputed: by the training forward, which for the first update of a step is its
    own; sampler: those seen while sampling, which saves that forward, with importance
    ratios truncated at max_ratio."""
    max_ratio: float = 2.0
    """Largest weight of a token where old_logprobs is sampler."""

    def __post_init__(self):
        check_choice("clip", self.clip, ("ppo", "none"))
        check_choice("aggregate", self.aggregate, ("token", "sequence"))
        check_choice("old_logprobs", self.old_logprobs, ("recomputed", "sampler"))
        check_share("clip_low", self.clip_low)
        for name in ("clip_high", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            check_number(name, value, "of 0 or more", lambda v: v >= 0)
        check_number("max_ratio", self.max_ratio, "of 1 or more", lambda v: v >= 1)


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW, after the gradient is clipped by its global norm."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak, in equal parts."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the last step."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Share of a parameter, times the learning rate, taken off at each update."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    def __post_init__(self):
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_choice("schedule", self.schedule, ("constant", "linear", "cosine"))
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), "above 0", lambda v: v > 0)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check_number(name, value, "from 0 to below 1", lambda v: 0 <= v < 1)
        check_number(
            "weight_decay", self.weight_decay, "of 0 or more", lambda v: v >= 0
        )


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How the responses of a step are turned into parameter updates."""

    minibatch_prompts: int = 64
    """Prompts in a mini-batch, all of their responses together; one update each."""
    microbatch: int = 8
    """Responses that go through the model at a time, on all devices together."""
    epochs: int = 1
    """Passes over the responses of a step."""
    remat: bool = True
    """Whether a layer's activations are computed again in the backward pass."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that are trained, their moments and their checkpoints."""

    def __post_init__(self):
        for name in ("minibatch_prompts", "microbatch", "epochs"):
            check_integer(name, getattr(self, name), 1)
        check_choice("param_dtype", self.param_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Accuracy on problems that are not trained on."""

    problems: str | None = None
    """As data.problems; null: no validation, the latest checkpoint is the best."""
    limit: int = 256
    """Problems, the first of the file."""
    every: int = 20
    """Steps from one validation to the next; each is followed by a checkpoint."""
    budgets: tuple[tuple[int | None, int | None], ...] = ((1024, 1024),)
    """Pairs of thinking and solution budget, null being unlimited."""
    temperature: float = 0.6
    """Of sampling; 0 is greedy."""
    top_p: float = 0.95
    """Of sampling; 1 is off."""
    best: str = "validation_accuracy"
    """Metric whose highest value names the best checkpoint: validation_accuracy (mean
    over the budgets), or validation_accuracy_32_28, say."""

    def __post_init__(self):
        check_integer("limit", self.limit, 1)
        check_integer("every", self.every, 1)
        if not self.budgets:
            raise UserError("validation.budgets is empty; give pairs, like [[32, 28]]")
        for thinking, solution in self.budgets:
            # The rules for these are those of a request.
            SamplingParams(
                thinking, solution, temperature=self.temperature, top_p=self.top_p
            )
        check_known([self.best], self.metrics, "validation.best")

    @property
    def metrics(self) -> list[str]:
        """Names that `best` may take."""
        each = [f"validation_accuracy_{budget_name(*pair)}" for pair in self.budgets]
        return ["validation_accuracy", *each]


def budget_name(thinking: int | None, solution: int | None) -> str:
    """A pair of budgets in the name of a metric: "32_28", "none_none"."""
    pair = (thinking, solution)
    return "_".join("none" if budget is None else str(budget) for budget in pair)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """GRPO with rollouts under a thinking and a solution budget (arXiv 2505.05315)."""

    model: str
    """Model to start from: hub id, Hugging Face or e1jax directory, run, nano."""
    steps: int
    """Steps of the whole run; each samples new responses."""
    seed: int = 0
    """Fixes the order of the problems and all random draws."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    optimizer: AdamWConfig = AdamWConfig()
    update: UpdateConfig = UpdateConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; null: float32 on a CPU, bfloat16 elsewhere."""
    mesh: str | None = None
    """Device mesh of the updates, like data=4,tensor=2; by default all devices on data.
    Each host samples on its own devices, as many of them on tensor as suits the model."""
    wandb: str | None = None
    """Weights & Biases project that gets the metrics too; null: none."""

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        rollout, update = self.rollout, self.update
        _check_divides(
            ("rollout.prompts", rollout.prompts),
            ("update.minibatch_prompts", update.minibatch_prompts),
        )
        _check_divides(
            (
                "update.minibatch_prompts x rollout.samples",
                update.minibatch_prompts * rollout.samples,
            ),
            ("update.microbatch", update.microbatch),
        )

    @property
    def updates_per_step(self) -> int:
        minibatches = self.rollout.prompts // self.update.minibatch_prompts
        return minibatches * self.update.epochs


def _check_divides(whole: tuple[str, int], part: tuple[str, int]) -> None:
    if whole[1] % part[1]:
        raise UserError(
            f"{whole[0]}={whole[1]} is not a multiple of {part[0]}={part[1]}; "
            "change one of them"
        )


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other; not needed on TPU pods or one host."""

    coordinator: str | None = None
    """HOST:PORT, with any free port of process 0's host, where the others find it; each
    process gets the same command but for --process."""
    processes: int | None = None
    """How many processes the run has."""
    process: int | None = None
    """Which one this is, from 0."""

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) not in (0, 3):
            raise UserError(
                f"--{given[0]} came without all of --coordinator, --processes and "
                "--process; give all three or none"
            )
        if self.coordinator is None or self.processes is None:
            return
        address = re.fullmatch(r"\S+:([0-9]{1,5})", self.coordinator)
        if not address or int(address[1]) > 65535:
            raise UserError(
                f"--coordinator must be like 10.0.0.1:1234, not {self.coordinator!r}"
            )
        check_integer("--processes", self.processes, 1)
        check_integer("--process", self.process, 0, self.processes - 1)


ConfigT = TypeVar("ConfigT")
FlagsT = TypeVar("FlagsT")


def load_config(
    cls: type[ConfigT], argv: Sequence[str], prog: str
) -> tuple[ConfigT, Path]:
    """The configuration (a dataclass) and run directory that a training command names.

    `--config FILE.yaml` is read first, then flags `--section.key value` set what they
    name in it: YAML keys, flags and dataclass fields are the same names. The run
    directory is `--run-dir`, by default runs/FILE. Raises UserError for an unknown key
    or flag, a value of the wrong type, and whatever the dataclasses refuse.
    """
    config, run_dir, _ = load_config_and_flags(cls, NoFlags, argv, prog)
    return config, run_dir


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """A command whose flags are all settings of the run."""


def load_config_and_flags(
    cls: type[ConfigT], flags: type[FlagsT], argv: Sequence[str], prog: str
) -> tuple[ConfigT, Path, FlagsT]:
    """As `load_config`, and the flags that are no settings of the run, a dataclass."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with these settings; required"
    )
    parser.add_argument(
        "--run-dir", help="directory of the run (default: runs/NAME-OF-THE-YAML-FILE)"
    )
    parser.add_class_arguments(flags)
    parser.add_class_arguments(cls)
    try:
        if not {"-h", "--help"} & set(argv):
            _check_names(cls, flags, argv, prog)
        parsed = parser.instantiate(parser.parse_args(list(argv)))
    except argparse.ArgumentError as error:
        raise UserError(_sentence(error, (cls, flags), argv)) from None
    run_dir = str(parsed.run_dir or Path("runs") / Path(parsed.config[0]).stem)
    if "://" in run_dir:  # a Path would make a directory here of it
        raise UserError(
            f"--run-dir {run_dir} is not a path; mount the bucket (docs/tpu.md says "
            "how) and give the path where it is mounted"
        )
    config = cls(**{name: parsed[name] for name in _types(cls)})
    others = flags(**{name: parsed[name] for name in _types(flags)})
    return config, Path(run_dir), others


def record_config(config: Any, run_dir: Path) -> None:
    """Writes `config.yaml` to a new run directory; in an old one, refuses any change.

    Raises UserError naming the settings that differ from those the run began with, and
    for a directory with other content.
    """
    now = yaml.safe_load(json.dumps(dataclasses.asdict(config)))
    path, new = run_dir / "config.yaml", run_dir / "config.yaml.new"
    with writing(run_dir):
        if not path.exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(file != new for file in run_dir.iterdir()):
                raise UserError(
                    f"{run_dir} holds files but no config.yaml, so it is not the "
                    "directory of a run; take another --run-dir"
                )
            text = yaml.safe_dump(now, sort_keys=False, allow_unicode=True)
            new.write_text(text, encoding="utf-8")
            new.replace(path)  # whole, wherever the run is killed
            return
    then, now = dict(_flatten(read_yaml(path))), dict(_flatten(now))
    changes = [
        f"{key} ({then.get(key)!r} there, {now.get(key)!r} now)"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"{run_dir} was begun with other settings: {', '.join(changes)}; "
            "repeat those, or take another --run-dir"
        )


def aligned(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Rows of cells as text, in columns that end, or with `left` begin, together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = str.ljust if left else str.rjust
    return "\n".join(
        "  ".join(
            pad(cell, width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file cannot be written, because the disk is full, say, is one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; raises UserError if it is missing or is not one."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _not_yaml(path, error) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings; write lines like 'steps: 100'")
    return value


def _not_yaml(path: Path, error: Exception) -> UserError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or ""
    if mark is None or "escape" not in problem:
        return UserError(f"{path} is not YAML: {' '.join(str(error).split())}")
    start = mark.buffer.rfind("\\", 0, mark.pointer)
    return UserError(
        f"{path} line {mark.line + 1} is not YAML ({problem}); "
        f"{_two_backslashes(mark.buffer[start:])}, or use single quotes"
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that a loop can stop where its state is whole.

    A second one has its usual effect, at once.
    """
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, usual[number])

    usual = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _check_names(cls: Any, flags: Any, argv: Sequence[str], prog: str) -> None:
    """Refuses flags and YAML keys that name no setting, offering the nearest one."""
    names = [f"--{name}" for kind in (cls, flags) for name, _ in _flatten(_types(kind))]
    # The last one comes with jsonargparse, which explains it in --help.
    known = [*names, "--config", "--run-dir", "--print_config"]
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    check_known(given, known, prog)
    path = _config_path(argv)
    if path is None:
        raise UserError(f"{prog} needs --config FILE.yaml; see configs/")
    _check_keys(cls, read_yaml(Path(path)), path)
    _check_quoted(Path(path))


def _check_quoted(path: Path) -> None:
    r"""Refuses double-quoted texts of a YAML file with an escape that looks like LaTeX.

    Not for files that we write: YAML's own writer makes "\_" of a no-break space.
    """
    text = path.read_text(encoding="utf-8")
    for token in yaml.scan(text):
        if not isinstance(token, yaml.ScalarToken) or token.style != '"':
            continue
        quoted = text[token.start_mark.index : token.end_mark.index]
        where = f"{path} line {token.start_mark.line + 1}"
        for escape in re.findall(r"\\(?:[A-Za-z]+|.)", quoted, re.DOTALL):
            if escape[1] in "abefv0_NLP":
                raise UserError(
                    f"{where}: YAML reads {escape[:2]} in double quotes as one "
                    rf"character; write \{escape}, or use single quotes"
                )
        check_backslashes(token.value, where)


def _config_path(argv: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def _sentence(
    error: argparse.ArgumentError, kinds: Sequence[Any], argv: Sequence[str]
) -> str:
    """What is wrong with a value, from what jsonargparse says over several lines:
    'Parser key "steps": Expected a <class 'int'>. Got value: five'."""
    text = " ".join(str(error).split()).removeprefix("Parser key ")
    found = re.match(r'"([\w.]+)": .*?(?:Got|Given) value: ?(.*)', text)
    if not found:
        return text
    name, value = found[1], found[2] or "''"
    kind = {key: kind for cls in kinds for key, kind in _flatten(_types(cls))}[name]
    path, places = _config_path(argv), []
    if path is not None and name in dict(_flatten(read_yaml(Path(path)))):
        places.append(f"{path}: {name}")
    if f"--{name}" in [word.partition("=")[0] for word in argv]:
        places.append(f"--{name}")
    where = " or ".join(places) or name
    words = _in_words(kind)
    if get_origin(kind) is tuple:  # of which the value may be an item
        return f"{where} must be {words}; {value} does not fit"
    return f"{where} must be {words}, not {value}"


def _in_words(kind: Any) -> str:
    """What a setting of this type may be."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(parts)
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_in_words, parts))}]"
    if parts:  # of a union
        return " or ".join(map(_in_words, parts))
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        ...: "...",
    }
    return words[kind]


def _check_keys(cls: Any, values: dict[str, Any], where: str) -> None:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    check_known(values, fields, where)
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {key} is {value!r}, but it is a section; write its "
                    "settings below it, indented"
                )
            _check_keys(fields[key], value, f"{where}: {key}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _types(cls: Any) -> dict[str, Any]:
    """Of the fields of a dataclass, those of nested ones as dicts."""
    return {
        f.name: _types(f.type) if dataclasses.is_dataclass(f.type) else f.type
        for f in dataclasses.fields(cls)
    }
