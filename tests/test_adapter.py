"""Adapters (LoRA): products and gradients, training, sampling, files."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from conftest import run_on_devices
from jax.sharding import NamedSharding, PartitionSpec
from test_grpo import (
    KEEP,
    TEMPERATURE,
    assert_close,
    batch_of,
    make_completions,
    settings,
)
from test_grpo import gradients as gradients_of_all
from transformers import AutoModelForCausalLM

from e1jax import Engine, SamplingParams
from e1jax.checkpoint.load import LoadedModel, load_model
from e1jax.checkpoint.params import named_leaves
from e1jax.checkpoint.runs import abstract_state
from e1jax.config.adapter import TARGETS, AdapterConfig
from e1jax.config.model import ModelConfig
from e1jax.grpo.learner import make_logprobs, make_update
from e1jax.grpo.rollouts import Batch
from e1jax.nn.lora import PARTS
from e1jax.nn.model import (
    abstract_adapter,
    abstract_params,
    forward,
    init_adapter,
    init_params,
    unembed,
)
from e1jax.nn.quantize import int8_on_host, is_packed
from e1jax.sharding.mesh import make_mesh
from e1jax.training import Frozen, make_optimizer, trained_shapes

ONE = "data=1,tensor=1"
THREE = AdapterConfig(3, 7.0)


@pytest.fixture(scope="module")
def small(tiny_hf) -> Path:
    return tiny_hf(hidden_size=16, intermediate_size=24, head_dim=6)


@pytest.fixture(scope="module")
def loaded(small) -> LoadedModel:
    return load_model(str(small), ONE, "float32")


@pytest.fixture(scope="module")
def completions(small, loaded):
    return make_completions(small, loaded.config.vocab_size)


def drawn(adapter: AdapterConfig, loaded: LoadedModel, seed: int = 0):
    """An adapter of which B is not 0 either."""
    shapes = abstract_adapter(loaded.config, adapter, loaded.mesh, jnp.float32)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves]
    placed = [
        jax.device_put(x, s.sharding) for x, s in zip(arrays, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def merged(params, pairs, scale):
    """The model whose kernels are W + scale A B, in float64 and then float32."""
    layers = jax.tree.map(lambda x: x, params["layers"])
    for part, linears in pairs.items():
        for name, pair in linears.items():
            a, b = (np.asarray(pair[key], np.float64) for key in "ab")
            kernel = np.asarray(layers[part][name]["kernel"], np.float64)
            layers[part][name]["kernel"] = jnp.asarray(
                (kernel + scale * a @ b).astype(np.float32)
            )
    return params | {"layers": layers}


def logits_of(config, params, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    hidden, _ = forward(config, params, jnp.asarray(tokens, jnp.int32), positions)
    return unembed(config, params, hidden)


def random_tokens(config, shape=(3, 11)):
    return np.random.default_rng(1).integers(0, config.vocab_size, shape)


# Against peft, the reference.


def peft_model(path: Path, adapter: AdapterConfig, **options):
    """peft's, with random A and B."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    modules = [f"{name}_proj" for name in adapter.targets]
    settings = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=modules, **options
    )
    model = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def of_peft(model, name: str, which: str, grad: bool = False) -> np.ndarray:
    """A or B of all layers, as we have them; or their gradients."""
    layers = []
    for key, parameter in model.named_parameters():
        if f".{name}_proj.lora_{which.upper()}." in key:
            layers.append((parameter.grad if grad else parameter.data).numpy().T)
    return np.stack(layers)


