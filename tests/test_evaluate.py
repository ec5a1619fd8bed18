"""The evaluate command: its statistics against brute force, resuming, figures, grading
of files, and every mistake."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from conftest import PATIENCE

from e1jax import Engine, SamplingParams, data, evaluate, rewards, sample
from e1jax.cli.command import run_command
from e1jax.cli.flags import flags_parser
from e1jax.evaluation.results import Outcome, result_row

PROBLEMS, SAMPLES, SLOTS = 7, 3, 5
FLAGS = ["--model", "nano", "--dataset", "nano", "--limit", PROBLEMS, "-n", SAMPLES]
FLAGS += ["--budgets", "none,8,64", "--solution-budget", 12]
FLAGS += ["--cache-len", 300, "--slots", SLOTS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an evaluation that ran to its end."""
    path = tmp_path_factory.mktemp("whole")
    evaluate.evaluate([*map(str, FLAGS), "--output", str(path)])
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*args, main=evaluate.main):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result, *words):
    """Exit code 2 and one sentence on stderr that holds the words."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert str(word) in err, err


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(path):
    return json.loads((path / "results.json").read_text())


def write_lines(path, objects):
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    return path


def solve(problem):
    """The answer of a nano problem, from its text alone."""
    value, *steps = re.split("[a-f]", problem.rstrip("?"))
    value = int(value)
    for step in steps:
        value = {
            "+": value + int(step[1:]),
            "-": value - int(step[1:]),
            "*": value * int(step[1:]),
        }[step[0]] % 100
    return value


def brute_force(found, problems):
    """The rows of results.json, by loops over the completions."""
    grouped = defaultdict(lambda: defaultdict(list))
    for r in found:
        budgets = r.get("thinking_budget"), r.get("solution_budget")
        right = r["answer"] == str(solve(problems[r["id"]].text))
        grouped[budgets][r["id"]].append((right, r))
    rows = []
    for budgets in sorted(
        grouped, key=lambda pair: math.inf if pair[0] is None else pair[0]
    ):
        per_problem = grouped[budgets]
        shares = [sum(right for right, _ in s) / len(s) for s in per_problem.values()]
        flat = [r for samples in per_problem.values() for _, r in samples]
        mean = sum(shares) / len(shares)
        variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
        thinking = sum(r["thinking_tokens"] for r in flat) / len(flat)
        solution = sum(r["solution_tokens"] for r in flat) / len(flat)
        tokens = sum(len(r["token_ids"]) for r in flat) / len(flat)
        forced = sum(
            len(r["token_ids"]) > r["thinking_tokens"] + r["solution_tokens"]
            for r in flat
        )
        rows.append(
            {
                "thinking_budget": budgets[0],
                "solution_budget": budgets[1],
                "accuracy": pytest.approx(mean),
                "stderr": pytest.approx(math.sqrt(variance / len(shares))),
                "pass_at_n": pytest.approx(sum(s > 0 for s in shares) / len(shares)),
                "mean_tokens": pytest.approx(tokens),
                "mean_thinking_tokens": pytest.approx(thinking),
                "mean_solution_tokens": pytest.approx(solution),
                "forced_share": pytest.approx(forced / len(flat)),
            }
        )
    return rows


def test_results_are_what_loops_over_the_completions_give(whole):
    found, made = records(whole / "completions.jsonl"), results(whole)
    problems = data.load_problems("nano", PROBLEMS)
    keys = {(r["id"], r["sample"], r["thinking_budget"]) for r in found}
    assert keys == {
        (i, j, b)
        for i in range(PROBLEMS)
        for j in range(SAMPLES)
        for b in (8, 64, None)
    }
    assert len(found) == len(keys)
    for r in found:
        right = r["answer"] == str(solve(problems[r["id"]].text))
        assert r["reward"] == right and r["solution_budget"] == 12
        assert r["text"] == r["thinking"] + "</think>" + r["solution"]
        assert not {"prompt_ids", "logprobs", "forced", "prompt_index"} & set(r)
    assert made["rows"] == brute_force(found, problems)
    assert (made["model"], made["dataset"], made["n"]) == ("nano", "nano", SAMPLES)
    # The test would not see much if all were right, or none.
    assert len({row["accuracy"] for row in made["rows"]}) == 3
    assert 0 < made["rows"][1]["accuracy"] < 1 and made["rows"][1]["stderr"] > 0


def test_statistics_of_uneven_samples():
    """Averages over problems of averages over samples; one problem has no spread."""
    one = Outcome(1.0, 10, 4, 5, True)
    two = Outcome(0.0, 20, 14, 6, False)
    row = result_row((4, None), [[one], [one, two], [two, two, two, two]])
    assert row["accuracy"] == 0.5 and row["pass_at_n"] == pytest.approx(2 / 3)
    assert row["stderr"] == pytest.approx(0.5 / math.sqrt(3))
    assert row["mean_tokens"] == 15 and row["mean_thinking_tokens"] == 9
    assert row["mean_solution_tokens"] == 5.5 and row["forced_share"] == 0.5
    assert (row["thinking_budget"], row["solution_budget"]) == (4, None)
    assert result_row((4, None), [[one, two]])["stderr"] is None


def test_samples_of_a_problem_are_paired_across_budgets(whole):
    found = records(whole / "completions.jsonl")
    ids = {(r["id"], r["sample"], r["thinking_budget"]): r["token_ids"] for r in found}
    for i in range(PROBLEMS):
        for j in range(SAMPLES):
            longest = ids[i, j, None]
            assert ids[i, j, 8][:8] == longest[:8]
            assert ids[i, j, 64][: min(64, len(longest))] == longest[:64]
    # Not because all samples are the same.
    assert len({tuple(ids[0, j, None]) for j in range(SAMPLES)}) > 1
    assert (
        len({evaluate.request_seed(s, i) for s in range(9) for i in range(99)}) == 891
    )
    sequence = np.random.SeedSequence([2**64 - 1, 5])
    expected = int(sequence.generate_state(1, np.uint64)[0])
    assert evaluate.request_seed(2**64 - 1, 5) == expected < 2**64


def test_the_same_tokens_come_from_the_python_api(run, tmp_path):
    """Prompt, instruction, seeds and settings are what the flags say."""
    extra = ["--instruction", "Go on.", "--seed", 9, "--temperature", 1.3]
    extra += ["--top-p", 0.9, "--top-k", 40, "-n", 2, "--budgets", 8, "--limit", 3]
    assert run(*FLAGS, *extra, "--output", tmp_path)[0] == 0
    engine = Engine.from_pretrained("nano", slots=SLOTS, cache_len=300)
    problems = data.load_problems("nano", 3)
    params = [
        SamplingParams(8, 12, 2, 1.3, 0.9, 40, seed=evaluate.request_seed(9, i))
        for i in range(3)
    ]
    expected = engine.generate([f"{p.text} Go on." for p in problems], params)
    found = records(tmp_path / "completions.jsonl")
    assert len(found) == 6
    for r in found:
        assert r["token_ids"] == expected[r["id"]][r["sample"]].token_ids
    assert results(tmp_path)["instruction"] == "Go on."


def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(run, tmp_path):
    flags = [*FLAGS, "--limit", 12, "-n", 6]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*flags, "--output", whole)[0] == 0
    path = broken / "completions.jsonl"
    command = [sys.executable, "-m", "e1jax.evaluate", *map(str, flags)]
    command += ["--slots", "2", "--output", str(broken)]

    def stop(number, at_least):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not (
            path.exists() and path.read_text().count("\n") >= at_least
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        return process.returncode, err

    code, err = stop(signal.SIGINT, at_least=3)
    assert code == 130 and "Traceback" not in err
    assert "interrupted after" in err and "run the same command again" in err
    assert stop(signal.SIGKILL, at_least=30)[0] == -signal.SIGKILL
    assert not (broken / "results.json").exists()
    kept = path.read_text()
    kept = kept[: kept.rfind("\n") + 1]
    assert 30 <= kept.count("\n") < 12 * 6 * 3
    with path.open("a") as file:
        file.write('{"id": 3, "sample"')
    code, out, err = run(*flags, "--output", broken)
    assert code == 0 and f"{12 * 6 * 3 - kept.count(chr(10))} completions" in err
    assert path.read_text().startswith(kept)
    assert len(records(path)) == 12 * 6 * 3
    for name in ("results.json", "accuracy.png"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    # Again: nothing is left, and the results are the same.
    (broken / "results.json").unlink()
    code, again, err = run(*flags, "--output", broken)
    assert code == 0 and again == out and "all completions are in" in err
    assert (broken / "results.json").read_bytes() == (
        whole / "results.json"
    ).read_bytes()


def test_budgets_samples_and_problems_can_be_added(run, tmp_path):
    path = tmp_path / "completions.jsonl"
    flags = [*FLAGS, "--output", tmp_path, "--temperature", 1, "--limit", 2, "-n", 1]
    assert run(*flags, "--budgets", 64)[0] == 0
    before = path.read_text()
    assert before.count("\n") == 2
    more = run(*flags, "--budgets", "64,8", "-n", 4)
    assert more[0] == 0 and "14 completions" in more[2]
    assert path.read_text().startswith(before)
    made = results(tmp_path)
    assert [row["thinking_budget"] for row in made["rows"]] == [8, 64]
    assert made["n"] == 4 and made["problems"] == 2
    more = run(*flags, "--budgets", 64, "--limit", 6)
    assert more[0] == 0 and "4 completions" in more[2]
    # Of what is there, only what is asked for counts.
    found = [r for r in records(path) if r["thinking_budget"] == 64]
    asked = [r for r in found if r["sample"] == 0]
    assert (len(found), len(asked)) == (12, 6)
    problems = data.load_problems("nano", 6)
    assert results(tmp_path)["rows"] == brute_force(asked, problems)
    assert results(tmp_path)["rows"] != brute_force(found, problems)


def test_other_settings_are_refused_and_nothing_is_touched(run, whole, tmp_path):
    flags = [*FLAGS, "--output", whole]
    before = {path: path.read_bytes() for path in whole.iterdir()}
    refused(run(*flags, "--seed", 4), "seed=0", "seed=4")
    refused(run(*flags, "--solution-budget", 13), "solution_budget=12", "13")
    refused(run(*flags, "--instruction", "x"), "instruction=''", "'x'")
    refused(run(*flags, "--instruction", "\boxed"), "--instruction holds a backspace")
    refused(run(*flags, "--cache-len", 299), "cache_len=300", "299")
    refused(run(*flags, "--dtype", "bfloat16"), "dtype='float32'", "bfloat16")
    refused(run(*flags, "--top-k", 5, "--top-p", 1), "top_p=0.95, top_k=0", "top_k=5")
    refused(run(*flags, "--dataset", "nano-train"), "dataset='nano'", "nano-train")
    assert {path: path.read_bytes() for path in whole.iterdir()} == before
    # Nor may a problem change.
    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    flags = [*FLAGS[:2], *FLAGS[4:], "--dataset", file, "--output", out]
    flags += ["--budgets", 8, "-n", 1, "--limit", 2]
    problem = {"id": "x", "problem": "11a+2?", "answer": 13}
    other = {"id": "y", "problem": "12a+2?", "answer": 14}
    write_lines(file, [problem, other])
    assert run(*flags)[0] == 0
    write_lines(file, [problem, {**other, "answer": 15}])
    refused(run(*flags), 'id "y"')
    write_lines(file, [other, problem])  # its seed would be another one
    refused(run(*flags), 'id "y"')


def test_without_output_there_is_only_the_table(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*FLAGS, "--limit", 2, "-n", 2)
    head, *lines = out.splitlines()
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "12 completions" in err and "tokens/s" in err
    columns = ["budgets", "accuracy %", "pass@2 %", "tokens", "thinking", "solution"]
    assert re.split("  +", head) == [*columns, "forced %"]
    assert [line.split()[0] for line in lines] == ["8+12", "64+12", "none+12"]
    assert len({len(line) for line in out.splitlines()}) == 1
    assert lines[0].split()[-1] == "100.0" and " ± " in lines[0]
    # One problem: the error is not known.
    code, out, _ = run(*FLAGS, "--limit", 1, "-n", 2)
    assert code == 0 and "±" not in out


def test_grading_the_completions_gives_the_same_results(run, whole, tmp_path):
    path = tmp_path / "moved.jsonl"
    found = records(whole / "completions.jsonl")
    random.Random(0).shuffle(found)
    for r in found:
        del r["reward"]
        r["id"] = random.Random(0).choice([r["id"], str(r["id"])])
    write_lines(path, found)
    code, out, err = run("grade", path, "--dataset", "nano", "--output", tmp_path / "g")
    graded = results(tmp_path / "g")
    assert code == 0 and graded["rows"] == results(whole)["rows"]
    assert (graded["n"], graded["model"]) == (SAMPLES, str(path))
    assert graded["problems"] == PROBLEMS
    assert (tmp_path / "g" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert f"of 1024 problems, {1024 - PROBLEMS} at 8+12" in err
    assert len(out.splitlines()) == 4


def test_completions_of_sample_are_graded(run, tmp_path):
    """Their ids are the numbers of their lines."""
    problems = data.load_problems("nano", 9)
    prompts = write_lines(tmp_path / "in.jsonl", [{"prompt": p.text} for p in problems])
    out = tmp_path / "out.jsonl"
    args = ["--prompts", prompts, "--output", out, "-n", 2, "--temperature", 1]
    args += ["--thinking-budget", 40, "--solution-budget", 12, "--cache-len", 300]
    assert run(*args, "--slots", SLOTS, main=sample.main)[0] == 0
    file = tmp_path / "problems.json"
    dataset = [{"question": p.text, "answer": p.answers[0]} for p in problems]
    file.write_text(json.dumps([*dataset, {"question": "11a+2?", "answer": 13}]))
    code, _, err = run("grade", out, "--dataset", file, "--output", tmp_path)
    assert code == 0 and "of 10 problems, 1 at 40+12 have no completion" in err
    assert results(tmp_path)["rows"] == brute_force(records(out), problems)
    assert results(tmp_path)["n"] == 2 and results(tmp_path)["problems"] == 9


def test_comparisons_that_take_too_long_are_counted(run, tmp_path, monkeypatch):
    grader = rewards.Grader
    monkeypatch.setattr(rewards, "Grader", lambda: grader(workers=1))
    problems = [{"problem": "?", "answer": r"\frac{1}{2}"}] * 2
    file = write_lines(tmp_path / "problems.jsonl", problems)
    boxes = [r"\boxed{0.5}", r"\boxed{9^{9^{9^{9}}}}"]
    path = write_lines(
        tmp_path / "out.jsonl",
        [record(id=i, solution=box) for i, box in enumerate(boxes)],
    )
    code, out, err = run("grade", path, "--dataset", file)
    assert code == 0 and "note: 1 comparison of answers ran into the time limit" in err
    assert out.splitlines()[1].split()[1] == "50.0"


def test_solutions_that_lost_a_backslash_are_noted(run, tmp_path):
    solutions = [r"\boxed{5}", "\boxed{5}", "so \frac{1}{2}"]
    lines = [record(id=i, solution=text) for i, text in enumerate(solutions)]
    path = write_lines(tmp_path / "c.jsonl", lines)
    code, _, err = run("grade", path, "--dataset", "nano")
    assert code == 0
    assert (
        rf"note: 2 of 3 solutions seem to have lost a backslash, the first: {path}"
        in err
    )
    assert r"c.jsonl line 2: solution holds a backspace where \boxed" in err


def test_share_of_forced_ends(run, tmp_path):
    """By the budget or by EOS; not by the model, nor where `</think>` never came."""
    ends = ["budget", "eos", "model", None, "eos"]
    found = [record(id=i, thinking_end=end) for i, end in enumerate(ends)]
    path = write_lines(tmp_path / "out.jsonl", found)
    assert run("grade", path, "--dataset", "nano", "--output", tmp_path)[0] == 0
    assert results(tmp_path)["rows"][0]["forced_share"] == 0.6


def record(**changes):
    return {
        "id": 0,
        "sample": 0,
        "solution": "\\boxed{1}",
        "token_ids": [1, 2],
        "thinking_tokens": 1,
        "solution_tokens": 1,
        "thinking_end": "model",
    } | changes


def without(name):
    return {key: value for key, value in record().items() if key != name}


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"id": 0', ["line 3", "not JSON"]),
        (r'{"solution": "\sqrt2"}', ["line 3", "not JSON", r"write \\sqrt"]),
        (b"\xff\xfe\x00", ["line 3", "not JSON"]),
        ("[" * 100000, ["line 3", "not JSON"]),
        ("[1]", ["line 3", "list"]),
        *[
            (json.dumps(without(name)), ["line 3", f"no field {name}"])
            for name in record()
        ],
        (json.dumps(record(id=99999)), ["line 3", "no problem has the id 99999"]),
        (json.dumps(record(id="-1")), ["line 3", "no problem has the id '-1'"]),
        (
            json.dumps(record(id=True)),
            ["line 3", "id must be a text or a whole number"],
        ),
        (json.dumps(record(id=[0])), ["line 3", "id must be"]),
        (json.dumps(record(id="0")), ["line 3", "sample 0 of id '0'", "line 1"]),
        (json.dumps(record(sample="a")), ["line 3", "sample must be", "'a'"]),
        (json.dumps(record(solution=None)), ["line 3", "solution must be a text"]),
        (json.dumps(record(token_ids=5)), ["line 3", "token_ids must be a list"]),
        (json.dumps(record(thinking_tokens=1.5)), ["line 3", "thinking_tokens", "1.5"]),
        (
            json.dumps(record(thinking_tokens=10**400)),
            ["line 3", "thinking_tokens must"],
        ),
        (
            json.dumps(record(solution_tokens=-1)),
            ["line 3", "solution_tokens must", "-1"],
        ),
        (json.dumps(record(thinking_budget="8")), ["line 3", "thinking_budget", "'8'"]),
    ],
)
def test_mistakes_in_completions(run, tmp_path, line, words):
    path = tmp_path / "out.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(record()).encode() + b"\n\n" + line + b"\n")
    refused(run("grade", path, "--dataset", "nano"), path, *words)


def test_other_mistakes_of_grade(run, tmp_path):
    path = tmp_path / "out.jsonl"
    refused(run("grade", path, "--dataset", "nano"), path, "No such file")
    path.write_text("\n")
    refused(run("grade", path, "--dataset", "nano"), path, "holds no completion")
    refused(run("grade", path), "--dataset")
    write_lines(path, [record()])
    refused(run("grade", path, "--dataset", "nanno"), "nanno", "did you mean nano?")
    refused(run("grade", path, "--dataset", "nano", "--output", path), "--output", path)
    refused(run("grade", path, "--dataset", "nano", "--model", "nano"), "--model")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--budgets", "8,8"], ["--budgets", "twice"]),
        (["--budgets", ""], ["--budgets"]),
        (["--budgets", "8,"], ["--budgets"]),
        (["--budgets", "8,-1"], ["--budgets", "-1"]),
        (["--budgets", "8,many"], ["--budgets", "many"]),
        (["--budgets", "9" * 12], ["thinking_budget", "9" * 12]),
        (["--solution-budget", "few"], ["--solution-budget", "few"]),
        (["--solution-budget", "400"], ["problem 0", "400", "cache_len=300"]),
        (["-n", "0"], ["n must"]),
        (["--limit", "0"], ["limit"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--slots", "0"], ["slots"]),
        (["--cache-len", "0"], ["cache_len"]),
        (["--mesh", "data=2"], ["data=2"]),
        (["--dtype", "int8"], ["int8"]),
        (["--model", "/no/such"], ["/no/such"]),
        (["--dataset", "/no/such.jsonl"], ["/no/such.jsonl"]),
        (["--budget", "8"], ["--budget"]),
        (["again"], ["again"]),
        (["--output", "/dev/null/x"], ["--output", "/dev/null/x"]),
    ],
)
def test_mistakes_on_the_command_line(run, args, words):
    refused(run(*FLAGS, *args), *words)


def test_files_that_are_not_ours_are_left_alone(run, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"a": 1}\n')
    refused(run(*FLAGS, "--output", tmp_path), path, "was not made by this command")
    (tmp_path / "completions.jsonl.settings.json").write_text("{}")
    refused(run(*FLAGS, "--output", tmp_path), path, "line 1")
    assert path.read_text() == '{"a": 1}\n'


def test_an_output_that_grew_meanwhile_is_not_cut(run, tmp_path, monkeypatch):
    """Another run may have written it while this one loaded its model."""
    path = tmp_path / "completions.jsonl"
    flags = [*FLAGS, "--output", tmp_path, "--budgets", 8, "-n", 1]
    assert run(*flags)[0] == 0
    load_flagged = evaluate.load_flagged

    def slow(flags):
        with path.open("a") as file:
            file.write("{}\n")
        return load_flagged(flags)

    monkeypatch.setattr(evaluate, "load_flagged", slow)
    refused(run(*flags, "-n", 2), "another run has written", path)
    assert path.read_text().endswith("{}\n")


# Figures.


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are saved."""
    found, save = [], matplotlib.figure.Figure.savefig

    def note(figure, *args, **kwargs):
        found.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    return found


