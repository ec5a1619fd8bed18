"""Stated budgets: in words, recorded with a model, in training, sampling and serving."""

import dataclasses
import json
import re
import shutil
import signal
import sys

import httpx
import hypothesis
import numpy as np
import pytest
from conftest import edit_json
from hypothesis import given
from hypothesis import strategies as st
from live_server import serving
from test_train import NANO, interrupted_run, settings, workplace
from transformers import AutoTokenizer

from e1jax import Engine, SamplingParams, convert, evaluate, sample, train
from e1jax.checkpoint.load import load_model
from e1jax.cli.command import run_command
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError
from e1jax.config.sampling import BUDGET_TEXT, check_budget_text, stated_budgets
from e1jax.config.training import StatedConfig, TraceMix
from e1jax.data.nano import (
    WORDS,
    draw_problem,
    encode_trace,
    held_out_problems,
    nano_problems,
    state_trace,
    write_solution,
)
from e1jax.grpo.rollouts import (
    drawn_pair,
    make_engine,
    prompt_lengths,
    read_examples,
    statements,
)
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer

__all__ = ["workplace"]  # fixtures

SHORT = "{thinking:-},{solution:-}:"
PROBLEMS = [problem["problem"] for problem in held_out_problems(4)]
PAIRS = [(5, 9), (0, 12), (None, 7), (11, None)]
WRITTEN = ["5,9:", "0,12:", "-,7:", "11,-:"]


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """The nano model, as if it had been trained with stated budgets."""
    path = tmp_path_factory.mktemp("stated") / "model"
    shutil.copytree(NANO, path)
    edit_json(path / "tokenizer_config.json", e1jax_budget_text=SHORT)
    return path


@pytest.fixture(scope="module")
def engines(stated):
    """Of that model, and of the one whose prompts are as they are."""
    sizes = {"cache_len": 300, "slots": 4}
    return [Engine.from_pretrained(str(m), **sizes) for m in (stated, "nano")]


def requests(n=1):
    return [SamplingParams(*pair, n=n, seed=i) for i, pair in enumerate(PAIRS)]


def user(text):
    return {"role": "user", "content": text}


# In words.


@pytest.mark.parametrize(
    "text, pair, said",
    [
        (
            BUDGET_TEXT,
            (1024, 512),
            "Think for at most 1024 tokens and answer in at most 512 tokens.\n",
        ),
        (
            BUDGET_TEXT,
            (None, 0),
            "Think for as long as you need and answer in at most 0 tokens.\n",
        ),
        (
            "{solution} after {thinking}. ",
            (None, None),
            "as long as you need after as long as you need. ",
        ),
        ("t={thinking:no limit}", (7, 8), "t=7"),
        ("t={thinking:no limit}", (None, 8), "t=no limit"),
        ("{thinking:}|", (None, 8), "|"),
    ],
)
def test_budgets_in_words(text, pair, said):
    check_budget_text(text, "it")
    assert stated_budgets(text, *pair) == said


@pytest.mark.parametrize(
    "text", ["", "Be brief.", "{think} {thinking}", "{thinking!r}", "{}{thinking}", 3]
)
def test_texts_that_state_no_budget_are_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"^here must (be a text|hold \{thinking\} or)"):
        check_budget_text(text, "here")
    write_byte_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", e1jax_budget_text=text)
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: e1jax_budget_text must"
    ):
        Tokenizer.from_dir(tmp_path)


# In a prompt.


def test_a_request_states_its_own_budgets(engines):
    """As the plain model with the texts written by hand, in one batch and to the token."""
    ours, plain = engines
    by_hand = [w + p for w, p in zip(WRITTEN, PROBLEMS, strict=True)]
    got, want = (
        ours.generate(PROBLEMS, requests(2)),
        plain.generate(by_hand, requests(2)),
    )
    assert got == want
    decode = ours.tokenizer.decode
    for [first, second], written in zip(got, by_hand, strict=True):
        assert f"<｜User｜>{written}<｜Assistant｜>" in decode(first.prompt_ids)
        assert first.prompt_ids == second.prompt_ids


