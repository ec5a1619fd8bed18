"""GRPO: its maths against NumPy and torch, its update against a whole one in torch."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import AS_USERS_HAVE_IT, set_everywhere, several_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from transformers import AutoModelForCausalLM

from e1jax.checkpoint.load import load_model
from e1jax.checkpoint.params import named_leaves
from e1jax.checkpoint.runs import abstract_state
from e1jax.config.architectures import ARCHITECTURES
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.training import (
    AdamWConfig,
    GRPOConfig,
    LossConfig,
    RolloutConfig,
    UpdateConfig,
)
from e1jax.grpo import rollouts as grpo_rollouts
from e1jax.grpo.learner import grpo_loss, make_logprobs, make_update
from e1jax.grpo.logprobs import chunked_logprobs, response_logprobs
from e1jax.grpo.loss import SURROGATES, group_advantages, policy_loss
from e1jax.grpo.rollouts import Batch, Rollouts, make_batch, padded_lengths
from e1jax.nn import paths
from e1jax.nn.chunks import CHUNK_TOKENS
from e1jax.nn.kernels.splash import splash_attention
from e1jax.nn.model import abstract_params, forward, init_params, unembed
from e1jax.sampling.completion import Completion
from e1jax.sharding.mesh import make_mesh
from e1jax.training import make_optimizer

# Sums of float32 in another order, relative to the largest number among them.
TOLERANCE = 1e-5


def assert_close(ours, reference, tolerance=TOLERANCE, name=""):
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, name
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max(), name


# Advantages and loss.


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("prompts", "samples"), [(1, 2), (5, 3), (3, 17)])
def test_advantages_are_those_of_numpy(prompts, samples, scale):
    rewards = np.random.default_rng(samples).normal(2, 3, (prompts, samples))
    rewards[0] = np.arange(samples) == 1
    rewards[-1] = 1e-6 * np.arange(samples)  # no larger than the 1e-6 in the quotient
    advantages = group_advantages(rewards.astype(np.float32), scale=scale)
    for ours, group in zip(advantages, rewards, strict=True):
        mean = sum(group) / samples
        variance = sum((reward - mean) ** 2 for reward in group) / (samples - 1)
        divisor = variance**0.5 + 1e-6 if scale else 1
        np.testing.assert_allclose(
            ours, (group - mean) / divisor, rtol=1e-4, atol=1e-5 / divisor
        )
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("samples", [2, 3, 7, 16, 41, 97])
def test_equal_rewards_are_no_advantage(samples, scale):
    rewards = np.repeat(np.float32([[0], [1], [0.1], [-2.7], [1e6]]), samples, axis=1)
    advantages = group_advantages(rewards, scale=scale)
    np.testing.assert_array_equal(advantages, 0 * rewards)


def test_one_response_is_no_group():
    with pytest.raises(UserError, match=r"\[7, 1\].*2 or more responses a prompt"):
        group_advantages(np.zeros((7, 1), np.float32))


def torch_loss(
    rows,
    advantages,
    *,
    clip="ppo",
    clip_low=0.2,
    clip_high=0.2,
    max_ratio=None,
    kl_coef=0.001,
    aggregate="token",
):
    """The formulas, token by token. `rows` holds, for each response, the logprob under
    the policy, the old policy and the reference, of every token that counts."""
    responses = []
    for tokens, advantage in zip(rows, advantages, strict=True):
        responses.append([])
        for logprob, old, ref in tokens:
            ratio = torch.exp(logprob - old)
            if max_ratio is not None and ratio > max_ratio:
                ratio = max_ratio * torch.exp(logprob - logprob.detach())
            bounded = ratio
            if clip == "ppo" and advantage > 0 and ratio > 1 + clip_high:
                bounded = torch.tensor(1 + clip_high)
            if clip == "ppo" and advantage < 0 and ratio < 1 - clip_low:
                bounded = torch.tensor(1 - clip_low)
            kl = torch.exp(ref - logprob) - (ref - logprob) - 1
            loss = -advantage * bounded + kl_coef * kl
            was_clipped = torch.tensor(float(bounded is not ratio))
            responses[-1].append(torch.stack([loss, kl, was_clipped, ratio]))
    responses = [torch.stack(tokens) for tokens in responses if tokens]
    if aggregate == "token":
        means = torch.cat(responses).mean(dim=0)
    else:
        means = torch.stack([tokens.mean(dim=0) for tokens in responses]).mean(dim=0)
    return means[0], dict(zip(["kl", "clip_fraction", "ratio"], means[1:], strict=True))


def loss_and_grads(*arrays, **options):
    """((loss, metrics), gradient with respect to the policy's logprobs)."""
    loss = functools.partial(policy_loss, **options)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(*arrays)


LOW, HIGH, CAP = 0.1, 0.3, 1.6


@pytest.fixture(scope="module")
def arrays():
    """(logprobs, old, ref, advantages, mask) [9, 11], in which every case comes up."""
    rng = np.random.default_rng(0)
    logprobs = rng.normal(-2, 1, (9, 11)).astype(np.float32)
    old = logprobs + rng.normal(0, 0.5, (9, 11)).astype(np.float32)
    ref = logprobs + rng.normal(0, 0.8, (9, 11)).astype(np.float32)
    advantages = np.float32([1.3, -0.4, 2.0, 0.7, -1.1, -3.0, 0.0, 0.5, -2.5])
    mask = rng.random((9, 11)) < 0.7
    mask[2] = False
    mask[3, 1:] = False
    edges = [0, 1 - LOW, 1 + HIGH, CAP, np.inf]
    for rows in (advantages > 0, advantages < 0):
        ratios = np.exp(logprobs - old)[rows][mask[rows]]
        assert np.histogram(ratios, edges)[0].min() > 0
    return logprobs, old, ref, advantages, mask


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("clip", ["ppo", "none"])
@pytest.mark.parametrize("max_ratio", [None, CAP])
def test_loss_and_its_gradient_are_those_of_torch(arrays, aggregate, clip, max_ratio):
    logprobs, old, ref, advantages, mask = arrays
    options = {"clip": clip, "clip_low": LOW, "clip_high": HIGH, "max_ratio": max_ratio}
    options |= {"kl_coef": 0.3, "aggregate": aggregate}
    leaf, *others = (torch.from_numpy(x).double() for x in (logprobs, old, ref))
    leaf.requires_grad_()
    rows = [
        [(leaf[b, r], *(x[b, r] for x in others)) for r in range(11) if mask[b, r]]
        for b in range(9)
    ]
    expected, expected_metrics = torch_loss(rows, advantages.tolist(), **options)
    expected.backward()

    (loss, metrics), grads = loss_and_grads(*arrays, **options)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_close(grads, leaf.grad.numpy())
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name].item(), rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_gradient_is_that_of_finite_differences(arrays, aggregate):
    options = {"clip_low": LOW, "kl_coef": 0.3, "aggregate": aggregate}
    with jax.enable_x64(True):
        logprobs, *others = (jnp.asarray(array, jnp.float64) for array in arrays)

        def loss(logprobs):
            return policy_loss(jnp.asarray(logprobs), *others, **options)[0]

        check_grads(loss, (logprobs,), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("max_ratio", [None, CAP])
def test_what_is_masked_may_be_anything(arrays, max_ratio):
    *tokens, advantages, mask = arrays
    options = {"max_ratio": max_ratio, "kl_coef": 0.3, "aggregate": "sequence"}
    junk = np.resize(np.float32([np.nan, np.inf, -np.inf, 1e30, -1e30, 0]), mask.shape)
    clean = [np.where(mask, x, 0) for x in tokens]
    dirty = [np.where(mask, x, np.roll(junk, i)) for i, x in enumerate(tokens)]
    expected = loss_and_grads(*clean, advantages, mask, **options)
    for kind in (bool, np.int32, np.float32):
        ours = loss_and_grads(*dirty, advantages, mask.astype(kind), **options)
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
        assert not np.asarray(ours[1])[~mask].any()
    nothing = loss_and_grads(*dirty, advantages, 0 * mask, **options)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("clip", SURROGATES)
@pytest.mark.parametrize("gap", [88.5, 90.0, 1e30])
def test_an_infinite_ratio_without_an_advantage_is_no_term(arrays, clip, gap):
    """Value and gradient are those without these tokens, but for the number of tokens."""
    logprobs, old, _, advantages, mask = (np.copy(x) for x in arrays)
    (row,) = np.flatnonzero(advantages == 0)
    mask[row] = True
    options = {"clip": clip, "kl_coef": 0.0}
    (expected, _), expected_grads = loss_and_grads(
        logprobs, old, None, advantages, mask, **options
    )
    old[row, ::2] = logprobs[row, ::2] - gap
    (loss, metrics), grads = loss_and_grads(
        logprobs, old, None, advantages, mask, **options
    )
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(grads, expected_grads)
    assert np.isfinite(list(metrics.values())).all()
    assert clip == "gspo" or metrics["ratio"] > 1e30


def test_an_infinite_ratio_that_is_clipped_has_no_gradient():
    logprobs, old = np.float32([[0.0, -1.0]]), np.float32([[-90.0, -1.0]])
    one, mask = np.ones(1, np.float32), np.ones((1, 2), bool)
    (loss, _), grads = loss_and_grads(logprobs, old, None, one, mask, kl_coef=0.0)
    np.testing.assert_allclose(loss, -(1.2 + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(grads, [[0.0, -0.5]])
    # Where nothing is clipped, no finite number is right.
    (loss, _), _ = loss_and_grads(logprobs, old, None, -one, mask, kl_coef=0.0)
    assert loss == np.inf


@pytest.mark.parametrize("low", [0.2, 0.0])
@pytest.mark.parametrize("high", [0.2, 0.0])
def test_an_advantage_pulls_in_full_at_a_ratio_of_one(low, high):
    """As it is in the first update of a step, also where that is a bound."""
    logprobs = np.float32([[-1.5, -0.1, -7.0], [-2, -3, -4]])
    advantages = np.float32([2.5, -1.3])
    (loss, _), grads = loss_and_grads(
        *(logprobs, logprobs, None, advantages, np.ones((2, 3))),
        **{"clip_low": low, "clip_high": high, "kl_coef": 0.0},
    )
    np.testing.assert_allclose(loss, -advantages.mean(), rtol=1e-6)
    expected = np.repeat(-advantages[:, None] / 6, 3, axis=1)
    np.testing.assert_allclose(grads, expected, rtol=1e-6)


def test_the_reference_is_needed_only_where_it_counts(arrays):
    logprobs, old, _, *others = arrays
    (loss, metrics), grads = loss_and_grads(logprobs, old, None, *others, kl_coef=0.0)
    (same, measured), same_grads = loss_and_grads(*arrays, kl_coef=0.0)
    assert metrics["kl"] == 0 and measured["kl"] > 0.1 and loss == same
    np.testing.assert_array_equal(grads, same_grads)
    with pytest.raises(UserError, match=r"kl_coef=0.001 needs ref_logprobs"):
        loss_and_grads(logprobs, old, None, *others)


@pytest.mark.parametrize("option", [{"clip": "dual"}, {"aggregate": "batch"}])
def test_unknown_choices_are_refused(arrays, option):
    [(name, value)] = option.items()
    with pytest.raises(UserError, match=f"{name} must be .* or .*, not '{value}'"):
        loss_and_grads(*arrays, **option)


# Log-probabilities in chunks.


@pytest.mark.parametrize(("tied", "temperature"), [(True, 0.6), (False, 1.7)])
@pytest.mark.parametrize(("length", "chunk_len"), [(7, 3), (6, 3), (5, 1), (4, 128)])
def test_chunks_are_the_plain_log_softmax(tied, temperature, length, chunk_len):
    """Against all logits at once, and their gradients as formulas, in float64."""
    config, params, hidden, targets = head(tied, length)
    pulls = np.random.default_rng(1).normal(size=(2, 3, length)).astype(np.float32)
    kernel = params["embedding"].T if tied else params["lm_head"]["kernel"]
    wide, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    logits = wide @ kernel / np.float32(temperature)
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    is_target = np.asarray(targets)[..., None] == np.arange(19)
    logprobs = np.log(probs[is_target]).reshape(3, length)
    entropy = -(probs * np.log(probs)).sum(axis=-1)
    of_logprobs = is_target - probs
    of_entropy = -probs * (np.log(probs) + entropy[..., None])

    for entropy_grad in (True, False):

        @jax.jit
        def chunked(params, hidden, entropy_grad=entropy_grad):
            logprobs, entropy = chunked_logprobs(
                *(config, params, hidden, targets, jnp.float32(temperature)),
                **{"chunk_len": chunk_len, "entropy_grad": entropy_grad},
            )
            return (pulls[0] * logprobs + pulls[1] * entropy).sum(), (logprobs, entropy)

        (_, ours), (of_params, of_hidden) = jax.value_and_grad(
            chunked, argnums=(0, 1), has_aux=True
        )(params, hidden)
        jax.tree.map(assert_close, ours, (logprobs, entropy))
        back = pulls[0, ..., None] * of_logprobs
        back = back + entropy_grad * pulls[1, ..., None] * of_entropy
        back = back / np.float32(temperature)
        assert_close(of_hidden, back @ kernel.T)
        of_kernel = np.einsum("brd,brv->dv", wide, back)
        if tied:
            assert_close(of_params["embedding"], of_kernel.T)
        else:
            assert_close(of_params["lm_head"]["kernel"], of_kernel)
            assert not of_params["embedding"].any()


def head(tied: bool, length: int):
    """(config, params, hidden [3, R, 8], targets [3, R]) of a model without layers."""
    config = ModelConfig(19, 8, 8, 1, 1, 1, 8, 64, 1e4, tie_word_embeddings=tied)
    rng = np.random.default_rng(0)
    params = {"embedding": jnp.asarray(rng.normal(size=(19, 8)), "float32")}
    if not tied:
        kernel = jnp.asarray(rng.normal(size=(8, 19)), "float32")
        params["lm_head"] = {"kernel": kernel}
    hidden = jnp.asarray(rng.normal(size=(3, length, 8)), "float32")
    return config, params, hidden, jnp.asarray(rng.integers(0, 19, (3, length)))


def largest_array(program, operation: str = "") -> int:
    """Elements of the largest result of an operation (a pattern) in a compiled program;
    0 without any."""
    results = re.findall(rf"= (.*?) (?:{operation})[a-z-]*\(", program.as_text())
    shapes = re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", " ".join(results))
    return max((math.prod(map(int, s.split(","))) for s in shapes), default=0)


WIDE = ModelConfig(9001, 8, 8, 2, 2, 1, 4, 512, 1e4)


def program_of(logprobs_by, response_len: int):
    """The gradient, compiled, of what (params, tokens, prompt_len) give, for two
    prompts of up to 60 tokens."""
    one = make_mesh("data=1,tensor=1", WIDE, jax.devices()[:1])
    params = abstract_params(WIDE, one, jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 60 + response_len), jnp.int32)
    prompt_len = jax.ShapeDtypeStruct((2,), jnp.int32)

    def total(*arguments):
        return sum(result.sum() for result in logprobs_by(*arguments))

    lowered = jax.jit(jax.grad(total)).lower(params, tokens, prompt_len)
    return lowered.compile(AS_USERS_HAVE_IT)


def test_responses_of_two_tokens_to_one_prompt():
    """The model sees one of them, behind a prompt that both share."""
    config = ModelConfig(32, 64, 24, 2, 4, 2, 16, 64, 1e4)
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    params = init_params(config, mesh, jnp.float32, 0)
    tokens = np.random.default_rng(0).integers(1, 32, (4, 22))
    tokens[1, :20], tokens[3, :20] = tokens[0, :20], tokens[2, :20]

    def total(params, samples):
        values, _ = response_logprobs(
            *(config, params, jnp.int32(tokens), jnp.full(4, 20), 2, jnp.float32(1)),
            mesh=mesh,
            samples=samples,
        )
        return values.sum()

    ours, alone = (
        jax.jit(jax.grad(total), static_argnums=1)(params, n) for n in (2, 1)
    )
    jax.tree.map(assert_close, ours, alone)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("response_len", "remat", "at_a_time"),
    [(CHUNK_TOKENS + 5, True, 259), (20, False, 20)],
)
def test_no_more_logits_exist_than_those_of_a_chunk(response_len, remat, at_a_time):
    """Forward and backward, nor any of a prompt."""

    def ours(params, tokens, prompt_len):
        return response_logprobs(
            *(WIDE, params, tokens, prompt_len, response_len, jnp.float32(0.6)),
            **{"remat": remat, "entropy_grad": True},
        )

    program = program_of(ours, response_len)
    assert largest_array(program) == 2 * at_a_time * WIDE.vocab_size


@pytest.mark.cpu
def test_a_program_with_all_logits_is_seen():
    def plain(params, tokens, prompt_len):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = forward(WIDE, params, tokens, positions)
        return [jax.nn.log_softmax(unembed(WIDE, params, hidden))[:, 60:, 7]]

    assert largest_array(program_of(plain, 20)) >= 2 * 80 * WIDE.vocab_size


@pytest.mark.cpu
def test_chunks_save_memory():
    config = ModelConfig(8192, 16, 8, 1, 1, 1, 8, 64, 1e4)
    shapes = (
        {"lm_head": {"kernel": jax.ShapeDtypeStruct((16, 8192), jnp.float32)}}
        | {"embedding": jax.ShapeDtypeStruct((8192, 16), jnp.float32)},
        jax.ShapeDtypeStruct((1, 512, 16), jnp.float32),
        jax.ShapeDtypeStruct((1, 512), jnp.int32),
    )

    def bytes_needed(chunk_len):
        def total(params, hidden, targets):
            logprobs, entropy = chunked_logprobs(
                *(config, params, hidden, targets, jnp.float32(1)),
                **{"chunk_len": chunk_len, "entropy_grad": True},
            )
            return (logprobs + entropy).sum()

        lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes)
        program = lowered.compile(AS_USERS_HAVE_IT)
        return program.memory_analysis().temp_size_in_bytes

    # A sixteenth of the logits, and what does not depend on the chunk.
    assert bytes_needed(32) < bytes_needed(512) / 8


