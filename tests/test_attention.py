"""Causal attention: values and gradients against a plain computation in NumPy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_on_devices, set_everywhere
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh

from e1jax.nn.attention import cached_attention, causal_attention
from e1jax.nn.cache import KVCache, sequence_shards
from e1jax.nn.cache import write as write_cache
from e1jax.nn.kernels.decode_attention import decode_attention, live_blocks
from e1jax.nn.kernels.gpu_flash import gpu_flash_attention
from e1jax.nn.kernels.splash import splash_attention


def plain(q, k, v):
    """[B, H, T, C] of float64, by the definition, without any trick."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    length = q.shape[2]
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights @ v


def plain_gradients(q, k, v, grad):
    """Of sum(grad * result), by the chain rule."""
    group, scale = q.shape[1] // k.shape[1], 1 / np.sqrt(q.shape[-1])
    weights, _ = plain(q, k, v)
    wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (k, v))
    grad_weights = grad @ wide_v.swapaxes(2, 3)
    mean = (grad_weights * weights).sum(axis=-1, keepdims=True)
    grad_scores = weights * (grad_weights - mean) * scale

    def of_groups(x):
        batch, _, length, size = x.shape
        return x.reshape(batch, k.shape[1], group, length, size).sum(axis=2)

    return (
        grad_scores @ wide_k,
        of_groups(grad_scores.swapaxes(2, 3) @ q),
        of_groups(weights.swapaxes(2, 3) @ grad),
    )


def arrays(batch, heads, kv_heads, length, size, dtype):
    """q, k, v and a gradient, as `dtype` and exactly so as float64."""
    rng = np.random.default_rng(length)
    shapes = [(batch, n, length, size) for n in (heads, kv_heads, kv_heads, heads)]
    given = [jnp.asarray(3 * rng.normal(size=shape), dtype) for shape in shapes]
    return given, [np.asarray(x.astype(jnp.float32), np.float64) for x in given]


def check(function, given, exact, rtol):
    result, backward = jax.vjp(jax.jit(function), *given[:3])
    found = (result, *backward(given[3]))
    expected = (plain(*exact[:3])[1], *plain_gradients(*exact))
    scale = max(np.abs(x).max() for x in (*exact, *expected))
    for name, ours, theirs in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert ours.dtype == given[0].dtype and ours.shape == theirs.shape
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        assert error.max() <= rtol * scale, name


@pytest.mark.parametrize("length", [1, 7, 129, 300, 1037])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2)])
def test_values_and_gradients_in_float32(heads, kv_heads, length):
    given, exact = arrays(2, heads, kv_heads, length, 20, jnp.float32)
    check(causal_attention, given, exact, 1e-5)


def one_device() -> Mesh:
    grid = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def splash(*args, **options):
    """The kernel of TPUs, interpreted."""
    attend = functools.partial(splash_attention, mesh=one_device(), interpret=True)
    return jax.jit(attend)(*args, **options)


def flash(*args, implementation="xla", **options):
    """The form of GPUs, with XLA's operations for those of cuDNN."""
    attend = functools.partial(
        gpu_flash_attention, mesh=one_device(), implementation=implementation
    )
    return jax.jit(attend)(*args, **options)