@pytest.mark.parametrize(
    ("adapter", "model"),
    [
        (AdapterConfig(3, 7.0), {}),
        (AdapterConfig(1, 16.0, ("q", "v")), {"tied": True}),
        (AdapterConfig(5, 2.0, ("o", "down")), {"architecture": "qwen3"}),
        (AdapterConfig(3, 3.0, ("k", "gate", "up")), {}),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_peft(adapter, model, tiny_hf, tmp_path):
    path = tiny_hf(hidden_size=20, intermediate_size=28, head_dim=6, **model)
    theirs = peft_model(path, adapter)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(path), ONE, "float32", adapter=str(tmp_path))
    config = ours.config
    tokens = random_tokens(config)
    weights = np.random.default_rng(2).normal(size=(3, 11, config.vocab_size))

    logits = theirs(torch.from_numpy(tokens)).logits
    (logits * torch.from_numpy(weights.astype(np.float32))).sum().backward()
    assert_close(logits_of(config, ours.read_params(), tokens), logits.detach(), 1e-5)
    plain = load_model(str(path), ONE, "float32").read_params()
    untrained = logits_of(config, plain, tokens)
    assert np.abs(untrained - logits.detach().numpy()).max() > 0.1

    pairs = {}
    for name in adapter.targets:
        pair = {which: jnp.asarray(of_peft(theirs, name, which)) for which in "ab"}
        pairs.setdefault(PARTS[name], {})[name] = pair

    def loss(pairs):
        params = Frozen(plain, adapter.scale).join(plain, pairs)
        return (logits_of(config, params, tokens) * weights.astype(np.float32)).sum()

    grads = jax.grad(loss)(pairs)
    for name in adapter.targets:
        for which in "ab":
            grad = grads[PARTS[name]][name][which]
            assert_close(grad, of_peft(theirs, name, which, grad=True), 1e-4, name)


def test_rank_stabilised_scaling_is_read(tiny_hf, tmp_path):
    theirs = peft_model(tiny_hf(), AdapterConfig(9, 6.0, ("q",)), use_rslora=True)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tiny_hf()), ONE, "float32", adapter=str(tmp_path))
    tokens = random_tokens(ours.config)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits
    assert_close(logits_of(ours.config, ours.read_params(), tokens), expected, 1e-5)


def test_initialisation_is_that_of_peft(loaded):
    """A uniform within 1 / sqrt(inputs), B zero; other targets change nothing."""
    wide = ModelConfig(64, 400, 900, 2, 4, 2, 100, 64, 1e4)
    mesh = make_mesh(ONE, wide, jax.devices()[:1])
    few = AdapterConfig(16, targets=("down", "q"))
    made, other = (
        init_adapter(abstract_adapter(wide, adapter, mesh, jnp.float32), 3)
        for adapter in (AdapterConfig(16), few)
    )
    assert named_leaves(made).keys() == {
        f"{PARTS[name]}/{name}/{which}" for name in TARGETS for which in "ab"
    }
    for name, array in named_leaves(made).items():
        if name.endswith("b"):
            assert not array.any()
            continue
        bound = array.shape[1] ** -0.5
        assert 0.99 * bound < abs(array).max() <= bound
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    for name, array in named_leaves(other).items():
        np.testing.assert_array_equal(array, named_leaves(made)[name])
    q, k = made["attention"]["q"]["a"], made["attention"]["k"]["a"]
    assert not np.array_equal(q, k) and not np.array_equal(q[0], q[1])
    torch_layer = torch.nn.Linear(400, 16)
    torch.nn.init.kaiming_uniform_(torch_layer.weight, a=5**0.5)
    assert torch_layer.weight.std().item() == pytest.approx(q.std().item(), rel=0.05)


# An update.


def update_of(config, adapter, loaded, dtype="float32", base=None):
    """Gradients of an update of the adapter beside `base`, and its metrics."""
    config = dataclasses.replace(config, adapter=adapter)
    frozen, shapes = trained_shapes(adapter, loaded)
    shardings = jax.tree.map(lambda s: s.sharding, (shapes, shapes))
    update = make_update(
        config,
        loaded.config,
        KEEP,
        dtype,
        shardings,
        longest_response=9,
        frozen=frozen,
    )
    pairs = drawn(adapter, loaded)
    base = loaded.read_params() if base is None else base

    def call(batch):
        params = jax.tree.map(jnp.copy, pairs)
        scalars = False, jnp.float32(TEMPERATURE), None
        _, grads, metrics = update(params, KEEP.init(params), batch, *scalars, base)
        return grads, metrics

    return call, pairs


