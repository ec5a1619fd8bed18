"""The results of sampling: completions, and events of samples that are under way."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from e1jax.config.checks import UserError
from e1jax.sampling.budget import FINISH_REASONS, THINKING_ENDS, BudgetState
from e1jax.sampling.request import Request
from e1jax.tokenizer import THINK_END, Tokenizer, extract_boxed

_CONTEXT = 16  # tokens decoded before new ones, which may end a character of theirs


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response; its lists are of one length, forced tokens and EOS too."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]  # log-softmax of logits / temperature, before top-k and top-p
    forced: list[bool]
    thinking: str  # text before the first `</think>`
    solution: str  # text after it
    text: str  # the response, without a final EOS
    answer: str | None  # content of the solution's last \boxed{}
    thinking_tokens: int  # sampled tokens; forced ones are not counted
    solution_tokens: int
    thinking_end: str | None  # "model", "budget" or "eos"; None: `</think>` never came
    finish_reason: str  # "stop", "solution_budget" or "length"
    prompt_index: int  # which prompt of the call
    sample: int  # which sample of the prompt


@dataclasses.dataclass
class Event:
    """New tokens of a sample, all of one phase; `</think>` is the last of thinking.

    The texts of a sample's events, joined, are the text of its completion.
    """

    request_id: int
    sample: int  # which sample of the request
    phase: str  # "thinking" or "solution"
    token_ids: list[int]
    logprobs: list[float]
    forced: list[bool]
    completion: Completion | None  # comes with the sample's last tokens
    decode: Callable[[], str] = dataclasses.field(repr=False)

    @functools.cached_property
    def text(self) -> str:
        """Text of the tokens. A character that later tokens end comes with these."""
        return self.decode()


@dataclasses.dataclass
class Sample:
    """A response that is being sampled."""

    request: Request
    number: int  # which sample of the request
    tokenizer: Tokenizer
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)
    close: int | None = None  # index of the first `</think>`

    def extend(
        self, token_ids: list[int], logprobs: list[float], forced: list[bool]
    ) -> None:
        """Raises UserError for a log-probability that is not finite."""
        if not all(map(math.isfinite, logprobs)):
            raise UserError(
                "the model's logits are not finite; its checkpoint is damaged, or its "
                "dtype is too narrow"
            )
        think_end = self.tokenizer.think_end_id
        if self.close is None and think_end in token_ids:
            self.close = len(self.token_ids) + token_ids.index(think_end)
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.forced += forced

    def completion(self, state: BudgetState) -> Completion:
        """The finished response; `state` holds the numbers of its row."""
        parts = self._parts(is_done=True)
        thinking, solution = (
            self.tokenizer.decode(self.token_ids[part.start : part.text_end])
            for part in parts
        )
        return Completion(
            prompt_ids=self.request.prompt_ids,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            forced=self.forced,
            thinking=thinking,
            solution=solution,
            text=thinking + parts[0].closer + solution,
            answer=extract_boxed(solution),
            thinking_tokens=int(state.thinking_tokens),
            solution_tokens=int(state.solution_tokens),
            thinking_end=THINKING_ENDS[int(state.end)],
            finish_reason=FINISH_REASONS[int(state.finish)],
            prompt_index=self.request.index,
            sample=self.number,
        )

    def events(self, start: int, completion: Completion | None) -> Iterator[Event]:
        """The tokens from `start` on, by phase; a `completion` comes with the last."""
        for part in self._parts(is_done=completion is not None):
            first = max(start, part.start)
            if first < part.end:
                yield Event(
                    self.request.id,
                    self.number,
                    part.phase,
                    self.token_ids[first : part.end],
                    self.logprobs[first : part.end],
                    self.forced[first : part.end],
                    completion if part.end == len(self.token_ids) else None,
                    functools.partial(self._new_text, part, first),
                )

    def _parts(self, is_done: bool) -> tuple["_Part", "_Part"]:
        """Thinking and solution, as far as they have come."""
        end = text_end = len(self.token_ids)
        if is_done and self.token_ids[-1] in self.tokenizer.eos_ids:
            text_end -= not self.forced[-1]
        if self.close is not None:
            split, text = self.close + 1, (self.close, THINK_END, True)
        else:
            split = 0 if self.tokenizer.think_end_id is None else end
            text = (min(split, text_end), "", is_done)
        thinking = _Part("thinking", 0, split, *text)
        return thinking, _Part("solution", split, end, text_end, "", is_done)

    def _new_text(self, part: "_Part", first: int) -> str:
        """Text of a part's tokens from `first` on, up to the last complete character unless
        the part is over."""
        context = max(part.start, first - _CONTEXT)
        old = self.tokenizer.decode(self.token_ids[context:first])
        text = self.tokenizer.decode(self.token_ids[context : part.text_end])
        if part.is_over:
            return text[len(_whole(old)) :] + part.closer
        return _whole(text)[len(_whole(old)) :]


class _Part(NamedTuple):
    """The tokens of a phase, as indices into the sample's tokens."""

    phase: str
    start: int
    end: int
    text_end: int  # without `</think>` or EOS
    closer: str  # text of `</think>`, if that ended it
    is_over: bool


def _whole(text: str) -> str:
    """Without a last character of which some bytes may be missing."""
    return text[:-1] if text.endswith("\ufffd") else text
