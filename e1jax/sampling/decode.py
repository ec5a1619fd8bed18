"""The jitted programs of sampling: prefill of prompts, admission into slots, decode steps.

The cache (rows, or positions of a few, over the mesh axis `data`, heads over `tensor`)
is donated to every call and updated in place; everything else per slot is replicated.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e1jax.config.model import ModelConfig
from e1jax.nn.cache import (
    KVCache,
    cache_on_mesh,
    cache_sizes,
    capacity,
    init_cache,
    prompt_of_shards,
    prompt_shards,
)
from e1jax.nn.cpu import as_bits, unstack
from e1jax.nn.kernels.gpu_flash import takes_gpu_flash
from e1jax.nn.kernels.splash import takes_splash
from e1jax.nn.model import compute_dtype, forward, unembed
from e1jax.nn.quantize import LANES, Params
from e1jax.nn.scores import BLOCK_LEN
from e1jax.sampling.budget import (
    BY_BUDGET,
    DONE,
    LENGTH,
    SOLUTION_BUDGET,
    SOLVE,
    THINK,
    Budget,
    BudgetState,
    TokenIds,
    advance,
    start_state,
)
from e1jax.sampling.draw import (
    Sampling,
    row_keys,
    sample_token,
    token_keys,
    token_logprobs,
)
from e1jax.sampling.request import Request
from e1jax.sharding.mesh import on_cpu, on_gpu, replicated, sharding
from e1jax.sharding.runtime import COMPILER_OPTIONS, free_bytes

CHUNK_STEPS = 64  # the most decode steps between two looks of the host


PREFILL_LEN = 512  # prompt tokens that go through the model at a time


# The same, of several prompts together, where a kernel spares the memory for scores. Enough
# for products at a chip's full speed; the memory grows with it, and `plan` counts it.
_PREFILL_LEN_AT_ONCE = 4096


_MOST_PROMPTS = (
    8  # that are prefilled at a time; more would need more compiled programs
)


_SHORTEST_BUCKET = 16


SHORTEST_FORCED = 8  # forced tokens that a row has room for at least


_SPARE_BYTES = 2**30  # on a device, for the temporaries of a step


_MAX_FLOAT = float(np.finfo(np.float32).max)


class Rows(NamedTuple):
    """All that a slot knows beside its keys and values; DONE without a request."""

    token: (
        jax.Array
    )  # [B] int32: the last token, which the next step puts into the cache
    position: jax.Array  # [B] int32: where it stands, prompt included
    first_token: jax.Array  # [B] int32: of the prompt
    sampling: Sampling
    budget: Budget
    state: BudgetState


class Chunk(NamedTuple):
    """Results of a decode call; a row's tokens start at column 0."""

    tokens: jax.Array  # [B, CHUNK_STEPS] int32
    logprobs: jax.Array  # [B, CHUNK_STEPS] float32
    forced: jax.Array  # [B, CHUNK_STEPS] bool
    num_steps: jax.Array  # [] int32


def prepare(params: Params, kv_dtype: str | None, mesh: Mesh) -> tuple[Params, Any]:
    """Parameters as decoding takes them, and the dtype of the cache; see quantize."""
    dtype = jnp.dtype(kv_dtype or compute_dtype(params))
    if not on_cpu(mesh):
        return params, dtype
    if compute_dtype(params) == jnp.bfloat16:
        params = as_bits(params)
    return params, jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def layers_apart(params: Params, mesh: Mesh) -> Params:
    """Parameters as `decode` takes them: with a list of layers in place of the stack, where
    XLA copies the weights of a layer that it takes from a stack, at every step.

    On a CPU, where it is alone, the layers are views of the stack; on GPUs they are copies,
    if there is room for them beside it and the cache.
    """
    if on_cpu(mesh) and mesh.size == 1:
        return unstack(params)
    if on_gpu(mesh) and _fits_again(params["layers"], mesh):
        return params | {"layers": _copied_apart(params["layers"])}
    return params


def _fits_again(layers: Any, mesh: Mesh) -> bool:
    """Whether each device has room for a copy of its part of the layers."""
    free = free_bytes(mesh)
    if free is None:
        return True
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(layers)
    ]
    return sum(sizes) + _SPARE_BYTES <= free


