"""The results of sampling: completions, and events of samples that are under way."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from e1jax.config.checks import UserError
from e1jax.sampling.budget import FINISH_REASONS, STOP, THINKING_ENDS, BudgetState
from e1jax.sampling.request import Request
from e1jax.tokenizer import THINK_END, Tokenizer, extract_boxed

# Tokens that are decoded before new ones, which may end a character of theirs; and for
# each character of a stop text, which they may end too.
_CONTEXT, _CONTEXT_OF_STOP = 16, 4


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
    cached_tokens: int  # of the prompt, that were in the cache before
    start: int = dataclasses.field(repr=False)  # index of the first token
    decode: Callable[[int], str] = dataclasses.field(repr=False)  # by `start`

    @functools.cached_property
    def text(self) -> str:
        """Text of the tokens. A character that later tokens end comes with these."""
        return self.decode(self.start)


def join_events(events: Iterable[Event]) -> list[Event]:
    """Events of several steps with one for each sample and phase, its tokens together."""
    parts: dict[tuple[int, int, str], list[Event]] = {}
    for event in events:
        key = event.request_id, event.sample, event.phase
        parts.setdefault(key, []).append(event)
    return [_joined(part) if len(part) > 1 else part[0] for part in parts.values()]


def _joined(events: Sequence[Event]) -> Event:
    """Events in turn of a sample, of one phase, as one."""

    def of_all(field: str) -> list[Any]:
        return [value for event in events for value in getattr(event, field)]

    tokens = {name: of_all(name) for name in ("token_ids", "logprobs", "forced")}
    return dataclasses.replace(events[-1], start=events[0].start, **tokens)


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
    is_stopped: bool = False  # by a stop text
    cached_tokens: int = 0

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
        thinks = self.request.starts_thinking and self.close is None
        if thinks and think_end in token_ids:
            self.close = len(self.token_ids) + token_ids.index(think_end)
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.forced += forced

    def stop_end(self, start: int, is_done: bool) -> int | None:
        """Where the first stop text ends, of a solution that has grown from `start` on:
        the number of tokens up to the token that completes it; None without any."""
        if not self.request.params.stop:
            return None
        part = self._parts(is_done)[1]
        first = max(start, part.start)
        context = self._context(part, first)

        def is_in(end: int) -> bool:
            return (
                self._stop_at(self.tokenizer.decode(self.token_ids[context:end])) >= 0
            )

        if first >= part.text_end or not is_in(part.text_end):
            return None
        ends = range(first + 1, part.text_end + 1)
        return ends[bisect.bisect_left(ends, True, key=is_in)]

    def stop(self, end: int, state: BudgetState) -> BudgetState:
        """Drops the tokens from `end` on, behind a stop text; `state` without them."""
        solution_tokens = int(state.solution_tokens) - len(self.token_ids[end:])
        for values in (self.token_ids, self.logprobs, self.forced):
            del values[end:]
        self.is_stopped = True
        return state._replace(solution_tokens=solution_tokens, finish=STOP)

    def completion(self, state: BudgetState) -> Completion:
        """The finished response; `state` holds the numbers of its row."""
        parts = self._parts(is_done=True)
        thinking, solution = (
            self.tokenizer.decode(self.token_ids[part.start : part.text_end])
            for part in parts
        )
        if self.is_stopped:
            solution = solution[: self._stop_at(solution)]
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
        parts = self._parts(is_done=completion is not None)
        if completion is not None and not self.token_ids:  # a budget of 0 tokens
            parts = parts[:1] if self.request.starts_thinking else parts[1:]
        for part in parts:
            first = max(start, part.start)
            if first < part.end or not self.token_ids:
                yield Event(
                    self.request.id,
                    self.number,
                    part.phase,
                    self.token_ids[first : part.end],
                    self.logprobs[first : part.end],
                    self.forced[first : part.end],
                    completion if part.end == len(self.token_ids) else None,
                    self.cached_tokens,
                    first,
                    functools.partial(self._new_text, part),
                )

    def _parts(self, is_done: bool) -> tuple["_Part", "_Part"]:
        """Thinking and solution, as far as they have come."""
        end = text_end = len(self.token_ids)
        if is_done and end and self.token_ids[-1] in self.tokenizer.eos_ids:
            text_end -= not self.forced[-1]
        if self.close is not None:
            split, text = self.close + 1, (self.close, THINK_END, True)
        else:
            split = end if self.request.starts_thinking else 0
            text = (min(split, text_end), "", is_done)
        thinking = _Part("thinking", 0, split, *text)
        return thinking, _Part("solution", split, end, text_end, "", is_done)

    def _new_text(self, part: "_Part", first: int) -> str:
        """Text of a part's tokens from `first` on. Unless the part is over, later tokens
        may change the last character or complete a stop text; both are held back."""
        context = self._context(part, first)
        old = self.tokenizer.decode(self.token_ids[context:first])
        text = self.tokenizer.decode(self.token_ids[context : part.text_end])
        stops = self.request.params.stop if part.phase == "solution" else ()
        if not part.is_over:
            text = _settled(text, stops)
        elif self.is_stopped and part.phase == "solution":
            text = text[: self._stop_at(text)]
        return text[len(_settled(old, stops)) :] + part.closer

    def _context(self, part: "_Part", first: int) -> int:
        """Index of a token far enough before `first` to decode the tokens there."""
        stops = max(map(len, self.request.params.stop), default=0)
        return max(part.start, first - _CONTEXT - _CONTEXT_OF_STOP * stops)

    def _stop_at(self, text: str) -> int:
        """Index of the first stop text; -1 without any."""
        found = [text.find(stop) for stop in self.request.params.stop]
        return min((index for index in found if index >= 0), default=-1)


class _Part(NamedTuple):
    """The tokens of a phase, as indices into the sample's tokens."""

    phase: str
    start: int
    end: int
    text_end: int  # without `</think>` or EOS
    closer: str  # text of `</think>`, if that ended it
    is_over: bool


def _settled(text: str, stops: Sequence[str]) -> str:
    """Without a last character of which bytes may be missing, and without the beginning of
    a stop text."""
    text = text[:-1] if text.endswith("\ufffd") else text
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text
