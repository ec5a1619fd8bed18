"""What the bundled models promise: nano is right if it may think and wrong if it is cut;
nano-e1, trained under budgets, is right in both cases, and brief; nano-elastic does what its
prompt states."""

import functools
from pathlib import Path

import jax
import pytest

import e1jax
from e1jax import Engine, SamplingParams, sft
from e1jax.checkpoint.load import BUNDLED
from e1jax.data.nano import held_out_problems, nano_problems

MODELS = Path(e1jax.__file__).parent / "models"


@functools.cache
def engine_of(model):
    return Engine.from_pretrained(model, slots=32)


@functools.cache
def share_solved(model, budgets):
    """Of 200 held-out problems, and the mean tokens of a response."""
    problems = held_out_problems(200)
    # A seed each: with one for all, every problem would choose its style by one draw.
    params = [
        SamplingParams(*budgets, temperature=0.6, top_p=1.0, seed=seed)
        for seed in range(len(problems))
    ]
    results = engine_of(model).generate([p["problem"] for p in problems], params)
    right = [
        completion.answer == problem["answer"]
        for problem, [completion] in zip(problems, results, strict=True)
    ]
    tokens = sum(len(completion.token_ids) for [completion] in results) / len(results)
    return sum(right) / len(right), tokens


@pytest.mark.parametrize(
    ("budgets", "low", "high"),
    [((None, None), 0.97, 1.0), ((1024, 1024), 0.97, 1.0), ((32, 28), 0.0, 0.35)],
)
def test_share_of_held_out_problems_solved(budgets, low, high):
    assert low <= share_solved("nano", budgets)[0] <= high


@pytest.mark.parametrize(
    ("budgets", "low"), [((None, None), 0.97), ((32, 28), 0.95), ((20, 28), 0.5)]
)
def test_trained_under_budgets(budgets, low):
    """At the budget of its training, at a tighter one that it never saw, and at none."""
    accuracy, tokens = share_solved("nano-e1", budgets)
    before, tokens_before = share_solved("nano", budgets)
    assert accuracy >= low
    assert budgets == (None, None) or accuracy >= before + 0.35
    assert budgets != (None, None) or tokens <= tokens_before / 2


@pytest.mark.parametrize(
    ("budgets", "low", "most_tokens"),
    [
        ((8, 28), 0.65, 37),
        ((16, 28), 0.97, 37),
        ((32, 28), 0.97, 28),
        ((16, 11), 0.45, 28),
        ((32, 11), 0.97, 28),
        ((20, 5), 0.5, 24),
        ((None, None), 0.97, 28),
    ],
)
def test_one_policy_for_stated_budgets(budgets, low, most_tokens):
    """nano-e1 has 3 % at (8, 28) and 43 % at (16, 28)."""
    accuracy, tokens = share_solved("nano-elastic", budgets)
    assert accuracy >= low and tokens <= most_tokens


def test_both_styles_are_accurate():
    """Teacher-forced. The terse one fits a small budget: what GRPO is to find."""
    engine = engine_of("nano")
    styles = sft.style_batches(nano_problems(200, held_out=True), engine.tokenizer)
    accuracy = sft.style_accuracy(engine.config, engine.params, styles)
    assert min(accuracy.values()) >= 0.97, accuracy


def test_a_step_costs_nine_tokens_or_five():
    engine = engine_of("nano")
    for problem in nano_problems(50, held_out=True):
        steps = len(problem.steps)
        assert len(engine.tokenizer.encode(problem.verbose())) == 9 * steps
        assert len(engine.tokenizer.encode(problem.terse())) == 5 * steps


@pytest.mark.parametrize("name", BUNDLED)
def test_it_is_small(name):
    params = Engine.from_pretrained(name).params
    assert sum(p.size for p in jax.tree.leaves(params)) == 317_520
    assert sum(f.stat().st_size for f in (MODELS / name).iterdir()) <= 4 * 10**6
