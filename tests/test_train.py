"""GRPO training: the command killed and resumed, its rollouts and updates, mistakes."""

import copy
import dataclasses
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import yaml
from conftest import Chip, edit_json, several_devices
from interrupt import interrupt
from tensorboardX.proto.event_pb2 import Event
from test_sft import torch_parts
from transformers import AutoModelForCausalLM

import e1jax
from e1jax import Engine, SamplingParams, convert, train, training
from e1jax.checkpoint.load import load_model, read_tokenizer
from e1jax.checkpoint.metrics import MetricsLog
from e1jax.checkpoint.params import named_leaves
from e1jax.checkpoint.runs import RunCheckpoints, find_params
from e1jax.cli.files import read_json
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.training import (
    AdamWConfig,
    GRPOConfig,
    LossConfig,
    RolloutConfig,
    UpdateConfig,
)
from e1jax.data.nano import nano_problems
from e1jax.data.prompts import Prompt, request_seed
from e1jax.grpo.learner import Learner
from e1jax.grpo.rollouts import (
    Rollouts,
    longest_lengths,
    make_engine,
    read_examples,
    rollout_metrics,
    rollout_request,
)
from e1jax.grpo.rollouts import sample_rollouts as _sample_rollouts
from e1jax.nn.model import forward, unembed
from e1jax.plan.training import logprob_passes
from e1jax.rewards import Grader, call_function, load_function
from e1jax.sampling.completion import Completion
from e1jax.sharding.mesh import make_mesh
from e1jax.tokenizer import extract_boxed
from e1jax.training import make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

