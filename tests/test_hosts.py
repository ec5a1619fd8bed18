"""Training on several processes: the update of one, and what happens when one is lost."""

import json
import os
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
from conftest import PATIENCE, Chip, several_devices

from e1jax import train
from e1jax.cli.locks import owning
from e1jax.config.checks import UserError
from e1jax.config.load import load_config, load_config_and_flags
from e1jax.config.training import GRPOConfig, HostsConfig
from e1jax.data.nano import nano_problems
from e1jax.grpo import rollouts
from e1jax.grpo.rollouts import mean_over_processes
from e1jax.sharding import hosts
from e1jax.sharding.hosts import (
    _check_even,
    allgather_rows,
    allgather_texts,
    any_process,
    check_agreement,
    joined,
    process_allgather,
)

DRIVER = str(Path(__file__).parent / "interrupt.py")
COMMAND = ["-m", "e1jax.train"]
SETTINGS = {
    "model": "nano",
    "steps": 4,
    "data": {"problems": "problems.jsonl", "max_prompt_len": 40},
    "rollout": {
        "prompts": 4,
        "samples": 4,
        "thinking_budget": 8,
        "solution_budget": 6,
        "temperature": 0.9,
        "slots": 5,
        "cache_len": 64,
    },
    # Two updates a step; which prompts are in which shows the order of the rows.
    "update": {"minibatch_prompts": 2, "microbatch": 4, "remat": False},
    # Or, where all rewards of a mini-batch agree, its gradient would be mere rounding.
    "loss": {"entropy_coef": 0.01},
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
TIMED = {"seconds", "rollout_tokens_per_second", "update_tokens_per_second"} | {
    *("sampler_idle", "learner_idle"),
}
# Of the whole, whoever sampled what.
EXACT = {"step", "reward", "accuracy", "solved", "mixed", "forced_share"} | {
    *("response_tokens", "thinking_tokens", "solution_tokens", "unfinished_share"),
    *("validation_accuracy", "validation_tokens_8_20", "learning_rate"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, compilations_in):
    """A directory with hosts.yaml, its problems, and compilations."""
    path = tmp_path_factory.mktemp("hosts")
    even = [str(number) for number in range(0, 100, 2)]  # right half of the time
    problems = [p for p in nano_problems(60, 3, held_out=False) if len(p.steps) == 4]
    lines = [json.dumps({"problem": p.text, "answer": even}) for p in problems[:9]]
    (path / "problems.jsonl").write_text("\n".join(lines))
    (path / "hosts.yaml").write_text(yaml.safe_dump(SETTINGS))
    with compilations_in(path / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield path


@pytest.fixture(scope="module")
def alone(place):
    """The run of one process."""
    train.train(settings(), place / "alone")
    return place / "alone"


def settings(*flags: str) -> GRPOConfig:
    return load_config(GRPOConfig, ["--config", "hosts.yaml", *flags], "train")[0]


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
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
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
    params = [(ours["params"], theirs["params"])]
    states = ours["optimizer"], theirs["optimizer"]
    if isinstance(states[0], list | tuple) and len(states[0]) == 2:  # rollout.ahead
        states, sampled = zip(*states, strict=True)
        params.append(sampled)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *states
    )
    # Adam makes whole steps of the few gradients that are nothing but rounding.
    for trees in params:
        pairs = zip(*map(jax.tree.leaves, trees), strict=True)
        gaps = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
        assert np.quantile(gaps, 0.999) < 1e-5 and gaps.max() < 3e-4 * step
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
    # In the first update of the third step, then of the fourth.
    for victim, nth in ((1, 5), (0, 3)):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, flags", [(1, []), (2, ["--rollout-mesh", "data=1,tensor=1"])]
)
def test_two_processes_sample_ahead(devices, flags, place, monkeypatch):
    """Each on a device that learns as well, and on one of its own."""
    ahead = ["--rollout.ahead", "1"]
    if not (place / "ahead_of_one").exists():
        train.train(settings(*ahead), place / "ahead_of_one")
    run_dir = place / f"ahead_of_two_{devices}"
    monkeypatch.setenv("XLA_FLAGS", several_devices(devices))
    codes, outputs = start(run_dir, [COMMAND, COMMAND], *ahead, *flags)
    assert codes == [0, 0], outputs
    assert_same(run_dir, place / "ahead_of_one", 2)


CUTS = [
    *("--rollout.thinking_budget", "1024", "--rollout.cuts", "[4, 9]"),
    *("--rollout.samples", "2", "--rollout.solutions_per_cut", "3"),
    *("--update.microbatch", "14", "--loss.scale_rewards", "false"),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--adapter.rank", "3"], CUTS], ids=["lora", "cuts"])
def test_two_processes_are_one(flags, place, tmp_path):
    flags = [*flags, "--steps", "2"]
    train.train(settings(*flags), tmp_path / "one")
    codes, outputs = start(tmp_path / "two", [COMMAND, COMMAND], *flags)
    assert codes == [0, 0], outputs
    assert_same(tmp_path / "two", tmp_path / "one", 2)


def test_processes_that_differ_or_whose_directory_is_taken_are_all_refused(place):
    run_dir = place / "refused"
    codes, outputs = start(run_dir, [COMMAND, [*COMMAND, "--seed", "1"]])
    ends = [error.strip().splitlines()[-1] for _, error in outputs]
    assert codes == [2, 2], outputs
    for end in ends:
        assert end.startswith(
            "error: the processes of the run differ in seed (0 in "
        ), end
        assert "process 0, 1 in process 1)" in end
    assert not run_dir.exists()
    run_dir.mkdir()
    with owning(run_dir, inside=True):
        codes, outputs = start(run_dir, [COMMAND, COMMAND])
    assert codes == [2, 2], outputs
    for _, error in outputs:
        assert "error: another run is writing" in error.strip().splitlines()[-1]
    assert not list(run_dir.iterdir())


@pytest.mark.slow
def test_four_processes_stop_together_and_two_of_two_devices_go_on(
    place, alone, monkeypatch
):
    run_dir = place / "four"
    stopped = [DRIVER, f"sampling:3:{signal.SIGTERM:d}"]  # in the third step
    codes, outputs = start(run_dir, [COMMAND, COMMAND, stopped, COMMAND])
    assert codes == [0] * 4 and "exit code 0" in outputs[2][0], outputs
    said = ["stopped after step 2, saved" in out for out, _ in outputs]
    assert said == [True, False, False, False]
    assert_same(run_dir, alone, 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    codes, outputs = start(run_dir, [COMMAND, COMMAND])
    assert codes == [0] * 2, outputs
    assert "is trained" in outputs[0][0]
    assert_same(run_dir, alone, 4)


# What can be wrong with it.


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--processes", "2"], "--processes came without all of --coordinator"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "'here'"),
        (["--coordinator", "a:99999", "--processes", "2", "--process", "0"], "a:99999"),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            "--process must be a whole number, from 0 to 1, not 2",
        ),
        (["--coordinater", "a:1"], "did you mean '--coordinator'"),
    ],
)
def test_mistakes_in_the_flags_are_one_sentence(place, flags, part):
    argv = ["--config", "hosts.yaml", *flags]
    with pytest.raises(UserError, match=part) as error:
        load_config_and_flags(GRPOConfig, HostsConfig, argv, "train")
    assert "\n" not in str(error.value)


