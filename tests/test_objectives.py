"""Objectives beyond the paper's against plain loops over tokens, each by its formula."""

import dataclasses
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_grpo import HIGH, LOW, arrays, assert_close, loss_and_grads
from test_train import interrupted_run, metrics, settings, workplace

from e1jax.config.checks import UserError
from e1jax.config.training import LossConfig, RewardConfig, RolloutConfig
from e1jax.grpo.loss import AGGREGATES, loss_scale
from e1jax.grpo.rollouts import (
    Rollouts,
    drawn_pair,
    least_room,
    longest_lengths,
    pair_metrics,
    pair_sums,
    rollout_request,
    unequal_groups,
)

__all__ = ["arrays", "workplace"]  # fixtures


def in_torch(arrays):
    logprobs, *others = (torch.from_numpy(x).double() for x in arrays[:3])
    return logprobs.requires_grad_(), *others


def same_as(loss, leaf, arrays, **options):
    """Value and gradient are policy_loss's."""
    loss.backward()
    (ours, _), grads = loss_and_grads(*arrays, **options)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_close(grads, leaf.grad.numpy())


def test_cispo(arrays):
    """arXiv 2506.13585, equations 4 and 5: sg(clip(r)) * A * log pi, mean over tokens."""
    *_, advantages, mask = arrays
    leaf, old, ref = in_torch(arrays)
    total, count, cut = torch.zeros((), dtype=torch.double), 0, 0
    for b, r in zip(*np.nonzero(mask), strict=True):
        ratio = torch.exp(leaf[b, r] - old[b, r]).item()
        weight = min(max(ratio, 1 - LOW), 1 + HIGH)
        gap = ref[b, r] - leaf[b, r]
        kl = torch.exp(gap) - gap - 1
        total += -weight * float(advantages[b]) * leaf[b, r] + 0.3 * kl
        count, cut = count + 1, cut + (weight != ratio)
    options = {"clip": "cispo", "clip_low": LOW, "clip_high": HIGH, "kl_coef": 0.3}
    same_as(total / count, leaf, arrays, **options)
    (_, measured), _ = loss_and_grads(*arrays, **options)
    np.testing.assert_allclose(measured["clip_fraction"], cut / count, rtol=1e-6)
    # A token beyond the bounds still teaches, where PPO's clip leaves it out.
    outside = mask & (np.exp(arrays[0] - arrays[1]) > 1 + HIGH)
    outside &= (advantages > 0)[:, None]
    grads = {}
    for clip in ("ppo", "cispo"):
        options |= {"clip": clip, "kl_coef": 0.0}
        grads[clip] = np.asarray(loss_and_grads(*arrays, **options)[1])
    assert outside.any() and not grads["ppo"][outside].any()
    assert grads["cispo"][outside].all()


@pytest.mark.parametrize("low, high", [(LOW, HIGH), (0.01, 0.02)])
def test_gspo(arrays, low, high):
    """arXiv 2507.18071, equations 5 and 7: one ratio a response, mean over responses."""
    *_, advantages, mask = arrays
    leaf, old, _ = in_torch(arrays)
    terms = []
    for b in range(9):
        tokens = np.flatnonzero(mask[b])
        if len(tokens):
            gaps = [leaf[b, r] - old[b, r] for r in tokens]
            ratio = torch.exp(torch.stack(gaps).mean())
            bounded = torch.clamp(ratio, 1 - low, 1 + high)
            a = float(advantages[b])
            terms.append(-torch.minimum(ratio * a, bounded * a))
    options = {"clip": "gspo", "clip_low": low, "clip_high": high, "kl_coef": 0.0}
    same_as(torch.stack(terms).mean(), leaf, arrays, **options, aggregate="sequence")