@pytest.mark.parametrize("remat", [False, True])
def test_an_update_is_that_of_the_merged_model(remat, loaded, completions):
    """By the chain rule: the gradients of A and B follow from the kernel's, which the
    update of all parameters gives, and which test_grpo compares with torch."""
    config = settings(entropy_coef=0.3, remat=remat)
    batch = batch_of(config, completions)
    call, pairs = update_of(config, THREE, loaded)
    grads, metrics = call(batch)

    whole = dataclasses.replace(loaded)
    params = merged(loaded.read_params(), pairs, 7 / 3)
    object.__setattr__(whole, "read_params", lambda: params)
    of_kernels, expected = gradients_of_all(config, whole, batch)
    for part, linears in pairs.items():
        for name, pair in linears.items():
            a, b = np.asarray(pair["a"]), np.asarray(pair["b"])
            kernel = np.asarray(of_kernels["layers"][part][name]["kernel"])
            of_a, of_b = (grads[part][name][which] for which in "ab")
            assert_close(of_a, 7 / 3 * kernel @ b.swapaxes(1, 2), 1e-4, name)
            assert_close(of_b, 7 / 3 * a.swapaxes(1, 2) @ kernel, 1e-4, name)
    del metrics["grad_norm"], expected["grad_norm"]  # of other parameters
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), metrics, expected
    )


def test_nothing_else_is_trained(loaded):
    """Neither gradients nor optimizer state of the frozen parameters exist."""
    frozen, shapes = trained_shapes(AdapterConfig(2, targets=("k",)), loaded)
    assert named_leaves(shapes).keys() == {"attention/k/a", "attention/k/b"}
    optimizer = make_optimizer(settings().optimizer, 5)
    state = abstract_state(optimizer, shapes, loaded.mesh)
    sizes = {leaf.size for leaf in jax.tree.leaves(state)}
    assert sizes == {1, *(leaf.size for leaf in jax.tree.leaves(shapes))}
    assert frozen.shapes == abstract_params(loaded.config, loaded.mesh, jnp.float32)


def test_logprobs_with_the_adapter_and_of_the_reference(loaded, completions):
    config = settings()
    batch = batch_of(config, completions)._replace(ref_logprobs=None)
    frozen, shapes = trained_shapes(THREE, loaded)
    places = jax.tree.map(lambda s: s.sharding, shapes)
    pairs, base = drawn(THREE, loaded), loaded.read_params()
    args = batch, jnp.float32(TEMPERATURE)
    ours = make_logprobs(loaded.config, jnp.float32, places, 3, frozen=frozen)
    own = make_logprobs(loaded.config, frozen.dtypes, frozen.shardings, 3)
    full = merged(base, pairs, 7 / 3)
    assert_close(ours(pairs, *args, base), own(full, *args), 1e-5)
    assert np.abs(own(full, *args) - own(base, *args)).max() > 0.1


def as_float(params):
    """The parameters that int8 ones stand for."""

    def one(leaf, axis=-2):
        scale = np.expand_dims(np.asarray(leaf["scale"]), axis)
        return jnp.asarray(np.asarray(leaf["values"], np.float32) * scale)

    params = params | {"embedding": one(params["embedding"], -1)}
    return jax.tree.map(
        lambda x: one(x) if is_packed(x) else x, params, is_leaf=is_packed
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_may_be_int8(tied, tiny_hf):
    """An update and log-probabilities are those beside the values that int8 stands for."""
    path = tiny_hf(hidden_size=16, intermediate_size=24, head_dim=6, tied=tied)
    int8 = load_model(str(path), ONE, "float32", "int8")
    plain = load_model(str(path), ONE, "float32")
    config = settings()
    batch = batch_of(config, make_completions(path, plain.config.vocab_size))
    base = as_float(int8.read_params())
    rounded = np.abs(base["embedding"] - plain.read_params()["embedding"])
    assert rounded.max() > 1e-3
    (ours, metrics), (theirs, expected) = (
        update_of(config, THREE, model, base=base)[0](batch)
        for model, base in ((int8, None), (plain, base))
    )
    jax.tree.map(
        lambda x, y: assert_close(x, y, 1e-4), (ours, metrics), (theirs, expected)
    )


SIZES = ModelConfig(512, 16, 24, 2, 4, 2, 6, 64, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "int8"])
def test_eight_devices_update_as_one(form):
    run_on_devices(8, f"import test_adapter; test_adapter.update_on_meshes({form!r})")


