"""Elastic Reasoning's budgets as a state machine on arrays.

A response is `thinking </think> solution <eos>`, and the two parts have separate
budgets (arXiv 2505.05315, section 3.1, budget-constrained rollout). `resolve_budget`
turns a request into numbers, once, on the host; `advance` is one step of the state
machine for a batch of rows. Budgets are arrays [B], so one compiled program serves any
mix of them.

Differs from the reference implementation: an end-of-sequence token sampled while
thinking is replaced by the forced `</think>` (the reference keeps it, and then masks
the entire solution out of the loss).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from e1jax.config.checks import UNLIMITED, UserError
from e1jax.config.sampling import SamplingParams
from e1jax.sampling.draw import take_from_rows

THINK, FORCE, SOLVE, DONE = range(4)


# Names of `BudgetState.end` and `BudgetState.finish`, as a Completion tells them.
THINKING_ENDS = (None, "model", "budget", "eos")


FINISH_REASONS = ("", "stop", "solution_budget", "length")  # "": not finished


BY_MODEL, BY_BUDGET, BY_EOS = 1, 2, 3


STOP, SOLUTION_BUDGET, LENGTH = 1, 2, 3


class TokenIds(NamedTuple):
    """Special ids, read from the tokenizer."""

    eos: Any  # [E] int32: any of them ends a response
    think_end: int  # -1: the model has no `</think>`
    # `<think>`, which no solution may hold; -1: the model has none
    think_start: int = -1


class Budget(NamedTuple):
    """Limits of a row, constant over its response; unlimited is a very large number."""

    thinking: Int[Array, " B"]  # sampled tokens up to and with `</think>`
    solution: Int[Array, " B"]  # sampled tokens after it
    total: Int[Array, " B"]  # tokens of any kind: the cache's room behind the prompt
    plain: Bool[Array, " B"]  # nothing is forced, EOS ends the response anywhere
    forced_ids: Int[Array, "B F"]  # end_of_thinking_text and `</think>`
    num_forced: Int[Array, " B"]  # how many of them count
    # Nothing is forced: a used up thinking budget ends the response, as EOS does.
    stops: Bool[Array, " B"]


class BudgetState(NamedTuple):
    """Where a row is in its response."""

    phase: Int[Array, " B"]  # THINK, FORCE, SOLVE or DONE
    thinking_tokens: Int[Array, " B"]  # sampled so far
    solution_tokens: Int[Array, " B"]  # sampled so far
    forced_tokens: Int[Array, " B"]
    num_tokens: Int[Array, " B"]  # all of them
    end: Int[Array, " B"]  # index into THINKING_ENDS
    finish: Int[Array, " B"]  # index into FINISH_REASONS


class ResolvedBudget(NamedTuple):
    """A request's budgets as the state machine counts them; see `Budget`."""

    thinking: int
    solution: int
    total: int
    plain: bool
    stops: bool
    was_cut: bool  # a given thinking budget was lowered to leave room for the solution


def resolve_budget(
    params: SamplingParams,
    num_prompt: int,
    num_forced: int,
    cache_len: int,
    where: str,
    *,
    can_think: bool = True,
    starts_thinking: bool = True,
) -> ResolvedBudget:
    """Reserves room for the solution: thinking is cut so that prompt + thinking +
    forced tokens + solution fits `cache_len`, the solution never.

    `num_forced` is the number of tokens that a forced end inserts, `can_think` whether
    the model has a `</think>`. A response that does not start in the thinking phase (see
    `request.starts_thinking`) has a solution budget alone. Raises UserError, with the numbers, for a request that
    cannot fit at all.
    """
    thinking, solution = params.thinking_budget, params.solution_budget
    if not can_think and thinking is not None:
        raise UserError(
            f"{where}: thinking_budget={thinking}, but this model has no </think> token; set it to none for "
            "plain sampling under the solution budget"
        )
    thinks = can_think and starts_thinking
    plain = thinks and thinking is None and solution is None
    stops = thinks and not plain and params.on_thinking_budget == "stop"
    forced = num_forced if thinks and not plain and not stops else 0
    # An unlimited solution still gets at least one token.
    reserved = 1 if solution is None else solution
    room = cache_len - num_prompt
    if room < forced + reserved:
        what = (
            "at least 1 token"
            if solution is None
            else f"a solution budget of {solution}"
        )
        end = f" + {forced} for the forced end of thinking" if forced else ""
        raise UserError(
            f"{where}: a prompt of {num_prompt} tokens{end} + {what} does not fit cache_len={cache_len}; "
            "raise --cache-len or shorten the prompt or the solution budget"
        )
    longest = room - forced - reserved
    wanted = UNLIMITED if thinking is None else thinking
    return ResolvedBudget(
        thinking=UNLIMITED if plain else min(wanted, longest),
        solution=UNLIMITED if solution is None else solution,
        total=room,
        plain=plain,
        stops=stops,
        was_cut=thinks and thinking is not None and thinking > longest,
    )


