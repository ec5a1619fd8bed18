"""Weights and caches in fewer bits: against NumPy, and against the model that has the same
values in float32."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PATIENCE, set_everywhere, several_devices
from jax.experimental.pallas import tpu as pltpu

from e1jax import Engine, SamplingParams, train
from e1jax.checkpoint.load import load_model
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig
from e1jax.convert import from_hf, to_hf
from e1jax.nn.attention import cached_attention
from e1jax.nn.cache import init_cache, sequence_shards
from e1jax.nn.cache import write as write_cache
from e1jax.nn.cpu import as_bits, matmul_precision, unstack
from e1jax.nn.kernels.decode_attention import decode_attention, live_blocks
from e1jax.nn.quantize import (
    Packed,
    _slab_rows,
    dequantize,
    int8_on_host,
    is_packed,
    map_kernels,
    matmul,
    matmul_transposed,
    take_rows,
)

CPU = "data=1,tensor=1"
PROMPTS = [[5, 9, 30, 7], [11] * 23, [40, 3]]


def int8_of(kernel: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric, per channel: by the definition, in float64."""
    scale = np.abs(kernel.astype(np.float64)).max(axis, keepdims=True) / 127
    safe = np.where(scale == 0, 1, scale)
    return np.rint(kernel / safe), scale.squeeze(axis)


def to_int8(params: dict) -> dict:
    def leaf(kernel, axis):
        values, scale = int8_of(np.asarray(kernel, np.float32), axis)
        return {"values": values.astype(np.int8), "scale": scale.astype(np.float32)}

    return map_kernels(leaf, params)


def bits_of(kernel: jax.Array) -> np.ndarray:
    return np.asarray(kernel.astype(jnp.bfloat16)).view(np.uint16)


def dequantized(params: dict) -> dict:
    """The same parameters as float32 arrays."""
    if is_packed(params):
        values = np.asarray(dequantize(params["values"], jnp.float32))
        if "scale" not in params:
            return jnp.asarray(values)
        scale = np.asarray(params["scale"])
        is_embedding = values.ndim == 2 and len(scale) == len(values)
        return jnp.asarray(values * np.expand_dims(scale, -1 if is_embedding else -2))
    if isinstance(params, dict):
        return {name: dequantized(part) for name, part in params.items()}
    return jnp.asarray(params, jnp.float32)


# Forms of a kernel.


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_rows_as_int8(dtype):
    rows = np.random.default_rng(0).normal(size=(7, 33)).astype(dtype)
    rows[2] = 0  # a channel without a scale
    values, scale = int8_on_host(rows, 1)
    turned = int8_on_host(rows.T[None], -2)
    expected, scales = int8_of(rows.astype(np.float32), 1)
    np.testing.assert_array_equal(turned[0][0].T, values)
    np.testing.assert_array_equal(turned[1][0], scale)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    np.testing.assert_allclose(scale, scales, rtol=1e-6)
    assert np.abs(values - expected).max() <= 1  # a tie may go either way
    assert (values != expected).mean() < 0.01 and np.abs(values).max() == 127


@pytest.mark.parametrize("in_slabs", [False, True])
@pytest.mark.parametrize("form", ["int8", "bits"])
@pytest.mark.parametrize("rows, size, width", [(1, 40, 24), (5, 37, 19), (3, 8, 1)])
def test_products_are_those_of_the_wide_kernel(
    rows, size, width, form, in_slabs, monkeypatch
):
    """Of one layer of a stack and of a kernel alone, whole and slab by slab, of which the
    last one is shorter."""
    set_everywhere(monkeypatch, "_slab_rows", lambda *_: min(16, size))
    rng = np.random.default_rng(size)
    stack = jnp.asarray(rng.normal(size=(3, size, width)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, size)), jnp.float32)
    if form == "int8":
        values, scale = int8_of(np.asarray(stack), 1)
        values, scale = jnp.asarray(values, jnp.int8), jnp.asarray(scale, jnp.float32)
        wide = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    else:
        values, scale = jnp.asarray(bits_of(stack)), None
        wide = stack.astype(jnp.bfloat16).astype(jnp.float32)
    for layer in range(3):
        expected = np.asarray(x, np.float64) @ np.asarray(wide[layer], np.float64)
        of_stack = Packed(values, scale, jnp.int32(layer), in_slabs)
        own = None if scale is None else scale[layer]
        alone = Packed(values[layer], own, None, in_slabs)
        for kernel in (of_stack, alone):
            with matmul_precision(jnp.float32):
                found = matmul(x, kernel)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("in_slabs", [False, True])