def row(budget, accuracy, tokens, stderr=0.01):
    return {
        "thinking_budget": budget,
        "solution_budget": 28,
        "accuracy": accuracy,
        "stderr": stderr,
        "mean_tokens": tokens,
    }


def write_results(path, model, *rows):
    path.write_text(json.dumps({"model": model, "rows": rows}))
    return path


def test_the_figure_shows_every_row(run, tmp_path, drawn):
    one = write_results(
        tmp_path / "a.json",
        "_base $x$",
        row(512, 0.2, 900, 0.05),
        row(256, 0.1, 700),
        row(None, 0.9, 5000, None),
    )
    two = write_results(tmp_path / "b.json", "tuned", row(512, 0.5, 600))
    path = tmp_path / "p.png"
    table = (
        "budgets           _base $x$               tuned\n"
        " 256+28  10.0 ± 1.0 (700.0)                   -\n"
        " 512+28  20.0 ± 5.0 (900.0)  50.0 ± 1.0 (600.0)\n"
        "none+28       90.0 (5000.0)                   -\n"
    )
    assert run("plot", one, two, "--output", path) == (0, table, "")
    [axes] = drawn
    lines = [container.lines[0] for container in axes.containers]
    points = [list(zip(*line.get_data(), strict=True)) for line in lines]
    assert points == [[(700, 10), (900, 20)], [(5000, 90)], [(600, 50)]]
    assert [line.get_marker() for line in lines] == ["o", "*", "o"]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    [bars] = axes.containers[0].lines[2]
    assert bars.get_segments()[1][:, 1] == pytest.approx([15, 25])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [r"_base \$x\$", "tuned", "thinking unconstrained"]
    assert axes.get_xlabel() == "mean tokens per response"
    assert axes.get_ylabel() == "accuracy (%)"
    assert axes.get_xscale() == "log"
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["512", "1024", "2048", "4096", "8192"]
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 300 and 0.001 < (image[..., :3] < 0.9).mean() < 0.5


