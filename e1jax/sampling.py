"""Elastic Reasoning's sampling as pure functions on arrays: budgets, and the draw of a
token.

A response is `thinking </think> solution <eos>`, and the two parts have separate
budgets (arXiv 2505.05315, section 3.1, budget-constrained rollout). `resolve_budget`
turns a request into numbers, once, on the host; `advance` is one step of the state
machine for a batch of rows. Budgets, temperature, top-p, top-k and seeds are arrays
[B], so one compiled program serves any mix of them.

Differs from the reference implementation: an end-of-sequence token sampled while
thinking is replaced by the forced `</think>` (the reference keeps it, and then masks
the whole solution out of the loss).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from e1jax.config import UNLIMITED, SamplingParams, UserError
from e1jax.sharding import on_tpu, sharding

THINK, FORCE, SOLVE, DONE = range(4)

_MAX_GAP = float(np.finfo(np.float32).max)
_MAX_RANK = np.int32(np.iinfo(np.int32).max)
_LANES = 128  # of a TPU's vector registers

# Names of `BudgetState.end` and `BudgetState.finish`, as a Completion tells them.
THINKING_ENDS = (None, "model", "budget", "eos")
FINISH_REASONS = ("", "stop", "solution_budget", "length")  # "": not finished
BY_MODEL, BY_BUDGET, BY_EOS = 1, 2, 3
STOP, SOLUTION_BUDGET, LENGTH = 1, 2, 3


class TokenIds(NamedTuple):
    """Special ids, read from the tokenizer."""

    eos: Any  # [E] int32: any of them ends a response
    think_end: int  # -1: the model has no `</think>`


class Budget(NamedTuple):
    """What a row may use; constant over its response. Unlimited is a very large number."""

    thinking: Int[Array, " B"]  # sampled tokens up to and with `</think>`
    solution: Int[Array, " B"]  # sampled tokens after it
    total: Int[
        Array, " B"
    ]  # tokens of any kind: what the cache holds beside the prompt
    plain: Bool[Array, " B"]  # nothing is forced, EOS ends the response anywhere
    forced_ids: Int[Array, "B F"]  # end_of_thinking_text and `</think>`
    num_forced: Int[Array, " B"]  # how many of them count


class BudgetState(NamedTuple):
    """Where a row is in its response."""

    phase: Int[Array, " B"]  # THINK, FORCE, SOLVE or DONE
    thinking_tokens: Int[Array, " B"]  # sampled so far
    solution_tokens: Int[Array, " B"]  # sampled so far
    forced_tokens: Int[Array, " B"]
    num_tokens: Int[Array, " B"]  # all of them
    end: Int[Array, " B"]  # index into THINKING_ENDS
    finish: Int[Array, " B"]  # index into FINISH_REASONS


class Sampling(NamedTuple):
    """How a row draws its tokens."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]  # 0 is off
    seed: UInt[Array, "B 2"]  # low and high half of the request's seed
    sample: Int[Array, " B"]  # which sample of the request


class ResolvedBudget(NamedTuple):
    """A request's budgets as the state machine counts them; see `Budget`."""

    thinking: int
    solution: int
    total: int
    plain: bool
    was_cut: bool  # a given thinking budget was lowered to leave room for the solution