@pytest.mark.parametrize("vocab_size", [32, 45])
def test_logits_of_tied_embeddings(vocab_size, in_slabs, monkeypatch):
    set_everywhere(monkeypatch, "_slab_rows", lambda *_: 16)
    rng = np.random.default_rng(vocab_size)
    embedding = rng.normal(size=(vocab_size, 12)).astype(np.float32)
    x = rng.normal(size=(3, 12)).astype(np.float32)
    values, scale = int8_of(embedding, 1)
    leaf = {
        "values": jnp.asarray(values, jnp.int8),
        "scale": jnp.asarray(scale, jnp.float32),
    }
    packed = Packed(leaf["values"], leaf["scale"], None, in_slabs)
    with matmul_precision(jnp.float32):
        found = matmul_transposed(jnp.asarray(x), packed, jnp.float32)
    wide = values * scale[:, None]
    np.testing.assert_allclose(found, x @ wide.T, atol=1e-5, rtol=1e-5)
    tokens = jnp.asarray([[0, vocab_size - 1], [7, 7]])
    rows = take_rows(leaf, tokens, jnp.float32)
    np.testing.assert_allclose(rows, wide[np.asarray(tokens)], atol=1e-6, rtol=1e-6)


@pytest.mark.cpu
def test_bits_and_layers_are_views(tiny_hf):
    """Of the arrays that the user has: a copy would take their memory once more. Nor may a
    view keep them from being donated later, as training does."""
    loaded = load_model(str(tiny_hf()), CPU, "bfloat16")
    params = jax.tree.map(jnp.copy, loaded.read_params())  # which own their memory
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    pointer = kernel.unsafe_buffer_pointer()
    bits = as_bits(params)
    layers = unstack(bits)["layers"]
    assert bits["layers"]["mlp"]["up"]["kernel"]["values"].unsafe_buffer_pointer() == (
        pointer
    )
    first, second = (layer["mlp"]["up"]["kernel"]["values"] for layer in layers[:2])
    assert first.unsafe_buffer_pointer() == pointer
    assert second.unsafe_buffer_pointer() == pointer + kernel[0].nbytes
    np.testing.assert_array_equal(second, bits_of(kernel[1]))
    assert bits["norm"]["scale"].dtype == jnp.float32
    del bits, layers, first, second, params
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    assert double(kernel).unsafe_buffer_pointer() == pointer and kernel.is_deleted()


# The cache.


