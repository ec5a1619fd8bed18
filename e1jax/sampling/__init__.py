"""Budgeted sampling: the state machine of budgets, random draws, jitted programs, the engine."""

from e1jax.sampling.budget import Budget, TokenIds, advance, resolve_budget, start_state
from e1jax.sampling.completion import Completion, Event
from e1jax.sampling.decode import SHORTEST_FORCED, Rows, admit, empty_rows, prefill_len
from e1jax.sampling.draw import Sampling, token_logprobs, top_k_top_p_mask
from e1jax.sampling.engine import Engine
from e1jax.sampling.request import Prompt

__all__ = [
    "SHORTEST_FORCED",
    "Budget",
    "Completion",
    "Engine",
    "Event",
    "Prompt",
    "Rows",
    "Sampling",
    "TokenIds",
    "admit",
    "advance",
    "empty_rows",
    "prefill_len",
    "resolve_budget",
    "start_state",
    "token_logprobs",
    "top_k_top_p_mask",
]