def resolve_budget(
    params: SamplingParams,
    num_prompt: int,
    num_forced: int,
    cache_len: int,
    where: str,
    *,
    can_think: bool = True,
) -> ResolvedBudget:
    """Reserves room for the solution: thinking is cut so that prompt + thinking +
    forced tokens + solution fits `cache_len`, the solution never.

    `num_forced` is the number of tokens that a forced end inserts, `can_think` whether
    the model has a `</think>`. Raises UserError, with the numbers, for a request that
    cannot fit at all.
    """
    thinking, solution = params.thinking_budget, params.solution_budget
    if not can_think and thinking is not None:
        raise UserError(
            f"{where}: thinking_budget={thinking}, but this model has no </think> token; set it to none for "
            "plain sampling under the solution budget"
        )
    plain = can_think and thinking is None and solution is None
    forced = num_forced if can_think and not plain else 0
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
        was_cut=thinking is not None and thinking > longest,
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

    `sampled` is what the model drew. While thinking it is dropped, in favour of the
    first forced token, where the budget is used up or where it is an EOS; a dropped token
    counts nowhere. A row that is DONE keeps its state, and its token means nothing.
    """
    is_eos = jnp.isin(sampled, ids.eos)
    thinking, solving = state.phase == THINK, state.phase == SOLVE
    spent = thinking & (state.thinking_tokens >= budget.thinking)
    stopped = thinking & ~budget.plain & is_eos
    forced = spent | stopped | (state.phase == FORCE)
    index = jnp.minimum(state.forced_tokens, budget.forced_ids.shape[1] - 1)
    next_forced = _at(budget.forced_ids, index)
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

    at_eos = is_eos & (solving | (thinking & budget.plain))
    finish = jnp.where(num_tokens >= budget.total, LENGTH, 0)
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


def row_keys(sampling: Sampling) -> Key[Array, " B"]:
    """Of the seed and the sample of each row. Its token i is drawn with `token_keys` of
    it and i, and so by these three and nothing else."""

    def key(seed, sample):
        base = jax.random.fold_in(jax.random.key(seed[0], impl="threefry2x32"), seed[1])
        return jax.random.fold_in(base, sample)

    return jax.vmap(key)(sampling.seed, sampling.sample)


def token_keys(rows: Key[Array, " B"], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """The key of token `index` of each row, from `row_keys`."""
    return jax.vmap(jax.random.fold_in)(rows, index)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    mesh: Mesh | None = None,
) -> Int[Array, " B"]:
    """Draws a token of each row from softmax(logits / temperature), cut by top-k, then
    top-p, renormalised.

    The draw is a Gumbel arg-max, which needs no sorted or summed-up distribution.
    `mesh` is where the arrays lie; see `kept`.
    """
    gaps = _gaps(logits, sampling.temperature)
    keep = kept(gaps, sampling.top_k, sampling.top_p, mesh)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    noisy = jnp.where(keep, noise - gaps, -jnp.inf)
    chosen = jnp.where((sampling.temperature == 0)[:, None], logits, noisy)
    return jnp.argmax(chosen, axis=-1).astype(jnp.int32)


def kept(
    gaps: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    mesh: Mesh | None = None,
) -> Bool[Array, "B V"]:
    """Which tokens survive top-k and then top-p.

    `gaps` are log p(most probable) - log p(token), 0 or more. Top-p keeps the smallest
    set of most probable tokens whose share of what top-k left reaches `top_p`. The token
    that crosses is kept, and so is any token tied with the last one kept, in both cuts.

    Nothing is sorted: floats of one sign are ordered like their bits, so bisection over
    the int32 range finds the exact cut in 31 passes over the array. Masses are summed in
    integers (see `_limbs`), so the set depends neither on the order of the sums nor on
    how the vocabulary is sharded. On a mesh of TPUs each device takes some of the rows,
    whole, and goes through them in its vector memory.
    """

    def limits():
        if on_tpu(mesh):
            return _limits_on_tpu(gaps, top_k, top_p, mesh)
        return _limit(gaps[:, None], top_k[:, None, None], top_p[:, None, None])[:, 0]

    everything = jnp.full((gaps.shape[0], 1), _MAX_RANK)
    filtering = jnp.any((top_k > 0) | (top_p < 1))
    return _ranks(gaps) <= jax.lax.cond(filtering, limits, lambda: everything)


def _limits_on_tpu(gaps, top_k, top_p, mesh):
    """[B, 1] of `_limit`: it is 62 passes over little data, so that its time would go
    into starting operations and collectives if XLA ran it."""
    batch, vocab = gaps.shape
    rows, columns = -batch % mesh.size, -vocab % _LANES
    by_vocab = sharding(mesh, (None, "vocab"), gaps.shape)
    gaps = jax.lax.with_sharding_constraint(gaps, by_vocab)  # as what else uses them
    gaps = jnp.pad(gaps, ((0, rows), (0, columns)), constant_values=_MAX_GAP)
    options = [jnp.pad(x, (0, rows))[:, None, None] for x in (top_k, top_p)]

    def one_row(gaps, top_k, top_p, limit):
        limit[...] = _limit(gaps[...], top_k[...], top_p[...])

    def local(gaps, top_k, top_p):
        gaps = gaps.reshape(gaps.shape[0], -1, _LANES)
        number = pl.BlockSpec((None, 1, 1), lambda row: (row, 0, 0))
        whole = pl.BlockSpec((None, *gaps.shape[1:]), lambda row: (row, 0, 0))
        return pl.pallas_call(
            one_row,
            grid=gaps.shape[:1],
            in_specs=[whole, number, number],
            out_specs=number,
            out_shape=jax.ShapeDtypeStruct(top_k.shape, jnp.int32),
            name="top_k_top_p",
        )(gaps, top_k, top_p)

    place = PartitionSpec(mesh.axis_names)
    everywhere = jax.shard_map(
        local, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
    )
    return everywhere(gaps, *options)[:batch, 0]


def _limit(gaps: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Rank of the last token kept [..., 1, 1], where a row's gaps are [..., M, N] and
    its top_k and top_p [..., 1, 1]."""
    ranks = _ranks(gaps)

    def total(x):
        return x.sum(axis=(-2, -1), keepdims=True)

    def k_most_probable():
        count = jnp.where(top_k > 0, top_k, _MAX_RANK)
        count = jnp.minimum(count, gaps.shape[-2] * gaps.shape[-1])

        def reaches(cut):
            return total((ranks <= cut).astype(jnp.int32)) >= count

        return _smallest(reaches, top_k.shape)

    everything = jnp.full_like(top_k, _MAX_RANK)
    by_k = jax.lax.cond(jnp.any(top_k > 0), k_most_probable, lambda: everything)
    limbs = [jnp.where(ranks <= by_k, limb, 0) for limb in _limbs(jnp.exp(-gaps))]

    def rest(cut):
        # What the cut leaves out. Near top_p = 1 it is small, so its float32 is finer
        # than that of what the cut keeps.
        sums = [total(jnp.where(ranks > cut, limb, 0)) for limb in limbs]
        return sum(
            s.astype(jnp.float32) * 2.0 ** -(12 * i) for i, s in enumerate(sums, 1)
        )

    mass = rest(jnp.full_like(top_k, -1))
    spare = (1 - top_p) * mass
    cut = _smallest(lambda cut: rest(cut) <= spare, top_k.shape)
    # 0.5 + 0.3 reaches 0.8 though their float32 sum may not: the last token is given up
    # if only rounding, and next to nothing of its own weight, was missing without it.
    before = jnp.maximum(cut - 1, 0)
    last = jnp.exp(-jax.lax.bitcast_convert_type(cut, jnp.float32))
    rounding = jnp.minimum(2e-7 * mass, 1e-3 * last)
    cut = jnp.where(rest(before) - spare <= rounding, before, cut)
    return jnp.where(top_p >= 1, by_k, jnp.minimum(by_k, cut))