def test_models_of_one_name_are_told_apart_by_their_files(run, tmp_path, drawn):
    files = [
        write_results(tmp_path / f"{i}.json", model, row(512, 0.5, 64))
        for i, model in enumerate(["same", "other", "same"])
    ]
    path = tmp_path / "p.svg"
    assert run("plot", *files, "--output", path)[0] == 0
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == [f"same ({files[0]})", "other", f"same ({files[2]})"]
    assert "<svg" in path.read_text()


def test_an_evaluation_draws_its_own_figure(whole):
    image = matplotlib.image.imread(whole / "accuracy.png")
    assert min(image.shape[:2]) > 300 and 0.001 < (image[..., :3] < 0.9).mean() < 0.5


def test_mistakes_of_plot(run, whole, tmp_path):
    good, out = whole / "results.json", tmp_path / "p.png"
    refused(
        run("plot", tmp_path / "no.json", "--output", out), "no.json", "No such file"
    )
    refused(run("plot", good), "--output")
    refused(run("plot", "--output", out), "RESULTS.json")
    refused(run("plot", good, "--output", tmp_path / "p.gif"), "p.gif", ".png")
    refused(run("plot", good, "--output", tmp_path / "no" / "p.png"), "--output")
    bad = tmp_path / "bad.json"
    rows = [row(None, 0.5, 9)]
    for content in (
        [1],
        {},
        {"model": "m", "rows": []},
        {"model": "m", "rows": 5},
        {"model": 5, "rows": rows},
        {"model": "m", "rows": [1]},
        {"model": "m", "rows": [row("8", 0.5, 9)]},
        {"model": "m", "rows": [row(8, "0.5", 9)]},
        {"model": "m", "rows": [row(8, 50, 9)]},
        {"model": "m", "rows": [row(8, 0.5, 0)]},
        {"model": "m", "rows": [row(8, 0.5, float("nan"))]},
        {"model": "m", "rows": [row(8, 0.5, 9, -1)]},
        {"model": "m", "rows": [*rows, {"thinking_budget": 8}]},
        {"model": "m", "rows": [row(8, 0.5, 9) | {"solution_budget": 1.5}]},
    ):
        bad.write_text(json.dumps(content))
        refused(run("plot", good, bad, "--output", out), bad)
    bad.write_text("{")
    refused(run("plot", bad, "--output", out), bad, "not JSON")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ([], evaluate.EvaluateFlags),
        (["grade"], evaluate.GradeFlags),
        (["plot"], evaluate.PlotFlags),
    ],
)
def test_help_explains_every_flag(run, command, flags):
    parser = flags_parser(flags, " ".join(["python -m e1jax.evaluate", *command]))
    assert all(action.help for action in parser._actions)
    code, out, _ = run(*command, "--help")
    assert code == 0 and out == parser.format_help()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["grad", "x.jsonl"], "has no command 'grad'; did you mean 'grade'?"),
        (["plt", "a.json"], "has no command 'plt'; did you mean 'plot'?"),
        (["x.jsonl", "--dataset", "nano"], "no command 'x.jsonl'; known: grade, plot"),
    ],
)
def test_a_mistyped_command_is_named(run, args, said):
    refused(run(*args), said)


def test_grading_and_plotting_start_no_device(whole, tmp_path):
    code = (
        "import sys; from e1jax import evaluate; from jax._src import xla_bridge\n"
        f"evaluate.grade([{str(whole / 'completions.jsonl')!r}, '--dataset', 'nano',"
        f" '--output', {str(tmp_path)!r}])\n"
        f"evaluate.plot([{str(whole / 'results.json')!r}, '--output', 'p.png'])\n"
        "assert not xla_bridge._backends\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