def update_on_meshes(form) -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 512, (2, 8, 30), dtype=np.int32)
    for first in (0, 4):  # four responses to a prompt
        tokens[:, first : first + 4, :6] = tokens[:, first : first + 1, :6]
    batch = Batch(
        tokens,
        rng.integers(1, 7, (2, 2), dtype=np.int32).repeat(4, axis=1),
        rng.normal(size=(2, 8)).astype(np.float32),
        np.arange(24) < rng.integers(1, 24, (2, 8, 1)),
        *rng.normal(-8, 1, (2, 2, 8, 24)).astype(np.float32),
    )
    config = dataclasses.replace(settings(microbatch=8, samples=4), adapter=THREE)
    expected = None
    for text, count in ((ONE, 1), ("data=4,tensor=2", 8)):
        mesh = make_mesh(text, SIZES, jax.devices()[:count])
        base = init_params(SIZES, mesh, jnp.float32, 0)
        base = jax.tree.map(lambda p: 5 * p, base)
        shapes = abstract_params(SIZES, mesh, jnp.float32, form)
        if form:
            base = quantized(base, shapes)
        pairs = abstract_adapter(SIZES, THREE, mesh, jnp.float32)
        frozen = Frozen(shapes, THREE.scale)
        shardings = jax.tree.map(lambda s: s.sharding, (pairs, pairs))
        update = make_update(
            config,
            SIZES,
            KEEP,
            jnp.float32,
            shardings,
            longest_response=9,
            frozen=frozen,
        )
        params = jax.tree.map(lambda x: x + 0.01, init_adapter(pairs, 0))
        params = jax.device_put(params, shardings[0])
        rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
        scalars = False, jnp.float32(0.7), None
        kept = jax.device_put(KEEP.init(params), shardings[1])
        new, grads, metrics = update(params, kept, rows, *scalars, base)
        assert jax.tree.map(lambda x: x.sharding, (new, grads)) == shardings
        ours = jax.device_get((grads, metrics))
        expected = expected or ours
        jax.tree.map(lambda x, y: assert_close(x, y, 1e-4), ours, expected)


def quantized(params, shapes):
    """As int8, where `shapes` says."""

    def one(leaf, like, axis=-2):
        if not isinstance(like, dict):
            return leaf
        parts = zip(
            ("values", "scale"), int8_on_host(np.asarray(leaf), axis), strict=True
        )
        return {key: jax.device_put(x, like[key].sharding) for key, x in parts}

    embedding = one(params["embedding"], shapes["embedding"], -1)
    return jax.tree.map(one, params, shapes) | {"embedding": embedding}


# Sampling.


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("float32", "int8")]
)
def test_sampling_has_the_adapter_beside_the_weights(
    dtype, quantize, tiny_hf, tmp_path
):
    """The engine's log-probabilities are those of a forward pass with the adapter."""
    path = str(tiny_hf())
    peft_model(Path(path), THREE).save_pretrained(tmp_path)
    engine = Engine.from_pretrained(
        path,
        adapter=str(tmp_path),
        mesh=ONE,
        dtype=dtype,
        quantize=quantize,
        kv_dtype="float32",  # or a cache of bfloat16 would round more than anything else
        cache_len=64,
        slots=3,
    )
    request = SamplingParams(8, 6, n=2, temperature=1.0, seed=1)
    groups = engine.generate(["1+1?", "a longer prompt"], request)
    results = [completion for group in groups for completion in group]
    tokens = np.zeros((len(results), 64), np.int32)
    for row, c in zip(tokens, results, strict=True):
        row[: len(c.prompt_ids + c.token_ids)] = c.prompt_ids + c.token_ids

    def logprobs(loaded):
        # On a CPU, the engine computes in float32, also from weights in bfloat16.
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
            loaded.read_params(),
        )
        values = jax.nn.log_softmax(logits_of(loaded.config, wide, tokens))
        values = np.take_along_axis(values[:, :-1], tokens[:, 1:, None], axis=-1)
        return [
            row[len(c.prompt_ids) - 1 :][: len(c.token_ids), 0]
            for row, c in zip(values, results, strict=True)
        ]

    adapted = load_model(path, ONE, dtype, quantize, adapter=str(tmp_path))
    for c, expected in zip(results, logprobs(adapted), strict=True):
        np.testing.assert_allclose(c.logprobs, expected, atol=1e-3)
    for c, other in zip(
        results, logprobs(load_model(path, ONE, dtype, quantize)), strict=True
    ):
        assert np.abs(np.subtract(c.logprobs, other)).max() > 0.1
