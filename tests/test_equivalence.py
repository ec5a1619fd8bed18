"""Pairs of answers that are equal, and pairs that are not, by kind."""

import collections
import json
from pathlib import Path

import pytest

from e1jax.rewards.equivalence import equivalent
from e1jax.rewards.marks import marked
from e1jax.rewards.spelling import spell
from e1jax.rewards.tex import elements
from e1jax.rewards.units import conversion, split_unit

# `gold` is the accepted answer.
PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
KINDS = list(dict.fromkeys(pair["kind"] for pair in PAIRS))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_a_kind(kind):
    wrong = [
        pair
        for pair in PAIRS
        if pair["kind"] == kind
        and equivalent(pair["answer"], pair["gold"]) != pair["equal"]
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_equivalent_to_itself(kind):
    texts = {p[side] for p in PAIRS if p["kind"] == kind for side in ("gold", "answer")}
    assert [text for text in sorted(texts) if not equivalent(text, text)] == []


def test_the_pairs_hold_both_verdicts():
    verdicts = collections.Counter(pair["equal"] for pair in PAIRS)
    assert min(verdicts.values()) > 100
    assert len({(p["gold"], p["answer"]) for p in PAIRS}) == len(PAIRS)


def test_a_constant_is_right_for_no_other_number():
    """`0.0` was right for all that is small."""
    small = [p["gold"] for p in PAIRS if p["kind"] == "tolerance" and p["gold"] != "0"]
    cheap = [
        "0",
        "0.0",
        "1e-9",
        r"\emptyset",
        r"\text{}",
        r"\%",
        "x=x",
        r"\variable{x}",
    ]
    accepted = [(c, g) for c in cheap for g in small if equivalent(c, g)]
    assert accepted == []


@pytest.mark.parametrize(
    "text, spelled",
    [
        (r"\frac1e", r"\frac{1}{e}"),
        (r"\frac{\dot x_0}\omega", r"\frac{\dot{x}_{0}}{\omega}"),
        (r"x^-1 + y_12", r"x^{-1} + y_{12}"),
        (r"\sqrt[3]2", r"\sqrt[3]{2}"),
        (r"\frac\sqrt2 3", r"\frac{\sqrt{2}}{3}"),
        (r"10^\frac12", r"10^\frac{1}{2}"),
        (r"1\,234{,}567", "1234567"),
        (r"(1,234)", "(1, 234)"),
        ("1,234,56", "1, 234, 56"),
        (r"0.1\overline6", r"\frac{1}{6}"),
        (r"22^\circ30'36''", r"\frac{2251}{100}\degree"),
        (r"\mathrm{ln}\,x", r"\ln x"),
        (r"\textbf{\text{(A)}}", r"\text{(A)}"),
        (r"\left\{1,2\right.", r"\{1, 2\}"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
        ("5²", "5^{2}"),
        ("**`5`**.", "5"),
    ],
)
def test_one_spelling(text, spelled):
    assert spell(text) == spelled
    assert spell(spelled) == spelled


# Longer ones would not end in a lifetime, were the patterns to try every way.
LOOPS = [
    "cm/",
    "m/",
    "'",
    r"\text{and",
    r"\text{a} ",
    "a",
    "/ ",
    "1,",
    "{",
    "=",
    "°",
    r"\pm",
]


@pytest.mark.parametrize("part", LOOPS)
def test_what_a_model_repeats_ends(part):
    for text in (part * 60, f"5{part * 60}x", rf"\text{{{part * 60}=1}}"):
        value, _ = split_unit(spell(text))
        elements(marked(value))


def test_units():
    value, speed = split_unit(spell(r"60\,\mathrm{km/h}"))
    assert (value, speed) == ("60", split_unit(spell("60 kilometers per hour"))[1])
    metres = split_unit(spell(r"1 \text{ m/s}"))[1]
    assert conversion(speed, metres) * 36 == 10
    assert conversion(speed, split_unit(spell(r"5\text{ s}"))[1]) is None
    assert split_unit(spell(r"5 \text{ or more}"))[1] is None
