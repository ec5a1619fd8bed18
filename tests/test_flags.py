"""Command lines: what is typed is what the dataclasses of flags hold, or is refused."""

import dataclasses
from pathlib import Path

import pytest

from e1jax.cli.command import check_command
from e1jax.cli.flags import EngineFlags, flag, flags_parser, read_flags
from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.evaluate import EvaluateFlags, GradeFlags, PlotFlags
from e1jax.plan.__main__ import PlanFlags
from e1jax.sample import SampleFlags
from e1jax.serve import ServeFlags

SAMPLING = ["solution-budget", "n", "temperature", "top-p", "top-k", "seed"]
ENGINE = [
    "model",
    "mesh",
    "dtype",
    "slots",
    "cache-len",
    "quantize",
    "kv-dtype",
    "no-state-budgets",
    "adapter",
]
FLAGS = {
    SampleFlags: "thinking-budget end-of-thinking-text on-thinking-budget stop prompts output json logprobs raw",
    EvaluateFlags: "dataset budgets limit instruction output",
    GradeFlags: "dataset output",
    PlotFlags: "output",
    PlanFlags: "config topology part mesh slots cache-len live quantize kv-dtype json "
    "dump-hlo",
}
EVALUATE = ["--model", "nano", "--dataset", "nano"]


def sample(*argv: str) -> SampleFlags:
    return read_flags(SampleFlags, argv, "sample")


@pytest.mark.parametrize("cls", FLAGS)
def test_each_command_has_its_flags_and_explains_them(cls):
    names = FLAGS[cls].split()
    if issubclass(cls, EngineFlags):
        names += SAMPLING + ENGINE
    actions = flags_parser(cls, "prog")._actions[1:]  # after --help
    found = [name for action in actions for name in action.option_strings]
    assert sorted(name.lstrip("-") for name in found) == sorted(names)
    assert all(action.help for action in actions)


def test_help_ends_in_the_default():
    texts = {a.dest: a.help for a in flags_parser(SampleFlags, "prog")._actions}
    assert texts["seed"].endswith("(default 0)")
    assert texts["temperature"].endswith("(default 0.6)")
    assert texts["model"].endswith("(default nano)")
    assert texts["slots"].count("default") == 1
    assert "default" not in texts["json"] + texts["end_of_thinking_text"]
    texts = {a.dest: a.help for a in flags_parser(EvaluateFlags, "prog")._actions}
    assert texts["n"].endswith("(default 16)")
    assert texts["model"].endswith("; required")


def test_defaults_are_those_of_the_dataclasses():
    assert sample() == SampleFlags()
    assert sample().sampling == SamplingParams()
    flags = read_flags(EvaluateFlags, EVALUATE, "evaluate")
    assert flags == EvaluateFlags(model="nano", dataset="nano")
    assert flags.sampling == SamplingParams(n=16)
    assert flags.budgets == (512, 1024, 2048, 3072, None)


def test_every_kind_of_value():
    flags = sample(
        *("--thinking-budget", "none", "--solution-budget=7", "-n3", "--top-p", "1"),
        *("--seed", "18446744073709551615", "--temperature", "1e-1", "--json"),
        *(
            "--slots",
            "4",
            "--cache-len=99",
            "--dtype",
            "bfloat16",
            "--kv-dtype",
            "int8",
        ),
        *("--output", "o.jsonl"),
    )
    assert flags == SampleFlags(
        sampling=SamplingParams(
            None, 7, n=3, temperature=0.1, top_p=1.0, seed=2**64 - 1
        ),
        json=True,
        slots=4,
        cache_len=99,
        dtype="bfloat16",
        kv_dtype="int8",
        output=Path("o.jsonl"),
    )
    flags = read_flags(EvaluateFlags, [*EVALUATE, "--budgets", "8,none,4"], "evaluate")
    assert flags.budgets == (4, 8, None)
    plot = read_flags(PlotFlags, ["a.json", "1", "--output", "null"], "plot")
    assert plot == PlotFlags(results=(Path("a.json"), Path("1")), output=Path("null"))


