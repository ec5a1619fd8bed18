"""Nano problems, solutions and fine-tuning batches."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from e1jax.config.model import ModelConfig
from e1jax.config.training import SFTConfig, TraceMix
from e1jax.data.nano import (
    LENGTHS,
    NUM_IDS,
    WORDS,
    SFTBatches,
    draw_problem,
    encode_prompt,
    held_out_problems,
    nano_problems,
    sft_batches,
    write_solution,
)
from e1jax.tokenizer import Tokenizer, extract_boxed, write_byte_tokenizer

MODEL = ModelConfig(272, 16, 32, 1, 2, 1, 8, 4096, 1e4, tie_word_embeddings=True)
MIX = TraceMix(4, 0.5, (0.1, 0.35, 0.55), 0.5)
CONFIG = SFTConfig(
    MODEL, steps=20, seed=3, first_phase=0.5, first=TraceMix(6), second=MIX
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    assert write_byte_tokenizer(path, WORDS) == NUM_IDS
    return Tokenizer.from_dir(path)


def brute_force(problem: str) -> int:
    """The answer from the text alone, by Python's own arithmetic on the whole chain."""
    start, steps = re.fullmatch(r"(\d\d)((?:[a-f][-+*]\d){2,6})\?", problem).groups()
    expression = start.lstrip("0") or "0"
    for label, step in zip(
        "abcdef", re.findall(r"[a-f]([-+*]\d)", steps), strict=False
    ):
        assert label in steps
        expression = f"({expression}){step}"
    return eval(expression) % 100  # modulo commutes with all three operators


@given(st.integers(0, 2**32), st.booleans())
def test_problems_follow_the_grammar_and_answers_are_right(seed, held_out):
    problem = draw_problem(np.random.default_rng(seed), held_out=held_out)
    assert problem.answer == str(brute_force(problem.text))
    labels = re.findall("[a-f]", problem.text)
    assert labels == list("abcdef"[: len(labels)])
    for operator, digit in re.findall(r"([-+*])(\d)", problem.text):
        assert int(digit) in ((2, 3) if operator == "*" else range(1, 10))


@given(st.integers(0, 2**32))
def test_traces_cost_the_documented_tokens_and_lead_to_the_answer(tokenizer, seed):
    problem = draw_problem(np.random.default_rng(seed), held_out=False)
    steps = len(problem.steps)
    assert len(tokenizer.encode(problem.verbose())) == 9 * steps
    assert len(tokenizer.encode(problem.terse())) == 5 * steps
    assert len(encode_prompt(problem, tokenizer)) == 5 + 3 + 3 * steps
    value = int(problem.text[:2])
    for _, before, step, after in re.findall(
        r"([a-f])(\d\d)([-+*]\d)=(\d\d);", problem.verbose()
    ):
        assert int(before) == value
        value = eval(f"{value}{step}") % 100
        assert int(after) == value
    assert value == int(problem.answer) == int(problem.terse()[-2:])


def test_the_documented_example():
    problems = nano_problems(2000, held_out=False)
    found = next(p for p in problems if p.values[0] == 22 and p.steps[0] == "+8")
    assert found.verbose().startswith("a22+8=30;")
    assert found.terse().startswith("a+830")


def test_words_are_single_tokens(tokenizer):
    assert [len(tokenizer.encode(word)) for word in WORDS] == [1, 1]
    assert len(tokenizer.encode(r"</think>\boxed{33}")) == 5


@given(st.integers(0, 2**32))
def test_solutions_are_one_pass_repeated_then_a_recap_and_the_box(seed):
    rng = np.random.default_rng(seed)
    problem = draw_problem(rng, held_out=False)
    thinking, solution = write_solution(problem, MIX, rng).split("</think>")
    passes = thinking.split("wait")
    assert 1 <= len(passes) <= 3
    assert passes[0] in (problem.terse(), problem.verbose())
    assert set(passes) == {passes[0]}
    recap, box = solution.split(r"\boxed{")
    assert problem.terse().endswith(recap)
    assert box == problem.answer + "}"
    assert extract_boxed(solution) == problem.answer


