"""Budgets that change over the steps of a run, and the entropy's weight that falls."""

import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from test_train import interrupted_run, metrics, settings, workplace

from e1jax import train
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.training import GRPOConfig, LossConfig, RolloutConfig
from e1jax.grpo import learner
from e1jax.grpo.rollouts import drawn_pair, least_room, longest_lengths
from e1jax.training import entropy_coefs

__all__ = ["workplace"]  # fixtures

UNTIL = {2: 4, 4: [5, 7]}
FLAGS = [
    *("--rollout.thinking_budget", "[3, 8]", "--rollout.solution_budget", "6"),
    *("--rollout.thinking_budget_until", json.dumps(UNTIL)),
    *("--rollout.solution_budget_until", "{1: [2, 9]}"),
    *("--loss.entropy_coef", "0.3", "--loss.entropy_coef_end", "0.05"),
]


def test_budgets_of_each_step(workplace):
    config = settings(workplace, *FLAGS)
    by_step = [config.at_step(step).rollout for step in range(7)]
    assert [r.thinking_budgets for r in by_step] == [
        (4,), (4,), (5, 7), (5, 7), (3, 8), (3, 8), (3, 8)
    ]  # fmt: skip
    assert [r.solution_budgets for r in by_step] == [(2, 9), *[(6,)] * 6]
    assert by_step[0].pairs == [(4, 2), (4, 9)]
    # Of the run, for its cache, its padding and plan: whatever may come.
    assert set(config.rollout.thinking_budgets) == {3, 4, 5, 7, 8}
    assert least_room(config) == 8 + 1 + 9
    assert longest_lengths(config, 64, 20, 31) == (31, 18)
    unlimited = settings(workplace, "--rollout.thinking_budget_until", "{3: [null]}")
    assert longest_lengths(unlimited, 64, 20, 31) == (31, 44)
    assert unlimited.at_step(2).rollout.is_unlimited
    assert not unlimited.at_step(3).rollout.is_unlimited
    # A draw is of (seed, position) among the pairs of the step.
    at = config.at_step(2)
    draws = [at.rollout.pairs[drawn_pair(at, p)] for p in range(200)]
    assert set(draws) == {(5, 6), (7, 6)}
    again = settings(workplace, *FLAGS).at_step(3)
    assert draws == [again.rollout.pairs[drawn_pair(again, p)] for p in range(200)]
    without = settings(workplace)
    assert without.at_step(0) == without


def test_a_curriculum_from_yaml(workplace, tmp_path):
    values = yaml.safe_load((workplace / "tiny.yaml").read_text())
    values["rollout"]["thinking_budget_until"] = UNTIL
    file = tmp_path / "tiny.yaml"
    for path in (file, tmp_path / "run" / "config.yaml"):  # and from a run's record
        if path == file:
            file.write_text(yaml.safe_dump(values))
        config = load_config(GRPOConfig, ["--config", str(path)], "train")[0]
        assert config.at_step(0).rollout.thinking_budgets == (4,)
        assert config.at_step(3).rollout.thinking_budgets == (5, 7)
        train.prepare_run(config, train.load_policy(config), "", tmp_path / "run", {})


@pytest.mark.parametrize(
    "until, words",
    [
        ({5: 4, 2: 8}, "thinking_budget_until has the steps 5, 2; let them rise"),
        ({0: 4}, "thinking_budget_until: the step must be a whole number, 1 or more"),
        ({3: ()}, "thinking_budget_until is an empty list"),
        ({3: (4, -1)}, "thinking_budget_until must be a whole number"),
        ({3: None}, "needs rollout.cache_len"),
    ],
)
def test_curricula_are_checked(until, words):
    with pytest.raises(UserError, match=words):
        RolloutConfig(thinking_budget_until=until)