def token_logprobs(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    temperature: Float[Array, " B"],
) -> Float[Array, " B"]:
    """log-softmax of logits / temperature (of logits where greedy) at the tokens,
    before top-k and top-p: what the ratio of a policy gradient needs."""
    gaps = _gaps(logits, temperature)
    return -_at(gaps, tokens) - jnp.log(jnp.exp(-gaps).sum(axis=-1))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b]] of each row, as a sum: TPUs gather by a dozen operations, which
    cost a microsecond each, more than going through a row does."""
    here = jnp.arange(x.shape[1])[None] == index[:, None]
    return jnp.where(here, x, jnp.zeros((), x.dtype)).sum(axis=1)


def _gaps(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """(largest logit - logit) / temperature; finite, so that a tiny temperature gives
    no infinity or NaN."""
    scale = jnp.where(temperature == 0, 1.0, temperature)[:, None]
    gaps = (logits.max(axis=-1, keepdims=True) - logits) / scale
    return jnp.minimum(gaps, _MAX_GAP)


def _ranks(gaps: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(gaps, jnp.int32)


def _limbs(weights: jax.Array) -> list[jax.Array]:
    """Weights in [0, 1] as three base-4096 digits: their int32 sums over up to 2**18
    tokens are exact, where a float32 sum over a large vocabulary is off by 1e-6."""
    first = (weights * 4096).astype(jnp.int32)
    weights = weights * 4096 - first
    second = (weights * 4096).astype(jnp.int32)
    # Rounded, not cut off: the errors of a long tail would add up to one side.
    third = jnp.round((weights * 4096 - second) * 4096).astype(jnp.int32)
    return [first, second, third]


def _smallest(
    reaches: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    """The smallest non-negative int32 that `reaches` accepts (a monotone test), by
    bisection; the largest one if it accepts none."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = reaches(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(shape, jnp.int32)
    high = jnp.full(shape, _MAX_RANK)
    return jax.lax.fori_loop(0, 31, halve, (low, high))[1]