def test_the_shares_of_a_mix_hold():
    rng = np.random.default_rng(0)
    problem = draw_problem(rng, held_out=False)
    texts = [write_solution(problem, MIX, rng) for _ in range(4000)]
    rechecks = [text.count("wait") for text in texts]
    shares = np.bincount(rechecks) / len(texts)
    # Four standard errors of a share near one half are 0.032.
    np.testing.assert_allclose(shares, MIX.rechecks, atol=0.032)
    terse = np.mean([text.startswith(problem.terse()) for text in texts])
    recap = np.mean([r"</think>\boxed" not in text for text in texts])
    np.testing.assert_allclose([terse, recap], [MIX.terse, MIX.recap], atol=0.032)


def test_held_out_problems_are_distinct_fixed_and_never_trained_on(tokenizer):
    held_out = held_out_problems(600)
    texts = {p["problem"] for p in held_out}
    assert len(texts) == 600
    assert held_out == held_out_problems(600)
    assert held_out[:50] == held_out_problems(50)
    assert held_out != held_out_problems(600, seed=1)
    assert all(p["answer"] == str(brute_force(p["problem"])) for p in held_out)
    trained = {p.text for p in nano_problems(5000, held_out=False)}
    for batch in sft_batches(CONFIG, tokenizer):
        trained |= {_problem(tokenizer, row) for row in batch["tokens"]}
    assert len(trained) > 5000
    assert not trained & {p.text for p in nano_problems(5000, held_out=True)}
    assert not trained & texts


def test_batches_are_padded_solutions_with_the_loss_on_the_solution(tokenizer):
    shapes = set()
    for batch in sft_batches(CONFIG, tokenizer):
        tokens, mask = batch["tokens"], batch["loss_mask"]
        shapes.add(tokens.shape[0])
        assert tokens.shape == mask.shape
        assert tokens.shape[1] in LENGTHS
        for ids, ones in zip(tokens, mask, strict=True):
            learned = np.flatnonzero(ones)
            start, end = learned[0], learned[-1] + 1
            assert set(ones[start:end]) == {1}
            prompt = tokenizer.decode(ids[:start].tolist())
            assert prompt.endswith("?<｜Assistant｜><think>\n")
            assert prompt.startswith("<｜begin▁of▁sentence｜><｜User｜>")
            response = tokenizer.decode(ids[start:end].tolist())
            answer = brute_force(_problem(tokenizer, ids))
            assert response.endswith(rf"\boxed{{{answer}}}<｜end▁of▁sentence｜>")
            assert (ids[end:] == tokenizer.eos_id).all()
    assert shapes == {CONFIG.first.batch_size, CONFIG.second.batch_size}


def test_batches_depend_on_seed_and_index_alone(tokenizer):
    whole = list(sft_batches(CONFIG, tokenizer))
    assert len(whole) == CONFIG.steps
    for i in (13, 0, 19, 7):  # random access, in any order
        _assert_equal(SFTBatches(CONFIG, tokenizer)[i], whole[i])
    other = SFTBatches(
        SFTConfig(MODEL, 20, 4, first=TraceMix(6), second=MIX), tokenizer
    )
    assert other[0]["tokens"].tolist() != whole[0]["tokens"].tolist()


def test_a_restored_iterator_goes_on_where_it_was(tokenizer):
    whole = list(sft_batches(CONFIG, tokenizer))
    iterator = sft_batches(CONFIG, tokenizer)
    for _ in range(11):
        next(iterator)
    restored = sft_batches(CONFIG, tokenizer)
    restored.set_state(iterator.get_state())
    for batch, expected in zip(restored, whole[11:], strict=True):
        _assert_equal(batch, expected)


def test_a_batch_holds_solutions_of_like_length(tokenizer):
    lengths = [b["loss_mask"].sum(axis=1) for b in sft_batches(CONFIG, tokenizer)]
    within = np.mean([n.std() for n in lengths[:8]])
    assert within < np.concatenate(lengths[:8]).std() / 3


def _problem(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return re.search(r"User｜>(.*?)<", tokenizer.decode(ids.tolist())).group(1)


def _assert_equal(batch, expected):
    for name in ("tokens", "loss_mask"):
        np.testing.assert_array_equal(batch[name], expected[name])