def test_flags_of_the_hosts_are_no_settings(place):
    argv = ["--config", "hosts.yaml", "--coordinator", "10.0.0.1:1234"]
    argv += ["--processes", "3", "--process", "1"]
    config, _, found = load_config_and_flags(GRPOConfig, HostsConfig, argv, "train")
    assert found == HostsConfig("10.0.0.1:1234", 3, 1)
    assert config == settings()
    with pytest.raises(UserError, match="unknown field 'processes'"):
        Path("hosts2.yaml").write_text(yaml.safe_dump({**SETTINGS, "processes": 3}))
        load_config_and_flags(GRPOConfig, HostsConfig, ["--config", "hosts2.yaml"], "")


def test_hosts_of_different_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Chip(0, 0), Chip(1, 0), Chip(2, 1)])
    with pytest.raises(UserError, match="2 in process 0, 1 in process 1"):
        _check_even()

    def leave(message, code):
        assert message.startswith("error: the processes of the run have different")
        raise SystemExit(code)

    monkeypatch.setattr(hosts, "_join", lambda config: True)
    monkeypatch.setattr(hosts, "_leave", leave)
    with pytest.raises(SystemExit, match="2"), joined(HostsConfig()):
        raise AssertionError("the run began")
    monkeypatch.setattr(jax, "devices", lambda: [Chip(0, 1), Chip(1, 0)])
    _check_even()