# Policy updates, on responses of very different lengths.

TEMPERATURE = 0.7
PROMPT_LENGTHS = [1, 6, 3, 4]  # each with three responses
RESPONSE_LENGTHS = [1, 20, 3, 9, 2, 17, 5, 11, 20, 1, 4, 13]
LONGEST = (8, 20)


@pytest.fixture(scope="module")
def small(tiny_hf) -> Path:
    return tiny_hf(hidden_size=16, intermediate_size=24, head_dim=6)


@pytest.fixture(scope="module")
def loaded(small):
    return load_model(str(small), dtype="float32")


@pytest.fixture(scope="module")
def completions(small, loaded) -> list[Completion]:
    """Random ones, with an id 0 (that of padding) in each; some tokens are forced."""
    return make_completions(small, loaded.config.vocab_size)


def make_completions(path, vocab_size) -> list[Completion]:
    rng = np.random.default_rng(3)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    made = []
    for row, length in enumerate(RESPONSE_LENGTHS):
        if row % 3 == 0:
            prompt = rng.integers(1, vocab_size, PROMPT_LENGTHS[row // 3]).tolist()
        tokens = rng.integers(0, vocab_size, length).tolist()
        tokens[length // 2] = 0
        forced = (rng.random(length) < 0.2).tolist()
        with torch.no_grad():
            logprobs, _ = torch_logprobs(reference, prompt, tokens)
        # Those of a policy some way off, so that many ratios are clipped.
        old = logprobs.numpy() + rng.normal(0, 0.3, length)
        made.append(completion(prompt, tokens, old.tolist(), forced))
    made[4].forced[:] = [True, True]  # nothing to learn from
    return made


def completion(prompt, tokens, logprobs, forced) -> Completion:
    texts, counts = ("", "", "", None), (0, 0, None, "stop", 0, 0)
    return Completion(prompt, tokens, logprobs, forced, *texts, *counts)


def torch_logprobs(reference, prompt, tokens):
    """Of a response, alone and without padding: logprobs and entropies."""
    ids = torch.tensor([prompt + tokens])
    logits = reference(ids).logits[0, len(prompt) - 1 : -1].double()
    logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs[torch.arange(len(tokens)), tokens], entropy


def settings(
    *,
    microbatch: int = 2,
    minibatch_prompts: int = 4,
    samples: int = 3,
    remat: bool = False,
    optimizer: AdamWConfig | None = None,
    **loss,
) -> GRPOConfig:
    update = UpdateConfig(minibatch_prompts, microbatch, remat=remat)
    rollout = RolloutConfig(prompts=4, samples=samples, temperature=TEMPERATURE)
    loss = LossConfig(**{"kl_coef": 0.2, **loss})
    optimizer = optimizer or AdamWConfig()
    return GRPOConfig(
        "", 5, 0, rollout=rollout, loss=loss, optimizer=optimizer, update=update
    )


REWARDS = np.float32([[1, 0, 0], [0, 1, 1], [0.5, 1, 0.7], [3, 0, -1]])


def batch_of(config: GRPOConfig, completions) -> Batch:
    """As of a step, with another policy for a reference."""
    rollouts = Rollouts(completions, REWARDS, {}, np.zeros((1, 5)))
    batch = make_batch(config, rollouts, *LONGEST)
    if config.loss.kl_coef:
        noise = np.random.default_rng(4).normal(0, 0.5, (12, 20)).astype(np.float32)
        ref = batch.old_logprobs + noise.reshape(batch.old_logprobs.shape)
        batch = batch._replace(ref_logprobs=ref)
    return jax.tree.map(jnp.asarray, batch)


# Keeps gradients as its state, and hands them on.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (grads, grads),
)


@functools.cache
def update_of(config: GRPOConfig, model: ModelConfig, mesh: Mesh, dtype: str):
    shapes = abstract_params(model, mesh, jnp.float32)
    shardings = jax.tree.map(lambda s: s.sharding, (shapes, shapes))
    return make_update(config, model, KEEP, dtype, shardings, longest_response=9)


def gradients(config, loaded, batch, dtype="float32", on_policy=False):
    """Gradients of an update, and its metrics."""
    update = update_of(config, loaded.config, loaded.mesh, dtype)
    params = jax.tree.map(jnp.copy, loaded.read_params())
    _, grads, metrics = update(
        params, KEEP.init(params), batch, on_policy, jnp.float32(TEMPERATURE)
    )
    return grads, metrics


def by_hf_name(params):
    """(name, array) of each parameter as torch has it."""
    for name, array in named_leaves(params).items():
        pattern, turned = ARCHITECTURES["qwen2"].tensors[name]
        layers = np.asarray(array) if "{}" in pattern else np.asarray(array)[None]
        for layer, part in enumerate(layers):
            yield pattern.format(layer), part.T if turned else part


@pytest.mark.parametrize(
    ("loss", "on_policy"),
    [
        ({"entropy_coef": 0.3}, False),
        ({"entropy_coef": 0.3}, True),
        ({"aggregate": "sequence", "clip_low": 0.1, "clip_high": 0.4}, False),
        (
            {
                **{"clip": "none", "old_logprobs": "sampler", "max_ratio": 1.1},
                **{"kl_coef": 0.0},
            },
            False,
        ),
    ],
    ids=str,
)
def test_an_update_is_that_of_torch(small, loaded, completions, loss, on_policy):
    """Its gradients and metrics, against the whole of the loss on rows of their own."""
    config = settings(**loss)
    batch = batch_of(config, completions)
    grads, metrics = gradients(config, loaded, batch, on_policy=on_policy)

    reference = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float64)
    refs = np.zeros((12, 20))
    if config.loss.kl_coef:
        refs = np.asarray(batch.ref_logprobs, np.float64).reshape(12, 20)
    rows, entropies, gaps = [], [], []
    for c, ref in zip(completions, refs, strict=True):
        logprobs, entropy = torch_logprobs(reference, c.prompt_ids, c.token_ids)
        counts = [config.loss.train_on_forced or not forced for forced in c.forced]
        old, ref = torch.tensor(c.logprobs).double(), torch.from_numpy(ref)
        gaps.append((logprobs - old).abs().detach()[counts])
        old = logprobs.detach() if on_policy else old
        each = zip(logprobs, old, ref[: len(old)], strict=True)
        rows.append([token for token, yes in zip(each, counts, strict=True) if yes])
        entropies.append(entropy[counts])
    deviations = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    spread = np.sqrt((deviations**2).sum(axis=1, keepdims=True) / 2)
    value, expected = torch_loss(
        rows,
        (deviations / (spread + 1e-6)).ravel().tolist(),
        clip=config.loss.clip,
        clip_low=config.loss.clip_low,
        clip_high=config.loss.clip_high,
        max_ratio=loss.get("max_ratio"),
        kl_coef=config.loss.kl_coef,
        aggregate=config.loss.aggregate,
    )
    entropy, gap = (
        torch.cat(parts).mean()
        if config.loss.aggregate == "token"
        else torch.stack([part.mean() for part in parts if len(part)]).mean()
        for parts in (entropies, gaps)
    )
    value = value - config.loss.entropy_coef * entropy
    value.backward()

    weights = dict(reference.named_parameters())
    total = sum((p.grad**2).sum() for p in weights.values()) ** 0.5
    expected |= {"loss": value, "entropy": entropy, "grad_norm": total}
    expected["sampler_gap"] = gap
    if not config.loss.kl_coef:
        expected["kl"] = torch.tensor(0.0)
    assert metrics.keys() == expected.keys()
    clips = config.loss.clip != "none" and not on_policy
    assert 0.1 < metrics["clip_fraction"] < 0.9 or not clips
    assert metrics["sampler_gap"] > 0.1
    for name, number in metrics.items():
        np.testing.assert_allclose(
            number, expected[name].item(), rtol=1e-4, err_msg=name
        )
    for name, ours in by_hf_name(grads):
        assert_close(ours, weights[name].grad.numpy(), 1e-4, name)


@pytest.mark.parametrize(
    ("microbatch", "loss"),
    [(1, {"entropy_coef": 0.3}), (12, {"aggregate": "sequence"})],
    ids=str,
)
def test_microbatches_add_up_to_the_whole(loaded, completions, microbatch, loss):
    """One, at 1, is a single response from which nothing is learned."""
    ours, reference = (
        gradients(config, loaded, batch_of(config, completions))
        for config in (settings(microbatch=microbatch, **loss), settings(**loss))
    )
    jax.tree.map(assert_close, ours, reference)


def test_remat_changes_nothing(loaded, completions):
    plain, remat = settings(entropy_coef=0.3), settings(entropy_coef=0.3, remat=True)
    batch = batch_of(plain, completions)
    reference = gradients(plain, loaded, batch)
    jax.tree.map(assert_close, gradients(remat, loaded, batch), reference)

    def bytes_kept(config):  # for the backward pass, parameters among them
        def loss(params):
            microbatch = jax.tree.map(lambda x: x[0], batch)
            return grpo_loss(
                *(config, loaded.config, params, microbatch),
                *(jnp.float32(1), False, jnp.float32(TEMPERATURE)),
            )[0]

        _, back = jax.eval_shape(lambda p: jax.vjp(loss, p), loaded.read_params())
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))

    assert bytes_kept(remat) < 0.7 * bytes_kept(plain)