def test_the_last_message_of_the_user_states_them(engines):
    ours, plain = engines
    [params, *_] = requests()
    head = [{"role": "system", "content": "Be right."}, user("1+1?")]
    head.append({"role": "assistant", "content": "2"})
    for messages, by_hand in (
        ([*head, user("2+2?")], [*head, user("5,9:2+2?")]),
        ([user("2+2?"), head[2]], [user("5,9:2+2?"), head[2]]),
        ([head[0]], [head[0]]),  # nobody asks
    ):
        before = json.dumps(messages)
        assert ours.encode(messages, params=params) == plain.encode(by_hand)
        assert json.dumps(messages) == before
        assert ours.encode(messages) == plain.encode(messages)


def test_parts_of_a_message(stated, tmp_path):
    """Of templates that know them, as those of models that see."""
    path = shutil.copytree(stated, tmp_path / "model")
    template = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    edit_json(path / "tokenizer_config.json", chat_template=template)
    engine = Engine.from_pretrained(str(path), cache_len=99, slots=1)
    ids = engine.encode(
        [user([{"type": "text", "text": "2+2?"}])], params=requests()[0]
    )
    assert engine.tokenizer.decode(ids) == "[5,9:][2+2?]"


def test_token_ids_are_used_as_they_are(engines):
    """Also those that a completion has, which state their budgets already."""
    ours, _ = engines
    ids = [12, 99, 258, 260, 198]
    got, want = (engine.generate([ids], requests()[0]) for engine in engines)
    assert got == want and got[0][0].prompt_ids == ids
    [[first]] = ours.generate(PROBLEMS[:1], requests()[0])
    assert ours.generate([first.prompt_ids], requests()[0]) == [[first]]


def test_it_can_be_switched_off(stated, engines):
    off = Engine.from_pretrained(
        str(stated), cache_len=300, slots=4, state_budgets=False
    )
    assert off.generate(PROBLEMS, requests()) == engines[1].generate(
        PROBLEMS, requests()
    )


def test_the_statement_counts_as_prompt(engines):
    """A request that fits without it is refused with it, and thinking is cut for it."""
    ours, plain = engines
    [params, *_] = requests()
    length = len(plain.encode(PROBLEMS[0]))
    solution = 300 - length - 1  # nothing is left but for the forced </think>
    tight = dataclasses.replace(params, solution_budget=solution)
    plain._request(0, PROBLEMS[0], tight, "it")
    with pytest.raises(UserError, match=f"{length + len('5,255:')} tokens"):
        ours._request(0, PROBLEMS[0], tight, "it")


# Recorded with a model.


