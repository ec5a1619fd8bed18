"""Random draws of tokens, cut by top-k and top-p, and the log-probabilities of tokens.

Each draw has a key of its own, from the request's seed, the sample and the position.
Temperature, top-p, top-k and seeds are arrays [B], so one compiled program serves any
mix of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from e1jax.nn.kernels.top_p import MAX_GAP, MAX_RANK, as_ranks, make_is_kept
from e1jax.nn.paths import choose_operations


class Sampling(NamedTuple):
    """How a row draws its tokens."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]  # 0 is off
    seed: UInt[Array, "B 2"]  # low and high half of the request's seed
    sample: Int[Array, " B"]  # which sample of the request


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


def sample_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    mesh: Mesh | None = None,
    banned: Int[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """Draws a token of each row from softmax(logits / temperature), cut by top-k, then
    top-p, renormalised.

    The token `banned` of a row is never drawn, as if its logit were -inf; -1 bans none.

    The draw is a Gumbel arg-max, which needs no sorted or summed-up distribution.
    `mesh` holds the arrays; see `top_k_top_p_mask`.
    """
    if banned is not None:
        is_banned = jnp.arange(logits.shape[1])[None] == banned[:, None]
        logits = jnp.where(is_banned, -jnp.inf, logits)
    gaps = _gaps(logits, sampling.temperature)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    is_greedy = (sampling.temperature == 0)[:, None]
    noisy = jnp.where(is_greedy, logits, noise - gaps)
    options = sampling.top_k, sampling.top_p
    if choose_operations(mesh).draws_again:
        return _draw_until_kept(noisy, gaps, *options)
    keep = top_k_top_p_mask(gaps, *options, mesh) | is_greedy
    return jnp.argmax(jnp.where(keep, noisy, -jnp.inf), axis=-1).astype(jnp.int32)


def _draw_until_kept(
    noisy: Float[Array, "B V"],
    gaps: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int[Array, " B"]:
    """The arg-max of `noisy` among the tokens of `top_k_top_p_mask`, without their set.

    The arg-max among all tokens is the one, if it is kept. If not, nor is any token that
    is as probable or less, and the arg-max among the others comes next. A nucleus of 0.95
    takes 1.05 draws of a row.
    """
    ranks = as_ranks(gaps)

    def draw(candidates):
        return jnp.argmax(candidates, axis=-1).astype(jnp.int32)

    # Where logits are not numbers, no token would ever be kept: the engine refuses them.
    is_cut = ((top_k > 0) | (top_p < 1)) & ~jnp.isnan(gaps[:, 0])
    first = draw(noisy)

    def until_kept():
        is_kept = make_is_kept(gaps, top_k, top_p)

        def again(state):
            token, is_open = state
            rank = take_from_rows(ranks, token)
            is_open &= ~is_kept(rank)
            others = draw(jnp.where(ranks < rank[:, None], noisy, -jnp.inf))
            return jnp.where(is_open, others, token), is_open

        return jax.lax.while_loop(lambda s: s[1].any(), again, (first, is_cut))[0]

    return jax.lax.cond(is_cut.any(), until_kept, lambda: first)


def top_k_top_p_mask(
    gaps: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    mesh: Mesh | None = None,
) -> Bool[Array, "B V"]:
    """Which tokens survive top-k and then top-p.

    `gaps` are log p(most probable) - log p(token), 0 or more. Top-p keeps the smallest
    set of most probable tokens whose share of the mass after top-k reaches `top_p`. The token
    that crosses is kept, and so is any token tied with the last one kept, in both cuts.

    Nothing is sorted: floats of one sign are ordered like their bits, so bisection over
    the int32 range finds the exact cut in 31 passes over the array. Masses are summed in
    integers (see `_limbs`), so the set depends neither on the order of the sums nor on
    how the vocabulary is sharded. On a mesh of TPUs each device takes some of the rows
    with all their logits, and goes through them in its vector memory.
    """

    def limits():
        return choose_operations(mesh).last_ranks(gaps, top_k, top_p)

    everything = jnp.full((gaps.shape[0], 1), MAX_RANK)
    filtering = jnp.any((top_k > 0) | (top_p < 1))
    return as_ranks(gaps) <= jax.lax.cond(filtering, limits, lambda: everything)


def token_logprobs(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    temperature: Float[Array, " B"],
) -> Float[Array, " B"]:
    """log-softmax of logits / temperature (of logits where greedy) at the tokens,
    before top-k, top-p and the ban, as the ratio of a policy gradient needs them."""
    gaps = _gaps(logits, temperature)
    return -take_from_rows(gaps, tokens) - jnp.log(jnp.exp(-gaps).sum(axis=-1))


def take_from_rows(x: jax.Array, index: jax.Array) -> jax.Array:
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
    return jnp.minimum(gaps, MAX_GAP)