def test_a_port_that_is_taken_is_named(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ["--coordinator", address, "--processes", "2", "--process", "0"]
        command = [sys.executable, *COMMAND, "--config", "hosts.yaml", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: --coordinator {address}: this process"), last


LAYOUTS = """
import jax, jax.numpy as jnp, numpy as np
from e1jax.config.model import ModelConfig
from e1jax.sharding.fsdp import default_mesh
from e1jax.nn import model
from e1jax.sharding import hosts
from e1jax.sharding.mesh import make_mesh
sizes = ModelConfig(96, 32, 48, 3, 8, 4, 4, 64, 1e4)
mesh = make_mesh(default_mesh(8), sizes, REORDERED)
assert dict(mesh.shape) == {"data": 8, "tensor": 1}
local = hosts.local_mesh(sizes, mesh)
assert dict(local.shape) == {"data": 2, "tensor": 4}
params = model.init_params(sizes, mesh, jnp.float32, 0)
for dtype in (jnp.float32, jnp.bfloat16):
    wanted = model.abstract_params(sizes, local, dtype)
    copy = hosts.make_local_copy(mesh, wanted)(params)
    for x, y, like in zip(*map(jax.tree.leaves, (params, copy, wanted)), strict=True):
        assert (y.sharding, y.dtype) == (like.sharding, like.dtype)
        np.testing.assert_array_equal(x.astype(dtype), y)
own = hosts.make_local_copy(mesh, model.abstract_params(sizes, mesh, jnp.float32))
assert own(params) is params
print("as sampling has them")
"""


@pytest.mark.parametrize(
    "devices", ["jax.devices()", "np.array(jax.devices()).reshape(2, 4).T.flatten()"]
)
def test_parameters_go_over_to_the_mesh_of_sampling(devices):
    """From all on `data` to as many on `tensor` as there are key/value heads, also where
    the mesh goes through the devices in another order than by process."""
    flags = {"XLA_FLAGS": several_devices(8)}
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS.replace("REORDERED", devices)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "as sampling has them\n", done.stderr[-3000:]


def test_rows_come_in_the_order_of_the_prompts(monkeypatch):
    """Process p has the prompts p, p + 3, ... of a step, two rows each."""
    rows = np.arange(12 * 2 * 5).reshape(24, 5)
    groups = rows.reshape(12, 2, 5)
    gathered = np.stack([groups[p::3].reshape(-1, 5) for p in range(3)])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        hosts.multihost_utils, "process_allgather", lambda tree: gathered
    )
    np.testing.assert_array_equal(allgather_rows(rows, 2), rows)


def test_numbers_of_all_processes_are_not_rounded(monkeypatch):
    def gather(bits):
        assert bits.dtype == np.uint32  # which JAX leaves as they are
        return np.stack([bits, bits[::-1].copy()[::-1]])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    numbers = [[0.1, 2.0**60 + 1], [-1e-300, 3.0]]
    np.testing.assert_array_equal(process_allgather(numbers), [numbers, numbers])
    assert any_process([0]) is True and any_process([]) is False


def gathered(monkeypatch, *texts: str) -> None:
    """As if each process had given one of the texts."""
    monkeypatch.setattr(jax, "process_count", lambda: len(texts))
    every = [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def gather(array):
        if array.dtype == np.uint32:  # sizes
            sizes = np.array([len(data) for data in every], np.float64)
            return sizes.view(np.uint32).reshape(len(every), 2)
        longest = max(map(len, every)) + 1
        return np.stack([np.pad(data, (0, longest - len(data))) for data in every])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)


def test_values_that_differ_between_processes_are_named(monkeypatch):
    gathered(monkeypatch, "aé", "", "bcd")
    assert allgather_texts("aé") == ["aé", "", "bcd"]
    here = {"steps": 5, "data.problems": "ab", "the code of e1jax": "00"}
    gathered(monkeypatch, *[json.dumps(here)] * 3)
    check_agreement(here)
    for name, value in {"steps": 6, "data.problems": "cd", "new": 1}.items():
        other = json.dumps({**here, name: value})
        gathered(monkeypatch, json.dumps(here), json.dumps(here), other)
        there = rf"{name} \({here.get(name)!r} in process 0, {value!r} in process 2\)"
        with pytest.raises(UserError, match=there):
            check_agreement(here)


def test_a_whole_step_from_those_of_each_process(monkeypatch):
    each = {"reward": [0.25, 0.75], "reward_crashes": [1, 2]}
    found = {name: values[0] for name, values in each.items()}
    monkeypatch.setattr(
        rollouts, "process_allgather", lambda values: np.array([*each.values()]).T
    )
    expected = {"reward": 0.5, "reward_crashes": 3}
    assert mean_over_processes(found) == expected


ABORT = """
import ctypes, sys, threading, time
import numpy
from e1jax.sharding import hosts
with hosts._watching_for_abort("error: JAX has aborted this process", 1):
    how = sys.argv[1]
    if how == "thread":  # as JAX does
        threading.Thread(target=ctypes.CDLL(None).abort).start()
        time.sleep(60)
    elif how == "locked":  # while no other thread can run Python
        ctypes.PyDLL(None).abort()
print("the end")
"""


@pytest.mark.parametrize(
    ("how", "code"), [("thread", 1), ("locked", -signal.SIGABRT), ("none", 0)]
)
def test_an_abort_ends_the_process(how, code):
    """With a sentence, where Python can run; in any case within seconds."""
    done = subprocess.run(
        [sys.executable, "-c", ABORT, how],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ("the end\n" if how == "none" else "")
    said = "error: JAX has aborted this process" in done.stderr
    assert said == (how == "thread")


JOIN = """
import sys
from e1jax.cli import run_command
from e1jax.config.training import HostsConfig
from e1jax.sharding import hosts
hosts.JOIN_SECONDS = 3
def main():
    with hosts.joined(HostsConfig(sys.argv[1], 2, int(sys.argv[2]))):
        print("joined")
run_command(main)
"""


@pytest.mark.parametrize(
    ("host", "process"), [("127.0.0.1", 0), ("127.0.0.1", 1), ("no.such.invalid", 1)]
)
def test_processes_that_do_not_come(host, process):
    """The first one waits for the other; the other waits at an address of nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", JOIN, f"{host}:{port}", str(process)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the other processes of the run are not found")
    if process:
        assert f"{host}:{port}" in last and done.stderr.count("\n") == 1


LOST = [
    (
        RuntimeError("Gloo: [pair.cc] Connection closed by peer"),
        1,
        "error: another",
    ),
    (RuntimeError("barrier: missed heartbeats of task 1"), 1, "error: another"),
    (RuntimeError("INTERNAL: the Gloo program was not compiled"), 1, "Traceback"),
    (RuntimeError("RESOURCE_EXHAUSTED"), 1, "Traceback"),
    (UserError("no"), 2, "error: no"),
    (OSError(28, "No space left on device", "f"), 2, "error: No space left on"),
]


@pytest.mark.parametrize(("error", "code", "part"), LOST, ids=str)
def test_only_a_lost_process_is_called_one(monkeypatch, error, code, part):
    def leave(message, code):
        left.append((message.split("\n")[0], code))
        raise SystemExit(code)

    left = []
    monkeypatch.setattr(hosts, "_join", lambda config: True)
    monkeypatch.setattr(hosts, "_check_even", lambda: None)
    monkeypatch.setattr(hosts, "_leave", leave)
    with pytest.raises(SystemExit), joined(HostsConfig()):
        raise error
    [(message, found)] = left
    assert message.startswith(part) and found == code
