"""Training on several processes: the update of one, and what happens when one is lost."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from e1jax import train
from e1jax.config import (
    GRPOConfig,
    load_config,
)
from e1jax.data import nano_problems

DRIVER = str(Path(__file__).parent / "interrupt.py")
COMMAND = ["-m", "e1jax.train"]
SETTINGS = {
    "model": "nano",
    "steps": 4,
    "data": {"problems": "problems.jsonl", "max_prompt_len": 40},
    "rollout": {
        "prompts": 4,
        "samples": 3,
        "thinking_budget": 8,
        "solution_budget": 6,
        "temperature": 0.9,
        "slots": 5,
        "cache_len": 64,
    },
    # A mini-batch of three micro-batches, whose rows are of both processes.
    "update": {"minibatch_prompts": 4, "microbatch": 4, "remat": False},
    "optimizer": {"learning_rate": 3e-4},
    "validation": {
        "problems": "problems.jsonl",
        "limit": 7,  # not shared out evenly
        "every": 2,
        "budgets": [[8, 20]],
        "temperature": 2.0,
    },
    "checkpoint": {"every": 2, "keep": 9},
}
TIMED = {"seconds", "rollout_tokens_per_second", "update_tokens_per_second"}
# Of the whole, whoever sampled what.
EXACT = {"step", "reward", "accuracy", "solved", "mixed", "forced_share"} | {
    *("response_tokens", "thinking_tokens", "solution_tokens", "unfinished_share"),
    *("validation_accuracy", "validation_tokens_8_20", "learning_rate"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with hosts.yaml, its problems, and compilations."""
    path = tmp_path_factory.mktemp("hosts")
    even = [str(number) for number in range(0, 100, 2)]  # right half of the time
    problems = [p for p in nano_problems(60, 3, held_out=False) if len(p.steps) == 4]
    lines = [json.dumps({"problem": p.text, "answer": even}) for p in problems[:9]]
    (path / "problems.jsonl").write_text("\n".join(lines))
    (path / "hosts.yaml").write_text(yaml.safe_dump(SETTINGS))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(path / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        jax.config.update(names[0], str(path / "cache"))
        compilation_cache.reset_cache()
        yield path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def alone(place):
    """The run of one process."""
    train.train(settings(), place / "alone")
    return place / "alone"


def settings() -> GRPOConfig:
    return load_config(GRPOConfig, ["--config", "hosts.yaml"], "train")[0]


def start(run_dir: Path, scripts: list[list[str]], *flags: str):
    """A run of as many processes as there are scripts; returns exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, *script, "--config", "hosts.yaml", *flags),
                *("--run-dir", str(run_dir), "--coordinator", address),
                *("--processes", str(len(scripts)), "--process", str(number)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, script in enumerate(scripts)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], outputs


def saved(run_dir: Path, step: int) -> dict:
    """Parameters and state of the optimizer, as NumPy arrays."""
    found = {}
    for name in ("params", "optimizer"):
        path = run_dir / "checkpoints" / str(step) / name
        reader = ocp.PyTreeCheckpointer()
        tree = reader.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found[name] = reader.restore(path, restore_args=args)
    return found


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def assert_same(run_dir: Path, other: Path, step: int) -> None:
    """Equal but for the order of sums in float32."""
    ours, theirs = saved(run_dir, step), saved(other, step)
    for name in ("params", "optimizer"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            *(ours[name], theirs[name]),
        )
    # Adam makes much of the few gradients that are next to nothing.
    pairs = zip(*map(jax.tree.leaves, (ours["params"], theirs["params"])), strict=True)
    gaps = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    assert np.quantile(gaps, 0.99) < 1e-6
    for one, two in zip(metrics(run_dir), metrics(other), strict=False):
        assert set(one) == set(two)
        for name in set(one) - TIMED - {"rollout_waste", "sampler_gap"}:
            close = pytest.approx(two[name], rel=2e-3, abs=1e-6)
            exact = pytest.approx(two[name], rel=1e-6)
            assert one[name] == (exact if name in EXACT else close), name


def records(run_dir: Path) -> list[dict]:
    paths = [run_dir / "checkpoints" / step / "record" / "metadata" for step in "24"]
    return [json.loads(path.read_text()) for path in paths]


def test_lost_processes_and_the_run_of_one(place, alone):
    """Two processes, of which the second is killed; two that go on, of which the first
    is killed; one that goes on to the end."""
    run_dir = place / "shared"
    # In the update of the third step, then of the fourth.
    for victim, nth in ((1, 3), (0, 2)):
        scripts = [COMMAND, COMMAND]
        scripts[victim] = [DRIVER, f"update:{nth}:{signal.SIGKILL:d}"]
        codes, outputs = start(run_dir, scripts)
        assert f"exit code -{signal.SIGKILL:d}" in outputs[victim][0], outputs
        assert codes[1 - victim] == 1
        last = outputs[1 - victim][1].strip().splitlines()[-1]
        assert last.startswith("error: ") and "start all of them again" in last, outputs
        steps = [p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()]
        assert "2" in steps and "4" not in steps
        assert_same(run_dir, alone, 2)
    train.train(settings(), run_dir)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4]
    assert_same(run_dir, alone, 4)
    assert [r["data"] for r in records(run_dir)] == [r["data"] for r in records(alone)]
