"""The optimizers of both training commands, and their learning rates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e1jax.config.training import AdamWConfig, MuonConfig
from e1jax.training import (
    apply_gradients,
    clip_by_norm,
    learning_rates,
    make_optimizer,
)


def test_learning_rates_of_adamw():
    def rates(schedule, warmup, steps):
        rate = learning_rates(AdamWConfig(0.5, warmup, schedule), steps)
        return [float(rate(jnp.int32(step))) for step in range(steps + 1)]

    cosine = [0.25 + 0.25 * math.cos(math.pi * i / 4) for i in range(5)]
    for schedule, warmup, steps, expected in (
        ("constant", 0, 3, [0.5, 0.5, 0.5, 0.5]),
        ("constant", 2, 4, [0.25, 0.5, 0.5, 0.5, 0.5]),
        ("linear", 0, 4, [0.5, 0.375, 0.25, 0.125, 0]),
        ("linear", 2, 4, [0.25, 0.5, 0.5, 0.25, 0]),
        ("cosine", 0, 4, cosine),
        ("cosine", 5, 9, [0.1, 0.2, 0.3, 0.4, 0.5, *cosine]),
        ("linear", 4, 4, [0.125, 0.25, 0.375, 0.5, 0]),
        ("linear", 8, 4, [0.0625, 0.125, 0.1875, 0.25]),
    ):
        ours = rates(schedule, warmup, steps)[: len(expected)]
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "jit"),
    [("constant", True), ("constant", False), ("linear", False)],
)
def test_learning_rates_are_exact_to_the_last_bit(schedule, jit):
    """As one division and two products of float32 make them: older runs go on with the
    same rates. (XLA may take the products of `linear` in another order.)"""
    one, f32 = np.float32(1), np.float32
    for peak, warmup, steps in ((1e-6, 0, 7), (7.7e-5, 10, 41), (0.3, 3, 2), (1, 9, 9)):
        rate = learning_rates(AdamWConfig(peak, warmup, schedule), steps)
        rate = jax.jit(rate) if jit else rate
        for step in range(steps + 1):
            rise = min(one, f32(step + 1) / f32(max(1, warmup)))
            left = min(one, f32(steps - step) / f32(max(1, steps - warmup)))
            expected = f32(peak) * rise * (left if schedule == "linear" else one)
            assert f32(rate(jnp.int32(step))) == expected, (peak, warmup, steps, step)


def test_updates_of_a_step_have_its_learning_rate():
    """Three updates a step, of a constant gradient, which Adam makes its sign."""
    adam = AdamWConfig(0.5, warmup_steps=2, schedule="linear", max_grad_norm=9)
    optimizer = make_optimizer(adam, steps=3, updates_per_step=3)
    params = {"a": jnp.zeros(2)}
    state, rates = optimizer.init(params), []
    for _ in range(9):
        update, state = optimizer.update({"a": jnp.array([1.0, -1.0])}, state, params)
        assert update["a"][0] == -update["a"][1]
        rates.append(-update["a"][0])
    np.testing.assert_allclose(rates, np.repeat([0.25, 0.5, 0.5], 3), rtol=1e-4)


def test_gradients_are_applied_in_the_dtype_of_the_parameters():
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    grads = {"a": jnp.array([3.0, 4.0, 1e-3])}
    optimizer = make_optimizer(AdamWConfig(0.5, max_grad_norm=0.1), steps=1)
    params, state, norm = apply_gradients(
        optimizer, params, optimizer.init(params), grads
    )
    np.testing.assert_allclose(norm, (25 + 1e-6) ** 0.5, rtol=1e-6)  # not clipped
    kinds = {str(x.dtype) for x in jax.tree.leaves((params, state)) if x.shape}
    assert kinds == {"bfloat16"}
    np.testing.assert_allclose(params["a"].astype(float), 0.5, rtol=1e-2)


def test_the_learning_rate_of_muon_rises_then_falls_to_its_final_share():
    schedule = learning_rates(MuonConfig(1e-2, warmup=0.1, final=0.05), 200)
    rates = np.array([float(schedule(step)) for step in range(201)])
    np.testing.assert_allclose(
        rates[[0, 10, 20, 200]], [0, 5e-3, 1e-2, 5e-4], rtol=1e-5
    )
    assert (np.diff(rates[20:]) <= 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 30.0])
def test_gradients_are_clipped_as_optax_does(scale):
    keys = jax.random.split(jax.random.key(5))
    grads = {
        "a": scale * jax.random.normal(keys[0], (7, 3)),
        "b": scale * jax.random.normal(keys[1], (5,)),
    }
    ours, reference = clip_by_norm(0.5), optax.clip_by_global_norm(0.5)
    state = ours.init(grads)
    assert state == reference.init(grads)  # so that older checkpoints are read
    clipped, expected = (t.update(grads, state)[0] for t in (ours, reference))
    for name in grads:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-6)