CONFIGS = Path(__file__).parent.parent / "configs"
NANO = Path(e1jax.__file__).parent / "models" / "nano"
DRIVER = str(Path(__file__).parent / "interrupt.py")
BUDGETS = (8, 6)
TINY = {
    "model": "nano",
    "steps": 6,
    "data": {"max_prompt_len": 40},
    # Fewer slots than responses: they are refilled. Every response has 13 to 15 tokens,
    # so all steps share a padded length: little to compile.
    "rollout": {
        "prompts": 2,
        "samples": 4,
        "thinking_budget": BUDGETS[0],
        "solution_budget": BUDGETS[1],
        "temperature": 0.9,
        "slots": 5,
        "cache_len": 64,
    },
    "update": {"minibatch_prompts": 1, "microbatch": 2, "remat": False},
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 3},
    "validation": {
        "limit": 9,
        "every": 3,
        "budgets": [[8, 20], [None, None]],
        "temperature": 2.0,  # so hot that every step's parameters draw something else
        "top_p": 0.98,
    },
    "checkpoint": {"every": 2},
}
# Of a step; they depend on how fast the machine is.
TIMED = {"seconds", "rollout_tokens_per_second", "update_tokens_per_second"}
IDLE = {"sampler_idle", "learner_idle"}  # of rollout.ahead; shares of that time
METRICS = TIMED | {
    *("step", "reward", "accuracy", "loss", "kl", "clip_fraction", "entropy"),
    *("grad_norm", "thinking_tokens", "solution_tokens", "response_tokens"),
    *("forced_share", "learning_rate", "sampler_gap", "rollout_waste"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, compilations_in):
    """A directory with tiny.yaml, its problems, and the compilations that runs share."""
    path = tmp_path_factory.mktemp("train")
    even = [str(number) for number in range(0, 100, 2)]  # right half of the time
    made = [p for p in nano_problems(100, 3, held_out=False) if len(p.steps) == 4]
    lines = [{"problem": problem.text, "answer": even} for problem in made[:16]]
    for name, part in (("problems", lines[:5]), ("held_out", lines[5:])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (path / f"{name}.jsonl").write_text(text)
    settings = copy.deepcopy(TINY)
    settings["data"]["problems"] = str(path / "problems.jsonl")
    settings["validation"]["problems"] = str(path / "held_out.jsonl")
    (path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with compilations_in(path / "cache"):
        yield path


def settings(workplace: Path, *flags: str) -> GRPOConfig:
    argv = ["--config", str(workplace / "tiny.yaml"), *flags]
    return load_config(GRPOConfig, argv, "train")[0]


@pytest.fixture(scope="module")
def unbroken(workplace):
    run_dir = workplace / "unbroken"
    train.train(settings(workplace), run_dir)
    return run_dir


def start(workplace: Path, script: list[str], *flags: str, devices: int = 1):
    return subprocess.Popen(
        [sys.executable, *script, "--config", "tiny.yaml", *flags],
        cwd=workplace,
        env={**os.environ, "XLA_FLAGS": several_devices(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [{k: v for k, v in step.items() if k not in TIMED | IDLE} for step in steps]


def saved(run_dir: Path) -> dict[str, dict]:
    """All that the checkpoints of a run hold, by step."""
    steps = {}
    for path in (run_dir / "checkpoints").iterdir():
        if path.is_dir():
            read = ocp.PyTreeCheckpointer().restore
            trees = {name: read(path / name) for name in ("params", "optimizer")}
            record = read_json(path / "record" / "metadata")
            steps[path.name] = {**trees, "record": record}
    return steps


def interrupted_run(
    workplace: Path, parent: Path, flags: Sequence[str], moments: str
) -> Path:
    """A run that was interrupted at `moments` (see interrupt.py) in a process of its own
    and went on in this one. It is compared with an unbroken one."""
    config = settings(workplace, *flags)
    if not (parent / "unbroken").exists():
        train.train(config, parent / "unbroken")
    run_dir = parent / "killed"
    process = start(workplace, [DRIVER, moments], "--run-dir", str(run_dir), *flags)
    assert process.wait() == 0, process.stderr.read()
    train.train(config, run_dir)
    assert_same_run(run_dir, parent / "unbroken")
    return run_dir


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Equal to the last bit: metrics, parameters, optimizer, position in the data."""
    assert metrics(run_dir) == metrics(other)
    ours, theirs = saved(run_dir), saved(other)
    both = set(ours) & set(theirs)  # a step where a run was stopped is saved too
    assert "6" in both
    for step in both:
        jax.tree.map(np.testing.assert_array_equal, ours[step], theirs[step])
    best = [read_json(d / "checkpoints" / "best.json") for d in (run_dir, other)]
    assert best[0] == best[1]


# A run and what it leaves.


def test_a_run_writes_its_metrics_and_learns(workplace, unbroken):
    lines = [json.loads(s) for s in (unbroken / "metrics.jsonl").open()]
    assert_drawn(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) >= METRICS
        assert line["reward"] == line["accuracy"]  # rewards are 1 or 0
        assert line["forced_share"] == 1 and line["thinking_tokens"] == 8
        assert line["response_tokens"] == 8 + 1 + line["solution_tokens"]
        assert 0 <= line["rollout_waste"] < 1
        rate = 3e-4 * min(1, line["step"] / 3)
        assert line["learning_rate"] == pytest.approx(rate)
        assert line["sampler_gap"] < 1e-5  # the sampler had this step's parameters
        has_validation = "validation_accuracy" in line
        assert has_validation == (line["step"] in (3, 6))
    assert {0 < line["reward"] < 1 for line in lines} >= {True}
    # The second mini-batch of a step is a policy away from the first one's.
    assert lines[0]["kl"] > 0 and lines[-1]["kl"] > 1e-4
    first, last = (saved(unbroken)[step]["params"] for step in ("4", "6"))
    assert not np.array_equal(first["embedding"], last["embedding"])
    assert yaml.safe_load((unbroken / "config.yaml").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(settings(workplace)))
    )
    assert read_json(unbroken / "tokenizer_config.json")["e1jax_instruction"] == ""
    for step, record in ((s, saved(unbroken)[s]["record"]) for s in ("4", "6")):
        assert record["seed"] == 0 and record["data"] == {"next_index": int(step)}


# Killed, stopped, resumed.


def test_killed_anywhere_and_resumed_is_bit_for_bit_the_unbroken_run(
    workplace, unbroken
):
    run_dir = workplace / "broken"
    kill, ctrl_c = signal.SIGKILL, signal.SIGINT
    # What happens: (where, the how manieth time in this process, signal, exit code, step
    # of the latest checkpoint afterwards).
    endings = [
        ("preparing", 1, kill, -kill, None),
        ("sampling", 2, kill, -kill, None),  # before the first checkpoint
        ("update", 5, kill, -kill, 2),  # between the two updates of step 3
        ("writing", 1, kill, -kill, 2),  # step 3 is whole, but for its name
        ("saved", 1, kill, -kill, 3),
        ("sampling", 2, ctrl_c, 130, 4),
    ]
    specs = " ".join(f"{where}:{nth}:{number:d}" for where, nth, number, *_ in endings)
    process = start(workplace, [DRIVER, specs], "--run-dir", "broken")
    latest = []
    for line in process.stdout:
        if line.startswith("exit code"):
            steps = saved_steps(run_dir)
            latest.append((int(line.split()[2]), max(steps, default=None)))
            # As if killed while writing: half a step, and half a line.
            half = run_dir / "checkpoints" / "5.orbax-checkpoint-tmp" / "params"
            half.mkdir(parents=True, exist_ok=True)
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "lo')
    assert process.wait() == 0
    error = process.stderr.read()
    assert "Traceback" not in error
    assert latest == [(code, step) for *_, code, step in endings], error

    train.train(settings(workplace), run_dir)
    assert_same_run(run_dir, unbroken)
    assert_drawn(run_dir)


def saved_steps(run_dir: Path) -> list[int]:
    return [int(p.name) for p in run_dir.glob("checkpoints/*") if p.name.isdigit()]


def assert_drawn(run_dir: Path) -> None:
    """TensorBoard shows the numbers of metrics.jsonl, each once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        step = line.pop("step")
        for name, value in line.items():
            expected.setdefault(name, {})[step] = pytest.approx(value, rel=1e-6)
    assert scalars(run_dir) == expected


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows, by name and step."""
    shown: dict[str, dict[int, float]] = {}
    [file] = (run_dir / "tensorboard").iterdir()
    data = file.read_bytes()
    while data:  # length and its checksum, an event and its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            steps = shown.setdefault(value.tag, {})
            assert event.step not in steps, f"{value.tag} at {event.step} twice"
            steps[event.step] = value.simple_value
    return shown


def test_sigterm_saves_and_ends_and_the_run_goes_on(
    workplace, unbroken, monkeypatch, capsys
):
    run_dir = workplace / "stopped"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    # Where it is stopped for the nth time, and the step of the latest checkpoint then.
    for where, nth, step in (("sampling", 1, 0), ("update", 1, 1), ("sampling", 3, 3)):
        with monkeypatch.context() as patch:
            interrupt(where, nth, signal.SIGTERM, patch.setattr)
            train.train(settings(workplace), run_dir)
        where = f"after step {step}, saved" if step else "before the first step was"
        assert f"stopped {where}" in capsys.readouterr().out
        assert max(saved_steps(run_dir), default=0) == step
        assert [line["step"] for line in metrics(run_dir)] == list(range(1, step + 1))
        after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        assert after == handlers
    train.train(settings(workplace), run_dir)
    assert_same_run(run_dir, unbroken)


@pytest.mark.slow
def test_a_kill_at_any_time_does_no_harm(workplace, unbroken):
    """From outside, at a random time after the first step."""
    run_dir = workplace / "killed"
    process = start(workplace, ["-m", "e1jax.train"], "--run-dir", "killed")
    log = run_dir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
    train.train(settings(workplace), run_dir)
    assert_same_run(run_dir, unbroken)


def test_a_finished_run_does_nothing_more(workplace, unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    train.train(settings(workplace), unbroken)
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert "is trained" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(workplace, unbroken):
    before = {file: file.read_bytes() for file in unbroken.iterdir() if file.is_file()}
    config = settings(workplace, "--steps", "7", "--loss.clip_low", "0.1")
    with pytest.raises(UserError) as error:
        train.train(config, unbroken)
    for part in ("steps (6 there, 7 now)", "loss.clip_low (0.2 there, 0.1 now)"):
        assert part in str(error.value)
    assert before == {file: file.read_bytes() for file in before}


def test_a_run_ends_responses_where_its_model_does(workplace, tmp_path):
    """The ids that the model's files name go into the run directory."""
    source = shutil.copytree(NANO, tmp_path / "model")
    edit_json(source / "generation_config.json", eos_token_id=[256, 97])
    edit_json(source / "config.json", eos_token_id=[98], bos_token_id=259)
    config = settings(workplace, "--model", str(source), "--data.instruction", "")
    loaded = load_model(config.model)
    run_dir = tmp_path / "run"
    train.prepare_run(config, loaded, "", run_dir, {})
    assert read_tokenizer(run_dir).eos_ids == (256, 97, 98)
    # A run that was begun before these ids were noted goes on.
    edit_json(run_dir / "config.json", eos_token_id=None, bos_token_id=None)
    (run_dir / "generation_config.json").unlink()
    train.prepare_run(config, loaded, "", run_dir, {})
    assert read_tokenizer(run_dir).eos_ids == (256, 97, 98)


def test_a_model_of_other_sizes_is_refused(workplace, tiny_hf, tmp_path):
    shutil.copytree(NANO, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data.instruction", ""]
    config = settings(workplace, *flags)
    loaded = load_model(config.model)
    train.prepare_run(config, loaded, "", tmp_path / "run", {})
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tiny_hf(), tmp_path / "model")
    with pytest.raises(UserError, match=r"begun with a model of other sizes than"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_two_devices_compute_what_one_does(workplace, unbroken):
    """By default, rows of a micro-batch are divided."""
    flags = ["--validation.problems", "null", "--steps", "2", "--run-dir", "meshed"]
    process = start(workplace, ["-m", "e1jax.train"], *flags, devices=2)
    assert process.wait() == 0, process.stderr.read()
    # The same tokens; sums in another order.
    for ours, theirs in zip(
        metrics(workplace / "meshed"), metrics(unbroken), strict=False
    ):
        exact = {"reward", "response_tokens", "solution_tokens", "unfinished_share"}
        for name in exact:
            assert ours[name] == theirs[name]
        for name in ("loss", "kl", "entropy", "grad_norm", "ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("flags", "mesh"),
    [([], "data=6,tensor=1"), (["--mesh", "data=2,tensor=3"], "data=2,tensor=3")],
)
def test_devices_are_on_data_unless_a_mesh_is_given(
    flags, mesh, workplace, monkeypatch
):
    def load(model, mesh_text, *form, devices):
        assert devices == list("abcdef")
        raise UserError(mesh_text)

    monkeypatch.setattr(jax, "devices", lambda: list("abcdef"))
    monkeypatch.setattr(training.run, "load_model", load)
    with pytest.raises(UserError, match=f"^{mesh}$"):
        train.train(settings(workplace, *flags), workplace / "nowhere")


def test_the_policy_is_laid_out_for_sampling_once_after_each_update(
    workplace, monkeypatch
):
    """A second copy would not fit beside the first on the hardware of a 7B model."""
    calls = []
    lay_out = Learner.sampling_params
    monkeypatch.setattr(
        Learner,
        "sampling_params",
        lambda self: calls.append(1) or lay_out(self),
    )
    flags = ["--steps", "3", "--validation.every", "1"]
    train.train(settings(workplace, *flags), workplace / "copies")
    assert len(calls) == 1 + 3


def test_too_little_memory_for_an_update_is_one_sentence(workplace, monkeypatch):
    def learn(self, rollouts, step):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(Learner, "learn", learn)
    with pytest.raises(UserError, match=r"memory for an update; lower update\.microb"):
        train.train(settings(workplace), workplace / "too_large")


# Orbax leaves threads behind that find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_good_step(workplace, unbroken, monkeypatch):
    run_dir = workplace / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = []
    original = RunCheckpoints.save

    def save(self, step, *args):
        original(self, step, *args)
        self.wait()
        steps.append(step)
        # Smaller than the embedding, larger than all that is written besides.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", save)
        try:
            with pytest.raises(UserError) as error:
                train.train(settings(workplace), run_dir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps == [2]
    assert "checkpoints cannot be written, the last step there is 2" in str(error.value)
    assert saved_steps(run_dir) == [2]
    train.train(settings(workplace), run_dir)
    assert_same_run(run_dir, unbroken)


def test_a_disk_that_is_full_from_the_start_is_one_sentence(workplace, tmp_path):
    config = settings(workplace)
    loaded = load_model(config.model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"run cannot be written: File too large"):
            train.prepare_run(config, loaded, "", tmp_path / "run", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_later_is_one_sentence(tmp_path):
    log = MetricsLog(tmp_path, 0, 3, [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        log.add(1, {"loss": 0.5})
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File"):
            log.flush()
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_number_that_is_not_finite_stops_and_names_the_step(
    workplace, unbroken, monkeypatch
):
    run_dir = workplace / "infinite"
    original = _sample_rollouts
    calls = []

    def sample_rollouts(*args, **options):
        rollouts = original(*args, **options)
        calls.append(None)
        bad = np.full_like(rollouts.rewards, np.inf)
        return rollouts._replace(rewards=bad) if len(calls) == 5 else rollouts

    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_rollouts", sample_rollouts)
        with pytest.raises(UserError, match=r"^step 5: \w+ is nan; lower the learning"):
            train.train(settings(workplace), run_dir)
    # Nothing of step 5 was kept, and what there was before is whole.
    assert max(saved_steps(run_dir)) == 4
    train.train(settings(workplace), run_dir)
    assert_same_run(run_dir, unbroken)


# The run directory is a model.


def test_a_run_is_a_model(workplace, unbroken, tmp_path):
    params = saved(unbroken)["6"]["params"]
    best = saved(unbroken)[str(best_step(unbroken))]["params"]
    for name, expected in (
        (unbroken, best),
        (unbroken / "6", params),
        (unbroken / "checkpoints" / "6", params),
    ):
        loaded = load_model(str(name))
        jax.tree.map(np.testing.assert_array_equal, loaded.read_params(), expected)

    convert.to_hf(str(unbroken / "6"), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 264, (3, 17)).astype(np.int32)
    positions = jnp.tile(jnp.arange(17), (3, 1))
    config, weights = loaded.config, loaded.read_params()
    logits = unembed(
        config, weights, forward(config, weights, jnp.asarray(tokens), positions)[0]
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    with torch.no_grad():
        untrained = before(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(untrained - expected).max() > 1e-2


def best_step(run_dir: Path) -> int:
    return read_json(run_dir / "checkpoints" / "best.json")["step"]


def test_dtype_and_instruction_go_with_the_model(workplace, tmp_path):
    flags = ["--update.param_dtype", "bfloat16", "--data.instruction", "Answer."]
    config = settings(workplace, *flags)
    loaded = load_model(config.model)
    train.prepare_run(config, loaded, "Answer.", tmp_path / "run", {})
    assert read_json(tmp_path / "run" / "config.json")["torch_dtype"] == "bfloat16"
    recorded = read_json(tmp_path / "run" / "tokenizer_config.json")
    original = read_json(NANO / "tokenizer_config.json")
    assert recorded == {**original, "e1jax_instruction": "Answer."}
    [example, *_] = read_examples(config, loaded, "Answer.")
    assert loaded.tokenizer.decode(example.prompt_ids).endswith(
        "? Answer.<｜Assistant｜><think>\n"
    )


# Validation.


def test_validation_measures_the_parameters_of_its_step(workplace, unbroken):
    problems = [json.loads(line) for line in (workplace / "held_out.jsonl").open()][:9]

    def measure(model):
        sampler = Engine.from_pretrained(model, cache_len=64)
        measured = {}
        for budgets in ((8, 20), (None, None)):
            params = [
                SamplingParams(
                    *budgets, temperature=2.0, top_p=0.98, seed=request_seed(0, index)
                )
                for index in range(9)
            ]
            texts = [problem["problem"] for problem in problems]
            completions = [c for [c] in sampler.generate(texts, params)]
            right = [
                extract_boxed(c.solution) in problem["answer"]
                for c, problem in zip(completions, problems, strict=True)
            ]
            name = "_".join(str(budget).lower() for budget in budgets)
            measured[f"validation_accuracy_{name}"] = np.mean(right)
            tokens = np.mean([len(c.token_ids) for c in completions])
            measured[f"validation_tokens_{name}"] = tokens
        accuracy = (measured[f"validation_accuracy_{n}"] for n in ("8_20", "none_none"))
        return measured | {"validation_accuracy": np.mean(list(accuracy))}

    line = metrics(unbroken)[-1]
    found = {name: value for name, value in line.items() if "validation" in name}
    assert found == pytest.approx(measure(str(unbroken / "6")))
    assert found != pytest.approx(measure("nano"))  # it would be seen


def test_the_best_validated_step_is_kept_and_is_the_model(
    workplace, tmp_path, monkeypatch
):
    values = iter([0.1, 0.9, 0.9, 0.2, 0.8])

    def make_validation(*args):
        return lambda grader: {"validation_accuracy": next(values), "other": 1.0}

    monkeypatch.setattr(train, "make_validation", make_validation)
    flags = ["--validation.every", "1", "--checkpoint.keep", "1", "--steps", "5"]
    config = settings(workplace, *flags)
    train.train(config, tmp_path / "run")
    assert best_step(tmp_path / "run") == 3  # of equals the latest
    assert sorted(saved_steps(tmp_path / "run")) == [3, 5]
    assert find_params(tmp_path / "run")[0].parent.name == "3"
    loaded = load_model(str(tmp_path / "run"))
    best = saved(tmp_path / "run")["3"]["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded.read_params(), best)
    # The model stays the one that was loaded, though the run finds a better step.
    edit_json(tmp_path / "run" / "checkpoints" / "best.json", step=5)
    assert best_step(tmp_path / "run") == 5
    jax.tree.map(np.testing.assert_array_equal, loaded.read_params(), best)


def test_without_validation_the_latest_step_is_the_model(workplace, tmp_path):
    flags = ["--validation.problems", "null", "--steps", "3"]
    train.train(settings(workplace, *flags), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()
    assert find_params(tmp_path / "run")[0].parent.name == "3"
    assert all("validation_accuracy" not in line for line in metrics(tmp_path / "run"))


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--rolout.samples", "4"], "did you mean '--rollout.samples'?"),
        (
            ["--config", "unknown.yaml"],
            "rollout: unknown field 'sampels'; did you mean",
        ),
        (["--config", "section.yaml"], "rollout is 3, but it is a section"),
        (["--config", "nosteps.yaml"], "steps"),
        (["--steps", "many"], "steps"),
        (["--rollout.prompts", "3.5"], "rollout.prompts"),
        (
            ["--rollout.samples", "1"],
            "samples must be a whole number, 2 or more, not 1",
        ),
        (["--loss.clip", "hard"], "loss.clip"),
        (["--update.param_dtype", "float16"], "update.param_dtype"),
        (
            ["--rollout.prompts", "3", "--update.minibatch_prompts", "2"],
            "rollout.prompts=3 is not a multiple of update.minibatch_prompts=2",
        ),
        (
            ["--update.microbatch", "3"],
            "minibatch_prompts x rollout.samples=4 is not a multiple of update.microbatch=3",
        ),
        (
            ["--rollout.cache_len", "33"],
            "rollout.cache_len=33 is too short for a prompt",
        ),
        (
            ["--rollout.cache_len", "null", "--rollout.thinking_budget", "null"],
            "a rollout without a budget needs rollout.cache_len",
        ),
        (["--model", "nono"], "'nono' is neither a directory nor a hub id"),
        (["--model", "owner/nono"], "cannot be had from the hub"),
        (["--model", "plain"], "no </think> token"),
        (["--data.problems", "nano-trian"], "did you mean nano-train?"),
        (["--data.problems", "missing.jsonl"], "there is no file 'missing.jsonl'"),
        (["--data.problems", "empty.jsonl"], "'empty.jsonl' holds no problems"),
        (["--data.problems", "broken.jsonl"], "broken.jsonl line 2 is not JSON"),
        (
            ["--data.problems", "unanswered.jsonl"],
            "unanswered.jsonl line 2 has no field",
        ),
        (["--data.max_prompt_len", "5"], "no prompt has at most max_prompt_len=5"),
        (["--validation.problems", "empty.jsonl"], "'empty.jsonl' holds no problems"),
        (["--validation.best", "acuracy"], "known: validation_accuracy, validation_"),
        (
            ["--validation.best", "validation_accuracy_9_9"],
            "field 'validation_accuracy_9_9'",
        ),
        (["--validation.budgets", "[[8, 60]]"], "[8, 60] do not fit rollout.cache_len"),
        (["--validation.budgets", "[]"], "validation.budgets is empty"),
        (["--mesh", "data=2"], "mesh data=2"),
        (["--run-dir", "mine"], "mine holds files but no config.yaml"),
        (["--run-dir", "tiny.yaml"], "tiny.yaml cannot be written"),
        (["--wandb", "project"], "needs the package wandb; pip install wandb"),
        ([], "needs --config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    flags, part, workplace, tmp_path, monkeypatch, refusal
):
    shutil.copy(workplace / "tiny.yaml", tmp_path)
    files = {
        "unknown.yaml": "model: nano\nsteps: 3\nrollout: {sampels: 3}\n",
        "section.yaml": "model: nano\nsteps: 3\nrollout: 3\n",
        "nosteps.yaml": "model: nano\n",
        "empty.jsonl": "\n",
        "broken.jsonl": '{"problem": "a", "answer": 1}\n{"problem": "b", \n',
        "unanswered.jsonl": '{"problem": "a", "answer": 1}\n{"problem": "b"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    if "plain" in flags:  # a model without </think>
        shutil.copytree(NANO, tmp_path / "plain")
        file = tmp_path / "plain" / "tokenizer.json"
        file.write_text(file.read_text().replace("</think>", "</thunk>"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = [] if not flags or "--config" in flags else ["--config", "tiny.yaml"]
    assert part in refusal(train.main, ["train", *config, *flags])


def test_a_cache_with_room_for_a_prompt_and_both_budgets_is_enough(workplace):
    longest = 5 + 2 + 3 * 4 + 1  # template, start value, steps, question mark
    for budgets, needed in (
        ((8, 6), longest + 8 + 1 + 6),
        ((8, None), longest + 8 + 1 + 1),
        ((None, 6), longest + 1 + 6),
    ):
        flags = ["--rollout.thinking_budget", json.dumps(budgets[0])]
        flags += ["--rollout.solution_budget", json.dumps(budgets[1])]
        for cache_len in (needed - 1, needed):
            config = settings(workplace, *flags, "--rollout.cache_len", str(cache_len))
            loaded = load_model("nano")
            examples = read_examples(config, loaded, "")
            assert {len(example.prompt_ids) for example in examples} == {longest}
            if cache_len == needed:
                assert make_engine(config, loaded, examples).cache_len == needed
                continue
            with pytest.raises(UserError, match=f"too short .*; {needed} is enough"):
                make_engine(config, loaded, examples)


def test_a_mesh_of_the_rollouts_that_does_not_divide_is_told(
    workplace, tiny_hf, capsys
):
    """Its default is another than the mesh of training, of which loading tells."""
    config = settings(workplace, "--dtype", "bfloat16")
    loaded = load_model(str(tiny_hf()))
    examples = read_examples(config, loaded, "")
    for mesh, notes in (("data=2,tensor=1", 1), ("data=1,tensor=2", 0)):
        mesh = make_mesh(mesh, loaded.config, [Chip(0), Chip(1)])
        make_engine(config, dataclasses.replace(loaded, mesh=mesh), examples)
        note = (
            "note: mesh data=1,tensor=2 does not divide vocab_size=265, so every device "
            "keeps 2 arrays of parameters whole in that dimension, "
            f"{2 * 2 * 265 * 64 / 2 / 2**20:.3g} MiB more than its share\n"
        )
        assert capsys.readouterr().err == note * notes


def test_micro_batches_are_shared_out_evenly_over_the_mesh(workplace):
    config = settings(workplace)
    loaded = load_model("nano")
    examples = read_examples(config, loaded, "")
    three = types.SimpleNamespace(shape={"data": 3})
    with pytest.raises(UserError, match=r"microbatch=2 is not a multiple .* data=3"):
        make_engine(config, dataclasses.replace(loaded, mesh=three), examples)


@pytest.mark.parametrize(
    ("budgets", "longest"),
    [((8, 6), 15), ((8, None), 300 - 20), ((None, 6), 300 - 20), ((None, None), 280)],
)
def test_longest_lengths(workplace, budgets, longest):
    """Of a cache that is larger than needed, only an unlimited budget takes more."""
    flags = ["--rollout.thinking_budget", json.dumps(budgets[0])]
    flags += ["--rollout.solution_budget", json.dumps(budgets[1])]
    config = settings(workplace, *flags)
    assert longest_lengths(config, 300, 20, 31) == (31, longest)


# Rollouts.


@pytest.fixture(scope="module")
def rollouts(workplace):
    """A function that samples for prompts at positions, and the engine it does so with."""
    config = settings(workplace)
    loaded = load_model("nano")
    examples = read_examples(config, loaded, "")
    sampler = make_engine(config, loaded, examples)
    sampler.params = loaded.read_params()
    with Grader() as grader:

        def sample(positions, seed=0, temperature=0.9):
            rollout = dataclasses.replace(config.rollout, temperature=temperature)
            changed = dataclasses.replace(config, seed=seed, rollout=rollout)
            prompts = [Prompt(p, p % 5, *examples[p % 5]) for p in positions]
            return _sample_rollouts(
                changed, sampler, prompts, grader, lambda new_tokens: None
            )

        yield sample, sampler


def test_draws_depend_on_seed_position_and_sample_alone(rollouts):
    sample, _ = rollouts

    def by_position(positions, seed=0):
        found = sample(positions, seed, temperature=3.0).completions
        keys = [(p, j) for p in positions for j in range(4)]
        order = [(positions[c.prompt_index], c.sample) for c in found]
        assert order == keys  # prompt by prompt, though they finish in another order
        return {key: c.token_ids for key, c in zip(keys, found, strict=True)}

    together = by_position([3, 8, 6])  # 3 and 8 are the same problem
    assert by_position([6, 3]).items() <= together.items()
    assert len({tuple(ids) for ids in together.values()}) == len(together)
    other_seed = by_position([3], seed=1)
    assert all(together[key] != ids for key, ids in other_seed.items())


def test_requests_of_a_step_draw_from_the_whole_distribution(workplace):
    config = dataclasses.replace(settings(workplace), seed=3)
    assert rollout_request(config, 17) == SamplingParams(
        8, 6, n=4, temperature=0.9, top_p=1.0, top_k=0, seed=request_seed(3, 17)
    )


def test_the_engine_samples_from_what_it_is_given(rollouts):
    sample, sampler = rollouts
    before = [c.token_ids for c in sample([1, 2]).completions]
    kept = sampler.params
    sampler.params = jax.tree.map(lambda p: 0.7 * p, kept)
    after = [c.token_ids for c in sample([1, 2]).completions]
    sampler.params = kept
    assert after != before
    assert [c.token_ids for c in sample([1, 2]).completions] == before


def test_the_samplers_logprobs_are_those_of_torch_forced_tokens_too(rollouts):
    sample, _ = rollouts
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    forced = 0
    for c in sample([0, 4], temperature=2.0).completions:
        with torch.no_grad():
            expected, _ = torch_logprobs(model, c, 2.0)
        np.testing.assert_allclose(c.logprobs, expected, atol=2e-5)
        forced += sum(c.forced)
    assert forced > 4


def test_rewards_and_counts_of_a_step(rollouts):
    sample, sampler = rollouts
    found = sample([0, 1, 2])
    right = [
        int(extract_boxed(c.text.partition("</think>")[2]) or 1) % 2 == 0
        for c in found.completions
    ]
    assert 0 < sum(right) < 12
    np.testing.assert_array_equal(found.rewards, np.reshape(right, (3, 4)))
    tokens = sum(len(c.token_ids) for c in found.completions)
    assert sampler.stats.slot_steps == 5 * sampler.stats.decode_steps
    waste = 1 - tokens / (5 * sampler.stats.decode_steps)
    assert found.metrics["rollout_waste"] == pytest.approx(waste)
    assert found.metrics["reward_timeouts"] == found.metrics["reward_crashes"] == 0


def test_metrics_of_a_step_are_means_over_responses_and_shares_of_prompts():
    completions = [
        completion([1, 2], 3, forced=0, finish_reason="stop"),
        completion([1, 2], 5, forced=1, finish_reason="solution_budget"),
        completion([1, 2], 6, forced=2, finish_reason="stop"),
        completion([1, 2], 8, forced=0, finish_reason="length"),
        completion([1, 2], 8, forced=0, finish_reason="stop"),
        completion([1, 2], 9, forced=0, finish_reason="stop"),
    ]
    rewards = np.array([[1, 1], [0, 1], [0, 0]], np.float32)
    assert rollout_metrics(completions, rewards, rewards == 1) == pytest.approx(
        {
            "reward": 0.5,
            "accuracy": 0.5,
            "solved": 2 / 3,
            "mixed": 1 / 3,
            "response_tokens": 6.5,
            "thinking_tokens": 2.0,
            "solution_tokens": 4.0,
            "forced_share": 2 / 6,
            "unfinished_share": 2 / 6,
        }
    )


def completion(prompt_ids, length, *, forced, finish_reason="stop", rng=None):
    """A response of random tokens, two of thinking, then so many forced ones."""
    rng = rng or np.random.default_rng(length)
    return Completion(
        prompt_ids=list(prompt_ids),
        token_ids=rng.integers(0, 264, length).tolist(),
        logprobs=[0.0] * length,
        forced=[2 <= i < 2 + forced for i in range(length)],
        **{"thinking": "", "solution": "", "text": "", "answer": None},
        thinking_tokens=2,
        solution_tokens=length - 2 - forced,
        thinking_end="budget",
        finish_reason=finish_reason,
        prompt_index=0,
        sample=0,
    )


# Updates.


def torch_logprobs(model, c: Completion, temperature: float):
    """Log-probability and entropy at each response token, by transformers."""
    ids = torch.tensor(c.prompt_ids + c.token_ids)
    logits = model(ids[None]).logits[0, len(c.prompt_ids) - 1 : -1] / temperature
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, ids[len(c.prompt_ids) :, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def torch_steps(config: GRPOConfig, steps: list[Rollouts], rates: list[float]):
    """The policy after steps of GRPO written down once more, and their metrics."""
    policy = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    loss, adam, temperature = config.loss, config.optimizer, config.rollout.temperature
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        betas=(adam.b1, adam.b2),
        eps=1e-8,
        weight_decay=adam.weight_decay,
    )
    measured = []
    for step, rate in zip(steps, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        rows = []
        for index, c in enumerate(step.completions):
            group = step.rewards[index // config.rollout.samples].astype(np.float64)
            advantage = (step.rewards.flat[index] - group.mean()) / (
                group.std(ddof=1) + 1e-6
            )
            counts = torch.tensor(c.forced).logical_not() | loss.train_on_forced
            with torch.no_grad():
                old = torch.tensor(c.logprobs)
                if loss.old_logprobs == "recomputed":
                    old = torch_logprobs(policy, c, temperature)[0]
                ref = torch_logprobs(reference, c, temperature)[0]
            rows.append((c, float(advantage), counts, old, ref))
        size = config.update.minibatch_prompts * config.rollout.samples
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        gaps = []  # of the first update
        for c, _, counts, _, _ in parts[0]:
            with torch.no_grad():
                gap = torch_logprobs(policy, c, temperature)[0] - torch.tensor(
                    c.logprobs
                )
            gaps.append(gap.abs()[counts])
        if loss.aggregate == "sequence":
            gaps = [gap.mean()[None] for gap in gaps]
        gap = torch.cat(gaps).mean().item()
        updates = []
        for part in parts * config.update.epochs:
            total = sum(int(counts.sum()) for _, _, counts, _, _ in part)
            means = dict.fromkeys(("surrogate", "kl", "entropy", "clip_fraction"), 0)
            for c, advantage, counts, old, ref in part:
                logprobs, entropy = torch_logprobs(policy, c, temperature)
                ratio = (logprobs - old).exp()
                if loss.old_logprobs == "sampler":
                    cut = ratio.clamp(max=loss.max_ratio) / ratio
                    ratio = ratio * cut.detach()
                clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
                clipped = ratio if loss.clip == "none" else clipped
                terms = {
                    "surrogate": torch.maximum(
                        -advantage * ratio, -advantage * clipped
                    ),
                    "kl": (ref - logprobs).exp() - (ref - logprobs) - 1,
                    "entropy": entropy,
                    "clip_fraction": (
                        -advantage * clipped > -advantage * ratio
                    ).float(),
                }
                weight = 1 / total
                if loss.aggregate == "sequence":
                    weight = 1 / (len(part) * int(counts.sum()))
                for name, values in terms.items():
                    means[name] = means[name] + weight * values[counts].sum()
            value = means.pop("surrogate") + loss.kl_coef * means["kl"]
            value = value - loss.entropy_coef * means["entropy"]
            optimizer.zero_grad()
            value.backward()
            norm = sum(p.grad.square().sum() for p in policy.parameters()).sqrt()
            for parameter in policy.parameters():
                parameter.grad *= min(1.0, adam.max_grad_norm / float(norm))
            optimizer.step()
            means |= {"loss": value, "grad_norm": norm}
            updates.append({name: mean.item() for name, mean in means.items()})
        measured.append(
            {name: np.mean([u[name] for u in updates]) for name in updates[0]}
        )
        measured[-1]["sampler_gap"] = gap
    return policy, measured


REWARDS = (
    [[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]],
    [[0, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0]],
)


def made_up_steps(model) -> list[Rollouts]:
    """Responses of 7 to 10 random tokens, some forced; a sampler that is off."""
    rng = np.random.default_rng(7)
    steps = []
    for rewards in REWARDS:
        completions = []
        for index in range(12):
            prompt = rng.integers(0, 264, 4 + index % 3)
            c = completion(prompt, 7 + index % 4, forced=index % 3, rng=rng)
            with torch.no_grad():
                exact = torch_logprobs(model, c, 0.7)[0].numpy()
            noise = rng.normal(0, 0.4, len(exact))
            completions.append(
                dataclasses.replace(c, logprobs=(exact + noise).tolist())
            )
        steps.append(
            Rollouts(completions, np.array(rewards, np.float32), {}, np.zeros((1, 5)))
        )
    return steps


CASES = {
    "recomputed, clipped": (
        {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.2},
        {},
        {},
        [1.0, 1.0],
    ),
    "recomputed, clipped, twice over": (
        {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.2, "train_on_forced": True},
        {"schedule": "linear", "weight_decay": 0.1, "b2": 0.9},
        {"epochs": 2},
        [1.0, 0.5],
    ),
    "the sampler's, not clipped, each response alike": (
        {
            **{"old_logprobs": "sampler", "max_ratio": 1.4, "aggregate": "sequence"},
            **{"clip": "none", "entropy_coef": 0.1, "kl_coef": 0.0},
        },
        {"warmup_steps": 2, "max_grad_norm": 0.3},
        {"remat": True},
        [0.5, 1.0],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case, workplace, tiny_hf, tmp_path):
    loss, optimizer, update, shares = CASES[case]
    config, learner = make_learner(tiny_hf(), tmp_path, loss, optimizer, update)
    assert (learner.reference is None) == (loss["kl_coef"] == 0)
    before = jax.tree.map(np.array, learner.params)
    sampled = learner.sampling_params()
    same = jax.tree.map(lambda a, b: a is b, sampled, learner.params)
    assert all(jax.tree.leaves(same))  # no copy where dtypes agree

    model = AutoModelForCausalLM.from_pretrained(tiny_hf(), dtype=torch.float32)
    steps = made_up_steps(model)
    rate = config.optimizer.learning_rate
    policy, expected = torch_steps(config, steps, [rate * share for share in shares])
    passes, logprobs = [], learner.logprobs
    assert learner.reference_logprobs is logprobs  # compiled once for both
    counted = lambda *args: passes.append(args) or logprobs(*args)  # noqa: E731
    learner.logprobs = learner.reference_logprobs = counted
    for index, step in enumerate(steps):
        found = learner.learn(step, index)
        assert float(learner.schedule(index)) == pytest.approx(rate * shares[index])
        for name, value in expected[index].items():
            if name == "kl" and learner.reference is None:
                assert found["kl"] == 0
            else:
                assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    # Those of the first mini-batch are of its own update, unless it comes again.
    assert len(passes) == len(steps) * logprob_passes(config)
    assert logprobs._cache_size() == (len(passes) > 0)  # compilations
    if config.loss.clip == "ppo":
        assert 0.02 < found["clip_fraction"] < 0.9
    # Adam divides by what may be rounding alone, so not every number can agree.
    moved = apart = 0.0
    weights = policy.state_dict()
    names = named_leaves(before)
    for name, array in named_leaves(learner.params).items():
        old = dict(torch_parts(name, names[name]))
        for key, part in torch_parts(name, array):
            theirs = weights[key].numpy()
            moved += np.square(theirs - old[key]).sum()
            apart += np.square(theirs - part).sum()
    assert moved > 0 and apart < 1e-4 * moved


def make_learner(model, run_dir, loss, optimizer, update):
    config = GRPOConfig(
        str(model),
        steps=2,
        rollout=RolloutConfig(3, 4, 4, 4, temperature=0.7),
        loss=LossConfig(**loss),
        optimizer=AdamWConfig(**{"learning_rate": 2e-3, **optimizer}),
        update=UpdateConfig(
            **{"minibatch_prompts": 1, "microbatch": 2, "remat": False, **update}
        ),
    )
    loaded = load_model(config.model, None, config.update.param_dtype)
    learner = Learner(config, loaded, longest=(9, 13))
    assert learner.restore(RunCheckpoints(run_dir, config.checkpoint), None) == 0
    return config, learner


def test_parameters_in_bfloat16(workplace, tiny_hf, tmp_path):
    """Their moments are too; the computation, on a CPU, is in float32."""
    config, learner = make_learner(
        tiny_hf(), tmp_path, {"kl_coef": 0.2}, {}, {"param_dtype": "bfloat16"}
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_hf(), dtype=torch.float32)
    steps = made_up_steps(model)[:1]
    _, [expected] = torch_steps(config, steps, [2e-3])
    found = learner.learn(steps[0], 0)
    for name in ("loss", "entropy", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=0.1), name
    kinds = {str(x.dtype) for x in jax.tree.leaves((learner.params, learner.state))}
    assert kinds == {"bfloat16", "int32"}
    assert learner.sampling_params()["embedding"].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_shipped_recipe_learns_to_answer_within_the_budget(
    seed, workplace, tmp_path
):
    flags = [
        "--config",
        str(CONFIGS / "nano_grpo.yaml"),
        "--validation.problems",
        "null",
    ]
    flags += ["--rollout.prompts", "8", "--update.minibatch_prompts", "4"]
    flags += ["--update.microbatch", "64", "--steps", "24", "--seed", str(seed)]
    train.train(load_config(GRPOConfig, flags, "train")[0], tmp_path / "run")
    lines = metrics(tmp_path / "run")
    first, last = (
        np.mean([r["reward"] for r in part]) for part in (lines[:5], lines[-5:])
    )
    # 640 responses each: a standard error of 0.02 at most.
    assert last > first + 0.15
    # Not their largest: a single token that the policy hardly gives any more makes k3,
    # whose tail is that of exp(ref - logp), some units large for one step.
    assert 0.01 < np.median([line["kl"] for line in lines[-8:]]) < 0.2


# Metrics.


class Wandb(types.ModuleType):
    """The part of Weights & Biases that is used."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []
        self.logged = []
        self.finished = 0

    def init(self, **settings):
        self.runs.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_each_step_once_over_a_stop_too(workplace, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = settings(workplace, "--wandb", "nano", "--steps", "3")
    with monkeypatch.context() as patch:
        interrupt("sampling", 3, signal.SIGTERM, patch.setattr)
        train.train(config, tmp_path / "run")
    train.train(config, tmp_path / "run")
    assert [step for step, _ in wandb.logged] == [1, 2, 3]
    assert wandb.finished == 2
    for line in (tmp_path / "run" / "metrics.jsonl").open():
        line = json.loads(line)
        assert (line.pop("step"), line) in wandb.logged
    first, second = wandb.runs
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == (
        "nano",
        "run",
        "allow",
    )
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    MetricsLog(tmp_path / "run", 0, 3, [], "nano").close()
    assert wandb.runs[2]["id"] != first["id"]  # made anew, another run


def test_wandb_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    wandb = Wandb()

    def init(**settings):
        raise RuntimeError("api_key not configured.\nUse wandb login.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(
        UserError, match=r"\(api_key not configured\. Use wandb login\)"
    ):
        MetricsLog(tmp_path, 0, 3, [], "nano")


@pytest.mark.parametrize(
    "path",
    [
        *sorted(CONFIGS.glob("*_grpo.yaml")),
        *(p for p in sorted(CONFIGS.glob("e1_*.yaml")) if not p.stem.endswith("_sft")),
    ],
    ids=lambda path: path.stem,
)
def test_shipped_configs_load(path):
    config, run_dir = load_config(GRPOConfig, ["--config", str(path)], "train")
    assert run_dir == Path("runs") / path.stem
    assert len(path.read_text().splitlines()) < 40
    assert make_optimizer(config.optimizer, config.steps)
    assert config.rollout.prompts >= config.update.minibatch_prompts


def test_a_reward_function_of_ones_own(workplace, tmp_path, monkeypatch):
    """It gets every response with its own answers, and its numbers are the rewards."""
    (tmp_path / "mine.py").write_text(
        """
calls = []


def of_tokens(completions, answers):
    calls.append((completions, answers))
    return [sum(c.token_ids) % 97 / 100 for c in completions]
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(workplace, "--reward.function", "mine:of_tokens", "--steps", "1")
    seen = []

    def sample_rollouts(*args, **options):
        seen.append((args[2], _sample_rollouts(*args, **options)))
        return seen[-1][1]

    monkeypatch.setattr(train, "sample_rollouts", sample_rollouts)
    train.train(config, tmp_path / "run")
    [(completions, answers)] = importlib.import_module("mine").calls
    [(prompts, rollouts)] = seen
    assert len(completions) == config.rollout.prompts * config.rollout.samples
    for completion, accepted in zip(completions, answers, strict=True):
        assert accepted == prompts[completion.prompt_index].answers
    sums = [sum(c.token_ids) % 97 for c in rollouts.completions]
    expected = np.array(sums).reshape(config.rollout.prompts, -1) / 100
    np.testing.assert_allclose(rollouts.rewards, expected, rtol=1e-6)
    assert len({*sums}) > 1  # so that it matters which is whose
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["reward"] == pytest.approx(expected.mean())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere_at_all:f",
            "cannot be imported (ModuleNotFoundError: No module named",
        ),
        ("json:nothing", "cannot be imported (AttributeError: module 'json' has no"),
        ("json:__name__", "reward.function=json:__name__ is 'json', not a function"),
    ],
)
def test_a_reward_function_that_is_not_there(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_function(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c, a: [1.0], "gave 1 rewards for 2 completions"),
        (lambda c, a: [1.0, math.nan], "gave nan as a reward"),
        (lambda c, a: [1.0, None], "gave None as a reward"),
        (lambda c, a: 1 / 0, "failed: ZeroDivisionError: division by zero, "),
        (lambda c, a: 3, "failed: TypeError: 'int' object is not iterable"),
    ],
)
def test_a_reward_function_that_fails(function, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call_function(function, ["a", "b"], ["1", "2"])
    assert call_function(lambda c, a: np.float32([0, 1]), ["a", "b"], ["1", "2"]) == [
        0,
        1,
    ]
