"""The kernels for TPUs, run by Pallas' interpreter, against the XLA versions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_on_devices, set_everywhere
from jax.experimental.pallas import tpu as pltpu

from e1jax.checkpoint.load import load_model
from e1jax.nn.attention import cached_attention, causal_attention
from e1jax.nn.cache import KVCache, init_cache, write
from e1jax.nn.heads import Vectors
from e1jax.nn.kernels.decode_attention import (
    _tile_len,
    decode_attention,
    live_blocks,
)
from e1jax.nn.kernels.decode_heads import decode_heads, prepare_heads
from e1jax.nn.model import forward
from e1jax.nn.norm import rms_normalise
from e1jax.nn.rope import apply_rope, rope_angles, rope_frequencies
from e1jax.sampling.decode import extend, prefill
from e1jax.sampling.draw import top_k_top_p_mask
from e1jax.sharding.mesh import make_mesh, sharding

pytestmark = pytest.mark.cpu

BLOCK = 8
LAYERS = 3
EPS = 1e-2  # so large that it counts


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    set_everywhere(monkeypatch, "TPU_BLOCK_LEN", BLOCK)


def arrays(positions, heads, kv_heads, capacity, head_dim, dtype=jnp.float32, length=1):
    """Queries and caches; whatever lies beyond a row's position, which is its last query's,
    is poison."""
    rng = np.random.default_rng(7)
    rows = len(positions)
    q = rng.normal(size=(rows, heads, length, head_dim))
    shape = (LAYERS, rows, kv_heads, capacity, head_dim)
    k, v = rng.normal(size=shape), rng.normal(size=shape)
    positions = np.array(positions, np.int32)[:, None]
    beyond = np.arange(capacity)[None, None, None, :, None]
    beyond = np.broadcast_to(beyond > positions[None, :, None, :, None], shape)
    poison = rng.choice([np.nan, np.inf, -np.inf, 3e38], size=shape)
    k, v = np.where(beyond, poison, k), np.where(beyond, poison, v)
    clean = np.where(beyond, 0, k), np.where(beyond, 0, v)
    positions = positions + np.arange(1 - length, 1, dtype=np.int32)
    return [jnp.asarray(x, dtype) for x in (q, k, v, *clean)] + [jnp.asarray(positions)]


def both(positions, *sizes, layer=1, interpreter: Any = True, length=1):
    """The kernel's result, with poison, and the XLA version's, without."""
    q, k, v, clean_k, clean_v, at = arrays(positions, *sizes, length=length)
    layer = jnp.int32(layer)
    visits = live_blocks(at, k.shape[3])
    with pltpu.force_tpu_interpret_mode(interpreter):
        ours = decode_attention(q, k, v, layer, at, visits)
    theirs = cached_attention(q, clean_k, clean_v, layer, at)
    return np.float32(ours), np.float32(theirs)


EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 39, 0, 22]


@pytest.mark.parametrize("heads, kv_heads", [(7, 1), (4, 2), (3, 3)])
def test_equals_the_xla_version_at_every_edge(heads, kv_heads):
    ours, theirs = both(EDGES, heads, kv_heads, 40, 16)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "heads, kv_heads, length, most, tile",
    [(7, 1, 16, 28, 4), (4, 2, 4, 100, 4), (4, 2, 12, 9, 2), (3, 3, 5, 100, 1)],
)
def test_pieces_of_prompts(monkeypatch, heads, kv_heads, length, most, tile):
    """Every query of a row sees the positions up to its own: in tiles within a block and
    across blocks, and rows that begin with the piece."""
    set_everywhere(monkeypatch, "_MOST_QUERIES", most)
    ends = [length - 1, *(end for end in EDGES if end >= length), 38]
    queries = arrays(ends, heads, kv_heads, 40, 16, length=length)[0]
    assert _tile_len(queries) == tile
    interpreter = pltpu.InterpretParams()
    sizes = heads, kv_heads, 40, 16
    ours, theirs = both(ends, *sizes, interpreter=interpreter, length=length)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("capacity", [5, 8, 20])
def test_capacity_shorter_than_a_block_or_no_multiple_of_it(capacity):
    positions = [0, capacity - 1, capacity // 2]
    ours, theirs = both(positions, 4, 2, capacity, 8, layer=LAYERS - 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", [[19] * 3, [0] * 3])
def test_all_rows_full_and_all_rows_empty(positions):
    """By the interpreter that keeps to a TPU's memories: what was not fetched is NaN."""
    sizes, interpreter = (2, 1, 20, 16), pltpu.InterpretParams()
    ours, theirs = both(positions, *sizes, layer=0, interpreter=interpreter)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_bfloat16_is_within_its_rounding():
    ours, theirs = both(EDGES, 4, 2, 40, 16, jnp.bfloat16)
    np.testing.assert_allclose(ours, theirs, atol=2**-7, rtol=2**-7)


