"""The sample command as a user meets it: text, JSONL in and out, resume, and every
mistake."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE, several_devices

from e1jax import sample
from e1jax.cli.command import run_command
from e1jax.cli.outputs import digest
from e1jax.config.sampling import SamplingParams

SHORT = ["--thinking-budget", "8", "--solution-budget", "6"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, args)])
        piped = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        monkeypatch.setattr(sys, "stdin", piped)
        code = 0
        try:
            run_command(sample.main)
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


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def tokens(by_key):
    """What must not change: logprobs may, by rounding, with the number of slots."""
    return {key: tuple(r["token_ids"]) for key, r in by_key.items()}


def write_lines(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def test_json_holds_the_fields_of_completion(run, tiny_hf):
    code, out, _ = run(
        "hi",
        "there",
        "--model",
        tiny_hf(),
        *SHORT,
        "-n",
        2,
        "--json",
        "--temperature",
        1,
    )
    assert code == 0
    found = records(out)
    assert {(r["id"], r["sample"]) for r in found} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for r in found:
        assert set(r) == {
            "id", "sample", "prompt_ids", "token_ids", "logprobs", "forced", "thinking", "solution", "text",
            "answer", "thinking_tokens", "solution_tokens", "thinking_end", "finish_reason",
            "thinking_budget", "solution_budget",
        }  # fmt: skip
        assert (r["thinking_budget"], r["solution_budget"]) == (8, 6)
        assert len(r["token_ids"]) == len(r["logprobs"]) == len(r["forced"])
        assert r["thinking_tokens"] <= 8 and r["solution_tokens"] <= 6


def test_text_shows_thinking_solution_and_counts(run, tiny_hf):
    code, out, err = run("hi", "--model", tiny_hf(), *SHORT)
    assert code == 0 and err == ""
    assert (
        "</think>" in out
        and "8 thinking (cut by the budget) + 1 forced + 6 solution tokens" in out
    )
    assert "1 completion, 15 tokens in" in out and "tokens/s" in out
    code, out, _ = run("hi", "--model", tiny_hf(), *SHORT, "--logprobs")
    assert " * " in out and "'</think>'" in out


def test_nano_runs_offline_without_arguments(run):
    code, out, err = run()
    assert code == 0 and err == ""
    assert out.count("---") == 6 and "answer" in out
    assert "6 completions" in out


def test_lines_of_a_file_set_their_own_parameters(run, tiny_hf, tmp_path):
    file = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "hi", "id": "first", "n": 2, "thinking_budget": 0},
        {"messages": [{"role": "user", "content": "hi"}], "solution_budget": 3},
        {
            "prompt_ids": [5, 6, 7],
            "thinking_budget": None,
            "solution_budget": None,
            "seed": 9,
        },
        {"prompt": "hi", "end_of_thinking_text": "ok", "thinking_budget": 1},
    )
    code, out, _ = run("--prompts", file, "--model", tiny_hf(), *SHORT, "--json")
    assert code == 0
    by_id = {}
    for r in records(out):
        by_id.setdefault(r["id"], []).append(r)
    assert sorted(by_id, key=str) == [1, 2, 3, "first"]
    assert len(by_id["first"]) == 2 and by_id["first"][0]["thinking_tokens"] == 0
    assert by_id[1][0]["solution_tokens"] <= 3
    assert by_id[1][0]["prompt_ids"] == by_id["first"][0]["prompt_ids"]
    assert by_id[2][0]["prompt_ids"] == [5, 6, 7] and not any(by_id[2][0]["forced"])
    assert by_id[3][0]["text"].count("ok</think>") == 1


def test_raw_adds_nothing(run, tiny_hf):
    _, out, _ = run("<think>hi", "--raw", "--model", tiny_hf(), *SHORT, "--json")
    assert len(records(out)[0]["prompt_ids"]) == 3


def test_prompts_from_a_pipe(run, tiny_hf):
    """The process compiles with XLA's defaults, this one with the flags of QUICKLY."""
    options = ["--model", str(tiny_hf()), *SHORT, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "e1jax.sample", "--prompts", "-", *options],
        input='{"prompt": "a"}\n\n{"prompt": "b"}\n',
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.endswith("tokens/s)\n")
    piped = records(done.stdout)
    assert [r["id"] for r in piped] == [0, 1]
    _, out, _ = run("a", "b", *options)
    assert [r["token_ids"] for r in piped] == [r["token_ids"] for r in records(out)]


