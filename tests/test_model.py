"""Parity with Hugging Face torch, and the laws that a cache has to keep."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import edit_json, set_everywhere
from flax import nnx
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from e1jax.checkpoint.huggingface import read_config
from e1jax.checkpoint.load import load_model
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.nn import model
from e1jax.nn.attention import causal_attention
from e1jax.nn.cache import init_cache
from e1jax.nn.cpu import product_on_cpu
from e1jax.nn.layers import RMSNorm
from e1jax.nn.model import unembed
from e1jax.nn.paths import choose_operations
from e1jax.nn.rope import rope_angles, rope_frequencies

# float32 sums in another order differ by about 1e-6 of the largest logit.
TOLERANCE = 1e-5

forward = jax.jit(model.forward, static_argnums=0, static_argnames="remat")

SHAPES = {
    "odd sizes, 1 kv head, tied": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_kv_heads": 1,
        "head_dim": 6,
        "tied": True,
    },
    "2 kv heads, other theta": {"rope_theta": 1e6, "head_dim": 32},
    "7 kv heads, wide heads": {
        "hidden_size": 56,
        "num_heads": 7,
        "num_kv_heads": 7,
        "head_dim": 128,
    },
    "6 heads on 3": {
        "hidden_size": 40,
        "num_heads": 6,
        "num_kv_heads": 3,
        "tied": True,
    },
    "qwen3, odd sizes, 1 kv head": {
        "architecture": "qwen3",
        "hidden_size": 40,
        "intermediate_size": 36,
        "num_layers": 3,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 22,
        "rope_theta": 1e6,
    },
    "qwen3, tied": {"architecture": "qwen3", "num_heads": 6, "tied": True},
}


def tokens_and_positions(config: ModelConfig, rows=3, length=13, start=0):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    positions = np.tile(np.arange(start, start + length, dtype=np.int32), (rows, 1))
    return jnp.asarray(tokens), jnp.asarray(positions)


def torch_logits(path, tokens, positions, dtype=torch.float32) -> np.ndarray:
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        output = reference(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            position_ids=torch.tensor(np.asarray(positions), dtype=torch.long),
        )
    return output.logits.float().numpy()


def our_logits(loaded, tokens, positions) -> np.ndarray:
    hidden, _ = forward(loaded.config, loaded.read_params(), tokens, positions)
    return np.asarray(unembed(loaded.config, loaded.read_params(), hidden))


def difference(ours: np.ndarray, reference: np.ndarray) -> float:
    return np.abs(ours - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("start", [0, 32767 - 12])
def test_logits_are_those_of_hugging_face(tiny_hf, shape, start):
    path = tiny_hf(**shape)
    loaded = load_model(str(path), dtype="float32")
    inputs = tokens_and_positions(loaded.config, start=start)
    reference = torch_logits(path, *inputs)
    assert reference.std() > 0.1 * np.abs(reference).max()  # not flat
    assert difference(our_logits(loaded, *inputs), reference) <= TOLERANCE


def test_bfloat16_stays_close(tiny_hf):
    path = tiny_hf()
    loaded = load_model(str(path), dtype="bfloat16")
    inputs = tokens_and_positions(loaded.config)
    exact = torch_logits(path, *inputs)
    reference = torch_logits(path, *inputs, dtype=torch.bfloat16)
    ours = our_logits(loaded, *inputs)
    assert (
        loaded.read_params()["embedding"].dtype == jnp.bfloat16
        and ours.dtype == np.float32
    )
    # Roundings fall differently in the two; neither is further off than the other.
    assert difference(ours, exact) <= 1.5 * difference(reference, exact)
    assert difference(ours, reference) <= 0.03


def test_old_and_new_spelling_of_rope(tiny_hf, tmp_path):
    new = tiny_hf(rope_theta=1e6, head_dim=32)
    old = shutil.copytree(new, tmp_path / "old")
    assert json.loads((new / "config.json").read_text())["rope_parameters"]
    edit_json(old / "config.json", rope_parameters=None, rope_theta=1e6)
    assert read_config(old) == read_config(new)
    assert read_config(old).rope_theta == 1e6
    scaled = {"rope_type": "default", "rope_theta": 5e5}
    edit_json(old / "config.json", rope_scaling=scaled, rope_theta=None)
    assert read_config(old).rope_theta == 5e5
    edit_json(old / "config.json", rope_scaling=None)
    with pytest.raises(UserError, match="rope_theta"):
        read_config(old)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_our_config_is_read_back_by_us_and_by_transformers(
    tiny_hf, tmp_path, architecture
):
    source = tiny_hf(architecture=architecture, rope_theta=1e6, head_dim=32)
    config = read_config(source)
    assert ModelConfig.from_hf(config.to_hf("float32")) == config
    ours = shutil.copytree(source, tmp_path / "ours")
    (ours / "config.json").write_text(json.dumps(config.to_hf("float32")))
    inputs = tokens_and_positions(config)
    np.testing.assert_array_equal(
        torch_logits(ours, *inputs), torch_logits(source, *inputs)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_hidden_layers": "two"}, "num_layers"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tiny_hf, tmp_path, change, named):
    path = shutil.copytree(tiny_hf(), tmp_path / "hf")
    if "rope_scaling" in change:
        edit_json(path / "config.json", rope_parameters=None, rope_theta=1e4)
    edit_json(path / "config.json", **change)
    with pytest.raises(UserError, match=r"config\.json") as error:
        load_model(str(path))
    assert named in str(error.value)


def test_rms_norm():
    rng = np.random.default_rng(0)
    x = (30 * rng.standard_normal((2, 5, 48))).astype(np.float32)
    scale = rng.standard_normal(48).astype(np.float32)
    ours, reference = RMSNorm(48, 1e-6), Qwen2RMSNorm(48, 1e-6)
    ours.scale[...] = jnp.asarray(scale)
    reference.weight.data = torch.tensor(scale)
    expected = reference(torch.tensor(x)).detach().numpy()
    found = ours(jnp.asarray(x), choose_operations(None))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_gradients_of_rms_norm(on_mesh):
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((2, 3, 7, 48)).astype(np.float32)
    x[1, 2] *= 1e-2  # where epsilon counts
    scale = rng.standard_normal(48).astype(np.float32)
    reference = Qwen2RMSNorm(48, 1e-3)
    reference.weight.data = torch.tensor(scale)
    of_torch = torch.tensor(x, requires_grad=True)
    reference(of_torch).backward(torch.tensor(grad))
    expected = of_torch.grad.numpy(), reference.weight.grad.numpy()

    mesh = jax.make_mesh((1, 1), ("data", "tensor")) if on_mesh else None
    graph = nnx.graphdef(RMSNorm(48, 1e-3))

    def apply(x, scale):
        return nnx.merge(graph, {"scale": scale})(x, choose_operations(mesh))

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        given = (jnp.asarray(a, dtype) for a in (x, scale))
        _, backward = jax.vjp(apply, *given)
        for ours, theirs in zip(
            backward(jnp.asarray(grad, dtype)), expected, strict=True
        ):
            assert ours.dtype == dtype
            error = np.abs(np.asarray(ours, np.float32) - theirs).max()
            assert error <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_rope(tiny_hf, theta, head_dim):
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_hf(rope_theta=theta, head_dim=head_dim)
    ).config
    reference = Qwen2RotaryEmbedding(hf)
    frequencies = rope_frequencies(head_dim, theta)
    # The power function of torch is itself off by a last bit here and there. Near 1,
    # where that would show, it is not; a plain float32 power is off by 2e-3 radians.
    radians = 32767 * np.abs(frequencies - reference.inv_freq.numpy()).max()
    assert radians <= 2e-6
    positions = np.array([[0, 1, 255, 257, 32766, 32767]], np.int32)
    cos, sin = reference(torch.zeros(1), torch.tensor(positions))
    ours = rope_angles(jnp.asarray(positions), frequencies)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        half = theirs.numpy()[:, None, :, : head_dim // 2]
        np.testing.assert_allclose(mine, half, atol=2e-6)


@pytest.mark.parametrize("splits", [[13], [1] * 13, [5, 3, 5], [8, 1, 4], [7, 2, 1, 3]])
def test_prefill_and_decode_are_one_forward(tiny_hf, splits, monkeypatch):
    """Whatever the pieces, also where they start or end at an edge of a block of 4."""
    set_everywhere(monkeypatch, "BLOCK_LEN", 4)
    loaded = load_model(str(tiny_hf()), dtype="float32")
    tokens, positions = tokens_and_positions(loaded.config)
    hidden, _ = forward(loaded.config, loaded.read_params(), tokens, positions)
    cache = init_cache(loaded.config, 3, 20, jnp.float32)
    pieces, start = [], 0
    for length in splits:
        part = np.s_[:, start : start + length]
        piece, cache = forward(
            loaded.config, loaded.read_params(), tokens[part], positions[part], cache
        )
        pieces.append(piece)
        start += length
    ours = np.concatenate(pieces, axis=1)
    assert difference(ours, np.asarray(hidden)) <= TOLERANCE


def test_rows_of_different_lengths_do_not_see_each_other(tiny_hf, monkeypatch):
    """A row is the same to the bit, however far the others are."""
    set_everywhere(monkeypatch, "BLOCK_LEN", 4)
    loaded = load_model(str(tiny_hf()), dtype="float32")
    tokens, positions = tokens_and_positions(loaded.config, rows=2)

    def last(second_row_at: int):
        cache = init_cache(loaded.config, 2, 64, jnp.float32)
        at = positions + jnp.array([[0], [second_row_at]], jnp.int32)
        hidden, _ = forward(loaded.config, loaded.read_params(), tokens, at, cache)
        return np.asarray(hidden[0])

    np.testing.assert_array_equal(last(0), last(40))


def test_later_tokens_change_nothing_before_them(tiny_hf):
    loaded = load_model(str(tiny_hf()), dtype="float32")
    tokens, positions = tokens_and_positions(loaded.config)
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 1) % loaded.config.vocab_size)
    before = our_logits(loaded, tokens, positions)
    after = our_logits(loaded, changed, positions)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).any(axis=-1).all()


@pytest.mark.parametrize(
    "length", [2, 128, 129, 300, pytest.param(1100, marks=pytest.mark.slow)]
)
def test_causal_attention_and_its_gradients_are_those_of_torch(length):
    # 1,100 queries are 8 parts of 138 (the last of 134), 300 are 3 of 128 (of 44).
    rng = np.random.default_rng(length)
    shapes = [(2, heads, length, 6) for heads in (6, 2, 2, 6)]
    q, k, v, seen = (rng.standard_normal(shape, np.float32) for shape in shapes)
    ours, pull = jax.vjp(causal_attention, *map(jnp.asarray, (q, k, v)))
    inputs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, enable_gqa=True
    )
    theirs.backward(torch.tensor(seen))
    assert difference(np.asarray(ours), theirs.detach().numpy()) <= TOLERANCE
    for gradient, x in zip(pull(jnp.asarray(seen)), inputs, strict=True):
        assert difference(np.asarray(gradient), x.grad.numpy()) <= TOLERANCE


def test_remat_changes_no_value_and_no_gradient(tiny_hf):
    loaded = load_model(str(tiny_hf()), dtype="float32")
    tokens, positions = tokens_and_positions(loaded.config)

    def loss(params, remat):
        hidden, _ = forward(loaded.config, params, tokens, positions, remat=remat)
        return jnp.square(unembed(loaded.config, params, hidden)).mean()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, again = grad(loaded.read_params(), False), grad(loaded.read_params(), True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert difference(np.asarray(b), np.asarray(a)) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(7, 12, 20), (300, 24, 9), (1, 8, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_for_cpus_has_the_gradients_of_a_product(sizes, dtype):
    rows, inner, outer = sizes
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (rows, inner)).astype(dtype)
    kernel = jax.random.normal(keys[1], (inner, outer)).astype(dtype)
    grad = jax.random.normal(keys[2], (rows, outer)).astype(dtype)
    y, backward = jax.vjp(product_on_cpu, x, kernel)
    wide = [np.asarray(array, np.float64) for array in (x, kernel, grad)]
    expected = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
    scale = 1e-6 if dtype == "float32" else 1e-2
    for ours, reference in zip((y, *backward(grad)), expected, strict=True):
        assert ours.dtype == dtype
        size = np.abs(reference).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), reference, atol=scale * size
        )