@pytest.mark.cpu
@pytest.mark.parametrize("shards", [1, 3])
def test_an_int8_cache_is_the_cache_of_its_rounded_vectors(shards):
    """Written by prompts and by steps, read by both kinds of attention."""
    rng = np.random.default_rng(shards)
    rows, kv_heads, size, length = 2, 2, 16, 300
    capacity = 128 * -(-length // (128 * shards))
    new = rng.normal(size=(2, rows, kv_heads, length, size)).astype(np.float32)
    new[0, 0, 0, 5] = 0  # a vector without a scale
    scale = np.abs(new).max(axis=-1, keepdims=True) / np.float32(127)
    rounded = np.rint(new / np.where(scale == 0, 1, scale)) * scale
    sizes = ModelConfig(
        *(9, 64, 96, 2, 4, kv_heads, size),
        max_position_embeddings=512,
        rope_theta=1e4,
    )
    layer = jnp.int32(1)
    cache = init_cache(sizes, shards * rows, capacity, jnp.int8)
    start = 0
    for end in (131, 171) if shards == 1 else ():  # a prompt's, in two pieces
        k, v = (jnp.asarray(x[:, :, start:end]) for x in new)
        write_positions = jnp.tile(jnp.arange(start, end)[None], (rows, 1))
        cache, start = write_cache(cache, layer, k, v, write_positions), end
    write = jax.jit(write_cache)
    for step in range(start, length):
        at = jnp.full((rows, 1), step)
        _, write_positions = sequence_shards(at, shards, capacity)
        k, v = (jnp.asarray(x[:, :, step : step + 1]) for x in new)
        cache = write(cache, layer, k, v, write_positions)
    assert not np.asarray(cache.k[0]).any() and not np.asarray(cache.k_scale[0]).any()
    num_queries = 4 if shards == 1 else 1  # a piece of a prompt, or a token
    q = jnp.asarray(rng.normal(size=(rows, 4, num_queries, size)), jnp.float32)
    whole = np.pad(rounded, ((0, 0),) * 3 + ((0, 384 - length), (0, 0)))
    whole = jnp.asarray(whole)[:, None]
    for ends in ([299, 130], [127, 128], [num_queries - 1, 255]):
        at = jnp.asarray(ends)[:, None] + jnp.arange(1 - num_queries, 1)[None]
        expected = cached_attention(q, whole[0], whole[1], jnp.int32(0), at)
        last, _ = sequence_shards(at, shards, capacity)
        args = (q, cache.k, cache.v, layer, last)
        scales = cache.k_scale, cache.v_scale
        found = cached_attention(*args, scales=scales)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
        visits = live_blocks(last, capacity, dtype=jnp.int8)
        with pltpu.force_tpu_interpret_mode(True):
            found = decode_attention(*args, visits, scales=scales)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


# The whole model.


def sampled(name, mesh=CPU, params=None, **settings):
    """Tokens and log-probabilities of greedy completions; of other parameters, if given."""
    settings = {"dtype": "float32", "cache_len": 384, "slots": 2, **settings}
    made = Engine.from_pretrained(str(name), mesh=mesh, **settings)
    made.params = params or made.params
    budgets = SamplingParams(thinking_budget=150, solution_budget=9, temperature=0.0)
    completions = [samples[0] for samples in made.generate(PROMPTS, budgets)]
    tokens = [c.token_ids for c in completions]
    return tokens, np.concatenate([c.logprobs for c in completions]), made


def difference(ours, theirs):
    """Mean difference of log-probabilities of the first response's tokens, as long as they
    are the same."""
    pairs = zip(ours[0][0], theirs[0][0], strict=False)
    same = [a == b for a, b in pairs]
    count = len(same) if all(same) else same.index(False)
    assert count > 3
    return np.abs(ours[1][:count] - theirs[1][:count]).mean()


@pytest.mark.parametrize("tied", [False, True])
def test_int8_weights_are_a_model_with_their_values(tiny_hf, tied):
    path = tiny_hf(tied=tied, num_layers=3)
    params = load_model(str(path), CPU, "float32", "int8").read_params()
    assert params["layers"]["mlp"]["down"]["kernel"]["values"].dtype == jnp.int8
    assert params["layers"]["attention"]["q"]["bias"].dtype == jnp.float32
    tokens, logprobs, _ = sampled(path, quantize="int8")
    expected = sampled(path, params=dequantized(params))
    assert tokens == expected[0]
    np.testing.assert_allclose(logprobs, expected[1], atol=1e-4)


def test_int8_weights_are_as_near_as_they_can_be(tiny_hf):
    path = str(tiny_hf(num_layers=3))
    wide, packed = (
        load_model(path, CPU, "float32", q).read_params() for q in (None, "int8")
    )
    for part, axis in (("o", -2), ("q", -2), (None, -1)):
        a, b = (
            p["layers"]["attention"][part]["kernel"] if part else p["embedding"]
            for p in (wide, packed)
        )
        error = np.abs(a - dequantized(b)).max(axis)
        assert error.max() > 0 and (error <= np.asarray(b["scale"]) * 0.501).all()


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_int8_is_the_same_from_wherever_it_is_loaded(tiny_hf, tmp_path, stored):
    """From Hugging Face files, from a checkpoint, and from one that is stored so."""
    path = tiny_hf(num_layers=3, dtype=stored)
    from_hf(str(path), tmp_path / "wide")
    from_hf(str(path), tmp_path / "int8", dtype="bfloat16", quantize="int8")
    plain = load_model(str(path), CPU, stored).read_params()
    made = to_int8(plain)
    made = jax.tree.map(
        lambda ours, bits: ours if ours.dtype == jnp.int8 else ours.astype(bits.dtype),
        *(made, load_model(str(tmp_path / "int8"), CPU, "bfloat16").read_params()),
    )
    sources = (path, "int8"), (tmp_path / "wide", "int8"), (tmp_path / "int8", None)
    first = None
    for name, form in sources:
        loaded = load_model(str(name), CPU, "bfloat16", form)
        assert loaded.quantize == "int8"
        first = first or loaded.read_params()
        assert jax.tree.all(
            jax.tree.map(np.array_equal, loaded.read_params(), first)
        ), name
        for ours, theirs in zip(*map(jax.tree.leaves, (first, made)), strict=True):
            atol = 1 if ours.dtype == jnp.int8 else 0  # where a tie goes the other way
            ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=atol)
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.read_params())}
        assert dtypes == {"int8", "float32", "bfloat16"}


