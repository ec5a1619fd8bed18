"""Requests: a prompt and how it is sampled, checked before any work is done."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams, stated_budgets
from e1jax.config.texts import check_backslashes
from e1jax.sampling.budget import ResolvedBudget, resolve_budget
from e1jax.tokenizer import THINK_END, Tokenizer

Prompt = str | Sequence[dict[str, Any]] | Sequence[int]


class Following(NamedTuple):
    """A request that goes on from a finished sample: all tokens of its prompt but the last
    begin that sample's prompt and response, of which the last one is left out."""

    index: int  # `prompt_index` of its completions
    prompt_ids: list[int]
    params: SamplingParams


Follow = Callable[[Any], Sequence[Following]]  # of a Completion


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that fits, as numbers."""

    id: int
    index: int  # which prompt of a call
    prompt_ids: list[int]
    params: SamplingParams
    budget: ResolvedBudget
    forced_ids: list[
        int
    ]  # end_of_thinking_text and `</think>`, if thinking comes first
    starts_thinking: bool
    # Came alone: its prompt may take keys and values from a slot, and is prefilled in
    # pieces between the steps of other requests.
    is_live: bool
    # Of a finished sample's Completion, the requests that go on from its slot.
    follow: Callable[[Any], list["Request"]] | None = None

    @property
    def most_tokens(self) -> int:
        """The most tokens that a response can have."""
        budget, forced = self.budget, len(self.forced_ids)
        thinking = budget.thinking if self.starts_thinking else 0
        return min(budget.total, thinking + forced + budget.solution)


def make_request(
    id: int,
    index: int,
    prompt: Prompt,
    params: SamplingParams,
    where: str,
    *,
    is_live: bool,
    tokenizer: Tokenizer,
    vocab_size: int,
    cache_len: int,
) -> Request:
    """Checks a prompt and its parameters; `where` names them in messages.

    Raises UserError for a prompt that is none, and for budgets that cannot fit.
    """
    if not isinstance(params, SamplingParams):
        raise UserError(f"params must be SamplingParams, not {params!r}")
    prompt_ids = encode_prompt(prompt, where, tokenizer, vocab_size, params)
    thinks = starts_thinking(prompt_ids, tokenizer)
    forced_ids = _forced_ids(params.end_of_thinking_text, where, tokenizer)
    budget = resolve_budget(
        params,
        len(prompt_ids),
        len(forced_ids),
        cache_len,
        where,
        can_think=tokenizer.think_end_id is not None,
        starts_thinking=thinks,
    )
    forced_ids = forced_ids if thinks and not budget.stops else []
    return Request(id, index, prompt_ids, params, budget, forced_ids, thinks, is_live)


def encode_prompt(
    prompt: Prompt,
    where: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    params: SamplingParams | None = None,
) -> list[int]:
    """Token ids of a text (the user's message in the chat template), of chat messages,
    or of token ids, as they are.

    Before a text, and before the last message of the user, stand the budgets of `params`,
    if the tokenizer has a text that states them.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence | np.ndarray):
        raise UserError(
            f"{where} is {prompt!r}; give a text, chat messages or token ids"
        )
    if not len(prompt):
        raise UserError(f"{where} is empty; a response needs a token to start from")
    if all(isinstance(item, dict) for item in prompt):
        messages: Any = prompt
        if params is not None and tokenizer.budget_text is not None:
            budgets = params.thinking_budget, params.solution_budget
            messages = _stating(
                messages, stated_budgets(tokenizer.budget_text, *budgets)
            )
        try:
            ids = tokenizer.encode_chat(messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        # Not before: it goes into any depth, and through any length.
        check_backslashes(prompt, where)
        prompt = ids
    last = vocab_size - 1
    for token in prompt:
        is_integer = isinstance(token, int | np.integer)
        if isinstance(token, bool) or not is_integer or not 0 <= token <= last:
            raise UserError(
                f"{where}: {token!r} is not a token id of this model (0 to {last})"
            )
    return [int(token) for token in prompt]  # type: ignore[arg-type]


def _stating(messages: Sequence[dict[str, Any]], statement: str) -> list[Any]:
    """The messages, with a text before the last one of the user; without one, as they
    are. Earlier messages keep their tokens, whatever budgets a conversation goes on with.
    """
    stated = list(messages)
    for index in reversed(range(len(stated))):
        message = stated[index]
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                stated[index] = {**message, "content": statement + content}
            elif isinstance(content, list):  # of parts
                part = {"type": "text", "text": statement}
                stated[index] = {**message, "content": [part, *content]}
            break
    return stated


def starts_thinking(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """The phase in which a response to the prompt starts: the solution, if the model has
    no `</think>`, or if that is the last of the two tags in the prompt."""
    if tokenizer.think_end_id is None:
        return False
    tags = (tokenizer.think_start_id, tokenizer.think_end_id)
    last = next((token for token in reversed(prompt_ids) if token in tags), None)
    return last != tokenizer.think_end_id


def _forced_ids(text: str, where: str, tokenizer: Tokenizer) -> list[int]:
    if THINK_END in text:
        raise UserError(
            f"{where}: end_of_thinking_text holds {THINK_END}, which is appended to "
            "it anyway; leave it out"
        )
    if tokenizer.think_end_id is None:
        return []
    try:
        return [*tokenizer.encode(text), tokenizer.think_end_id]
    except UserError as error:
        raise UserError(f"{where}: end_of_thinking_text: {error}") from None