@pytest.mark.parametrize(
    ("before", "length", "attend"),
    [
        *((b, n, causal_attention) for b, n in ((150, 200), (3, 1), (40, 129))),
        *((b, n, splash) for b, n in ((150, 200), (3, 1), (600, 515))),
        *((b, n, flash) for b, n in ((150, 200), (3, 1))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_queries_that_follow_a_prompt(before, length, attend):
    """What lies between a row's prompt and its response is not seen, whatever it is."""
    total, prompt_len = before + length, [before, before // 2]
    is_hidden = jnp.arange(total)[None] >= jnp.array(prompt_len)[:, None]
    segments = (is_hidden & (jnp.arange(total) < before)[None]).astype(jnp.int32)
    is_kernel = attend in (splash, flash)
    dtype, size = (jnp.bfloat16, 128) if is_kernel else (jnp.float32, 20)
    tolerance = 4e-2 if is_kernel else 1e-5  # scaled queries are rounded to 8 bits
    given, exact = arrays(2, 6, 2, total, size, dtype)
    given = [x.at[1, :, before // 2 : before].set(1e4) for x in given]
    q, k, v, grad = given
    ours, backward = jax.vjp(
        lambda *x: attend(*x, segments=segments),
        *(q[:, :, before:], k, v),
    )
    found = (ours, *backward(grad[:, :, before:]))
    for row, prompt in enumerate(prompt_len):
        seen = np.r_[:prompt, before:total]
        alone = [x[row : row + 1, :, seen] for x in exact]
        alone[3][:, :, :prompt] = 0
        expected = [plain(*alone[:3])[1], *plain_gradients(*alone)]
        scale = max(np.abs(x).max() for x in expected)
        for name, x, y in zip(("out", "q", "k", "v"), found, expected, strict=True):
            after = name in ("out", "q")
            x, y = (x[row], y[0, :, prompt:]) if after else (x[row][:, seen], y[0])
            error = np.abs(np.asarray(x, np.float64) - y)
            assert error.max() <= tolerance * scale, name
    assert not any(x[1, :, before // 2 : before].any() for x in found[2:])


@pytest.mark.parametrize(
    ("lengths", "attend"),
    [
        *((n, causal_attention) for n in ([3, 1, 200], [150, 130, 1, 76])),
        *((n, splash) for n in ([3, 1, 200], [515, 1, 130])),
        ([3, 1, 200], flash),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sequences_of_one_row_do_not_see_each_other(lengths, attend):
    """Each is as it were alone, in the second row with another order of lengths."""
    is_kernel = attend in (splash, flash)
    dtype, size = (jnp.bfloat16, 128) if is_kernel else (jnp.float32, 20)
    tolerance = 4e-2 if is_kernel else 1e-5  # scaled queries are rounded to 8 bits
    given, exact = arrays(2, 6, 2, sum(lengths), size, dtype)
    rows = lengths, lengths[::-1]
    numbers = np.stack([np.repeat(np.arange(len(n)), n) for n in rows])
    segments = jnp.asarray(numbers, jnp.int32)
    *heads, grad = given
    ours, backward = jax.vjp(lambda *x: attend(*x, segments=segments), *heads)
    found = (ours, *backward(grad))
    for row, number in ((r, n) for r in (0, 1) for n in range(len(lengths))):
        own = numbers[row] == number
        alone = [x[row : row + 1, :, own] for x in exact]
        expected = [plain(*alone[:3])[1], *plain_gradients(*alone)]
        scale = max(np.abs(x).max() for x in (*alone, *expected))
        for name, x, y in zip(("out", "q", "k", "v"), found, expected, strict=True):
            error = np.abs(np.asarray(x[row][:, own], np.float64) - y[0])
            assert error.max() <= tolerance * scale, name


@pytest.mark.cpu
def test_gradients_of_one_query_after_others():
    """XLA (jax 0.10.2) aborts the process where this is compiled as it stands."""
    (q, k, v, grad), exact = arrays(3, 4, 2, 21, 16, jnp.float32)

    def total(q, k, v):
        return (causal_attention(q, k, v) * grad[:, :, 20:]).sum()

    ours = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q[:, :, 20:], k, v)
    exact[3][:, :, :20] = 0
    expected = plain_gradients(*exact)
    for x, y in zip(ours, (expected[0][:, :, 20:], *expected[1:]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def on_two_tensor_places():
    """Rows over `data` and heads over `tensor`, two places each, give the values of one
    device; run in its own process."""
    grid = np.array(jax.devices()).reshape(2, 2)
    mesh = Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    (q, k, v, _), _ = arrays(2, 4, 2, 384, 128, jnp.float32)
    is_hidden = jnp.arange(256)[None] >= jnp.array([[256], [100]])
    segments = jnp.pad(is_hidden.astype(jnp.int32), ((0, 0), (0, 128)))
    for attend in (
        functools.partial(splash_attention, interpret=True),
        functools.partial(gpu_flash_attention, implementation="xla"),
    ):
        ours, expected = (
            jax.jit(functools.partial(attend, mesh=m))(q[:, :, 256:], k, v, segments)
            for m in (mesh, one_device())
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_hidden_keys_where_heads_are_divided():
    run_on_devices(4, "import test_attention as t\nt.on_two_tensor_places()")


def test_values_and_gradients_in_bfloat16():
    given, exact = arrays(2, 6, 2, 300, 20, jnp.bfloat16)
    check(causal_attention, given, exact, 2e-2)


def test_gradients_keep_all_digits_of_float32_where_products_would_not():
    """The precision that is set around the forward pass does not reach the backward."""
    x = jnp.ones((1, 2, 5, 20))

    def backward(q):
        return jax.grad(lambda q: causal_attention(q, x, x).sum())(q)

    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(backward)(x))
    products = text.count("dot_general[")
    assert products >= 6 and text.count("Precision.HIGHEST") == 2 * products


@pytest.mark.cpu
@pytest.mark.parametrize("heads, length", [((6, 2), 5), ((6, 2), 128), ((3, 1), 700)])
def test_splash_attention(heads, length):
    """On a mesh and inside a shard_map over `data`."""
    given, exact = arrays(2, *heads, length, 128, jnp.bfloat16)
    rows = jax.sharding.PartitionSpec("data")
    inside = jax.shard_map(
        splash,
        mesh=one_device(),
        in_specs=(rows,) * 3,
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
    )
    check(splash, given, exact, 2e-2)
    check(inside, given, exact, 2e-2)


def test_flash_attention():
    """On a mesh; what is not of cuDNN."""
    check(flash, *arrays(2, 6, 2, 300, 128, jnp.bfloat16), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 300, 1037])
def test_flash_attention_on_a_gpu(length):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    attend = functools.partial(flash, implementation="cudnn")
    check(attend, *arrays(2, 6, 2, length, 128, jnp.bfloat16), 2e-2)


@pytest.mark.cpu
@pytest.mark.parametrize("shards, rows", [(3, 2), (8, 1)])
def test_rows_that_lie_in_shards(shards, rows, monkeypatch):
    """Where every position goes is stated here by a loop over positions. By the XLA
    version and by the kernel, whose blocks are others."""
    set_everywhere(monkeypatch, "BLOCK_LEN", 4)
    set_everywhere(monkeypatch, "TPU_BLOCK_LEN", 8)
    rng = np.random.default_rng(shards)
    whole = rng.normal(size=(2, 2, rows, 2, 56, 8)).astype(np.float32)  # keys, values
    q = rng.normal(size=(rows, 6, 1, 8)).astype(np.float32)
    capacity = 4 * -(-56 // (4 * shards))
    layer = jnp.int32(1)
    write, attend = jax.jit(write_cache), jax.jit(cached_attention)
    cache = KVCache(*jnp.zeros((2, 2, shards * rows, 2, capacity, 8)))
    expected = np.zeros(cache.k.shape, np.float32), np.zeros(cache.k.shape, np.float32)
    for step in range(53):  # rows of different lengths, one step after the other
        at = np.maximum(0, step - 5 * np.arange(rows))[:, None].astype(np.int32)
        new = [side[1, np.arange(rows), :, at[:, 0], None] for side in whole]
        for row, position in enumerate(at[:, 0]):
            shard, index = (
                position // 4 % shards,
                position // 4 // shards * 4 + position % 4,
            )
            for side, rows_new in zip(expected, new, strict=True):
                side[1, shard * rows + row, :, index] = rows_new[row, :, 0]
        last, write_positions = sequence_shards(jnp.asarray(at), shards, capacity)
        cache = write(cache, layer, *map(jnp.asarray, new), write_positions)
        if step in (0, 3, 4, 11, 12, 13, 37, 52):
            found = attend(jnp.asarray(q), cache.k, cache.v, layer, last)
            wanted = attend(*map(jnp.asarray, (q, *whole)), layer, jnp.asarray(at))
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            visits = live_blocks(last, capacity)
            with pltpu.force_tpu_interpret_mode(True):
                found = decode_attention(
                    jnp.asarray(q), cache.k, cache.v, layer, last, visits
                )
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(cache.k, expected[0])
    np.testing.assert_array_equal(cache.v, expected[1])
