"""Grouped-query attention over a sequence, and over the filled blocks of the cache.

Shapes: B rows, T queries, L layers, R rows of the cache (B, or N shards of each: see
`cache.sequence_shards`), S positions of one, H query heads, K key/value heads, G = H / K,
C head dim. Query heads of one group are folded into the query dimension
([B, K, G*T, C]), so that both products are plain batched matrix products: the
five-dimensional einsum runs several times slower on a CPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped

from e1jax.nn.cache import merge_shards
from e1jax.nn.quantize import LANES, dequantize
from e1jax.nn.scores import BLOCK_LEN, MASKED, fold, keep, scaled, wide_einsum

MAX_PARTS = 8  # of causal attention; each is compiled on its own


class SharedPrompts(NamedTuple):
    """Rows of several lengths, one after the other on a dim of tokens: N prompts of P, then
    the G responses of R to each, then, if `seen` is given, the Q solutions of L to each
    response, which is then a thought. A common beginning of rows is computed once."""

    prompt_len: jax.Array  # [N] int32
    samples: int  # G
    longest_prompt: int  # P
    seen: jax.Array | None = None  # [N*G*Q] int32: tokens of its thought that it sees
    longest_response: int | None = None  # R, where `seen` is given

    def split(self, x: Shaped[Array, "1 _S D"]) -> tuple[jax.Array, ...]:
        """[1, N*P + N*G*R + N*G*Q*L, D] -> [N, P, D], [N*G, R, D] and [N*G*Q, L, D]"""
        rows = [len(self.prompt_len), len(self.prompt_len) * self.samples]
        ends = [rows[0] * self.longest_prompt]
        if self.seen is not None:
            assert self.longest_response is not None
            ends.append(ends[0] + rows[1] * self.longest_response)
            rows.append(len(self.seen))
        parts = jnp.split(x[0], ends)
        return tuple(
            part.reshape(count, -1, x.shape[-1])
            for part, count in zip(parts, rows, strict=True)
        )

    def join(self, parts: Sequence[jax.Array]) -> Shaped[Array, "1 _S D"]:
        """Prompts [N, P, D], responses [N*G, R, D] and solutions as one row; undone by
        `split`."""
        rows = [part.reshape(1, -1, part.shape[-1]) for part in parts]
        return jnp.concatenate(rows, axis=1)


def shared_prompt_attention(
    q: tuple[jax.Array, ...],
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    shared: SharedPrompts,
    causal: Callable[..., jax.Array],
) -> tuple[jax.Array, ...]:
    """Attention of prompts, of responses that also see their prompt, and of solutions that
    see the prompt and their thought up to where it was cut, by `causal`, which is
    `causal_attention` or another form of it.

    Heads of each part, as `SharedPrompts.split` gives them: [N, H, P, C], ..., or with K
    heads.
    """

    def before_responses(keys):
        return jnp.repeat(keys[0], shared.samples, axis=0)

    def before_solutions(keys):
        thoughts = jnp.concatenate([before_responses(keys), keys[1]], axis=2)
        return jnp.repeat(thoughts, len(keys[2]) // len(thoughts), axis=0)

    def with_own(part, before):
        return (jnp.concatenate([before(x), x[part]], axis=2) for x in (k, v))

    def segments(part, *before):
        # Keys that are not seen are a segment of their own.
        own = jnp.zeros((len(q[part]), q[part].shape[2]), jnp.int32)
        return jnp.concatenate([*before, own], axis=1)

    of_prompt = _beyond(shared.prompt_len, shared.longest_prompt)
    of_prompt = jnp.repeat(of_prompt, shared.samples, axis=0)
    results = [causal(q[0], k[0], v[0])]
    keys, values = with_own(1, before_responses)
    results.append(causal(q[1], keys, values, segments(1, of_prompt)))
    if shared.seen is not None:
        of_prompt = jnp.repeat(of_prompt, len(shared.seen) // len(of_prompt), axis=0)
        of_thought = _beyond(shared.seen, q[1].shape[2])
        keys, values = with_own(2, before_solutions)
        results.append(causal(q[2], keys, values, segments(2, of_prompt, of_thought)))
    return tuple(results)


def _beyond(count: Int[Array, " B"], length: int) -> Int[Array, "B S"]:
    """0 for the first `count` of `length` tokens of a row, 1 for the tokens after them."""
    return (jnp.arange(length)[None] >= count[:, None]).astype(jnp.int32)


def causal_attention(
    q: Float[Array, "B H T C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B H T C"]:
    """Every query sees the keys at its own index and before; for training.

    Rows are left-aligned, so padding at their end is never seen by a real token and
    needs no mask. The T queries belong to the last T keys. With `segments`, numbers of the
    keys, a query sees only the keys with the number of its own key: one row then holds
    several sequences, or keys before the queries that they must not see. Up to
    MAX_PARTS parts of the queries are gone through in turn, each against the keys up to its end: that spares up to 7/16
    of the products, and no more than the scores of one part have to exist at a time, in
    the backward pass too.
    """
    if q.shape[2] == 1 < k.shape[2]:
        # XLA on a CPU aborts in the backward pass of a single query (jax 0.10.2): another
        # one follows it, and is dropped.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in (q, k, v))
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, 1)))
        return causal_attention(q, k, v, segments)[:, :, :1]
    return _by_parts(q, k, v, segments)


@jax.custom_vjp
def _by_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """Causal attention of the last queries over all keys, or over the keys of their own
    segment ([B, S] int32).

    The backward pass follows FlashAttention-2 (arXiv 2307.08691, section 3.1): the
    result and the logarithm of each query's mass give the weights back in one pass.
    """
    return _by_parts_forward(q, k, v, segments)[0]


def _parts(q: jax.Array, k: jax.Array) -> list[tuple[slice, slice]]:
    """Queries of each part, and the keys up to its end; of dim 2."""
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    part_len = max(BLOCK_LEN, -(-length // MAX_PARTS))
    parts = []
    for start in range(0, length, part_len):
        end = min(start + part_len, length)
        parts.append((slice(start, end), slice(before + end)))
    return parts


def _by_parts_forward(q, k, v, segments):
    results, masses = [], []
    for queries, keys in _parts(q, k):
        own, own_k, own_v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        scores = _visible_scores(own, own_k, segments)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        mass = weights.sum(axis=-1, keepdims=True)
        out = wide_einsum("bkqs,bksc->bkqc", weights.astype(v.dtype), own_v) / mass
        results.append(out.astype(q.dtype).reshape(own.shape))
        masses.append((peak + jnp.log(mass)).reshape(*own.shape[:3], 1))
    out, log_mass = (keep(jnp.concatenate(x, axis=2)) for x in (results, masses))
    return out, (q, k, v, segments, out, log_mass)


def _by_parts_backward(residuals, grad):
    q, k, v, segments, out, log_mass = residuals
    kv_heads = k.shape[1]
    # An array of its own: sums of products, fused, take XLA on a CPU ten times as long.
    product = jax.lax.optimization_barrier(grad * out)
    mean = product.astype(jnp.float32).sum(axis=-1, keepdims=True)
    of_queries, of_keys, of_values = [], [], []
    for queries, keys in _parts(q, k):
        own, own_k, own_v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        own_grad, own_mean, own_log_mass = (
            fold(x[:, :, queries], kv_heads) for x in (grad, mean, log_mass)
        )
        weights = jnp.exp(_visible_scores(own, own_k, segments) - own_log_mass)
        of_values.append(_of_keys(own_grad, weights.astype(v.dtype)))
        grad_weights = wide_einsum("bkqc,bksc->bkqs", own_grad, own_v)
        grad_scores = (weights * (grad_weights - own_mean)).astype(k.dtype)
        of_keys.append(_of_keys(fold(scaled(own), kv_heads), grad_scores))
        grad_q = scaled(wide_einsum("bkqs,bksc->bkqc", grad_scores, own_k))
        of_queries.append(grad_q.reshape(own.shape))

    def padded(part):  # which is of the keys up to the end of its queries
        missing = k.shape[2] - part.shape[2]
        return jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0)))

    grad_k, grad_v = (
        functools.reduce(jnp.add, map(padded, parts)) for parts in (of_keys, of_values)
    )
    grads = jnp.concatenate(of_queries, axis=2), grad_k, grad_v
    pairs = zip(grads, (q, k, v), strict=True)
    return *(grad.astype(x.dtype) for grad, x in pairs), None


_by_parts.defvjp(_by_parts_forward, _by_parts_backward)


def _of_keys(of_queries: jax.Array, scores: jax.Array) -> jax.Array:
    """Sums over queries for each key, [B, K, S, C]. The result is transposed and not the
    scores, which XLA on a CPU would copy; the barrier keeps it from turning that round."""
    product = wide_einsum("bkqc,bkqs->bkcs", of_queries, scores)
    return jax.lax.optimization_barrier(product).swapaxes(2, 3)


def _visible_scores(q: jax.Array, k: jax.Array, segments) -> jax.Array:
    """Scores of the last queries, folded; MASKED where the key comes later, or is of
    another segment."""
    length, num_keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    index = jnp.arange(num_keys)
    visible = index[num_keys - length :, None] >= index[None, :]
    visible = jnp.tile(visible, (groups, 1))[None, None]
    if segments is not None:
        of_keys = segments[:, :num_keys]
        of_queries = jnp.tile(of_keys[:, num_keys - length :], (1, groups))
        visible &= of_queries[:, None, :, None] == of_keys[:, None, None]
    scores = wide_einsum("bkqc,bksc->bkqs", fold(scaled(q), k.shape[1]), k)
    return jnp.where(visible, scores, MASKED)


def cached_attention(
    q: Float[Array, "B H T C"],
    k_cache: Num[Array, "L R K S C"],
    v_cache: Num[Array, "L R K S C"],
    layer: Int[Array, ""],
    positions: Int[Array, "R T"],
    *,
    scales: tuple[Float[Array, "L R K _N _C"], Float[Array, "L R K _N _C"]]
    | None = None,
) -> Float[Array, "B H T C"]:
    """Attention of queries over the cached keys at positions up to their own.

    Work follows the filled length, not the capacity S: blocks of BLOCK_LEN positions
    are visited up to the last one that any row has reached (a dynamic trip count in one
    compiled program), and merged by online softmax in float32. A block beyond a row's
    length adds exactly zero to it, so a row's result does not depend on how far the
    others are. S is a multiple of BLOCK_LEN, or smaller than it. R is B, or a multiple
    of it: see `sequence_shards`. An int8 cache comes with `scales`. A cache may also
    hold bits of bfloat16: see quantize.quantize_kv.
    """
    _, rows, kv_heads, capacity, head_dim = k_cache.shape
    block_len = min(BLOCK_LEN, capacity)
    shards = rows // q.shape[0]
    q = jnp.tile(q, (shards, 1, 1, 1))
    folded = fold(scaled(q), kv_heads)
    query_positions = jnp.tile(positions, (1, q.shape[1] // kv_heads))[
        :, None, :, None
    ]  # [R, 1, G*T, 1]

    def visit(block, carry):
        peak, total, sums = carry
        start = block * block_len
        at = (layer, 0, 0, start, 0)
        size = (1, rows, kv_heads, block_len, head_dim)

        def block_of(cache):
            return dequantize(jax.lax.dynamic_slice(cache, at, size)[0], q.dtype)

        def scales_of(scales):  # [R, K, 1, block_len]
            at = (layer, 0, 0, start // LANES, start % LANES)
            size = (1, rows, kv_heads, 1, block_len)
            return jax.lax.dynamic_slice(scales, at, size)[0]

        k, v = block_of(k_cache), block_of(v_cache)
        scores = wide_einsum("bkqc,bksc->bkqs", folded, k)
        if scales is not None:
            scores *= scales_of(scales[0])
        key_positions = start + jnp.arange(block_len)[None, None, None]
        scores = jnp.where(key_positions <= query_positions, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_peak)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        if scales is not None:
            weights *= scales_of(scales[1])
        product = wide_einsum("bkqs,bksc->bkqc", weights.astype(v.dtype), v)
        return new_peak, total, sums * shrink + product

    each = (*folded.shape[:-1], 1)
    start = (
        jnp.full(each, MASKED, jnp.float32),
        jnp.zeros(each, jnp.float32),
        jnp.zeros(folded.shape, jnp.float32),
    )
    num_blocks = jnp.max(positions) // block_len + 1
    peak, total, sums = jax.lax.fori_loop(0, num_blocks, visit, start)
    out = (sums / total).astype(q.dtype).reshape(q.shape)
    return merge_shards(out, peak + jnp.log(total), shards)
