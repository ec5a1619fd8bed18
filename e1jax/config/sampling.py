"""How a prompt is sampled: budgets, temperature, cuts and seed; and budgets in words."""

import dataclasses
import numbers
import re
from typing import Any, Literal, get_args

from e1jax.config.checks import (
    UNLIMITED,
    UserError,
    check_choice,
    check_integer,
    check_number,
    shown,
)
from e1jax.config.texts import check_backslashes

OnThinkingBudget = Literal["force", "stop"]


# States the budgets of a request before its question; see `stated_budgets`.
BUDGET_TEXT = (
    "Think for at most {thinking} tokens and answer in at most {solution} tokens.\n"
)


_UNLIMITED = "as long as you need"


_FIELD = re.compile(r"(at most )?\{(thinking|solution)(?::([^{}]*))?\}( tokens)?")


# Fields that version 0.1 had not, with their defaults: a digest of a request leaves them
# out then, so that outputs of that version can be resumed.
LATER_FIELDS = {"on_thinking_budget": "force", "stop": []}


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one prompt is sampled. Budgets are in sampled tokens, None is unlimited."""

    thinking_budget: int | None = 1024
    """Most tokens sampled before </think>; then it is forced."""
    solution_budget: int | None = 1024
    """Most tokens sampled after </think>; room for them is reserved also where thinking
    is unlimited."""
    n: int = 1
    """Samples of each prompt."""
    temperature: float = 0.6
    """Softmax temperature; 0 is greedy."""
    top_p: float = 0.95
    """Probability mass kept, in (0, 1]; 1 is off."""
    top_k: int = 0
    """Number of most probable tokens kept; 0 is off."""
    seed: int = 0
    """Seed of each prompt; the same gives the same tokens."""
    end_of_thinking_text: str = ""
    """Text, for example "I have to answer now.", that is inserted, unsampled, right
    before a forced </think>."""
    on_thinking_budget: OnThinkingBudget = "force"
    """Where the thinking budget is used up: force </think>, or stop the response, without
    an answer; then nothing is ever forced, and EOS ends the response while thinking too."""
    stop: tuple[str, ...] = ()
    """Text that ends a solution, which is cut before it; may be given several times."""

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
                f"end_of_thinking_text must be a string, not {shown(self.end_of_thinking_text)}"
            )
        check_backslashes(self.end_of_thinking_text, "end_of_thinking_text")
        check_choice(
            "on_thinking_budget", self.on_thinking_budget, get_args(OnThinkingBudget)
        )
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        # NumPy's numbers become Python's: sums of NumPy's 8 or 32 bits would overflow.
        for name, value in list(vars(self).items()):
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))

    def record(self) -> dict[str, Any]:
        """The fields as JSON values, as outputs record them."""
        return dataclasses.asdict(self) | {"stop": list(self.stop)}


def _stop_texts(stop: Any) -> tuple[str, ...]:
    """A text, a list of texts or None, as a tuple."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    is_list = isinstance(texts, list | tuple)
    if not is_list or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"stop must be a text or a list of texts, not {shown(stop)}")
    return tuple(texts)


def check_budget_text(text: Any, name: str) -> None:
    """Raises UserError, calling it by `name`, for a text that does not state budgets."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text, not {shown(text)}")
    check_backslashes(text, name)
    rest = _FIELD.sub("", text)
    if rest == text or "{" in rest or "}" in rest:
        raise UserError(
            f"{name} must hold {{thinking}} or {{solution}}, and no other braces, not "
            f"{shown(text)}"
        )


def stated_budgets(text: str, thinking: int | None, solution: int | None) -> str:
    """A pair of budgets as a text says it, with {thinking} and {solution} filled in.

    An unlimited budget is "as long as you need", in place of "at most {thinking} tokens"
    as well; of {thinking:none} it is "none".
    """
    budgets = {"thinking": thinking, "solution": solution}

    def fill(field: re.Match[str]) -> str:
        before, name, word, after = field.groups()
        if budgets[name] is None:
            return _UNLIMITED if word is None else word
        return f"{before or ''}{budgets[name]}{after or ''}"

    return _FIELD.sub(fill, text)