def of_step(
    positions,
    heads,
    kv_heads,
    capacity,
    head_dim,
    dtype,
    write_positions=None,
    architecture="qwen2",
):
    """Products, vectors and caches of random numbers, angles, and places in the caches,
    which are `positions` unless rows lie in shards."""
    write_positions = positions if write_positions is None else write_positions
    rng = np.random.default_rng(11)
    sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    rows = len(positions)
    shape = (LAYERS, len(write_positions), kv_heads, capacity, head_dim)
    products = [rng.normal(size=(rows, size)) for size in sizes]
    biases = [rng.normal(size=(LAYERS, size)) for size in sizes]
    norms = [rng.normal(size=(LAYERS, head_dim)) for _ in range(2)]
    caches = [rng.normal(size=shape) for _ in range(2)]
    products, biases, norms, caches = (
        [jnp.asarray(x, dtype) for x in xs] for xs in (products, biases, norms, caches)
    )
    vectors = Vectors(biases, []) if architecture == "qwen2" else Vectors([], norms)
    at = jnp.asarray(positions, jnp.int32)[:, None]
    rope = rope_angles(at, rope_frequencies(head_dim, 1e4))
    # Of 8 bits: no product with bfloat16 is rounded, as part of a multiply-add or not.
    rope = tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in rope)
    write_positions = jnp.asarray(write_positions, jnp.int32)[:, None]
    return products, vectors, KVCache(*caches), rope, write_positions


def plain_heads(products, vectors, caches, rope, write_positions, layer):
    """What `decode_heads` gives, by the functions of the other devices."""
    rows, size = len(products[0]), caches.k.shape[4]
    if vectors.biases:
        pairs = zip(products, vectors.biases, strict=True)
        products = [x + bias[layer][None] for x, bias in pairs]
    q, k, v = (x.reshape(rows, 1, -1, size).swapaxes(1, 2) for x in products)
    if vectors.norms:
        norms = [scale[layer] for scale in vectors.norms]
        q, k = (rms_normalise(*pair, EPS) for pair in zip((q, k), norms, strict=True))
    q, k = (apply_rope(x, rope) for x in (q, k))
    return q, *write(caches, layer, k, v, write_positions)[:2]


