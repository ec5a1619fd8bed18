"""Responses sampled while the step before is learned: which parameters they come from,
and that a run goes on exactly."""

import json
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import (
    interrupted_run,
    metrics,
    settings,
    start,
    workplace,  # noqa: F401 (fixture)
)

from e1jax import train
from e1jax.config.checks import UserError
from e1jax.sharding.hosts import divided_devices

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

AHEAD = ("--rollout.ahead", "1")
MORE = ("--checkpoint.every", "1", "--checkpoint.keep", "9")


def test_each_step_is_sampled_from_the_parameters_before_the_last_update(
    workplace,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """The engine's parameters at each step are compared with the saved checkpoints."""
    seen, prompts = [], []
    original = train.sample_rollouts

    def sample_rollouts(config, engine, batch, *args, **options):
        seen.append(jax.tree.map(np.array, engine.params))
        prompts.append([prompt.position for prompt in batch])
        return original(config, engine, batch, *args, **options)

    monkeypatch.setattr(train, "sample_rollouts", sample_rollouts)
    train.train(settings(workplace, *AHEAD, *MORE), tmp_path / "run")
    assert prompts == [[2 * step, 2 * step + 1] for step in range(6)]
    read = ocp.PyTreeCheckpointer().restore
    after = {
        step: read(tmp_path / "run" / "checkpoints" / str(step) / "params")
        for step in range(1, 7)
    }
    jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])  # of the model
    for step in range(2, 6):
        jax.tree.map(np.testing.assert_array_equal, seen[step], after[step - 1])
    assert not np.array_equal(after[1]["embedding"], after[2]["embedding"])
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1, 1, 1]
    for line in lines:
        for name in ("sampler_idle", "learner_idle"):
            assert 0 <= line[name] <= 1
    # The first step has the parameters that sampled it, and no other.
    assert lines[0]["sampler_gap"] < 1e-5 < lines[-1]["sampler_gap"]


KILL, STOP = signal.SIGKILL, signal.SIGTERM
MOMENTS = [
    ("sampling", 1, KILL),  # the first step's responses
    ("sampling", 4, KILL),  # the responses of step 4, while step 3 is learned
    ("sampling", 3, STOP),  # the step that is learned meanwhile is saved
    ("saved", 1, KILL),
]


def test_killed_and_resumed_is_the_unbroken_run(workplace, tmp_path):  # noqa: F811
    moments = " ".join(f"{where}:{nth}:{number:d}" for where, nth, number in MOMENTS)
    run_dir = interrupted_run(workplace, tmp_path, AHEAD, moments)
    assert [line["staleness"] for line in metrics(run_dir)] == [0, 1, 1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_kills_and_resumed_is_the_unbroken_run(workplace, tmp_path, seed):  # noqa: F811
    """Twenty in all, each of a run of its own."""
    rng = np.random.default_rng(seed)
    for number in range(5):
        where = str(rng.choice(["sampling", "update", "saved", "writing"]))
        nth = int(rng.integers(1, 4))
        parent = tmp_path / str(number)
        parent.mkdir()
        if number:
            (parent / "unbroken").symlink_to(tmp_path / "0" / "unbroken")
        interrupted_run(workplace, parent, AHEAD, f"{where}:{nth}:{KILL:d}")


@pytest.mark.slow
def test_an_adapter_is_sampled_ahead_too(workplace, tmp_path):  # noqa: F811
    flags = (*AHEAD, "--adapter.rank", "2")
    interrupted_run(workplace, tmp_path, flags, f"sampling:4:{KILL:d}")


@pytest.mark.slow
def test_devices_that_only_sample_give_the_run_of_one_device(
    workplace,  # noqa: F811
    tmp_path,
):
    train.train(settings(workplace, *AHEAD), tmp_path / "one")
    flags = (*AHEAD, "--rollout-mesh", "data=1,tensor=1")
    run_dir = tmp_path / "two"
    command = ["-m", "e1jax.train"]
    process = start(workplace, command, *flags, "--run-dir", str(run_dir), devices=2)
    assert process.wait() == 0, process.stderr.read()
    for ours, theirs in zip(metrics(run_dir), metrics(tmp_path / "one"), strict=True):
        for name in ("reward", "response_tokens", "thinking_tokens", "staleness"):
            assert ours[name] == theirs[name], name
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rollout_mesh": "data=1"}, "rollout.ahead: 1"),
        ({"rollout": {"ahead": 2}}, "ahead must be"),
    ],
)
def test_settings_that_do_not_fit(workplace, changes, part):  # noqa: F811
    flags = []
    for name, value in changes.items():
        values = value.items() if isinstance(value, dict) else [(None, value)]
        for key, setting in values:
            flags += [f"--{name}.{key}" if key else f"--{name}", str(setting)]
    with pytest.raises(UserError, match=part):
        settings(workplace, *flags)


class Device:
    def __init__(self, id: int, process_index: int):
        self.id, self.process_index = id, process_index


def test_the_last_devices_of_each_process_sample(monkeypatch):
    devices = [Device(i, i // 4) for i in (4, 5, 0, 1, 2, 3, 6, 7)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:2] + devices[-2:])
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    learning, sampling = divided_devices("data=3")
    assert [device.id for device in learning] == [4, 0]
    assert [device.id for device in sampling] == [5, 6, 7]
    learning, sampling = divided_devices(None)
    assert learning == devices and len(sampling) == 4
    with pytest.raises(UserError, match="takes 4 devices of each host, which has 4"):
        divided_devices("data=2,tensor=2")
