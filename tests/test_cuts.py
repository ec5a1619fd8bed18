"""Training at several cuts of a thought: sampling, shared rows, advantages, the run."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Chip, several_devices
from test_engine import CONFIG, compiled_programs, make, params, tokenizer
from test_train import interrupted_run, metrics, settings, workplace

from e1jax import train
from e1jax.checkpoint.load import load_model
from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.config.training import RolloutConfig
from e1jax.grpo.cuts import (
    cut_advantages,
    cut_requests,
    cut_response,
    solution_advantages,
    thinking_advantages,
)
from e1jax.grpo.logprobs import Solutions, response_logprobs
from e1jax.grpo.rollouts import longest_lengths
from e1jax.plan.training import abstract_learner, parts_in_pass
from e1jax.sampling.request import Following
from e1jax.sharding.mesh import make_mesh

__all__ = ["make", "params", "tokenizer", "workplace"]  # fixtures

LONGEST_CUT, LONGEST = 9, 5  # tokens of a thought before `</think>`, and of a solution
CUTS = [
    *("--rollout.thinking_budget", "1024"),  # the default: none
    *("--rollout.cuts", "[3, 6, 8]", "--rollout.solutions_per_cut", "2"),
    *("--loss.scale_rewards", "false", "--update.microbatch", "14"),
]


# Sampling.


def follow(thought):
    """Solutions from three cuts of a thought, all of which end in `</think>`."""
    ids = thought.token_ids
    seen = sorted({min(cut, len(ids) - 1) for cut in (0, 4, 17)})
    return [
        Following(
            100 + 10 * (4 * thought.prompt_index + thought.sample) + j,
            [*thought.prompt_ids, *ids[:tokens], ids[-1]],
            SamplingParams(None, 5 + j, n=2, top_p=1.0, seed=7 * thought.sample + j),
        )
        for j, tokens in enumerate(seen)
    ]


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_followers_are_sampled_as_any_request(make, slots):
    """From the keys and values of the thought: only the prompts are prefilled."""
    prompts = ["a", "some longer prompt", "third"]
    thinking = SamplingParams(17, 0, n=3, temperature=1.0, top_p=1.0, seed=3)
    engine = make(slots=slots)
    found = list(engine.stream(prompts, thinking, follow=follow))
    assert engine.stats.prefills == len(prompts)
    assert engine.running == engine.waiting == 0
    thoughts = [c for c in found if c.prompt_index < len(prompts)]
    assert len(thoughts) == 9
    plain = {}
    reference = make(slots=5)
    for samples in reference.generate(prompts, thinking):
        plain |= {(c.prompt_index, c.sample): c for c in samples}
    for c in thoughts:
        assert c.token_ids == plain[c.prompt_index, c.sample].token_ids
    followers = [request for thought in thoughts for request in follow(thought)]
    results = reference.generate(
        [f.prompt_ids for f in followers], [f.params for f in followers]
    )
    expected = {
        (f.index, c.sample): c
        for f, samples in zip(followers, results, strict=True)
        for c in samples
    }
    assert len(found) == 9 + len(expected) and len(expected) >= 40
    for c in found:
        if c.prompt_index >= 100:
            want = expected[c.prompt_index, c.sample]
            assert (c.token_ids, c.solution) == (want.token_ids, want.solution)
            assert (c.prompt_ids, c.finish_reason) == (
                want.prompt_ids,
                want.finish_reason,
            )
            np.testing.assert_allclose(c.logprobs, want.logprobs, atol=1e-4)


def test_slots_that_hold_thoughts_are_used_at_once(make):
    """As many thoughts as slots: each goes on where it is, and hardly a step is wasted.
    Nothing is compiled for other cuts."""
    engine = make(slots=4)
    thinking = SamplingParams(17, 0, n=4, temperature=1.0, top_p=1.0, seed=3)
    list(engine.stream(["prompt"], thinking, follow=follow))
    assert engine.stats.tokens > 0.8 * engine.stats.slot_steps
    seen = compiled_programs()
    list(engine.stream(["other"], SamplingParams(11, 0, n=4, seed=1), follow=follow))
    assert seen == []


def test_a_stream_with_followers_can_be_abandoned(make):
    engine = make(slots=2)
    thinking = SamplingParams(17, 0, n=4, temperature=1.0, top_p=1.0, seed=3)
    stream = engine.stream(["prompt"], thinking, follow=follow)
    next(stream)
    stream.close()
    assert engine.running == engine.waiting == 0
    again = engine.generate(["prompt"], thinking)
    assert again == make(slots=2).generate(["prompt"], thinking)


def thought(ids, end):
    return types.SimpleNamespace(
        prompt_index=1,
        sample=2,
        prompt_ids=[5, 6],
        token_ids=ids,
        logprobs=[-0.5] * len(ids),
        thinking_end=end,
    )


@pytest.mark.parametrize(
    ("ids", "end", "seen"),
    [
        ([97] * 8 + [261], "budget", [3, 6, 8]),
        ([97] * 4 + [261], "model", [3, 4, 4]),
        ([97] * 4 + [261], "eos", [3, 4, 4]),
        ([97] * 3 + [261], "model", [3, 3, 3]),
        ([261], "model", [0, 0, 0]),
    ],
)
def test_a_thought_is_cut_unless_it_has_ended(workplace, ids, end, seen):
    """A request for each state, with the samples of all of its cuts."""
    config = settings(workplace, *CUTS)
    requests = cut_requests(config, thought(ids, end), position=9, num_prompts=4)
    states = sorted(set(seen))
    assert [r.prompt_ids for r in requests] == [
        [5, 6, *ids[:tokens], 261] for tokens in states
    ]
    assert [r.params.n for r in requests] == [2 * seen.count(s) for s in states]
    assert {(r.params.thinking_budget, r.params.solution_budget) for r in requests} == {
        (None, 6)
    }
    assert len({r.params.seed for r in requests}) == len(states)
    # 4 prompts, and 3 cuts of each of 4 thoughts.
    first = 4 + (1 * 4 + 2) * 3
    assert [r.index for r in requests] == [first + seen.index(s) for s in states]


def test_a_response_is_as_if_sampled_under_its_cut(make, tokenizer):
    """Thinking, ends and counts are those of plain sampling at each budget."""
    cuts = (2, 5, 11)
    engine = make(slots=6)
    options = {"n": 12, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    [thoughts] = engine.generate(["prompt"], SamplingParams(11, 0, **options))
    assert {c.thinking_end for c in thoughts} == {"budget", "model", "eos"}
    [solution] = engine.generate(
        [[97, 261]], SamplingParams(None, 4, top_p=1.0, seed=1)
    )[0]
    for cut in cuts:
        [plain] = engine.generate(["prompt"], SamplingParams(cut, 0, **options))
        for own, want in zip(thoughts, plain, strict=True):
            got = cut_response(own, cut, solution, tokenizer)
            size = len(want.token_ids)
            assert got.prompt_ids == want.prompt_ids
            assert got.token_ids == want.token_ids + solution.token_ids
            assert got.forced == want.forced + solution.forced
            assert got.thinking == want.thinking
            assert got.text == want.text + solution.solution
            assert got.thinking_tokens == want.thinking_tokens
            assert got.thinking_end == want.thinking_end
            assert got.solution_tokens == solution.solution_tokens
            np.testing.assert_allclose(
                got.logprobs[: size - 1], want.logprobs[:-1], atol=1e-5
            )
            is_known = size == len(own.token_ids)
            assert math.isnan(got.logprobs[size - 1]) != is_known


# Advantages.


def test_advantages_of_solutions():
    """Each less the mean of all from the same state, by loops."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(2, 3, (2, 3, 4, 5))
    seen = np.sort(rng.integers(0, 4, (2, 3, 4)), axis=-1)
    seen[0, 0], seen[1, 1] = [1, 2, 3, 4], [7, 7, 7, 7]
    got = solution_advantages(rewards, seen)
    for n, g, m, k in np.ndindex(rewards.shape):
        others = [
            rewards[n, g, i, j]
            for i, j in np.ndindex(4, 5)
            if seen[n, g, i] == seen[n, g, m]
        ]
        want = rewards[n, g, m, k] - sum(others) / len(others)
        assert got[n, g, m, k] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(("groups", "cuts"), [(3, 4), (5, 1), (2, 7)])