def test_output_resumes_by_id_and_sample(run, tiny_hf, tmp_path):
    out = tmp_path / "out.jsonl"
    file = write_lines(
        tmp_path / "in.jsonl", *({"prompt": f"p{i}", "n": 3} for i in range(3))
    )
    args = ("--prompts", file, "--model", tiny_hf(), *SHORT, "--output", out)
    assert run(*args)[0] == 0
    whole = {(r["id"], r["sample"]): r for r in records(out.read_text())}
    assert len(whole) == 9
    # Killed in the middle of a line: the whole lines are kept, the half one is written
    # again.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:20])
    code, said, err = run(*args)
    assert code == 0 and said == "" and "5 completions" in err
    assert out.read_text().startswith("".join(lines[:4]))
    again = {(r["id"], r["sample"]): r for r in records(out.read_text())}
    assert tokens(again) == tokens(whole)
    # Nothing left; more samples; more prompts.
    with out.open("a") as torn:
        torn.write('{"id": 7, "torn')
    assert "all 9 are in" in run(*args)[2]
    assert len(records(out.read_text())) == 9
    write_lines(file, *({"prompt": f"p{i}", "n": 4} for i in range(4)))
    assert "7 completions" in run(*args)[2]
    found = records(out.read_text())
    assert len({(r["id"], r["sample"]) for r in found}) == len(found) == 16
    more = {(r["id"], r["sample"]): r for r in found}
    assert tokens(whole).items() <= tokens(more).items()