@pytest.mark.parametrize(("microbatch", "shared"), [(6, True), (4, False)])
def test_prompts_are_gone_through_once_by_whole_groups(
    loaded, completions, microbatch, shared
):
    """Seen by the rows of the products: 2 prompts of 8 and 6 responses of 19, or rows of
    27 each."""
    config = settings(microbatch=microbatch)
    batch = jax.tree.map(lambda x: x[0], batch_of(config, completions))
    loss = functools.partial(grpo_loss, config, loaded.config)
    scalars = jnp.float32(1), False, jnp.float32(TEMPERATURE)
    text = str(jax.make_jaxpr(loss)(loaded.read_params(), batch, *scalars))
    rows = {True: 2 * 8 + 6 * 19, False: microbatch * 27}
    width = loaded.config.hidden_size
    assert (f"[1,{rows[True]},{width}]" in text) == shared
    assert (f"[{microbatch},27,{width}]" in text) != shared


def test_prompts_are_shared_by_the_kernel_of_tpus_too(
    tiny_hf, completions, monkeypatch
):
    """Gradients through splash, interpreted: with each prompt once, and in rows of its
    own for every response."""
    small = load_model(str(tiny_hf(num_heads=2, num_kv_heads=1, head_dim=128)))
    config = settings(microbatch=12, kl_coef=0.0, entropy_coef=0.3)
    batch = jax.tree.map(lambda x: x[0], batch_of(config, completions))
    calls = []

    def splash(q, *args, **options):
        calls.append(q.shape)
        return splash_attention(q, *args, **options, interpret=True)

    set_everywhere(monkeypatch, "takes_splash", lambda *_: True)
    monkeypatch.setattr(paths, "splash_attention", splash)

    def grads(config):
        def loss(params):
            scalars = jnp.float32(1), False, jnp.float32(TEMPERATURE)
            args = config, small.config, params, batch, *scalars
            return grpo_loss(*args, mesh=small.mesh)[0]

        calls.clear()
        return jax.jit(jax.grad(loss))(small.read_params())

    shared = grads(config)
    assert {shape[2] for shape in calls} == {8, 19}  # prompts and responses
    divided = settings(microbatch=12, kl_coef=0.0, entropy_coef=0.3, samples=9)
    alone = grads(divided)  # 12 rows are not groups of 9
    assert {shape[2] for shape in calls} == {27}
    jax.tree.map(assert_close, shared, alone)


