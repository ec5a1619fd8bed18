"""Training at several cuts of a thought: sampling, shared rows, advantages, the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e1jax.checkpoint.load import load_model
from e1jax.grpo.logprobs import Solutions, response_logprobs

LONGEST_CUT, LONGEST = 9, 5  # tokens of a thought before `</think>`, and of a solution


@pytest.fixture(scope="module")
def loaded():
    return load_model("nano", "data=1,tensor=1", "float32")


def tree_rows(rng, prompts=2, samples=3, seen=(0, 2, 7, 7, 9)):
    """Complete rows of thoughts and of their solutions, of random ids: tokens, prompt_len
    and which response tokens are there."""
    longest_prompt, response_len = 6, LONGEST_CUT + 1
    length = longest_prompt + LONGEST_CUT + 1 + response_len
    rows, mask, starts = [], [], []

    def add(start, response):
        row = np.concatenate([start, response])
        rows.append(np.pad(row, (0, length - len(row))))
        mask.append(np.arange(response_len) < len(response))
        starts.append(len(start))

    for p in range(prompts):
        prompt = rng.integers(0, 250, longest_prompt - p)
        for g in range(samples):
            # One thought of two is cut before all its solutions see the last tokens.
            thought = rng.integers(0, 250, LONGEST_CUT - 3 * (g % 2))
            thought = np.append(thought, 261)
            add(prompt, thought)
            for cut in seen:
                context = np.append(thought[: min(cut, len(thought) - 1)], 261)
                solution = rng.integers(0, 250, rng.integers(1, LONGEST + 1))
                add(np.concatenate([prompt, context]), solution)
    return jnp.array(np.stack(rows)), jnp.array(starts), np.array(mask)


@pytest.mark.parametrize("samples", [3, 4], ids=["whole groups", "whole thoughts"])
def test_shared_thoughts_are_as_complete_rows(loaded, samples):
    """Values and gradients, where only thoughts are whole too (a group of 4 is not)."""
    tokens, prompt_len, mask = tree_rows(np.random.default_rng(0))
    weights = jnp.array(np.random.default_rng(1).normal(size=(2, *mask.shape)))
    params = loaded.read_params()

    def weighted(params, **options):
        values = response_logprobs(
            loaded.config,
            params,
            tokens,
            prompt_len,
            mask.shape[1],
            jnp.float32(0.8),
            entropy_grad=True,
            **options,
        )
        total = sum(
            jnp.where(mask, value * w, 0).sum()
            for value, w in zip(values, weights, strict=True)
        )
        return total, values

    both = jax.jit(jax.value_and_grad(weighted, has_aux=True), static_argnames=OPTIONS)
    shared = Solutions(5, LONGEST_CUT, LONGEST)
    (_, want), want_grads = both(params)
    (_, got), got_grads = both(params, samples=samples, solutions=shared)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[mask], b[mask], atol=3e-5)
    for a, b in zip(
        jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-6)


OPTIONS = ("samples", "solutions")