def test_advantages_of_parts_of_thoughts(groups, cuts):
    """BRPO by loops: the return of a part less its two baselines."""
    rewards = np.random.default_rng(cuts).normal(1, 2, (2, groups, cuts, 3))
    got = thinking_advantages(rewards)
    assert got.shape == (2, groups, cuts)
    for n in range(2):
        means = [[np.mean(r) for r in own] for own in rewards[n]]
        for g in range(groups):
            for j in range(cuts):
                returns = [sum(own[j:]) / cuts for own in means]
                v1 = 0.0
                if j:
                    weights = [2.0**i for i in range(j)]
                    v1 = sum(w * r for w, r in zip(weights, means[g], strict=False))
                    v1 *= (cuts - j) / cuts / sum(weights)
                v2 = sum(returns) / groups
                want = returns[g] - (j * v1 + (cuts - j) * v2) / cuts
                assert got[n, g, j] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("reward", [0, 1, 0.1, -2.7])
def test_equal_rewards_teach_nothing(reward):
    rewards = np.full((2, 3, 4, 5), reward, np.float32)
    assert not thinking_advantages(rewards).any()
    assert not solution_advantages(rewards, np.ones((2, 3, 4), int)).any()


def test_advantages_of_tokens():
    """Of a thought's tokens by the cuts that they come before, of solutions throughout."""
    rollout = RolloutConfig(samples=2, cuts=(2, 5), solutions_per_cut=2)
    rewards = np.float32([[1, 0, 1, 1, 0, 0, 1, 1]])
    thoughts = [thought([0] * 6, "budget"), thought([0] * 2, "model")]
    rows = [row for own in thoughts for row in [own] * 5]
    got = cut_advantages(rollout, rewards, rows, 7)
    parts = thinking_advantages(rewards.reshape(1, 2, 2, 2))[0]
    for g in range(2):
        want = [parts[g, 0]] * 2 + [parts[g, 1]] * 5
        np.testing.assert_allclose(got[5 * g], want, atol=1e-7)
    want = [0.5, -0.5, 0, 0], [-0.5, -0.5, 0.5, 0.5]  # the second has one state
    for g in range(2):
        for row in range(4):
            assert (got[5 * g + 1 + row] == want[g][row]).all()