def start_state(phase: Any) -> BudgetState:
    """State of rows [B] that have no token yet: THINK, SOLVE (a model without
    `</think>`) or DONE (no request)."""
    zeros = 0 * phase  # of NumPy's, if that is
    return BudgetState(phase, zeros, zeros, zeros, zeros, zeros, zeros)


def advance(
    state: BudgetState, sampled: Int[Array, " B"], budget: Budget, ids: TokenIds
) -> tuple[Int[Array, " B"], Bool[Array, " B"], BudgetState]:
    """One step of the state machine: (next token of each row, whether it was forced,
    next state).

    `sampled` are the model's draws. While thinking, a draw gives way to the first forced
    token where the budget is used up or where it is an EOS; a dropped token
    counts nowhere. A row that stops instead of forcing keeps the draw, and ends
    with it. A row that is DONE keeps its state, and its token means nothing.
    """
    is_eos = jnp.isin(sampled, ids.eos)
    thinking, solving = state.phase == THINK, state.phase == SOLVE
    may_force = thinking & ~budget.stops
    spent = may_force & (state.thinking_tokens >= budget.thinking)
    stopped = may_force & ~budget.plain & is_eos
    forced = spent | stopped | (state.phase == FORCE)
    index = jnp.minimum(state.forced_tokens, budget.forced_ids.shape[1] - 1)
    next_forced = take_from_rows(budget.forced_ids, index)
    token = jnp.where(forced, next_forced, sampled)

    natural = thinking & ~forced & (token == ids.think_end)
    forced_tokens = state.forced_tokens + forced
    closes = natural | (forced & (forced_tokens == budget.num_forced))
    phase = jnp.where(closes, SOLVE, jnp.where(forced, FORCE, state.phase))
    end = jnp.where(natural, BY_MODEL, state.end)
    end = jnp.where(spent, BY_BUDGET, jnp.where(stopped, BY_EOS, end))
    thinking_tokens = state.thinking_tokens + (thinking & ~forced)
    solution_tokens = state.solution_tokens + solving
    num_tokens = state.num_tokens + 1

    ends_at_eos = thinking & (budget.plain | budget.stops)
    at_eos = is_eos & (solving | ends_at_eos)
    used_up = thinking & budget.stops & ~natural & (thinking_tokens >= budget.thinking)
    end = jnp.where(used_up, BY_BUDGET, end)
    end = jnp.where(thinking & budget.stops & is_eos, BY_EOS, end)
    finish = jnp.where(used_up | (num_tokens >= budget.total), LENGTH, 0)
    finish = jnp.where(
        (phase == SOLVE) & (solution_tokens >= budget.solution), SOLUTION_BUDGET, finish
    )
    finish = jnp.where(at_eos, STOP, finish)
    phase = jnp.where(finish > 0, DONE, phase)
    new = BudgetState(
        phase, thinking_tokens, solution_tokens, forced_tokens, num_tokens, end, finish
    )
    done = state.phase == DONE
    new = BudgetState(
        *(jnp.where(done, old, now) for old, now in zip(state, new, strict=True))
    )
    return token, forced & ~done, new