@pytest.mark.parametrize(
    "text",
    ["1", "1.0", "0x1", "[1, 2]", "{}", "null", "true", "a: b", " ", "- a", "-5"],
)
def test_texts_are_not_parsed(text):
    assert sample(text).prompt == (text,)
    assert sample("a", text).prompt == ("a", text)
    joined = [
        f"--{name}={text}" for name in ("end-of-thinking-text", "mesh", "prompts")
    ]
    flags = sample(*joined)
    assert (flags.sampling.end_of_thinking_text, flags.mesh, flags.prompts) == (
        text,
    ) * 3


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["a", "--json", "b", "--seed", "0", "c"], "a b c"),
        (["--json", "a"], "a"),
        (["--", "-x", "--seed"], "-x --seed"),
        (["--json", "--", "--help"], "--help"),
        (["a", "--json", "--", "-b", "--", "c"], "a -b -- c"),
        (["--json", "--"], ""),
    ],
)
def test_flags_and_prompts_mix(argv, prompts):
    assert sample(*argv).prompt == tuple(prompts.split())
    assert sample(*argv).json == ("--json" in argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temprature", "1"], "--temprature 1; did you mean --temperature?"),
        (["--thinking_budget=3"], "_budget=3; did you mean --thinking-budget?"),
        (["--n", "3"], "did you mean -n?"),
        (["--prompt", "hi"], "did you mean --prompts?"),
        (["--temp", "1"], "unrecognized arguments: --temp 1; see sample --help"),
        (["-x"], "unrecognized arguments: -x; see sample --help"),
        (["--seed", "x"], "--seed: invalid int value: 'x'; see"),
        (["--seed", "0x1"], "--seed: invalid int value: '0x1'"),
        (["--seed", "null"], "--seed: invalid int value: 'null'"),
        (["--seed", ""], "--seed: invalid int value: ''"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "-1"], "seed must be a whole number, from 0 to"),
        (["--seed", str(2**64)], "seed must be a whole number, from 0 to"),
        (["-n", "0"], "n must be a whole number, from 1 to"),
        (["--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--temperature", "nan"], "temperature must be a number of 0 or more"),
        (["--top-p", "0"], "top_p must be a number above 0 and at most 1, not 0.0"),
        (["--thinking-budget", "None"], "'None' is not a number of tokens (0 or more)"),
        (["--thinking-budget", "-1"], "--thinking-budget: '-1' is not a number of"),
        (["--solution-budget", "٣"], "--solution-budget: '٣' is not a number of"),
        (["--thinking-budget", str(2**31)], "thinking_budget must be a whole number"),
        (["--slots", "none"], "--slots: invalid int value: 'none'"),
        (["--dtype", "int4"], "--dtype: invalid choice: 'int4' (choose from"),
        (["--json=1"], "--json: ignored explicit argument '1'"),
        (
            ["--end-of-thinking-text", "\boxed{"],
            "end_of_thinking_text holds a backspace",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_one_sentence(argv, message):
    with pytest.raises(UserError) as error:
        sample("hi", *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cls", "argv", "message"),
    [
        (EvaluateFlags, [], "required: --model, --dataset; see"),
        (EvaluateFlags, [*EVALUATE, "x"], "unrecognized arguments: x; see"),
        (EvaluateFlags, [*EVALUATE, "--budgets", "8,8"], "'8,8' names a budget twice"),
        (EvaluateFlags, [*EVALUATE, "--thinking-budget", "5"], "unrecognized"),
        (GradeFlags, [], "required: COMPLETIONS.jsonl, --dataset; see"),
        (GradeFlags, ["a", "b", "--dataset", "nano"], "unrecognized arguments: b"),
        (PlotFlags, ["--output", "p.png"], "required: RESULTS.json; see"),
        (PlanFlags, [], "required: --config, --topology; see"),
        (ServeFlags, ["--modl", "nano"], "--modl; did you mean --model?"),
        (ServeFlags, ["--nonsense", "x"], "required: --model; see"),
        (GradeFlags, ["--", "--datset"], "required: --dataset; see"),
        (EvaluateFlags, [*EVALUATE[:2], "--datset=x"], "did you mean --dataset?"),
        (GradeFlags, ["a", "--datset", "x"], "--datset; did you mean --dataset?"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_of_other_commands(cls, argv, message):
    with pytest.raises(UserError) as error:
        read_flags(cls, argv, "prog")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_command_or_a_flag_comes_first():
    assert check_command(["plot", "x"], ["grade", "plot"], "prog") == "plot"
    for argv in ([], ["--help"], ["-x"]):
        assert check_command(argv, ["grade", "plot"], "prog") is None
    with pytest.raises(UserError, match=r"prog has no command 'plt'; did you mean 'pl"):
        check_command(["plt"], ["grade", "plot"], "prog")
    with pytest.raises(UserError, match=r"prog has no command ''; known: grade, plot"):
        check_command([""], ["grade", "plot"], "prog")


def test_a_field_of_a_base_and_a_percent_sign():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Flags(EngineFlags):
        """Shows 100 % of it.

        The end.
        """

        model: str = flag("MODEL", "nano")
        slots: int | None = None
        """Its own words."""
        share: float | None = None
        """In %, of all
        of it."""

    parser = flags_parser(Flags, "prog")
    text = " ".join(parser.format_help().split())
    assert "Shows 100 % of it. options:" in text and text.endswith("The end.")
    assert "--share X In %, of all of it --mesh" in text
    assert (
        "nano, nano-e1 or nano-elastic (default nano) --slots N Its own words --"
        in text
    )
    assert read_flags(Flags, ["--share", "5"], "prog") == Flags(share=5.0)