# Rows of a thought and its solutions.


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
            # One thought of two ends before the last cuts.
            ids = rng.integers(0, 250, LONGEST_CUT - 3 * (g % 2))
            ids = np.append(ids, 261)
            add(prompt, ids)
            for cut in seen:
                context = np.append(ids[: min(cut, len(ids) - 1)], 261)
                solution = rng.integers(0, 250, rng.integers(1, LONGEST + 1))
                add(np.concatenate([prompt, context]), solution)
    return jnp.array(np.stack(rows)), jnp.array(starts), np.array(mask)


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(3, id="whole groups"),
        pytest.param(4, id="whole thoughts", marks=pytest.mark.slow),
    ],
)
def test_shared_thoughts_are_as_complete_rows(loaded, samples):
    """Values and gradients, where only thoughts are whole too (a group of 4 is not)."""
    tokens, prompt_len, mask = tree_rows(np.random.default_rng(0))
    weights = jnp.array(np.random.default_rng(1).normal(size=(2, *mask.shape)))
    params = loaded.read_params()

    def weighted(params, samples, solutions):
        values = response_logprobs(
            loaded.config,
            params,
            tokens,
            prompt_len,
            mask.shape[1],
            jnp.float32(0.8),
            entropy_grad=True,
            samples=samples,
            solutions=solutions,
        )
        total = sum(
            jnp.where(mask, value * w, 0).sum()
            for value, w in zip(values, weights, strict=True)
        )
        return total, values

    both = jax.jit(jax.value_and_grad(weighted, has_aux=True), static_argnums=(1, 2))
    (_, want), want_grads = both(params, 1, None)
    (_, got), got_grads = both(params, samples, Solutions(5, LONGEST_CUT, LONGEST))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[mask], b[mask], atol=3e-5)
    for a, b in zip(*map(jax.tree.leaves, (got_grads, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()) + 1e-6)
    # Thoughts, and prompts of whole groups, are there once.
    jaxpr = str(jax.make_jaxpr(both, static_argnums=(1, 2))(
        params, samples, Solutions(5, LONGEST_CUT, LONGEST)
    ))  # fmt: skip
    num_prompts = 2 if samples == 3 else 6
    num_tokens = num_prompts * 6 + 6 * LONGEST_CUT + 30 * LONGEST
    assert f"[1,{num_tokens},{loaded.config.hidden_size}]" in jaxpr
    assert f"[36,{tokens.shape[1] - 1},{loaded.config.hidden_size}]" not in jaxpr


# Settings.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rollout.cuts", "[8, 6]"], "cuts must rise, and 6 comes after 8"),
        (["--rollout.cuts", "[8, 8]"], "cuts must rise, and 8 comes after 8"),
        (["--rollout.cuts", "[0, 8]"], "cuts must be a whole number"),
        (["--rollout.solutions_per_cut", "1"], "solutions_per_cut must be a whole"),
        (["--rollout.thinking_budget", "8"], "rollout.thinking_budget=8 is set too"),
        (["--rollout.solution_budget", "0"], "need one rollout.solution_budget"),
        (["--rollout.solution_budget", "[3, 6]"], "need one rollout.solution_budget"),
        (["--rollout.solution_budget", "null"], "need one rollout.solution_budget"),
        (["--rollout.state_budgets", "true"], "set rollout.state_budgets: false"),
        (["--rollout.thinking_budget_until", "{3: 8}"], "thinking_budget_until=.* too"),
        (["--rollout.solution_budget_until", "{3: 8}"], "need one rollout.solution"),
        (["--loss.scale_rewards", "true"], "set loss.scale_rewards: false"),
        (["--loss.clip", "gspo"], "loss.clip=gspo has one ratio"),
        (["--loss.train_on_forced", "true"], "leave it false"),
        (["--update.microbatch", "16"], r"samples x \(1 \+ cuts x solutions_per_cut\)=28"),
    ],
)  # fmt: skip
def test_settings_are_checked(workplace, flags, words):
    with pytest.raises(UserError, match=words) as error:
        settings(workplace, *CUTS, *flags)
    assert "\n" not in str(error.value)