def test_constant(arrays):
    """Dr. GRPO, arXiv 2503.20783: long responses are not weighed less, token by token."""
    *_, advantages, mask = arrays
    leaf, old, ref = in_torch(arrays)
    total = torch.zeros((), dtype=torch.double)
    for b, r in zip(*np.nonzero(mask), strict=True):
        ratio = torch.exp(leaf[b, r] - old[b, r])
        a, gap = float(advantages[b]), ref[b, r] - leaf[b, r]
        bounded = torch.clamp(ratio, 0.8, 1.2)
        kl = torch.exp(gap) - gap - 1
        total += -torch.minimum(ratio * a, bounded * a) + 0.3 * kl
    same_as(total / (9 * 11), leaf, arrays, kl_coef=0.3, aggregate="constant")
    scales = {name: loss_scale(jnp.array(mask), name, 55) for name in AGGREGATES}
    np.testing.assert_allclose(scales["constant"], mask.sum() / (9 * 55), rtol=1e-6)
    assert scales["token"] == scales["sequence"] == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LossConfig(clip="dapo"), "clip must be ppo or none or cispo or gspo"),
        (lambda: LossConfig(aggregate="sum"), "aggregate must be token or sequence"),
        (lambda: RewardConfig(length_cost=-1), "reward.length_cost must be a number"),
        (lambda: RewardConfig("a:b", 0.1), "set one of them"),
        (lambda: RolloutConfig(thinking_budget=()), "thinking_budget is an empty list"),
        (
            lambda: RolloutConfig(solution_budget=(3, -1)),
            "solution_budget must be a whole",
        ),
        (lambda: RolloutConfig(solution_budget=(3, None)), "needs rollout.cache_len"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(UserError, match=words):
        make()


# Drawn budgets.


def drawn(workplace, *flags):
    lists = ["--rollout.thinking_budget", "[4, 8, null]"]
    lists += ["--rollout.solution_budget", "[6, 3]", "--rollout.cache_len", "60"]
    return settings(workplace, *lists, *flags)


def test_budgets_are_drawn_from_seed_and_position(workplace):
    config = drawn(workplace)
    assert config.rollout.pairs == [
        (4, 6), (4, 3), (8, 6), (8, 3), (None, 6), (None, 3)
    ]  # fmt: skip
    draws = [drawn_pair(config, position) for position in range(3000)]
    counts = np.bincount(draws, minlength=6)
    assert counts.min() > 430 and counts.max() < 570  # 500 each, on average
    assert draws[:100] == [drawn_pair(config, position) for position in range(100)]
    other = dataclasses.replace(config, seed=1)
    assert draws[:100] != [drawn_pair(other, position) for position in range(100)]
    for position in (0, 17):
        request = rollout_request(config, position)
        pair = config.rollout.pairs[draws[position]]
        assert (request.thinking_budget, request.solution_budget) == pair
    fixed = settings(workplace)
    assert {drawn_pair(fixed, position) for position in range(9)} == {0}


def test_room_is_for_the_largest_budgets(workplace):
    assert least_room(drawn(workplace)) == 8 + 1 + 6
    lists = ["--rollout.thinking_budget", "[4, 8]", "--rollout.solution_budget", "[2]"]
    config = settings(workplace, *lists)
    assert least_room(config) == 8 + 1 + 2
    assert longest_lengths(config, 60, 20, 31) == (31, 11)
    assert longest_lengths(drawn(workplace), 60, 20, 31) == (31, 40)


def completion(tokens, forced=0, thinking=2, solution=3):
    return types.SimpleNamespace(
        token_ids=[0] * tokens,
        forced=[True] * forced + [False] * (tokens - forced),
        thinking_tokens=thinking,
        solution_tokens=solution,
    )


def test_metrics_of_each_pair(workplace):
    config = drawn(workplace)
    lengths = [[5, 6], [7, 8], [1, 2]]
    completions = [completion(n, forced=n > 5) for group in lengths for n in group]
    rewards = np.float32([[1, 0.5], [0, 0], [1, 1]])
    sums = pair_sums(config, [4, 2, 4], completions, rewards, rewards == 1)
    np.testing.assert_array_equal(sums[4], [4, 3.5, 3, 14, 1])
    np.testing.assert_array_equal(sums[2], [2, 0, 0, 15, 2])
    assert pair_metrics(config, sums) == {
        "reward_none_6": 3.5 / 4,
        "accuracy_none_6": 3 / 4,
        "response_tokens_none_6": 14 / 4,
        "forced_share_none_6": 1 / 4,
        "reward_8_6": 0,
        "accuracy_8_6": 0,
        "response_tokens_8_6": 15 / 2,
        "forced_share_8_6": 1,
    }
    fixed = settings(workplace)
    assert (
        pair_metrics(fixed, pair_sums(fixed, [0] * 3, completions, rewards, rewards))
        == {}
    )


def test_equal_groups_give_way_to_unequal_ones(workplace):
    config = settings(workplace, "--rollout.samples", "2")

    def part(first, rewards):
        rewards = np.float32(rewards)
        names = [f"{first + g} {j}" for g in range(len(rewards)) for j in range(2)]
        return Rollouts(names, rewards, {"mixed": float(first)}, np.ones((1, 5)))

    parts = [part(0, [[1, 1], [0, 1], [0, 0]]), part(3, [[1, 0], [0, 0], [1, 0]])]
    kept = unequal_groups(config, parts, 3)
    assert kept.completions == ["1 0", "1 1", "3 0", "3 1", "5 0", "5 1"]
    np.testing.assert_array_equal(kept.rewards, [[0, 1], [1, 0], [1, 0]])
    assert kept.metrics == {"mixed": 1.5, "sampled_batches": 2, "kept_mixed": 1}
    # Too few: the first equal ones stay.
    kept = unequal_groups(config, parts[:1], 3)
    assert kept.completions == parts[0].completions
    assert kept.metrics["kept_mixed"] == pytest.approx(1 / 3)
    np.testing.assert_array_equal(kept.of_pairs, np.ones((1, 5)))


BEYOND = [
    *("--rollout.thinking_budget", "[4, 8]", "--rollout.solution_budget", "[6, 3]"),
    *("--rollout.drop_equal_groups", "true", "--reward.length_cost", "2"),
    *("--loss.clip", "cispo", "--loss.aggregate", "constant"),
    *("--loss.scale_rewards", "false"),
]


@pytest.mark.slow
def test_a_run_beyond_the_paper_resumes_bit_for_bit(workplace, tmp_path):
    """Killed while it samples another batch of prompts for a step, and after an update."""
    moments = f"sampling:4:{int(signal.SIGKILL)} update:3:{int(signal.SIGTERM)}"
    run_dir = interrupted_run(workplace, tmp_path, BEYOND, moments)

    lines = metrics(run_dir)
    drawn = {name for line in lines for name in line if name.startswith("reward_")}
    drawn -= {"reward_timeouts", "reward_crashes"}
    assert drawn <= {"reward_4_6", "reward_4_3", "reward_8_6", "reward_8_3"}
    assert len(drawn) >= 3
    assert max(line["sampled_batches"] for line in lines) > 1
    # Sampled tokens of right answers cost: 4 to 15 of them 0.008 to 0.03.
    for line in lines:
        cost = line["accuracy"] - line["reward"]
        assert 0.007 * line["accuracy"] <= cost <= 0.031 * line["accuracy"]