def test_output_made_with_other_settings_is_refused_and_untouched(
    run, tiny_hf, tmp_path
):
    out = tmp_path / "out.jsonl"
    args = ["hi", "--model", tiny_hf(), *SHORT, "--output", out]
    assert run(*args)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused(run(*args, "--temperature", 0.9), out, "temperature=0.6", "0.9")
    refused(run(*args, "--seed", 4), "seed=0", "4")
    refused(run(*args, "--dtype", "bfloat16"), "dtype='float32'", "bfloat16")
    refused(run(*args, "--cache-len", 99), "cache_len=32768", "99")
    refused(run("other", *args[1:]), "another prompt", "id 0")
    # What was the default all along is no other setting.
    assert run(*args, "--dtype", "float32", "--cache-len", 32768)[0] == 0
    for name, content in [
        ("foreign.jsonl", b'{"a": 1}\n'),
        ("own.jsonl", out.read_bytes()),
        ("notes.txt", b"one line without an end"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        before[path] = content
        refused(run(*args[:-1], path), path, "was not made by this command")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_output_is_untouched_when_the_weights_are_bad(run, tiny_hf, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(tiny_hf(), model)
    args = ["a", "b", "--model", model, *SHORT, "--output", out]
    assert run(*args)[0] == 0
    out.write_bytes(out.read_bytes()[:-9])  # as if killed while writing
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    refused(run(*args), "model.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.glob("out*")} == before
    # A new output is not begun.
    refused(run(*args[:-1], tmp_path / "new.jsonl"), "model.safetensors")
    assert not list(tmp_path.glob("new*"))


def test_two_runs_do_not_write_one_output(run, tiny_hf, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(run("hi", "--model", tiny_hf(), *SHORT, "--output", out), "another run")


def test_unwritable_output(run, tiny_hf, tmp_path):
    args = ["hi", "--model", tiny_hf(), *SHORT, "--output"]
    refused(run(*args, tmp_path / "no" / "out.jsonl"), "no writable directory")
    for other in (tmp_path, ".", "", "/dev/full"):
        refused(run(*args, other), "is not a regular file")
    refused(run(*args, tmp_path / ("x" * 250)), "File name too long")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--thinking-budget", "-1"], ["thinking-budget", "-1"]),
        (["--thinking-budget", "1.5"], ["thinking-budget", "1.5"]),
        (["--solution-budget", "many"], ["solution-budget", "many"]),
        (["--top-p", "0"], ["top_p", "0"]),
        (["--top-p", "1.01"], ["top_p", "1.01"]),
        (["--top-p", "nan"], ["top_p", "nan"]),
        (["--temperature", "-0.1"], ["temperature", "-0.1"]),
        (["--temperature", "hot"], ["temperature", "hot"]),
        (["--top-k", "-2"], ["top_k", "-2"]),
        (["--seed", "-3"], ["seed", "-3"]),
        (["-n", "0"], ["n must", "0"]),
        (["--slots", "0"], ["slots", "0"]),
        (["--cache-len", "0"], ["cache_len", "0"]),
        (
            ["--cache-len", "30", "--solution-budget", "40"],
            ["solution budget of 40", "cache_len=30"],
        ),
        (["--cache-len", "3"], ["prompt of", "cache_len=3"]),
        (["--mesh", "data=2"], ["data=2", "1"]),
        (["--mesh", "rows=2"], ["rows=2", "data=1,tensor=4"]),
        (["--dtype", "int4"], ["int4", "float32"]),
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--model", "no-such/hub-id"], ["no-such/hub-id"]),
        (["--prompts", "in.jsonl"], ["not both"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--prompt", "hi"], ["--prompt"]),
        (["--end-of-thinking-text", "so</think>"], ["</think>"]),
    ],
)
def test_mistakes_on_the_command_line(run, tiny_hf, args, words):
    refused(run("hello", "--model", tiny_hf(), *SHORT, *args), *words)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a"', ["line 2", "not JSON"]),
        ("[1]", ["line 2", "list"]),
        ("[" * 100000, ["line 2", "not JSON"]),
        ('{"prompt": "a\\ud800b"}', ["line 2", "Unicode"]),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", ["temperature"]),
        (
            '{"prompt": "a", "thinking_bugdet": 3}',
            ["line 2", "thinking_bugdet", "'thinking_budget'"],
        ),
        ("{}", ["line 2", "prompt, messages and prompt_ids"]),
        ('{"prompt": "a", "prompt_ids": [1]}', ["line 2", "exactly one"]),
        ('{"prompt": 5}', ["line 2", "prompt must be a text"]),
        ('{"prompt": ""}', ["line 2", "empty"]),
        ('{"prompt_ids": []}', ["line 2", "empty"]),
        ('{"prompt_ids": ["a"]}', ["line 2", "prompt_ids", "whole numbers"]),
        ('{"prompt_ids": [999999]}', ["line 2", "999999"]),
        ('{"messages": [{"content": "x"}]}', ["line 2", "role"]),
        ('{"messages": [{"role": "ghost", "content": "x"}]}', ["line 2", "ghost"]),
        ('{"prompt": "a", "top_p": 0}', ["line 2", "top_p"]),
        (
            '{"prompt": "a", "thinking_budget": 2.0}',
            ["line 2", "thinking_budget", "2.0"],
        ),
        (
            '{"prompt": "a", "thinking_budget": true}',
            ["line 2", "thinking_budget", "True"],
        ),
        ('{"prompt": "a", "n": null}', ["line 2", "n must"]),
        ('{"prompt": "a", "id": 0}', ["requests 0 and 1", "id 0"]),
        ('{"prompt": "a", "id": [1]}', ["line 2", "id must"]),
        (r'{"prompt": "\sqrt2"}', ["line 2", "not JSON", r"write \\sqrt"]),
        (r'{"prompt": "\frac12"}', ["line 2", "prompt", r"write \\frac"]),
        (
            r'{"messages": [{"role": "user", "content": "$\theta$"}]}',
            ["line 2", "messages", r"write \\theta"],
        ),
        (
            r'{"prompt": "a", "end_of_thinking_text": "\boxed{"}',
            ["line 2", "end_of_thinking_text", r"write \\boxed"],
        ),
    ],
)
def test_mistakes_in_the_prompts_file(run, tiny_hf, tmp_path, line, words):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    out = tmp_path / "out.jsonl"
    refused(
        run("--prompts", file, "--model", tiny_hf(), *SHORT, "--output", out), *words
    )
    assert not out.exists() or out.read_text() == ""


def test_missing_and_empty_prompts(run, tiny_hf, tmp_path):
    refused(run("--model", tiny_hf()), "no prompt")
    refused(run("--prompts", tmp_path / "none.jsonl"), "none.jsonl", "No such file")
    refused(run("--prompts", "-", stdin="\n"), "no request")
    refused(run("", "--model", tiny_hf()), "empty")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    refused(run("--prompts", latin), "latin.jsonl is not UTF-8")
    # A byte order mark and Windows line ends are no mistakes.
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert run("--prompts", windows, "--model", tiny_hf(), *SHORT)[0] == 0


def test_flags_and_prompts_may_mix(run, tiny_hf):
    code, out, _ = run("a", *SHORT, "b", "--json", "--model", tiny_hf(), "c")
    assert code == 0 and {r["id"] for r in records(out)} == {0, 1, 2}


def test_text_comes_in_the_order_of_the_prompts(run, tiny_hf):
    args = ("a", "b", "c", "--model", tiny_hf(), "--solution-budget", 3, "-n", 2)
    _, out, _ = run(*args, "--thinking-budget", 90, "--slots", 2, "--temperature", 1)
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert heads == [f"--- {i}, sample {j}" for i in range(3) for j in range(2)]


def test_mesh_of_several_devices(tiny_hf):
    command = [sys.executable, "-m", "e1jax.sample", "hi", *SHORT, "--json"]
    command += ["--model", str(tiny_hf()), "--mesh"]
    found = []
    for mesh in ("data=2,tensor=2", "data=4", "tensor=4"):
        done = subprocess.run(
            [*command, mesh],
            env={**os.environ, "XLA_FLAGS": several_devices(4)},
            capture_output=True,
            text=True,
        )
        found.append((done.returncode, done.stdout, done.stderr))
    assert records(found[0][1])[0]["token_ids"] == records(found[1][1])[0]["token_ids"]
    assert found[2][0] == 2 and "tensor=4 does not divide num_kv_heads=2" in found[2][2]


def test_a_reader_that_leaves_is_no_fault(tiny_hf):
    command = f"{sys.executable} -m e1jax.sample a b c d --json --model {tiny_hf()} "
    command += " ".join(SHORT) + " | head -c 20"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_model_without_think_end(run, tiny_hf, tmp_path):
    path = tmp_path / "plain"
    shutil.copytree(tiny_hf(), path)
    text = (path / "tokenizer.json").read_text().replace("</think>", "</thunk>")
    (path / "tokenizer.json").write_text(text)
    refused(run("hi", "--model", path), "no </think> token", "none")
    code, out, _ = run(
        "hi",
        "--model",
        path,
        "--thinking-budget",
        "none",
        "--solution-budget",
        5,
        "--json",
    )
    [record] = records(out)
    assert (
        code == 0 and record["thinking_end"] is None and record["solution_tokens"] <= 5
    )


def test_ctrl_c_keeps_what_is_done(tiny_hf, tmp_path):
    out = tmp_path / "out.jsonl"
    file = write_lines(
        tmp_path / "in.jsonl", *({"prompt": f"p{i}", "n": 9} for i in range(400))
    )
    command = [
        sys.executable,
        "-m",
        "e1jax.sample",
        "--prompts",
        str(file),
        "--model",
        str(tiny_hf()),
    ]
    command += [
        "--thinking-budget",
        "300",
        "--solution-budget",
        "300",
        "--slots",
        "4",
        "--output",
        str(out),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (
        out.exists() and out.read_text().count("\n") >= 3
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert (
        "interrupted after" in err
        and "run the same command again" in err
        and "Traceback" not in err
    )
    done = records(out.read_text())
    assert 3 <= len(done) < 3600


def test_settings_that_came_later_do_not_change_older_digests():
    """An output of an older version has none of them, and can be resumed."""

    def item(**settings):
        return sample.Item("a", 0, "x", False, SamplingParams(**settings))

    older = {
        "thinking_budget": 1024, "solution_budget": 1024, "n": 1, "temperature": 0.6,
        "top_p": 0.95, "top_k": 0, "seed": 0, "end_of_thinking_text": "",
    }  # fmt: skip
    assert item(n=3).digest() == digest(["x", False, older])
    others = [item(stop="a"), item(stop=("a", "b")), item(on_thinking_budget="stop")]
    assert len({other.digest() for other in [item(), *others]}) == 4
