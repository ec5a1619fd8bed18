"""The decode kernel for TPUs, run by Pallas' interpreter, against the XLA version."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from e1jax import attention, engine, model, sampling
from e1jax.convert import load_model
from e1jax.sharding import make_mesh, sharding

BLOCK = 8
LAYERS = 3


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(attention, "TPU_BLOCK_LEN", BLOCK)


def arrays(positions, heads, kv_heads, capacity, head_dim, dtype=jnp.float32):
    """Queries and caches; whatever lies beyond a row's position is poison."""
    rng = np.random.default_rng(7)
    rows = len(positions)
    q = rng.normal(size=(rows, heads, 1, head_dim))
    shape = (LAYERS, rows, kv_heads, capacity, head_dim)
    k, v = rng.normal(size=shape), rng.normal(size=shape)
    positions = np.array(positions, np.int32)[:, None]
    beyond = np.arange(capacity)[None, None, None, :, None]
    beyond = np.broadcast_to(beyond > positions[None, :, None, :, None], shape)
    poison = rng.choice([np.nan, np.inf, -np.inf, 3e38], size=shape)
    k, v = np.where(beyond, poison, k), np.where(beyond, poison, v)
    clean = np.where(beyond, 0, k), np.where(beyond, 0, v)
    return [jnp.asarray(x, dtype) for x in (q, k, v, *clean)] + [jnp.asarray(positions)]


def both(positions, *sizes, layer=1, interpreter: Any = True):
    """The kernel's result, with poison, and that of the XLA version, without."""
    q, k, v, clean_k, clean_v, at = arrays(positions, *sizes)
    layer = jnp.int32(layer)
    visits = attention.live_blocks(at, k.shape[3])
    with pltpu.force_tpu_interpret_mode(interpreter):
        ours = attention.decode_attention(q, k, v, layer, at, visits)
    theirs = attention.cached_attention(q, clean_k, clean_v, layer, at)
    return np.float32(ours), np.float32(theirs)


EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 39, 0, 22]


@pytest.mark.parametrize("heads, kv_heads", [(7, 1), (4, 2), (3, 3)])
def test_equals_the_xla_version_at_every_edge(heads, kv_heads):
    ours, theirs = both(EDGES, heads, kv_heads, 40, 16)
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


def test_visits_are_the_live_blocks_and_no_others():
    positions = jnp.array([[0], [BLOCK], [3 * BLOCK - 1], [39], [BLOCK - 1]])
    count, rows, blocks = attention.live_blocks(positions, 40)
    expected = [
        (r, b) for r, at in enumerate(positions[:, 0]) for b in range(at // BLOCK + 1)
    ]
    assert (
        list(zip(rows.tolist(), blocks.tolist(), strict=True))[: int(count[0])]
        == expected
    )
    assert len(rows) == 5 * 5


def test_a_model_decodes_by_it_as_by_the_xla_version(tiny_hf, monkeypatch):
    """Through `forward` on a mesh: layers, writes and lengths of rows that differ."""
    loaded = load_model(str(tiny_hf()))
    config, params = loaded.config, loaded.params
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    cache = model.init_cache(config, 3, 24, jnp.float32)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, config.vocab_size, (3, 9)), jnp.int32)
    places = jnp.tile(jnp.arange(9)[None], (3, 1))
    _, cache = model.forward(config, params, prompt, places, cache)
    tokens, at = prompt[:, :1], jnp.array([[0], [7], [8]], jnp.int32)

    plain, plain_cache = model.forward(config, params, tokens, at, cache)
    called = []
    kernel = attention.decode_attention
    monkeypatch.setattr(attention, "on_tpu", lambda mesh: True)
    monkeypatch.setattr(
        attention, "decode_attention", lambda *a: called.append(1) or kernel(*a)
    )
    with pltpu.force_tpu_interpret_mode(True):
        ours, cache = model.forward(config, params, tokens, at, cache, mesh=mesh)
    assert called, "the kernel was not used"
    np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(cache.k, plain_cache.k, atol=1e-5, rtol=1e-5)


def test_prefill_at_once_is_prefill_in_pieces(tiny_hf, monkeypatch):
    """What TPUs do with a prompt: queries see the new keys, not those of the cache."""
    loaded = load_model(str(tiny_hf()))
    config, params = loaded.config, loaded.params
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 1024))
    tokens, length = jnp.asarray(tokens, jnp.int32), jnp.int32(1000)
    pieces = engine.prefill(config, mesh, params, tokens, length)
    engine.prefill.clear_cache()
    called = []
    causal = attention.causal_attention
    monkeypatch.setattr(attention, "takes_splash", lambda *_: True)
    monkeypatch.setattr(
        attention, "causal_attention", lambda *a: called.append(1) or causal(*a)
    )
    monkeypatch.setattr(
        attention, "splash_attention", lambda q, k, v, _: causal(q, k, v)
    )
    at_once = engine.prefill(config, mesh, params, tokens, length)
    engine.prefill.clear_cache()
    assert called
    for ours, theirs in zip(at_once, pieces, strict=True):
        ours, theirs = ours[..., :1000, :], theirs[..., :1000, :]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def on_a_mesh(data: int, tensor: int):
    """On 8 devices: rows over `data`, heads over `tensor`; run in its own process."""
    attention.TPU_BLOCK_LEN = BLOCK
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    positions = [0, 39, 8, 7]
    q, k, v, clean_k, clean_v, at = arrays(positions, 12, 4, 40, 16)
    theirs = attention.cached_attention(q, clean_k, clean_v, jnp.int32(1), at)
    axes = ("layers", "rows", "kv_heads", None, None)
    k, v = (jax.device_put(x, sharding(mesh, axes, k.shape)) for x in (k, v))

    @jax.jit
    def decode(q, k, v, layer, at):
        visits = attention.live_blocks(at, 40, mesh)
        return attention.decode_attention(q, k, v, layer, at, visits, mesh)

    with pltpu.force_tpu_interpret_mode(True):
        ours = decode(q, k, v, jnp.int32(1), at)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)

    # The kernel for top-k and top-p too; 5 rows do not divide 8 devices.
    gaps = jnp.asarray(np.random.default_rng(3).gamma(2, size=(5, 96)), jnp.float32)
    options = jnp.array([0, 3, 0, 9, 0]), jnp.array([0.9, 1, 0.5, 0.8, 1])
    theirs = sampling.kept(gaps, *options)
    sampling.on_tpu = lambda mesh: mesh is not None
    with pltpu.force_tpu_interpret_mode(True):
        ours = jax.jit(lambda *args: sampling.kept(*args, mesh))(gaps, *options)
    np.testing.assert_array_equal(ours, theirs)


def test_on_meshes_of_8_devices():
    code = "import test_attention_kernel as t\nt.on_a_mesh(2, 4), t.on_a_mesh(4, 2)"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