# By default, XLA leaves out roundings to bfloat16 where it fuses operations.
@functools.partial(
    jax.jit,
    static_argnames="mesh",
    compiler_options={"xla_allow_excess_precision": False},
)
def kernel_heads(products, vectors, caches, rope, write_positions, layer, mesh=None):
    heads = prepare_heads(rope, vectors, len(write_positions) // len(products[0]))
    q, caches = decode_heads(
        products, caches[:2], layer, write_positions, heads, mesh, eps=EPS
    )
    return q, *caches


def assert_same(ours, theirs):
    """Bit for bit in bfloat16."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        atol = 1e-6 if one.dtype == jnp.float32 else 0
        np.testing.assert_allclose(*map(np.float32, (one, other)), atol=atol, rtol=0)


@pytest.mark.parametrize(
    "architecture", ["qwen2", pytest.param("qwen3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "positions, heads, kv_heads, head_dim",
    [([0, 7, 8, 15, 39], 7, 1, 128), ([38, 3, 17], 4, 2, 16), ([23], 3, 3, 256)],
)
def test_heads_are_those_of_the_other_devices(
    positions, heads, kv_heads, head_dim, dtype, architecture
):
    """Queries, and the whole caches: nothing else in them is touched."""
    sizes = heads, kv_heads, 40, head_dim
    args = of_step(positions, *sizes, dtype, architecture=architecture)
    for layer in map(jnp.int32, range(LAYERS)):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            ours = kernel_heads(*args, layer)
        assert_same(ours, plain_heads(*args, layer))


def test_visits_are_the_live_blocks_and_no_others():
    positions = jnp.array([[0], [BLOCK], [3 * BLOCK - 1], [39], [BLOCK - 1]])
    count, rows, blocks = live_blocks(positions, 40)
    expected = [
        (r, b) for r, at in enumerate(positions[:, 0]) for b in range(at // BLOCK + 1)
    ]
    assert (
        list(zip(rows.tolist(), blocks.tolist(), strict=True))[: int(count[0])]
        == expected
    )
    assert len(rows) == 5 * 5


@pytest.mark.parametrize(
    "architecture, head_dim, kernels",
    [("qwen2", 16, 1), ("qwen2", 128, 2), ("qwen3", 128, 2)],
)
def test_a_model_decodes_by_kernels_as_by_the_xla_version(
    tiny_hf, monkeypatch, architecture, head_dim, kernels
):
    """Through `forward` on a mesh: layers, writes and lengths of rows that differ."""
    loaded = load_model(str(tiny_hf(architecture=architecture, head_dim=head_dim)))
    config, params = loaded.config, loaded.read_params()
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    cache = init_cache(config, 3, 24, jnp.float32)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, config.vocab_size, (3, 9)), jnp.int32)
    write_positions = jnp.tile(jnp.arange(9)[None], (3, 1))
    _, cache = forward(config, params, prompt, write_positions, cache)
    tokens, at = prompt[:, :1], jnp.array([[0], [7], [8]], jnp.int32)

    plain, plain_cache = forward(config, params, tokens, at, cache)
    called = []

    def listed(kernel):
        return lambda *args, **kw: called.append(kernel) or kernel(*args, **kw)

    set_everywhere(monkeypatch, "on_tpu", lambda mesh: True, within="e1jax.nn")
    for kernel in (decode_heads, decode_attention):
        set_everywhere(monkeypatch, kernel.__name__, listed(kernel))
    with pltpu.force_tpu_interpret_mode(True):
        ours, cache = forward(config, params, tokens, at, cache, mesh=mesh)
    assert len(set(called)) == kernels
    np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(cache.k, plain_cache.k, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(cache.v, plain_cache.v, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_extended_by_the_kernel_as_by_the_xla_version(tiny_hf, monkeypatch):
    """By a short piece and a long one, from the middle of the prompt to its end."""
    loaded = load_model(str(tiny_hf()))
    config, params = loaded.config, loaded.read_params()
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 512))
    args = config, mesh, params, jnp.asarray(tokens, jnp.int32)
    begun = prefill(*args, jnp.int32(128))
    begun = begun._replace(k=begun.k.at[..., 128:, :].set(jnp.nan))

    def extended():
        extend.clear_cache()
        return extend(
            *args, jnp.int32(128), jnp.int32(500), jax.tree.map(jnp.copy, begun)
        )

    plain = extended()
    called = []

    def kernel(q, *rest, **options):
        called.append(q.shape[2])
        return decode_attention(q, *rest, **options)

    set_everywhere(monkeypatch, "PREFILL_LEN", 256)
    set_everywhere(monkeypatch, "on_tpu", lambda mesh: True, within="e1jax.nn")
    set_everywhere(monkeypatch, "decode_attention", kernel)
    with pltpu.force_tpu_interpret_mode(True):
        ours = extended()
    extend.clear_cache()
    assert set(called) == {128, 256}
    for one, other in zip(ours[:2], plain[:2], strict=True):
        one, other = one[..., :500, :], other[..., :500, :]
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_prefill_at_once_is_prefill_in_pieces(tiny_hf, monkeypatch):
    """What TPUs do with a prompt: queries see the new keys, not those of the cache."""
    loaded = load_model(str(tiny_hf()))
    config, params = loaded.config, loaded.read_params()
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 1024))
    tokens, length = jnp.asarray(tokens, jnp.int32), jnp.int32(1000)
    pieces = prefill(config, mesh, params, tokens, length)
    prefill.clear_cache()
    called = []
    set_everywhere(monkeypatch, "takes_splash", lambda *_: True)
    set_everywhere(
        monkeypatch,
        "splash_attention",
        lambda *heads, mesh: called.append(mesh) or causal_attention(*heads),
    )
    at_once = prefill(config, mesh, params, tokens, length)
    prefill.clear_cache()
    assert called
    for ours, theirs in zip(at_once[:2], pieces[:2], strict=True):
        ours, theirs = ours[..., :1000, :], theirs[..., :1000, :]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def on_a_mesh(data: int, tensor: int, monkeypatch: pytest.MonkeyPatch):
    """On 8 devices: rows over `data`, heads over `tensor`; run in its own process."""
    set_everywhere(monkeypatch, "TPU_BLOCK_LEN", BLOCK)
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    positions = [0, 39, 8, 7]
    axes = ("layers", "rows", "kv_heads", None, None)

    @jax.jit
    def attend(q, k, v, layer, at):
        visits = live_blocks(at, 40, mesh)
        return decode_attention(q, k, v, layer, at, visits, mesh)

    # A token of each row; a piece of a prompt, whose row all devices have.
    for ends, length in ((positions, 1), ([21], 8)):
        q, k, v, clean_k, clean_v, at = arrays(ends, 12, 4, 40, 16, length=length)
        theirs = cached_attention(q, clean_k, clean_v, jnp.int32(1), at)
        k, v = (jax.device_put(x, sharding(mesh, axes, k.shape)) for x in (k, v))
        with pltpu.force_tpu_interpret_mode(True):
            ours = attend(q, k, v, jnp.int32(1), at)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)

    # Of the products of all rows, each device takes its own; with a row in shards, all
    # take it, and one writes.
    shards = [40] * (data - 1) + [11]
    for rows, write_positions, architecture in (
        (positions, None, "qwen2"),
        ([3], shards, "qwen2"),
        (positions, None, "qwen3"),
    ):
        sizes = 12, 4, 40, 128
        args = of_step(rows, *sizes, jnp.bfloat16, write_positions, architecture)
        with pltpu.force_tpu_interpret_mode(True):
            ours = kernel_heads(*args, jnp.int32(2), mesh=mesh)
        assert_same(ours, plain_heads(*args, jnp.int32(2)))

    # The kernel for top-k and top-p too; 5 rows do not divide 8 devices.
    gaps = jnp.asarray(np.random.default_rng(3).gamma(2, size=(5, 96)), jnp.float32)
    options = jnp.array([0, 3, 0, 9, 0]), jnp.array([0.9, 1, 0.5, 0.8, 1])
    theirs = top_k_top_p_mask(gaps, *options)
    set_everywhere(monkeypatch, "on_tpu", lambda mesh: mesh is not None)
    with pltpu.force_tpu_interpret_mode(True):
        ours = jax.jit(lambda *args: top_k_top_p_mask(*args, mesh))(gaps, *options)
    np.testing.assert_array_equal(ours, theirs)


def test_on_meshes_of_8_devices():
    code = (
        "import pytest, test_attention_kernel as t\npatch = pytest.MonkeyPatch()\n"
        "t.on_a_mesh(2, 4, patch), t.on_a_mesh(4, 2, patch)"
    )
    run_on_devices(8, code)
