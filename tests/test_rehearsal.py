"""The walk of docs/tpu.md on one machine: hosts are processes, their chips CPU devices, and
the bucket is an emulated one. Everything is written to the bucket and read from there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE, several_devices
from test_buckets import emulator

from e1jax.config.buckets import open_path
from e1jax.data.nano import nano_problems

__all__ = ["emulator"]  # a fixture, for all tests here

BUCKET = "gs://bucket/rehearsal"
SFT = {
    "model": f"{BUCKET}/model",
    "steps": 6,
    "data": {"examples": f"{BUCKET}/traces.jsonl", "max_len": 256},
    "optimizer": {"learning_rate": 1e-3},
    "update": {"batch_size": 8, "microbatch": 8, "remat": False},
    "checkpoint": {"every": 3},
}
TRAIN = {
    "model": f"{BUCKET}/sft",
    "steps": 8,
    "data": {"problems": f"{BUCKET}/problems.jsonl", "max_prompt_len": 40},
    "rollout": {
        **{"prompts": 8, "samples": 4, "thinking_budget": 16, "solution_budget": 11},
        **{"temperature": 1.0, "slots": 8, "cache_len": 96},
    },
    "update": {"minibatch_prompts": 8, "microbatch": 16, "remat": False},
    "optimizer": {"learning_rate": 1e-4},
    "validation": {
        "problems": f"{BUCKET}/problems.jsonl",
        **{"limit": 8, "every": 4, "budgets": [[16, 11]]},
    },
    "checkpoint": {"every": 1, "keep": 3},
}


def say(text: str) -> None:
    """A line of the log, which pytest shows with -s."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def command(name: str, *argv: str, devices: int = 1, **options) -> subprocess.Popen:
    say(f"python -m e1jax.{name} {' '.join(argv)} (devices: {devices})")
    environment = {"XLA_FLAGS": several_devices(devices), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"e1jax.{name}", *argv],
        env={**os.environ, **environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(*processes: subprocess.Popen) -> str:
    """Waits for the processes, which must exit with 0; the stdout of the first one."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    return outputs[0][0]


def on_hosts(count: int, devices: int, name: str, *argv: str) -> list[subprocess.Popen]:
    """A command on so many hosts, with so many chips each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--coordinator", address, "--processes", str(count), "--process"]
    return [
        command(name, *argv, *([] if count == 1 else [*hosts, str(i)]), devices=devices)
        for i in range(count)
    ]


def steps_of(run_dir) -> list[int]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def kill_after(step: int, run_dir, processes: list[subprocess.Popen]) -> None:
    """Kills one of the hosts once a step is saved; the others end with a sentence."""
    end = time.monotonic() + PATIENCE
    while max(steps_of(run_dir), default=0) < step:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    *others, victim = processes
    victim.kill()
    victim.communicate(timeout=PATIENCE)
    for process in others:
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and "start all of them again" in error, error
    say(f"killed after step {max(steps_of(run_dir))}")


@pytest.mark.slow
def test_from_weights_to_a_served_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket = open_path(BUCKET)
    problems = nano_problems(64, held_out=False)
    texts = {
        "traces.jsonl": [
            {
                "problem": p.text,
                "thinking": p.terse(),
                "solution": rf"\boxed{{{p.answer}}}",
            }
            for p in problems
        ],
        "problems.jsonl": [{"problem": p.text, "answer": p.answer} for p in problems],
    }
    for name, records in texts.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (bucket / name).write_text(lines)
    for name, settings in (("sft", SFT), ("train", TRAIN)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))

    finished(command("convert", "from-hf", "nano", f"{BUCKET}/model"))
    argv = ("--config", "sft.yaml", "--run-dir", f"{BUCKET}/sft")
    finished(*on_hosts(2, 4, "sft", *argv))
    assert steps_of(bucket / "sft")[-1] == 6

    argv = ("--config", "train.yaml", "--run-dir", f"{BUCKET}/run")
    run_dir = bucket / "run"
    kill_after(2, run_dir, on_hosts(2, 4, "train", *argv))
    kill_after(5, run_dir, on_hosts(4, 2, "train", *argv))
    finished(*on_hosts(1, 8, "train", *argv))
    steps = steps_of(run_dir)
    assert steps == list(range(1, 9))
    accuracy = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    say(f"validation: {accuracy['validation_accuracy']}")

    argv = ("--dataset", f"{BUCKET}/problems.jsonl", "--budgets", "8,16", "-n", "1")
    argv = (*argv, "--solution-budget", "11", "--cache-len", "96")
    evaluated = ("evaluate", "--model", f"{BUCKET}/run", *argv)
    finished(command(*evaluated, "--output", f"{BUCKET}/evaluation", devices=4))
    rows = json.loads((bucket / "evaluation" / "results.json").read_text())["rows"]
    assert [row["thinking_budget"] for row in rows] == [8, 16]
    say(f"evaluated: {[(r['thinking_budget'], r['accuracy']) for r in rows]}")

    finished(command("convert", "to-hf", f"{BUCKET}/run", f"{BUCKET}/hf"))
    greedy = ("--temperature", "0", "--thinking-budget", "16", "--solution-budget")
    greedy = (*greedy, "11", "--cache-len", "96", "--json", problems[0].text)
    of_run, of_hf = (
        json.loads(finished(command("sample", "--model", f"{BUCKET}/{name}", *greedy)))
        for name in ("run", "hf")
    )
    assert of_run["token_ids"] == of_hf["token_ids"]

    argv = ("--model", f"{BUCKET}/hf", "--port", "0", "--cache-len", "96")
    argv = (*argv, "--thinking-budget", "16", "--solution-budget", "11")
    server = command("serve", *argv)
    lines = iter(server.stderr.readline, "")
    url = next(line for line in lines if "is served at" in line).split(" at ")[1]
    url = url.split()[0]
    next(line for line in lines if line == "ready\n")
    body = {
        "messages": [{"role": "user", "content": problems[0].text}],
        **{"temperature": 0, "thinking_token_budget": 16, "solution_token_budget": 11},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        answer = json.load(response)
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=PATIENCE)
    assert server.returncode == 0
    [choice] = answer["choices"]
    assert choice["message"]["content"] == of_run["solution"]
    assert choice["message"]["reasoning"] == of_run["thinking"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 16
    say(f"served: {choice['message']}")