def test_what_int8_cannot_be_used_for(tiny_hf, tmp_path):
    from_hf(str(tiny_hf()), tmp_path / "int8", quantize="int8")
    with pytest.raises(UserError, match="int8, which a Hugging Face directory cannot"):
        to_hf(str(tmp_path / "int8"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    config = GRPOConfig(model=str(tmp_path / "int8"), steps=1)
    with pytest.raises(UserError, match="int8, which cannot be trained"):
        train.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="quantize must be int8, not 'int4'"):
        load_model("nano", quantize="int4")
    with pytest.raises(UserError, match="kv_dtype must be float32 or bfloat16 or int8"):
        Engine.from_pretrained("nano", kv_dtype="fp8")


@pytest.mark.cpu
def test_bfloat16_on_a_cpu_is_the_float32_model_of_its_values(tiny_hf):
    path = tiny_hf(num_layers=3)
    params = load_model(str(path), CPU, "bfloat16").read_params()
    tokens, logprobs, made = sampled(path, dtype="bfloat16")
    assert made._cache.k.dtype == jnp.uint16
    expected = sampled(path, params=dequantized(params), kv_dtype="bfloat16")
    assert tokens == expected[0]
    np.testing.assert_allclose(logprobs, expected[1], atol=1e-4)
    assert 1e-4 < difference(sampled(path), (tokens, logprobs)) < 0.1


def test_an_int8_cache_changes_little(tiny_hf):
    ours = sampled(tiny_hf(), kv_dtype="int8")
    assert ours[2]._cache.k.dtype == jnp.int8
    assert 1e-5 < difference(ours, sampled(tiny_hf())) < 0.1


def on_mesh(path, mesh, rows, expected):
    """`rows`: of the cache, on all of `data` together."""
    tokens, _, made = sampled(path, mesh, **BOTH)
    assert tokens == expected
    scale = made._cache.k_scale
    assert scale.sharding == made._cache.k.sharding and scale.shape[1] == rows


BOTH = {"quantize": "int8", "kv_dtype": "int8"}


@pytest.mark.parametrize(
    "mesh, rows, tied",
    [
        ("data=2,tensor=2", 2, True),  # a row a place
        # A part of each of two rows at each place.
        pytest.param("data=4,tensor=2", 8, False, marks=pytest.mark.slow),
        pytest.param("data=8,tensor=1", 16, True, marks=pytest.mark.slow),
    ],
)
def test_meshes_give_the_tokens_of_one_device(tiny_hf, mesh, rows, tied):
    path = str(tiny_hf(tied=tied))
    expected = sampled(path, **BOTH)[0]
    call = f"t.on_mesh({path!r}, {mesh!r}, {rows}, {expected!r})"
    data, tensor = mesh[5], mesh[-1]
    flags = several_devices(int(data) * int(tensor))
    done = subprocess.run(
        [sys.executable, "-c", f"import test_quantize as t\n{call}"],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Kernels of slabs: their sizes.


@pytest.mark.parametrize("rows, size, width", [(1, 3584, 18944), (8, 3584, 152064)])
def test_slabs_stay_in_the_cache_of_a_processor(rows, size, width):
    count = _slab_rows(rows, size, width)
    assert 8 <= count <= size and (count * width * 4 <= 2**23 or count == 8)


def test_a_slab_is_never_longer_than_the_kernel():
    assert _slab_rows(1, 5, 3) == 5 and _slab_rows(500, 700, 64) == 700
