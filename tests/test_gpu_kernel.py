"""The decode kernel of GPUs against a plain computation in NumPy's float64: by the
interpreter anywhere, and compiled where there is a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_on_devices, set_everywhere
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from e1jax import Engine, SamplingParams
from e1jax.checkpoint.load import load_model
from e1jax.nn import paths
from e1jax.nn.cache import sequence_shards
from e1jax.nn.kernels.gpu_decode import gpu_decode_attention, num_splits
from e1jax.nn.quantize import LANES, quantize_kv
from e1jax.nn.scores import BLOCK_LEN
from e1jax.sampling.decode import decode, layers_apart
from e1jax.sharding.mesh import sharding

LAYERS = 3
EDGES = [0, 1, 127, 128, 129, 255, 256, 639, 0, 300]
interpreted = functools.partial(gpu_decode_attention, interpret=True)


def expected(q, k, v, positions):
    """[B, H, 1, C] by the definition; k and v [B, K, S, C], all float64."""
    rows = []
    for row, position in enumerate(positions):
        group = q.shape[1] // k.shape[1]
        seen = [np.repeat(x[row, :, : position + 1], group, axis=0) for x in (k, v)]
        scores = q[row] @ seen[0].swapaxes(1, 2) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        rows.append(weights / weights.sum(axis=-1, keepdims=True) @ seen[1])
    return np.stack(rows)


def arrays(positions, heads, kv_heads, capacity, head_dim, dtype):
    """Queries, caches of LAYERS layers and their scales, if any, with poison beyond each
    row's position; and queries, keys and values of layer 1 as float64."""
    rng = np.random.default_rng(7)
    q = jnp.asarray(rng.normal(size=(len(positions), heads, 1, head_dim)))
    q = q.astype(jnp.bfloat16 if dtype == jnp.int8 else dtype)
    shape = (LAYERS, len(positions), kv_heads, capacity, head_dim)
    caches, scales, exact = [], [], [q.astype(jnp.float32)]
    at = np.array(positions)[None, :, None, None]
    for _ in range(2):
        values, scale = quantize_kv(jnp.asarray(rng.normal(size=shape)), dtype)
        wide = values.astype(jnp.float32)
        if scale is None:
            poison = rng.choice([np.nan, np.inf, -np.inf, 3e38], size=shape)
            beyond = np.arange(capacity) > at
            values = jnp.where(beyond[..., None], poison.astype(values.dtype), values)
        else:
            wide *= scale[..., None]
            scale = jnp.where(np.arange(capacity) > at, np.nan, scale)
            scales.append(scale.reshape(*shape[:3], capacity // LANES, LANES))
        caches.append(values)
        exact.append(wide[1])
    exact = [np.asarray(x, np.float64) for x in exact]
    return q, caches, tuple(scales) or None, exact


# Queries are rounded after they are scaled, and weights before the second product.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.int8: 2e-2}


def check(attend, positions, *sizes):
    q, caches, scales, exact = arrays(positions, *sizes)
    at = jnp.array(positions, jnp.int32)[:, None]
    ours = jax.jit(attend)(q, *caches, jnp.int32(1), at, scales=scales)
    assert ours.dtype == q.dtype
    wanted = expected(*exact, positions)
    error = np.abs(np.asarray(ours, np.float64) - wanted).max()
    assert error <= TOLERANCE[sizes[-1]] * np.abs(wanted).max()


SHAPES = [
    (EDGES, 7, 1, 640, 64),
    ([5, 383, 130], 12, 2, 384, 128),
    ([0, 127], 3, 3, 128, 16),
    ([1200], 34, 2, 1280, 32),  # groups of more than 16 heads, and many splits
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_equals_float64(sizes, dtype):
    check(interpreted, *sizes, dtype)


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (20, 2), (30, 3)])
def test_a_split_goes_through_several_blocks(programs, splits, monkeypatch):
    set_everywhere(monkeypatch, "PROGRAMS", programs)
    assert num_splits(len(EDGES), 640) == splits
    check(interpreted, EDGES, 7, 1, 640, 64, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_equals_float64_on_a_gpu(sizes, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    check(gpu_decode_attention, *sizes, dtype)


@pytest.mark.parametrize(
    ("heads", "capacity", "splits"),
    [(4, 32768, 32), (4, 512, 4), (32, 32768, 8), (128, 4096, 2), (300, 4096, 1)],
)
def test_splits_fill_the_processors(heads, capacity, splits):
    assert num_splits(heads, capacity) == splits


@pytest.mark.parametrize("step", [0, 127, 128, 300, 511])
def test_positions_of_a_row_in_shards(step):
    """Blocks of a row are dealt to 3 shards; some of these hold nothing yet."""
    shards, capacity = 3, 256
    rng = np.random.default_rng(step)
    k, v = rng.normal(size=(2, 1, 2, shards * capacity, 16)).astype(np.float32)
    q = rng.normal(size=(1, 6, 1, 16)).astype(np.float32)
    caches = np.zeros((2, LAYERS, shards, 2, capacity, 16), np.float32)
    for position in range(step + 1):
        block, offset = divmod(position, BLOCK_LEN)
        index = block // shards * BLOCK_LEN + offset
        for cache, x in zip(caches, (k, v), strict=True):
            cache[1, block % shards, :, index] = x[0, :, position]
    last, _ = sequence_shards(jnp.array([[step]]), shards, capacity)
    ours = interpreted(jnp.asarray(q), *map(jnp.asarray, caches), jnp.int32(1), last)
    wanted = expected(*(x.astype(np.float64) for x in (q, k, v)), [step])
    np.testing.assert_allclose(ours, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_triton_takes_the_kernel(dtype):
    """Pallas makes Triton's code of it, which needs no GPU: a cache of more than 4 GiB."""
    shape = (28, 2, 4, 32768, 128)
    q = jax.ShapeDtypeStruct((2, 28, 1, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct((*shape[:3], 256, LANES), jnp.float32)
    scales = (scale, scale) if dtype == jnp.int8 else None
    at = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(gpu_decode_attention).trace(
            q, cache, cache, layer, at, scales=scales
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "gpu_decode_attention" in text and "triton" in text


@pytest.mark.parametrize(
    ("free", "apart"), [(None, True), (2**30 + 500_000, True), (2**30, False)]
)
def test_layers_are_copied_apart_on_gpus_where_they_fit(
    free, apart, tiny_hf, monkeypatch
):
    loaded = load_model(str(tiny_hf()), "data=1,tensor=1")
    params = loaded.read_params()
    set_everywhere(monkeypatch, "on_cpu", lambda mesh: False, within="e1jax.sampling")
    set_everywhere(monkeypatch, "on_gpu", lambda mesh: True, within="e1jax.sampling")
    set_everywhere(monkeypatch, "free_bytes", lambda mesh: free)
    ours = layers_apart(params, loaded.mesh)
    assert isinstance(ours["layers"], list) == apart
    for layer, weights in enumerate(ours["layers"] if apart else []):
        jax.tree.map(
            lambda x, stack, i=layer: np.testing.assert_array_equal(x, stack[i]),
            *(weights, params["layers"]),
        )


@pytest.mark.slow
def test_greedy_tokens_are_those_of_plain_attention(tiny_hf, monkeypatch):
    """1,000 tokens of an engine, in float32, over 8 blocks; the two rows differ in length."""
    loaded = load_model(str(tiny_hf()), "data=1,tensor=1")
    endless = dataclasses.replace(loaded.tokenizer, eos_id=2**20, think_end_id=None)
    prompts = [[5, 6, 7], list(range(40, 240))]
    params = SamplingParams(thinking_budget=None, solution_budget=1000, temperature=0.0)

    def tokens():
        decode.clear_cache()
        args = loaded.config, loaded.read_params(), endless, loaded.mesh
        engine = Engine(*args, cache_len=1280, slots=2)
        return [of[0].token_ids for of in engine.generate(prompts, params)]

    plain, called = tokens(), []

    def kernel(*args, **options):
        called.append(args)
        return interpreted(*args, **options)

    monkeypatch.setattr(paths, "takes_gpu_decode", lambda *_: True)
    monkeypatch.setattr(paths, "gpu_decode_attention", kernel)
    ours = tokens()
    decode.clear_cache()
    assert called and [len(row) for row in plain] == [1000, 1000]
    assert ours == plain
    assert len({*plain[0]}) > 20  # not one token over and over


def on_a_mesh(data: int, tensor: int):
    """Rows over `data`, heads over `tensor`; run in its own process."""
    grid = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    mesh = Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    axes = ("layers", "rows", "kv_heads", None, None)

    def attend(q, k, v, *args, scales):
        k, v = (
            jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))
            for x in (k, v)
        )
        return interpreted(q, k, v, *args, mesh=mesh, scales=scales)

    for dtype in TOLERANCE:
        check(attend, [0, 300, 127, 383], 12, 4, 384, 32, dtype)


def test_on_meshes_of_8_devices():
    code = "import test_gpu_kernel as t\nt.on_a_mesh(2, 4), t.on_a_mesh(4, 2)"
    run_on_devices(8, code)