def test_a_cache_without_room_is_refused(workplace, tmp_path):
    config = settings(workplace, *CUTS, "--rollout.cache_len", "30")
    with pytest.raises(UserError, match=r"budgets of \[3, 6, 8\] and 6") as error:
        train.train(config, tmp_path / "none")
    assert "is enough" in str(error.value)


def test_lengths_have_room_for_a_solution_to_the_longest_thought(workplace):
    assert longest_lengths(settings(workplace, *CUTS), 64, 20, 31) == (31 + 9, 9)
    long = settings(workplace, *CUTS, "--rollout.solution_budget", "20")
    assert longest_lengths(long, 64, 20, 31) == (31 + 9, 20)


# A run.


@pytest.mark.slow
def test_a_run_with_cuts_resumes_bit_for_bit(workplace, tmp_path):
    """Killed while it samples, and after an update."""
    flags = [*CUTS, "--loss.entropy_coef", "0.01", "--reward.length_cost", "2"]
    moments = f"sampling:4:{int(signal.SIGKILL)} update:3:{int(signal.SIGTERM)}"
    run_dir = interrupted_run(workplace, tmp_path, flags, moments)
    for line in metrics(run_dir):
        rewards = [line[f"reward_{cut}_6"] for cut in (3, 6, 8)]
        assert line["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)
        assert {line[f"forced_share_{cut}_6"] for cut in (3, 6, 8)} == {1}
        tokens = [line[f"response_tokens_{cut}_6"] for cut in (3, 6, 8)]
        assert 3 + 1 < tokens[0] < tokens[1] < tokens[2] <= 8 + 1 + 6
        cost = line["accuracy"] - line["reward"]  # of 4 to 14 sampled tokens
        assert 0.007 * line["accuracy"] <= cost <= 0.029 * line["accuracy"]


ON_EIGHT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train
from e1jax import train
train.train(test_train.settings(Path(sys.argv[2]), *sys.argv[4:]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_eight_devices_train_as_one(workplace, tmp_path):
    """Each with one thought of two prompts, and its solutions."""
    flags = [*CUTS, "--steps", "2", "--validation.limit", "1", "--loss.kl_coef", "0.1"]
    flags += ["--update.microbatch", "56", "--update.minibatch_prompts", "2"]
    train.train(settings(workplace, *flags), tmp_path / "one")
    tests = os.path.dirname(__file__)
    done = subprocess.run(
        [
            *(sys.executable, "-c", ON_EIGHT, tests, str(workplace)),
            *(str(tmp_path / "eight"), *flags, "--mesh", "data=8,tensor=1"),
        ],
        env={**os.environ, "XLA_FLAGS": several_devices(8), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(*map(metrics, (tmp_path / "eight", tmp_path / "one")), strict=True):  # fmt: skip
        assert ours == {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in theirs.items()}  # fmt: skip


def test_plan_sees_the_arrays_of_training(workplace):
    """The shapes of an update by the longest responses: 2 x 14 rows of one prompt."""
    config = settings(workplace, *CUTS)
    mesh = make_mesh("data=2,tensor=1", CONFIG, [Chip(i) for i in range(2)])
    learner, batch = abstract_learner(config, CONFIG, mesh)
    # Prompts of 40, a thought of 9 with its end before a solution, responses of 9.
    assert batch.tokens.shape == (2, 14, 40 + 9 + 9)
    for array in (batch.loss_mask, batch.advantages, batch.old_logprobs):
        assert array.shape == (2, 14, 9)
    # On each device a thought of 9, after its prompt, and 6 solutions of 6 after both.
    assert parts_in_pass(learner) == [(1, 0, 40), (1, 40, 9), (6, 49, 6)]
    uneven = dataclasses.replace(config.update, microbatch=4)
    config = dataclasses.replace(config, update=uneven)
    learner, _ = abstract_learner(config, CONFIG, mesh)
    assert parts_in_pass(learner) == [(2, 0, 58)]