def test_bfloat16_is_only_computed_in(loaded, completions):
    """Gradients of micro-batches are added, and kept, in float32."""
    config = settings(entropy_coef=0.3)
    batch = batch_of(config, completions)
    exact, _ = gradients(config, loaded, batch)
    grads, _ = gradients(config, loaded, batch, "bfloat16")
    for name, ours in named_leaves(grads).items():
        reference = named_leaves(exact)[name]
        assert ours.dtype == jnp.float32
        if name != "embedding":  # whose rows come up once, and need no sum
            assert (ours != ours.astype(jnp.bfloat16)).mean() > 0.5, name
        # Rounding clips other tokens here and there.
        error = jnp.linalg.norm(ours - reference) / jnp.linalg.norm(reference)
        assert 1e-3 < error < 0.3, name


@pytest.mark.cpu
def test_an_update_on_a_cpu_has_no_product_that_sums_over_rows(loaded, completions):
    """In the layers: it would go to the slower library, see cpu.product_on_cpu."""
    config = settings()
    optimizer = make_optimizer(config.optimizer, config.steps, config.updates_per_step)
    shapes = abstract_params(loaded.config, loaded.mesh, jnp.float32)
    shapes = (shapes, abstract_state(optimizer, shapes, loaded.mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    update = make_update(
        config, loaded.config, optimizer, "float32", shardings, longest_response=9
    )
    batch = batch_of(config, completions)
    lowered = update.lower(*shapes, batch, False, jnp.float32(1))
    text = lowered.compile(AS_USERS_HAVE_IT).as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert len(products) > 20
    sums = "lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    assert not [p for p in products if sums in p and "while/body" in p]


def test_updates_are_those_of_adamw(loaded, completions):
    """Four in a step, each by its own mini-batch and all at the rate of the step."""
    adam = AdamWConfig(
        *(0.01, 3, "linear", 0.8, 0.9), weight_decay=0.3, max_grad_norm=0.1
    )
    config = settings(minibatch_prompts=1, microbatch=1, optimizer=adam)
    batch = batch_of(config, completions)
    optimizer = optax.chain(
        KEEP, make_optimizer(config.optimizer, config.steps, config.updates_per_step)
    )
    shapes = abstract_params(loaded.config, loaded.mesh, jnp.float32)
    shapes = (shapes, abstract_state(optimizer, shapes, loaded.mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    update = make_update(
        config, loaded.config, optimizer, "float32", shardings, longest_response=9
    )

    params = jax.tree.map(jnp.copy, loaded.read_params())
    state = optimizer.init(params)
    first = {name: 0.0 for name in named_leaves(params)}
    second = dict(first)
    for count in range(20):
        part = slice(count % 4 * 3, count % 4 * 3 + 3)
        minibatch = jax.tree.map(lambda x, part=part: x[part], batch)
        before = {name: np.array(p) for name, p in named_leaves(params).items()}
        given = jax.tree.leaves((params, state[1:]))
        params, state, metrics = update(
            params, state, minibatch, False, jnp.float32(TEMPERATURE)
        )
        assert all(leaf.is_deleted() for leaf in given)  # written over
        grads = {n: np.float64(np.array(g)) for n, g in named_leaves(state[0]).items()}
        norm = sum((grad**2).sum() for grad in grads.values()) ** 0.5
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        assert norm > adam.max_grad_norm
        rate = 0.01 * [1 / 3, 2 / 3, 1, 1, 1 / 2][count // 4]
        for name, ours in named_leaves(params).items():
            grad = grads[name] * adam.max_grad_norm / norm
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            mean = first[name] / (1 - 0.8 ** (count + 1))
            size = np.sqrt(second[name] / (1 - 0.9 ** (count + 1)))
            change = mean / (size + 1e-8) + 0.3 * before[name]
            expected = before[name] - rate * change
            np.testing.assert_allclose(ours, expected, atol=1e-3 * rate, err_msg=name)


@pytest.mark.parametrize("train_on_forced", [False, True])
def test_a_batch_is_made_from_lengths(completions, train_on_forced):
    config = settings(microbatch=3, train_on_forced=train_on_forced, kl_coef=0.0)
    batch = batch_of(config, completions)
    assert batch.tokens.shape == (4, 3, 8 + 20)
    assert batch.loss_mask.shape == batch.old_logprobs.shape == (4, 3, 20)
    assert batch.ref_logprobs is None
    kinds = {"tokens": "int32", "prompt_len": "int32", "loss_mask": "bool"}
    kinds |= {"advantages": "float32", "old_logprobs": "float32"}
    assert {name: getattr(batch, name).dtype for name in kinds} == kinds
    advantages = np.asarray(group_advantages(REWARDS))
    for row, c in enumerate(completions):
        got = [np.asarray(x)[row // 3, row % 3] for x in batch[:5]]
        tokens, prompt_len, advantage, mask, logprobs = got
        prompt, length = c.prompt_ids, len(c.token_ids)
        assert prompt_len == len(prompt)
        assert advantage == advantages[row // 3, row % 3]
        padding = [0] * (28 - len(prompt) - length)
        assert tokens.tolist() == prompt + c.token_ids + padding
        learned = [train_on_forced or not forced for forced in c.forced]
        assert mask.tolist() == learned + [False] * (20 - length)
        np.testing.assert_array_equal(logprobs[:length], np.float32(c.logprobs))
        assert 0 in c.token_ids  # also the id of padding; it counts as any other


def test_batches_are_of_few_lengths():
    """Four, of which each takes the shortest that holds its responses."""
    response_lens = []
    for length in range(1, 19):
        longest = completion([5], [7] * length, [0.0] * length, [False] * length)
        shortest = completion([5], [7], [0.0], [False])
        rollouts = Rollouts([longest, *[shortest] * 11], REWARDS, {}, np.zeros((1, 5)))
        batch = make_batch(settings(), rollouts, 3, 18)
        response_lens.append(batch.loss_mask.shape[-1])
        assert batch.tokens.shape[-1] == 3 + response_lens[-1]
    assert response_lens == [6] * 6 + [11] * 5 + [16] * 5 + [18] * 2


def test_prompts_are_padded_to_the_longest_of_their_step():
    """To one of four lengths, where they could be long: 150, 300, 450 and 600 here."""
    for length, padded in ((1, 150), (150, 150), (151, 300), (580, 600)):
        prompts = [[5] * length, *[[5]] * 11]
        rows = [completion(p, [7] * 3, [0.0] * 3, [False] * 3) for p in prompts]
        rollouts = Rollouts(rows, REWARDS, {}, np.zeros((1, 5)))
        batch = make_batch(settings(), rollouts, 600, 3)
        seen = padded + 2
        assert batch.tokens.shape[-1] == 1 + (640 if padded == 600 else seen)
        assert batch.loss_mask.shape[-1] == 3
        assert (np.asarray(batch.tokens) == 5).sum() == length + 11


def test_rows_of_all_processes_are_of_one_length(completions, monkeypatch):
    """Another process has prompts of up to 160 tokens and responses of up to 5."""
    monkeypatch.setattr(
        grpo_rollouts, "process_allgather", lambda own: np.array([own, [160, 5]], float)
    )
    rollouts = Rollouts(completions, REWARDS, {}, np.zeros((1, 5)))
    batch = make_batch(settings(), rollouts, 600, 40)
    longest = max(len(c.token_ids) for c in completions)
    response_len = next(n for n in (11, 21, 31, 40) if n >= longest)
    assert batch.loss_mask.shape[-1] == response_len
    assert batch.tokens.shape[-1] == 300 + response_len


@pytest.mark.parametrize(
    ("longest", "of_step", "lengths"),
    [
        ((1024, 2049), (1024, 2049), (3073, 2049)),  # the model sees 3,072
        ((1024, 2049), (1000, 513), (1537, 513)),
        ((1024, 2049), (257, 2000), (2561, 2049)),
        ((1024, 2049), (256, 2000), (2305, 2049)),
        ((1024, 2049), (1, 1), (769, 513)),
        ((1001, 2049), (1001, 514), (2049, 1025)),
        ((1001, 2049), (252, 514), (1537, 1025)),  # 502 + 1,024, and whole tiles
        ((900, 13), (900, 13), (1025, 13)),
        ((300, 201), (300, 200), (501, 201)),  # too few to matter
        ((300, 201), (128, 200), (128 + 201, 201)),
        ((300, 201), (257, 200), (501, 201)),
        ((128, 201), (5, 200), (128 + 201, 201)),
        ((3, 1), (3, 1), (4, 1)),
    ],
)
def test_long_batches_are_whole_tiles_for_the_model(longest, of_step, lengths):
    assert padded_lengths(longest, of_step) == lengths


@pytest.mark.parametrize(("microbatch", "samples"), [(3, 1), (6, 3), (4, 3)], ids=str)
def test_logprobs_of_a_step_are_those_of_torch(
    small, loaded, completions, microbatch, samples
):
    """Prompts by themselves, once with their responses, and where groups are divided."""
    config = settings(microbatch=microbatch)
    batch = batch_of(config, completions)
    shapes = abstract_params(loaded.config, loaded.mesh, jnp.float32)
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    logprobs = make_logprobs(loaded.config, jnp.float32, shardings, samples)
    logprobs = logprobs(loaded.read_params(), batch, jnp.float32(TEMPERATURE))
    shape = (12 // microbatch, microbatch, 20)
    assert logprobs.shape == shape and logprobs.dtype == jnp.float32
    reference = AutoModelForCausalLM.from_pretrained(small)
    for ours, c in zip(logprobs.reshape(12, 20), completions, strict=True):
        with torch.no_grad():
            expected, _ = torch_logprobs(reference, c.prompt_ids, c.token_ids)
        assert_close(ours[: len(expected)], expected.numpy())


# Runs with eight devices, which a process can only get at its start.
ON_EIGHT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_grpo
test_grpo.update_on_meshes()
"""
MESHES = {
    "data=1,tensor=1": 1,
    "data=1,tensor=2": 2,
    "data=2,tensor=2": 4,
    "data=8,tensor=1": 8,
    "data=4,tensor=2": 8,
}
MESHED = ModelConfig(2048, 16, 24, 2, 4, 2, 6, 64, 1e4)


def update_on_meshes() -> None:
    """An update of two micro-batches on each mesh: is it that of one device?"""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 2048, (2, 8, 30), dtype=np.int32)
    prompt_len = rng.integers(1, 7, (2, 2), dtype=np.int32).repeat(4, axis=1)
    for first in (0, 4):  # four responses to a prompt
        tokens[:, first : first + 4, :6] = tokens[:, first : first + 1, :6]
    lengths = rng.integers(1, 24, (2, 8, 1))
    lengths[0, 0], lengths[1, 1:] = 24, 1
    batch = Batch(
        *(tokens, prompt_len),
        rng.normal(size=(2, 8)).astype(np.float32),
        np.arange(24) < lengths,
        *rng.normal(-8, 1, (2, 2, 8, 24)).astype(np.float32),
    )
    config = settings(microbatch=8, samples=4, aggregate="sequence", remat=True)
    optimizer = make_optimizer(config.optimizer, config.steps, config.updates_per_step)
    expected = None
    for text, count in MESHES.items():
        mesh = make_mesh(text, MESHED, jax.devices()[:count])
        shapes = abstract_params(MESHED, mesh, jnp.float32)
        shapes = (shapes, abstract_state(optimizer, shapes, mesh))
        shardings = jax.tree.map(lambda s: s.sharding, shapes)
        update = make_update(
            config, MESHED, optimizer, jnp.float32, shardings, longest_response=9
        )
        params = init_params(MESHED, mesh, jnp.float32, 0)
        params = jax.tree.map(lambda p: 5 * p, params)
        state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
        rows = NamedSharding(mesh, PartitionSpec(None, "data"))
        arguments = (
            params,
            state,
            jax.device_put(batch, rows),
            False,
            jnp.float32(0.7),
        )
        program = update.lower(*arguments).compile()
        # Logits are larger than anything else, and stay where they were computed.
        assert largest_array(program) >= 8 * 24 * 2048 // count
        moved = largest_array(program, "all-|collective-|reduce-scatter")
        assert moved < 8 * 24 * 2048 // count
        params, state, metrics = program(*arguments)
        assert jax.tree.map(lambda x: x.sharding, (params, state)) == shardings
        # Adam's first moment is a share of the gradient.
        ours = jax.device_get((optax.tree.get(state, "mu"), metrics))
        expected = expected or ours
        jax.tree.map(assert_close, ours, expected)
        print(text)


def test_eight_devices_update_as_one():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(Path(__file__).parent)],
        env={**os.environ, "XLA_FLAGS": several_devices(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == list(MESHES), done.stderr[-3000:]
