"""The paper's figures, wherever the repository mentions them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIGURES = json.loads((ROOT / "benchmarks" / "paper.json").read_text())
MODELS = {model["name"]: model for model in FIGURES["models"]}
TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "configs/*", "tpu_scripts/*", "*/*.py")
    for path in ROOT.glob(pattern)
    if path != Path(__file__)
)


def wrong_figures(text: str) -> list[str]:
    """Lines that give one of the models a figure that the paper does not."""
    wrong = []
    for line in text.splitlines():
        named = [model for name, model in MODELS.items() if name in line]
        known = {f"{p:.1f}" for model in named for p in model["accuracy_percent"]}
        percents = set(re.findall(r"(\d+\.\d) ?%", line)) if named else set()
        pairs = set(re.findall(r"(\d+\.\d) ?% at ([\d,]+) tokens", line))
        right = {
            (f"{model['accuracy_percent'][-1]:.1f}", f"{model['unlimited_tokens']:,}")
            for model in named or MODELS.values()
        }
        if not (percents <= known and pairs <= right):
            wrong.append(line)
    return wrong


def test_the_table_of_the_readme():
    script = ROOT / "benchmarks" / "paper.py"
    spec = importlib.util.spec_from_file_location("paper", script)
    assert spec and spec.loader
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    assert paper.table(FIGURES) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_trained_model_is_ahead_at_every_budget():
    base, trained = FIGURES["models"]
    pairs = zip(base["accuracy_percent"], trained["accuracy_percent"], strict=True)
    assert all(before < after for before, after in pairs)
    assert trained["unlimited_tokens"] < base["unlimited_tokens"]


def test_no_text_has_other_figures_of_the_models():
    found = {path: wrong_figures(path.read_text(encoding="utf-8")) for path in TEXTS}
    assert not {path: lines for path, lines in found.items() if lines}
    assert {path.suffix for path in TEXTS} >= {".md", ".yaml", ".py", ".sh"}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("E1-Math-7B: 69.6 % at 11,768 tokens", False),
        ("E1-Math-7B: 68.3 % at 13,803 tokens", True),
        ("E1-Math-7B: 69.6 % at 13,803 tokens", True),
        ("from 68.3 % at 13,803 tokens to 69.6 % at 11,768 tokens", False),
        ("from 68.3 % at 11,768 tokens", True),
        ("E1-Math-7B has 32.9% at 3k, Skywork-OR1-Math-7B 14.0%", False),
        ("Skywork-OR1-Math-7B has 32.9% at 3k", True),
        ("nano has 32.8 % at 48", False),
    ],
)
def test_which_lines_are_wrong(line, wrong):
    assert bool(wrong_figures(line)) == wrong


def test_links_between_documents_lead_somewhere():
    links = [
        (path, link)
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
        for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 10
    assert not [(p, link) for p, link in links if not (p.parent / link).exists()]
