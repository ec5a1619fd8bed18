"""Answers in OpenAI's shape, whole and as chunks: completions and events to JSON."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e1jax.sampling.completion import Completion, Event
from e1jax.serving.protocol import random_bits
from e1jax.tokenizer import THINK_END, Tokenizer

_FINISH_REASONS = {"stop": "stop", "solution_budget": "length", "length": "length"}


@dataclasses.dataclass(frozen=True)
class AnswerShape:
    """Makes the answers of one request; `index` counts its samples, over all prompts."""

    is_chat: bool
    logprobs: bool
    model: str
    seed: int
    tokenizer: Tokenizer
    id: str = dataclasses.field(default_factory=lambda: f"{random_bits(96):024x}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(
        self, completions: Mapping[int, Completion], prompts: int, cached: int
    ) -> bytes:
        """The answer to a request that is not streamed, of all its samples; see
        `usage_of`."""
        choices = [self._choice(*item) for item in sorted(completions.items())]
        usage = usage_of(completions, prompts, cached)
        head = self._head("chat.completion" if self.is_chat else "text_completion")
        return json.dumps({**head, "choices": choices, "usage": usage}).encode()

    def start(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a sample, which names the role; a text has none."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta}, []) if self.is_chat else None

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The chunk of an event."""
        logprobs = self._logprobs(event.token_ids, event.logprobs, event.forced)
        if not self.is_chat:
            part: dict[str, Any] = {"text": event.text}
        elif event.phase == "solution":
            part = {"delta": {"content": event.text}}
        else:
            text = event.text
            if event.token_ids[-1:] == [self.tokenizer.think_end_id]:
                text = text.removesuffix(THINK_END)
            part = {"delta": {"reasoning": text, "reasoning_content": text}}
        if event.completion is not None:
            part |= _ending(event.completion)
        return self._chunk(index, part, logprobs)

    def usage_chunk(
        self, completions: Mapping[int, Completion], prompts: int, cached: int
    ) -> dict[str, Any]:
        """The last chunk, of stream_options.include_usage."""
        usage = usage_of(completions, prompts, cached)
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        id = ("chatcmpl-" if self.is_chat else "cmpl-") + self.id
        head = {"id": id, "object": kind, "created": self.created}
        return {**head, "model": self.model, "seed": self.seed}

    def _chunk(self, index: int, part: dict[str, Any], logprobs: Any) -> dict[str, Any]:
        choice = {"index": index, "logprobs": logprobs or None, "finish_reason": None}
        return {**self._head(self._chunk_kind), "choices": [{**choice, **part}]}

    def _choice(self, index: int, c: Completion) -> dict[str, Any]:
        logprobs = self._logprobs(c.token_ids, c.logprobs, c.forced)
        choice = {"index": index, "logprobs": logprobs, **_ending(c)}
        if not self.is_chat:
            return {**choice, "text": c.text}
        message = {"role": "assistant", "content": c.solution}
        thinking = {"reasoning": c.thinking, "reasoning_content": c.thinking}
        return {**choice, "message": {**message, **thinking}}

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[float], forced: Sequence[bool]
    ) -> dict[str, Any] | None:
        """Of all tokens of the response, thinking too."""
        if not self.logprobs:
            return None
        texts = [self.tokenizer.decode([token]) for token in ids]
        # The shortest text that gives the float32 back.
        values = [float(str(np.float32(logprob))) for logprob in logprobs]
        if not self.is_chat:
            return {
                "tokens": texts,
                "token_logprobs": values,
                "token_ids": list(ids),
                "forced": list(forced),
            }
        columns = zip(ids, texts, values, forced, strict=True)
        return {"content": [_token(*row) for row in columns]}


def usage_of(
    completions: Mapping[int, Completion], prompts: int, cached: int
) -> dict[str, Any]:
    """Tokens of a request: its prompts' once each, and its samples': thinking, forced and
    solution. `cached` tokens of the prompts were in the engine's cache before."""
    samples = len(completions) // prompts
    firsts = [completions[index * samples] for index in range(prompts)]
    done = list(completions.values())
    prompt_tokens = sum(len(c.prompt_ids) for c in firsts)
    tokens = sum(len(c.token_ids) for c in done)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(c.thinking_tokens for c in done)
        },
    }


def finish_reason(completion: Completion) -> str:
    """OpenAI's word for how a completion ended: stop or length."""
    return _FINISH_REASONS[completion.finish_reason]


def server_sent(value: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def _ending(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason(completion),
        "thinking_end": completion.thinking_end,
        "forced_tokens": sum(completion.forced),
    }


def _token(id: int, text: str, logprob: float, forced: bool) -> dict[str, Any]:
    # A token that is part of a character has no text of its own.
    in_bytes = None if "\ufffd" in text else list(text.encode())
    entry = {"token": text, "logprob": logprob, "bytes": in_bytes, "top_logprobs": []}
    return {**entry, "token_id": id, "forced": forced}
