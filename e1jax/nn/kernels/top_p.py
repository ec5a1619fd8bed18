"""Exact top-k and top-p without a sort: the rank of the last token kept, by bisection.

On TPUs as a kernel (Pallas), a row at a time in vector memory.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from e1jax.sharding.mesh import sharding

MAX_GAP = float(np.finfo(np.float32).max)


MAX_RANK = np.int32(np.iinfo(np.int32).max)


_HALVINGS = 31  # of the range of ranks, until one is left


_LANES = 128  # of a TPU's vector registers


def last_ranks(
    gaps: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Int[Array, "B 1"]:
    """`last_rank` of each row, by XLA."""
    return last_rank(gaps[:, None], top_k[:, None, None], top_p[:, None, None])[:, 0]


def last_ranks_on_tpu(
    gaps: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    mesh: Mesh,
) -> Int[Array, "B 1"]:
    """`last_ranks` as a kernel: it is 62 passes over little data, so that its time would
    go into starting operations and collectives if XLA ran it."""
    batch, vocab = gaps.shape
    rows, columns = -batch % mesh.size, -vocab % _LANES
    by_vocab = sharding(mesh, (None, "vocab"), gaps.shape)
    gaps = jax.lax.with_sharding_constraint(
        gaps, by_vocab
    )  # as their other users have them
    gaps = jnp.pad(gaps, ((0, rows), (0, columns)), constant_values=MAX_GAP)
    options = [jnp.pad(x, (0, rows))[:, None, None] for x in (top_k, top_p)]

    def one_row(gaps, top_k, top_p, limit):
        limit[...] = last_rank(gaps[...], top_k[...], top_p[...])

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
            cost_estimate=_cost(gaps),
        )(gaps, top_k, top_p)

    place = PartitionSpec(mesh.axis_names)
    everywhere = jax.shard_map(
        local, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
    )
    return everywhere(gaps, *options)[:batch, 0]


def _cost(gaps: jax.Array) -> pl.CostEstimate:
    """Of rows [B, M, 128] for which top-k is on: each halving adds up a number per token
    for top-k, and three for top-p."""
    return pl.CostEstimate(
        flops=_HALVINGS * (1 + 3) * gaps.size,
        bytes_accessed=gaps.size * gaps.dtype.itemsize + 3 * 4 * len(gaps),
        transcendentals=gaps.size,
    )


def last_rank(gaps: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Rank of the last token kept [..., 1, 1], where a row's gaps are [..., M, N] and
    its top_k and top_p [..., 1, 1]."""
    by_k = _last_by_k(gaps, top_k)
    rest = _rest_within(gaps, by_k)
    mass = rest(jnp.full_like(top_k, -1))
    spare = (1 - top_p) * mass
    cut = _smallest(lambda cut: rest(cut) <= spare, top_k.shape)
    before = jnp.maximum(cut - 1, 0)
    cut = jnp.where(_is_rounding(rest(before) - spare, cut, mass), before, cut)
    return jnp.where(top_p >= 1, by_k, jnp.minimum(by_k, cut))


def make_is_kept(
    gaps: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Callable[[Int[Array, " B"]], Bool[Array, " B"]]:
    """A function that says of one rank a row whether it is kept, as `last_ranks` has it;
    one pass over the array instead of a search."""
    gaps, top_k, top_p = gaps[:, None], top_k[:, None, None], top_p[:, None, None]
    by_k = _last_by_k(gaps, top_k)
    rest = _rest_within(gaps, by_k)

    def is_kept(rank):
        rank = rank[:, None, None]
        mass = rest(jnp.full_like(rank, -1))
        spare = (1 - top_p) * mass
        before = rest(rank - 1)
        is_last = rest(rank) <= spare
        given_up = is_last & _is_rounding(before - spare, rank, mass)
        by_p = (rank == 0) | ((before > spare) & ~given_up)
        return ((rank <= by_k) & (by_p | (top_p >= 1)))[:, 0, 0]

    return is_kept


def _last_by_k(gaps: jax.Array, top_k: jax.Array) -> jax.Array:
    """Rank of the last of the `top_k` most probable tokens; see `last_rank`."""
    ranks = as_ranks(gaps)

    def k_most_probable():
        count = jnp.where(top_k > 0, top_k, MAX_RANK)
        count = jnp.minimum(count, gaps.shape[-2] * gaps.shape[-1])

        def reaches(cut):
            return _total((ranks <= cut).astype(jnp.int32)) >= count

        return _smallest(reaches, top_k.shape)

    everything = jnp.full_like(top_k, MAX_RANK)
    return jax.lax.cond(jnp.any(top_k > 0), k_most_probable, lambda: everything)


def _rest_within(gaps: jax.Array, by_k: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """(cut) -> the mass of tokens beyond `cut`, of all up to `by_k`.

    Near top_p = 1 it is small, so float32 resolves it better than the mass up to the cut.
    """
    ranks = as_ranks(gaps)
    # The int32 sums of digits are exact: 2^24 ids is the most that ModelConfig takes.
    bits = 12 if gaps.shape[-2] * gaps.shape[-1] < 2**19 else 6
    limbs = _limbs(jnp.exp(-gaps), bits)
    limbs = [jnp.where(ranks <= by_k, limb, 0) for limb in limbs]

    def rest(cut):
        sums = [_total(jnp.where(ranks > cut, limb, 0)) for limb in limbs]
        parts = (
            s.astype(jnp.float32) * 2.0 ** -(bits * i) for i, s in enumerate(sums, 1)
        )
        return functools.reduce(jnp.add, parts)

    return rest


def _is_rounding(missing: jax.Array, cut: jax.Array, mass: jax.Array) -> jax.Array:
    """Whether the last token kept is given up: 0.5 + 0.3 reaches 0.8 though their float32
    sum may not. Only rounding, and next to nothing of the token's own weight, was
    missing without it."""
    last = jnp.exp(-jax.lax.bitcast_convert_type(cut, jnp.float32))
    return missing <= jnp.minimum(2e-7 * mass, 1e-3 * last)


def _total(x: jax.Array) -> jax.Array:
    return x.sum(axis=(-2, -1), keepdims=True)


def as_ranks(gaps: jax.Array) -> jax.Array:
    """Bits of float32 gaps of 0 or more as int32, which have the same order."""
    return jax.lax.bitcast_convert_type(gaps, jnp.int32)


def _limbs(weights: jax.Array, bits: int) -> list[jax.Array]:
    """Weights in [0, 1] as digits of some bits each, 36 in all: their int32 sums over less
    than 2^(31 - bits) tokens are exact, where a float32 sum over a large vocabulary is off
    by 1e-6."""
    digits = []
    for _ in range(36 // bits - 1):
        digits.append((weights * 2**bits).astype(jnp.int32))
        weights = weights * 2**bits - digits[-1]
    # Rounded, not cut off: the errors of a long tail would add up to one side.
    return [*digits, jnp.round(weights * 2**bits).astype(jnp.int32)]


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
    high = jnp.full(shape, MAX_RANK)
    return jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))[1]
