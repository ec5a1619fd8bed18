"""What the bundled nano model promises: right if it may think, wrong if it is cut."""

from pathlib import Path

import jax
import pytest

import e1jax
from e1jax import Engine, SamplingParams, sft
from e1jax.data import held_out_problems, nano_problems

NANO = Path(e1jax.__file__).parent / "models" / "nano"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", slots=32)


@pytest.mark.parametrize(
    ("budgets", "low", "high"),
    [((None, None), 0.97, 1.0), ((1024, 1024), 0.97, 1.0), ((32, 28), 0.0, 0.35)],
)
def test_share_of_held_out_problems_solved(engine, budgets, low, high):
    problems = held_out_problems(200)
    # A seed each: with one for all, every problem would choose its style by one draw.
    params = [
        SamplingParams(*budgets, temperature=0.6, top_p=1.0, seed=seed)
        for seed in range(len(problems))
    ]
    results = engine.generate([p["problem"] for p in problems], params)
    right = [
        completion.answer == problem["answer"]
        for problem, [completion] in zip(problems, results, strict=True)
    ]
    assert low <= sum(right) / len(right) <= high


def test_both_styles_are_accurate(engine):
    """Teacher-forced. The terse one fits a small budget: what GRPO is to find."""
    styles = sft.style_batches(nano_problems(200, held_out=True), engine.tokenizer)
    accuracy = sft.style_accuracy(engine.config, engine.params, styles)
    assert min(accuracy.values()) >= 0.97, accuracy


def test_a_step_costs_nine_tokens_or_five(engine):
    for problem in nano_problems(50, held_out=True):
        steps = len(problem.steps)
        assert len(engine.tokenizer.encode(problem.verbose())) == 9 * steps
        assert len(engine.tokenizer.encode(problem.terse())) == 5 * steps


def test_it_is_small(engine):
    assert sum(p.size for p in jax.tree.leaves(engine.params)) == 317_520
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 4 * 10**6