def test_the_text_goes_where_the_model_goes(stated, tmp_path):
    convert.from_hf(str(stated), tmp_path / "e1")
    convert.to_hf(str(tmp_path / "e1"), tmp_path / "back")
    for path in (tmp_path / "e1", tmp_path / "back"):
        assert load_model(str(path)).tokenizer.budget_text == SHORT
    # transformers reads and writes the files, and keeps what it does not know.
    loaded = AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = loaded.apply_chat_template(
        [user("5,9:" + PROBLEMS[0])], add_generation_prompt=True, return_dict=False
    )
    ours = Engine.from_pretrained(str(tmp_path / "back"), cache_len=99, slots=1)
    assert ours.encode(PROBLEMS[0], params=requests()[0]) == ids
    loaded.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").budget_text == SHORT


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: exit code and stderr."""

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        try:
            run_command(main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def prompts_of(path, tokenizer):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [tokenizer.decode(record["prompt_ids"]) for record in records]


def test_sample_states_budgets_and_resumes_by_them(stated, tmp_path, run, engines):
    out = tmp_path / "out.jsonl"
    flags = [PROBLEMS[0], "--cache-len", 200, "--thinking-budget", 3]
    flags += ["--solution-budget", 4, "--output", out]
    assert run(sample.main, *flags, "--model", stated)[0] == 0
    [prompt] = prompts_of(out, engines[0].tokenizer)
    assert f"<｜User｜>3,4:{PROBLEMS[0]}<" in prompt
    assert run(sample.main, *flags, "--model", stated, "-n", 2)[0] == 0
    assert prompts_of(out, engines[0].tokenizer) == [prompt, prompt]
    code, error = run(sample.main, *flags, "--model", stated, "--no-state-budgets")
    assert code == 2 and f"was made with budget_text='{SHORT}'" in error

    out.unlink()
    off = [*flags, "--model", stated, "--no-state-budgets"]
    assert run(sample.main, *off)[0] == 0
    # An output of a version that stated none has no such setting, and can be resumed.
    record = out.with_name("out.jsonl.settings.json")
    made_how = read_json(record)
    assert made_how["settings"].pop("budget_text") is None
    record.write_text(json.dumps(made_how))
    assert run(sample.main, *off, "-n", 2)[0] == 0
    plain = f"<｜User｜>{PROBLEMS[0]}<"
    assert all(plain in p for p in prompts_of(out, engines[0].tokenizer))
    out.unlink()
    assert run(sample.main, *flags, "--model", stated, "--raw")[0] == 0
    assert prompts_of(out, engines[0].tokenizer) == [PROBLEMS[0]]


def test_each_budget_of_an_evaluation_states_itself(stated, tmp_path, run, monkeypatch):
    seen = []
    stream = Engine.stream

    def noting(self, *args, **options):
        for completion in stream(self, *args, **options):
            seen.append(self.tokenizer.decode(completion.prompt_ids))
            yield completion

    monkeypatch.setattr(Engine, "stream", noting)
    flags = ["--dataset", "nano", "--limit", 2, "--budgets", "2,6,none", "-n", 1]
    flags += ["--solution-budget", 5, "--cache-len", 200, "--model", stated]
    assert run(evaluate.main, *flags, "--output", tmp_path / "out")[0] == 0
    found = [re.search(r"<｜User｜>(.*?:)", prompt)[1] for prompt in seen]
    assert sorted(found) == ["-,5:"] * 2 + ["2,5:"] * 2 + ["6,5:"] * 2
    assert read_json(tmp_path / "out" / "results.json")["budget_text"] == SHORT
    code, error = run(
        evaluate.main, *flags, "--output", tmp_path / "out", "--no-state-budgets"
    )
    assert code == 2 and "this run has budget_text=None" in error


# Over HTTP.


@pytest.fixture(scope="module")
def client(engines):
    with (
        serving(engines[0]) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_a_conversation_with_changing_budgets(client, engines):
    """States those that fit into max_completion_tokens, before the last question. What
    came before the last question of an earlier turn is in the cache, whatever budgets
    that one had."""
    _, plain = engines
    messages = [{"role": "system", "content": "x" * 130}, user(PROBLEMS[0])]
    asked = ["4,6:", "8,8:", "-,5:"]
    fields = [
        {"thinking_token_budget": 4, "solution_token_budget": 6},
        {"max_completion_tokens": 17},
        {"thinking_token_budget": -1, "solution_token_budget": 5},
    ]
    params = [(4, 6), (8, 8), (None, 5)]
    for turn, (text, body, pair) in enumerate(zip(asked, fields, params, strict=True)):
        answer = client.post(
            "/v1/chat/completions", json={"messages": messages, "seed": turn, **body}
        )
        assert answer.status_code == 200, answer.text
        by_hand = [*messages[:-1], user(text + messages[-1]["content"])]
        [[want]] = plain.generate([by_hand], SamplingParams(*pair, seed=turn))
        [choice] = answer.json()["choices"]
        assert choice["message"]["content"] == want.solution
        assert choice["message"]["reasoning"] == want.thinking
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == len(want.prompt_ids)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached == (128 if turn else 0)  # in steps of 128
        said = {"role": "assistant", "content": want.solution}
        messages += [said, user(PROBLEMS[turn + 1])]


def test_texts_to_complete_are_as_they_are(client, engines):
    body = {"prompt": PROBLEMS[0], "max_tokens": 6, "seed": 1}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len(PROBLEMS[0])


# In training.

FLAGS = [
    *("--rollout.state_budgets", "true", "--data.max_prompt_len", "100"),
    *("--rollout.thinking_budget", "[4, 8, null]", "--rollout.solution_budget", "[6]"),
    *("--rollout.cache_len", "70", "--validation.budgets", "[[8, 6]]"),
]
SHORTLY = ["--data.budget_text", SHORT]


def test_which_text_training_states(workplace, stated):
    def text(*flags):
        return train.load_policy(settings(workplace, *flags)).tokenizer.budget_text

    on = FLAGS[:2]
    of_model = ["--model", str(stated)]
    assert text() is None and text(*of_model) is None
    assert text(*on) == BUDGET_TEXT and text(*on, *of_model) == SHORT
    other = ["--data.budget_text", "{thinking}!"]
    assert text(*on, *other) == text(*on, *of_model, *other) == "{thinking}!"
    with pytest.raises(UserError, match=r"rollout\.state_budgets is false"):
        settings(workplace, *SHORTLY)
    with pytest.raises(UserError, match=r"data\.budget_text must hold \{thinking\}"):
        settings(workplace, *on, "--data.budget_text", "Hurry!")


def test_the_longest_prompt_has_the_longest_statement(workplace):
    config = settings(workplace, *FLAGS, *SHORTLY)
    loaded = train.load_policy(config)
    assert set(statements(config, loaded.tokenizer)) == {"4,6:", "8,6:", "-,6:"}
    several = settings(
        workplace, *FLAGS, "--rollout.thinking_budget", "[4,128]", *SHORTLY
    )
    assert statements(several, loaded.tokenizer)[-1] == "128,6:"
    plain = read_examples(settings(workplace), load_model("nano"), "")
    length = len(plain[0].prompt_ids)
    assert {len(e.prompt_ids) for e in plain} == {length}
    examples = read_examples(several, loaded, "")
    assert {len(e.prompt_ids) for e in examples} == {length + 6}
    assert prompt_lengths(several, loaded.tokenizer, examples) == (
        length + 4,
        length + 6,
    )
    for most, kept in ((length + 6, 5), (length + 5, None)):
        tight = [*SHORTLY, "--data.max_prompt_len", str(most)]
        flags = [*FLAGS, "--rollout.thinking_budget", "[4,128]", *tight]
        if kept:
            assert len(read_examples(settings(workplace, *flags), loaded, "")) == kept
        else:
            with pytest.raises(UserError, match="no prompt has at most max_prompt_len"):
                read_examples(settings(workplace, *flags), loaded, "")
    needed = length + 4 + 8 + 1 + 6
    flags = [*FLAGS, *SHORTLY, "--rollout.thinking_budget", "[4,8]"]
    small = settings(workplace, *flags, "--rollout.cache_len", str(needed - 1))
    with pytest.raises(UserError, match=f"{needed} is enough"):
        make_engine(small, loaded, read_examples(small, loaded, ""))


@pytest.mark.slow
def test_a_run_that_states_budgets(workplace, tmp_path, monkeypatch):
    """Each prompt states what its position draws; killed at two places, it resumes bit
    for bit; its model states budgets too."""
    prompts = []
    sample_rollouts = train.sample_rollouts

    def noting(config, engine, given, *args, **options):
        rollouts = sample_rollouts(config, engine, given, *args, **options)
        prompts.extend(
            (config, prompt, engine.tokenizer.decode(completion.prompt_ids))
            for prompt, completion in zip(given, rollouts.completions[::4], strict=True)
        )
        return rollouts

    config = settings(workplace, *FLAGS, *SHORTLY)
    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_rollouts", noting)
        train.train(config, tmp_path / "unbroken")
    assert len(prompts) == 12
    for of_step, prompt, text in prompts:
        thinking, solution = of_step.rollout.pairs[drawn_pair(config, prompt.position)]
        written = f"{'-' if thinking is None else thinking},{solution}:"
        assert f"<｜User｜>{written}{prompt.text}<｜Assistant｜>" in text
    assert len({text.partition(":")[0] for *_, text in prompts}) > 1

    moments = f"sampling:4:{int(signal.SIGKILL)} update:3:{int(signal.SIGTERM)}"
    run_dir = interrupted_run(workplace, tmp_path, [*FLAGS, *SHORTLY], moments)

    convert.to_hf(str(run_dir), tmp_path / "hf")
    for model in (run_dir, tmp_path / "hf"):
        assert load_model(str(model)).tokenizer.budget_text == SHORT
    # Trained on without stating them, they are not stated any more.
    plain = settings(workplace, "--model", str(run_dir))
    train.prepare_run(plain, train.load_policy(plain), "", tmp_path / "plain", {})
    assert "e1jax_budget_text" not in read_json(
        tmp_path / "plain" / "tokenizer_config.json"
    )


# In fine-tuning.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path, WORDS)
    return dataclasses.replace(Tokenizer.from_dir(path), budget_text=SHORT)


MIX = {"terse": 0.5, "rechecks": (0.4, 0.3, 0.3), "recap": 0.5}


@hypothesis.settings(deadline=None)
@given(st.integers(0, 2**32))
def test_solutions_keep_the_budgets_that_they_state(tokenizer, seed):
    """Read off the text: a pass has 9 or 5 tokens a step, a re-check one more."""
    rng = np.random.default_rng(seed)
    problem = draw_problem(rng, held_out=False)
    written = write_solution(problem, TraceMix(**MIX), rng)
    config = StatedConfig(SHORT, most_thinking=64, most_solution=40, cut=0.5)
    whole = encode_trace(written, tokenizer)
    trace, (thinking, solution) = state_trace(problem, whole, config, tokenizer, rng)
    assert trace.solution[-1] == tokenizer.eos_id
    said = tokenizer.decode(trace.solution[:-1])
    if solution is not None:
        assert len(trace.solution) <= solution <= 40
    if not trace.is_cut:
        text = f"{tokenizer.decode(trace.thinking)}</think>{said}"
        assert trace == whole and text == written
        if thinking is not None:
            assert len(trace.thinking) + 1 <= thinking <= 64
        return
    # Nobody stopped by himself: the budget is used up, and the thought its beginning.
    assert len(trace.thinking) == thinking <= 64
    assert trace.thinking == whole.thinking[:thinking]
    size = 5 if written.startswith(problem.terse()) else 9
    shown = tokenizer.decode(trace.thinking)
    completed = 0
    for label in "abcdef"[: len(problem.steps)]:  # a step is complete with its result
        at = shown.find(label)
        completed += at >= 0 and len(shown) >= at + size
    recap, _, box = said.partition(r"\boxed{")
    assert box == problem.answer + "}"
    steps = re.findall(r"([a-f])([-+*]\d)(\d\d)", recap)
    assert "".join(map("".join, steps)) == recap
    labels = "abcdef"[completed : len(problem.steps)]
    assert [label for label, *_ in steps] == list(labels)
    value = problem.values[completed]
    for _, step, result in steps:
        value = eval(f"{value}{step}") % 100
        assert int(result) == value


def test_shares_of_stated_budgets(tokenizer):
    rng = np.random.default_rng(0)
    [problem] = [p for p in nano_problems(99, held_out=False) if len(p.steps) == 4][:1]
    config = StatedConfig(SHORT, most_thinking=64, unlimited=0.2, cut=0.3)
    mix = TraceMix(terse=0.0)
    trace = encode_trace(write_solution(problem, mix, rng), tokenizer)
    found = [state_trace(problem, trace, config, tokenizer, rng) for _ in range(4000)]
    is_cut = np.array([made.is_cut for made, _ in found])
    thinking = np.array([-1 if t is None else t for _, (t, _) in found])
    assert abs(is_cut.mean() - 0.3) < 0.03
    assert abs((thinking[~is_cut] == -1).mean() - 0.2) < 0.03
    # 36 tokens and </think>: anything from 37 on, and a cut anywhere up to 36.
    numbers = thinking[~is_cut & (thinking >= 0)]
    assert (numbers.min(), numbers.max()) == (37, 64)
    assert set(thinking[is_cut]) == set(range(37))
    few = dataclasses.replace(config, most_thinking=36, cut=0.0)
    made, (thinking, _) = state_trace(problem, trace, few, tokenizer, rng)
    assert thinking is None and made == trace