def _copied_apart(layers: Any) -> list[Any]:
    """The layers of stacks, each sharded as its stack is."""
    shardings = jax.tree.map(
        lambda x: NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:])),
        layers,
    )
    count = len(jax.tree.leaves(layers)[0])

    def apart(layers):
        return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]

    return jax.jit(apart, out_shardings=[shardings] * count)(layers)


_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


@functools.partial(_jit, static_argnums=(0, 1, 5))
def prefill(
    config: ModelConfig,
    mesh: Mesh,
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    kv_dtype: Any = None,
) -> KVCache:
    """Keys and values of the first `length` of `tokens` [N, P], one prompt a row, in a
    cache of N rows of P positions and of `kv_dtype`, as `prepare` gives it (None: as it is
    computed). `length` is the longest prompt's; shorter ones are padded to it.

    The prompts go through the model in pieces, as many as the longest fills, or at once
    where a kernel spares the memory for its scores; no logits are made.
    """
    rows, bucket = tokens.shape
    dtype = compute_dtype(params)
    empty = init_cache(config, rows, bucket, kv_dtype or dtype)
    cache = cache_on_mesh(mesh, empty)
    at_once = _goes_at_once(config, mesh, dtype)
    piece = bucket if at_once else math.gcd(bucket, PREFILL_LEN)
    step = _prefill_step(config, mesh, params, tokens, piece, from_start=at_once)
    return jax.lax.fori_loop(0, -(-length // piece), step, cache)


def most_prompts(config: ModelConfig, mesh: Mesh, dtype: Any, bucket: int) -> int:
    """How many prompts of a bucket are prefilled at a time, at most: a power of two. `dtype`
    is of the hidden states."""
    at_once = _goes_at_once(config, mesh, dtype)
    tokens = _PREFILL_LEN_AT_ONCE if at_once else PREFILL_LEN
    fitting = max(1, tokens // bucket)
    return min(_MOST_PROMPTS, 1 << fitting.bit_length() - 1)


def _goes_at_once(config: ModelConfig, mesh: Mesh, dtype: Any) -> bool:
    """Whether prompts go through the model at once, and not in pieces."""
    takes = mesh, dtype, config.head_dim
    return takes_splash(*takes) or takes_gpu_flash(*takes)


@functools.partial(_jit, static_argnums=(0, 1), donate_argnums=6)
def extend(
    config: ModelConfig,
    mesh: Mesh,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    prefix: KVCache,
) -> KVCache:
    """`prefix` of P positions, which holds the keys and values of `tokens` [1, P] up to
    `start`, a multiple of `prefix_step(P)`; with those up to `stop`, too.

    A piece of PREFILL_LEN starts at a multiple of its length. Shorter ones lead to it,
    and are all that is needed for fewer tokens.
    """
    bucket = tokens.shape[1]
    short, long = prefix_step(bucket), math.gcd(bucket, PREFILL_LEN)
    step = functools.partial(_prefill_step, config, mesh, params, tokens)
    aligned = jnp.where(stop - start < long, stop, -(-start // long) * long)
    first = start // short
    prefix = jax.lax.fori_loop(first, -(-aligned // short), step(short), prefix)
    first = -(-aligned // long)
    return jax.lax.fori_loop(first, -(-stop // long), step(long), prefix)


def _prefill_step(config, mesh, params, tokens, piece, *, from_start=False):
    """(i, prefix) -> prefix with piece i of `tokens` [N, P]."""
    rows = tokens.shape[0]

    def step(i, prefix):
        start = i * piece
        positions = jnp.broadcast_to(start + jnp.arange(piece), (rows, piece))
        part = jax.lax.dynamic_slice(tokens, (0, start), (rows, piece))
        _, prefix = forward(
            config,
            params,
            part,
            positions,
            prefix,
            mesh=mesh,
            from_start=from_start,
            cache_only=True,
        )
        return cache_on_mesh(mesh, prefix)

    return step


def prefix_step(bucket: int) -> int:
    """The prefix of a prompt in a bucket can be extended from multiples of this."""
    return _SHORTEST_BUCKET if bucket <= BLOCK_LEN else BLOCK_LEN


@functools.partial(_jit, static_argnums=(0, 1, 2, 3))
def empty_prefix(config: ModelConfig, mesh: Mesh, bucket: int, dtype: Any) -> KVCache:
    """Room for the keys and values of a prompt."""
    return cache_on_mesh(mesh, init_cache(config, 1, bucket, dtype))


@functools.partial(_jit, static_argnums=(0, 1, 2))
def read_prefix(
    mesh: Mesh, slots: int, bucket: int, cache: KVCache, slot: jax.Array
) -> KVCache:
    """The first `bucket` positions of a slot, out of `slots`, as `prefill` gives them."""
    shards = cache.k.shape[1] // slots

    def read(buffer, block):
        by_shard = buffer.reshape(buffer.shape[0], shards, slots, *buffer.shape[2:])
        row = jax.lax.dynamic_index_in_dim(by_shard, slot, axis=2, keepdims=False)
        positions = -(-bucket * block // BLOCK_LEN)
        if shards == 1:
            return row[:, :, :, :positions]
        return prompt_of_shards(row, block)[:, :, :, :positions]

    k, v, *scales = jax.tree.leaves(cache)
    prefix = KVCache(
        *(read(x, BLOCK_LEN) for x in (k, v)),
        *(read(x, BLOCK_LEN // LANES) for x in scales),
    )
    return cache_on_mesh(mesh, prefix)


@functools.partial(_jit, static_argnums=0, donate_argnums=(1, 3))
def admit(
    mesh: Mesh,
    cache: KVCache,
    prefix: KVCache,
    rows: Rows,
    slots: jax.Array,
    sources: jax.Array,
    count: jax.Array,
    new: tuple[jax.Array, Rows],
) -> tuple[KVCache, Rows]:
    """Copies prefilled prompts into the first `count` of `slots` [B], and starts their
    rows. `sources` [B] says which row of `prefix` goes into each.

    `new` is (which rows are new [B] bool, their contents).
    """
    shards = cache.k.shape[1] // len(slots)
    k, v, *scales = jax.tree.leaves(_rows_everywhere(mesh, prefix))
    block = BLOCK_LEN  # one row of the scales, if there are any
    prefix = KVCache(
        *(prompt_shards(x, shards, block) for x in (k, v)),
        *(prompt_shards(x, shards, block // LANES) for x in scales),
    )

    def put(buffer, prompts, slot, source):
        by_shard = buffer.reshape(buffer.shape[0], shards, -1, *buffer.shape[2:])
        prompt = jax.lax.dynamic_slice_in_dim(prompts, source, 1, axis=2)
        at = (0, 0, slot, 0, 0, 0)
        return jax.lax.dynamic_update_slice(by_shard, prompt, at).reshape(buffer.shape)

    def copy(i, cache):
        row = functools.partial(put, slot=slots[i], source=sources[i])
        return jax.tree.map(row, cache, prefix)

    cache = jax.lax.fori_loop(0, count, copy, cache_on_mesh(mesh, cache))
    return cache_on_mesh(mesh, cache), _replace_rows(mesh, rows, new)


def _rows_everywhere(mesh: Mesh, prefix: KVCache) -> KVCache:
    """A prefix whose rows are on every device, since any of them may go into any slot."""
    axes = ("layers", None, "kv_heads", None, None)
    places = jax.tree.map(lambda x: sharding(mesh, axes, x.shape), prefix)
    return jax.lax.with_sharding_constraint(prefix, places)


@functools.partial(_jit, static_argnums=0, donate_argnums=1)
def start_rows(mesh: Mesh, rows: Rows, new: tuple[jax.Array, Rows]) -> Rows:
    """Starts rows whose slots hold the keys and values of their prompts; `new` as for
    `admit`."""
    return _replace_rows(mesh, rows, new)


def _replace_rows(mesh: Mesh, rows: Rows, new: tuple[jax.Array, Rows]) -> Rows:
    is_new, fresh = new

    def merge(now, old):
        return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)), now, old)

    return _everywhere(mesh, jax.tree.map(merge, fresh, rows))


@functools.partial(_jit, static_argnums=(0, 1), donate_argnums=(4, 5))
def decode(
    config: ModelConfig,
    mesh: Mesh,
    params: Params,
    ids: TokenIds,
    cache: KVCache,
    rows: Rows,
    enough: jax.Array,
    num_steps: jax.Array,
) -> tuple[KVCache, Rows, Chunk]:
    """Steps all rows until `enough` of them are DONE, but `num_steps` (at most
    CHUNK_STEPS) times."""
    batch, of_rows = rows.token.shape[0], row_keys(rows.sampling)
    # An unfinished row gets a token at every step: its keys are made all at once.
    index = rows.state.num_tokens[None] + jnp.arange(CHUNK_STEPS)[:, None]
    keys = jax.vmap(token_keys, (None, 0))(of_rows, index)
    everywhere = functools.partial(_everywhere, mesh)

    def unfinished(carry):
        _, rows, chunk = carry
        return (chunk.num_steps < num_steps) & (
            (rows.state.phase == DONE).sum() < enough
        )

    def step(carry):
        cache, rows, chunk = carry
        done = rows.state.phase == DONE
        # A finished row stays at position 0, so that it does not lengthen the others'
        # attention, and writes there again what is there: its cache may be read later.
        position = everywhere(jnp.where(done, 0, rows.position))[:, None]
        token = everywhere(jnp.where(done, rows.first_token, rows.token))[:, None]
        hidden, cache = forward(config, params, token, position, cache, mesh=mesh)
        logits = unembed(config, params, hidden[:, 0], mesh)
        # Sharded as the weights are: logits sharded by rows would need gathered weights.
        place = sharding(mesh, (None, "vocab"), logits.shape)
        logits = jax.lax.with_sharding_constraint(logits, place)
        i = chunk.num_steps
        banned = jnp.where(rows.state.phase == SOLVE, ids.think_start, -1)
        sampled = sample_token(logits, keys[i], rows.sampling, mesh, banned)
        sampled = everywhere(sampled)
        token, forced, state = everywhere(
            advance(rows.state, sampled, rows.budget, ids)
        )
        logprobs = token_logprobs(logits, token, rows.sampling.temperature)
        rows = rows._replace(token=token, position=rows.position + 1, state=state)
        chunk = Chunk(
            chunk.tokens.at[:, i].set(token),
            chunk.logprobs.at[:, i].set(everywhere(logprobs)),
            chunk.forced.at[:, i].set(forced),
            i + 1,
        )
        return cache_on_mesh(mesh, cache), everywhere(rows), chunk

    shape = (batch, CHUNK_STEPS)
    chunk = Chunk(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(shape, bool),
        jnp.int32(0),
    )
    return jax.lax.while_loop(
        unfinished, step, (cache_on_mesh(mesh, cache), rows, chunk)
    )


@functools.partial(_jit, static_argnums=(0, 1, 2, 3, 4))
def new_cache(
    config: ModelConfig, mesh: Mesh, slots: int, cache_len: int, dtype: Any
) -> KVCache:
    """An empty cache; its rows and their capacity are `cache_sizes`."""
    cache = init_cache(config, *cache_sizes(mesh, slots, cache_len), dtype)
    return cache_on_mesh(mesh, cache)


def _everywhere(mesh: Mesh, of_rows: Any) -> Any:
    """Replicates the arrays of rows: the compiler would shard them over `data`, as the cache
    is, and gather them again by a dozen small operations."""
    return jax.lax.with_sharding_constraint(of_rows, replicated(mesh))


def prefill_len(length: int, cache_len: int) -> int:
    """The bucket, in positions, of a prompt of `length` tokens before its last."""
    return min(next_power(length, _SHORTEST_BUCKET), capacity(cache_len))


def next_power(length: int, shortest: int) -> int:
    """The next power of two, at least `shortest`: few lengths, so few compiled
    programs."""
    return max(shortest, 1 << max(length - 1, 0).bit_length())


def empty_rows(slots: int, width: int) -> Rows:
    """Rows without a request; `width` tokens can be forced."""
    zeros: Any = np.zeros(slots, np.int32)
    ones: Any = np.ones(slots, np.float32)  # a top_p of 1 asks for no filtering
    seed: Any = np.zeros((slots, 2), np.uint32)
    forced_ids: Any = np.zeros((slots, width), np.int32)
    done: Any = np.full(slots, DONE, np.int32)
    no: Any = np.zeros(slots, bool)
    return Rows(
        token=zeros,
        position=zeros,
        first_token=zeros,
        sampling=Sampling(ones, ones, zeros, seed, zeros),
        budget=Budget(zeros, zeros, zeros, no, forced_ids, zeros, no),
        state=start_state(done),
    )


def request_rows(
    starts: Mapping[int, tuple[Request, int]], rows: Rows
) -> tuple[np.ndarray, Rows]:
    """A mask [B] of the rows in `starts`, and rows in their first state. `starts` gives, by
    slot, a request and the number of its sample."""
    slots, width = rows.budget.forced_ids.shape
    fresh = jax.tree.map(np.copy, empty_rows(slots, width))
    for slot, start in starts.items():
        _fill_row(fresh, slot, *start)
    return np.isin(np.arange(slots), list(starts)), fresh


def _fill_row(rows: Rows, slot: int, request: Request, number: Any) -> None:
    """Writes the first state of a sample into `rows`, which are NumPy arrays."""
    params: Any = request.params
    prompt_ids: Any = request.prompt_ids
    forced_ids: Any = request.forced_ids
    temperature: Any = min(params.temperature, _MAX_FLOAT)
    # The most probable token survives any cut: greedy rows need none.
    top_p: Any = params.top_p if temperature else 1
    top_k: Any = params.top_k if temperature else 0
    seed: Any = [params.seed & 0xFFFFFFFF, params.seed >> 32]
    num_forced: Any = len(forced_ids)
    padding = [0] * (rows.budget.forced_ids.shape[1] - num_forced)
    budget: Any = request.budget
    row = Rows(
        token=prompt_ids[-1],
        position=len(prompt_ids) - 1,  # type: ignore[arg-type]
        first_token=prompt_ids[0],
        sampling=Sampling(temperature, top_p, top_k, seed, number),
        budget=Budget(
            thinking=budget.thinking,
            solution=budget.solution,
            total=budget.total,
            plain=budget.plain,
            forced_ids=forced_ids + padding,
            num_forced=num_forced,
            stops=budget.stops,
        ),
        state=_first_state(request),
    )

    def write(array: Any, value: Any) -> None:
        array[slot] = value

    jax.tree.map(write, rows, row)


def _first_state(request: Request) -> BudgetState:
    """The state in which a response starts: DONE, if its budget has no token."""
    budget = request.budget
    state = start_state(THINK if request.starts_thinking else SOLVE)
    if not request.starts_thinking and budget.solution == 0:
        return state._replace(phase=DONE, finish=SOLUTION_BUDGET)
    if budget.stops and budget.thinking == 0:
        return state._replace(phase=DONE, finish=LENGTH, end=BY_BUDGET)
    return state


@functools.partial(_jit, static_argnums=0, donate_argnums=1)
def stop_rows(mesh: Mesh, rows: Rows, is_stopped: jax.Array) -> Rows:
    """Ends the rows where `is_stopped` [B] holds, whatever they are at."""
    phase = jnp.where(is_stopped, DONE, rows.state.phase)
    return _everywhere(mesh, rows._replace(state=rows.state._replace(phase=phase)))


def widen_rows(mesh: Mesh, rows: Rows, width: int) -> Rows:
    """Rows with room for `width` forced tokens, or as they are if they have it."""
    missing = width - rows.budget.forced_ids.shape[1]
    if missing <= 0:
        return rows
    ids = jnp.pad(rows.budget.forced_ids, ((0, 0), (0, missing)))
    budget = rows.budget._replace(forced_ids=jax.device_put(ids, replicated(mesh)))
    return rows._replace(budget=budget)