@pytest.mark.parametrize("value", ["soon", "[3]", "{a: 4}", "{3: many}"])
def test_a_curriculum_of_the_wrong_kind(workplace, value):
    with pytest.raises(
        UserError, match=r"rollout\.thinking_budget_until must be"
    ) as found:
        settings(workplace, "--rollout.thinking_budget_until", value)
    assert "{a whole number: a whole number or null or" in str(found.value)


@pytest.mark.slow
def test_a_run_by_a_curriculum_resumes_bit_for_bit(workplace, tmp_path):
    moments = f"sampling:3:{int(signal.SIGKILL)} update:5:{int(signal.SIGTERM)}"
    run_dir = interrupted_run(workplace, tmp_path, FLAGS, moments)
    allowed = [{"4_2", "4_9"}, {"4_6"}, {"5_6", "7_6"}, {"5_6", "7_6"}]
    allowed += [{"3_6", "8_6"}] * 2
    for line, pairs in zip(metrics(run_dir), allowed, strict=True):
        found = {n.removeprefix("reward_") for n in line if n.startswith("reward_")}
        found -= {"timeouts", "crashes"}
        assert found <= pairs and (found or len(pairs) == 1)
        at = 0.3 - 0.05 * (line["step"] - 1)
        assert line["entropy_coef"] == pytest.approx(at, abs=1e-6)


def test_weights_of_entropy_are_linear():
    loss = LossConfig(entropy_coef=0.4, entropy_coef_end=0.0)
    values = [float(entropy_coefs(loss, 5)(step)) for step in range(7)]
    np.testing.assert_allclose(values, [0.4, 0.3, 0.2, 0.1, 0, 0, 0], atol=1e-7)
    assert float(entropy_coefs(loss, 1)(0)) == pytest.approx(0.4)
    assert entropy_coefs(LossConfig(entropy_coef=0.4), 5)(3) == 0.4
    assert LossConfig(entropy_coef_end=0.1).raises_entropy
    assert not LossConfig(entropy_coef_end=0.0).raises_entropy
    with pytest.raises(UserError, match="entropy_coef_end must be a number of 0 or"):
        LossConfig(entropy_coef_end=-0.1)


def test_the_weight_of_entropy_is_data(workplace, monkeypatch):
    """A loss with the weight as an argument is the one that has it in its settings, with
    its gradient; and no weight is a compilation of its own."""
    rng = np.random.default_rng(0)
    batch = types.SimpleNamespace(
        tokens=None,
        prompt_len=None,
        loss_mask=jnp.array(rng.random((3, 5)) < 0.8),
        old_logprobs=jnp.array(rng.normal(size=(3, 5)), jnp.float32),
        ref_logprobs=None,
        advantages=jnp.array([1.0, -1, 0.5]),
    )
    given = jnp.array(rng.normal(size=(3, 5)), jnp.float32)

    def made_up(model, params, *args, entropy_grad, **options):
        entropy = 2 * params
        return params, entropy if entropy_grad else jax.lax.stop_gradient(entropy)

    monkeypatch.setattr(learner, "response_logprobs", made_up)
    traces = []

    def grads(flags, *coef):
        config = settings(workplace, "--loss.kl_coef", "0", *flags)

        @jax.jit
        def compute(params, *coef):
            traces.append(flags)
            scalars = jnp.float32(1), jnp.array(False), jnp.float32(1)
            loss = learner.grpo_loss
            return jax.value_and_grad(
                lambda p: loss(config, None, p, batch, *scalars, *coef)[0]
            )(params)

        return [compute(given, jnp.float32(c)) for c in coef] or [compute(given)]

    falling = ["--loss.entropy_coef", "0.5", "--loss.entropy_coef_end", "0"]
    by_data = grads(falling, 0.5, 0.2, 0.0)
    assert len(traces) == 1
    for coef, ours in zip((0.5, 0.2, 0.0), by_data, strict=True):
        [want] = grads(["--loss.entropy_coef", str(coef)])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, want
        )
