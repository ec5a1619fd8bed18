"""Two processes at once, models and data that change, and damaged files of a run."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import e1jax
from e1jax import convert, evaluate, sample, sft, train
from e1jax.checkpoint import load
from e1jax.checkpoint.digests import checksums, files_digest
from e1jax.checkpoint.load import ModelFiles, load_model
from e1jax.checkpoint.metrics import MetricsLog
from e1jax.checkpoint.runs import RunCheckpoints
from e1jax.cli.command import run_command
from e1jax.cli.locks import owning
from e1jax.config.checks import UserError
from e1jax.config.load import load_config, record_config
from e1jax.config.training import CheckpointConfig, GRPOConfig, SFTConfig
from e1jax.training.run import _alike, record_origin

NANO = Path(e1jax.__file__).parent / "models" / "nano"
RECORDED = Path(__file__).parent / "runs_0.1"  # config.yaml as e1jax 0.1 wrote it
METRIC = "validation_accuracy"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit code, stderr)."""

    def run(command, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        code = 0
        try:
            run_command(command.main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def refused(result, *words):
    """Exit code 2 and one sentence on stderr that holds the words."""
    code, err = result
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in err, err
    for word in words:
        assert str(word) in last, err


def contents(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def save_steps(run_dir: Path, params, **accuracy: float) -> None:
    """Checkpoints whose parameters are `params` times their step."""
    checkpoints = RunCheckpoints(run_dir, CheckpointConfig(keep=9), METRIC)
    for name, value in accuracy.items():
        step = int(name.removeprefix("step"))
        state = {"count": jnp.array(step)}
        record = {"seed": 0, "data": {"next_index": step}, "metrics": {METRIC: value}}
        scaled = jax.tree.map(lambda p, step=step: p * step, params)
        checkpoints.save(step, scaled, state, record)
    checkpoints.close()


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run directory with two steps, of which the first is the best, and its files."""
    run_dir = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(NANO, run_dir, ignore=shutil.ignore_patterns("*.safetensors"))
    save_steps(run_dir, load_model("nano").read_params(), step1=0.9, step2=0.1)
    config = load_config(GRPOConfig, ["--config", str(RECORDED / "train.yaml")], "")[0]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    (run_dir / "config.yaml").write_text((RECORDED / "train.yaml").read_text())
    record_origin({"model": "ab", "data.problems": "cd"}, run_dir)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, METRIC: 0.1}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


@pytest.fixture
def run_dir(made_run, tmp_path):
    shutil.copytree(made_run, tmp_path / "run")
    return tmp_path / "run"


def name_best(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / "best.json").write_text(json.dumps({"step": step}))


# Outputs, and the models that made them.


@pytest.fixture
def commands(run_dir, tmp_path):
    """The commands that append to an output of a model: module and arguments."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "47a+5b*3c-8?", "answer": "0"}\n')
    short = ["--model", run_dir, "--solution-budget", "2", "--output"]
    sampled = [*short, tmp_path / "out.jsonl", "--thinking-budget", "1", "47a+5b?"]
    evaluated = [*short, tmp_path / "ev", "--dataset", problems, "--budgets", "1"]
    return {"sample": (sample, *sampled), "evaluate": (evaluate, *evaluated, "-n", "1")}


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_another_best_step_or_other_weights_are_refused(
    name, commands, run, run_dir, tmp_path
):
    command = commands[name]
    assert run(*command)[0] == 0
    before = contents(tmp_path / "ev") | contents(tmp_path)
    assert run(*command)[0] == 0
    name_best(run_dir, 2)
    refused(run(*command), "step=1", "step=2", "weights=")
    name_best(run_dir, 1)
    assert run(*command)[0] == 0
    after = contents(tmp_path / "ev") | contents(tmp_path)
    assert {k: v for k, v in after.items() if "best.json" not in k.name} == {
        k: v for k, v in before.items() if "best.json" not in k.name
    }
    # The same step, with other parameters.
    shutil.rmtree(run_dir / "checkpoints")
    save_steps(run_dir, load_model("nano-e1").read_params(), step1=0.9, step2=0.1)
    refused(run(*command), "weights=")


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_outputs_of_the_version_before_resume(name, commands, run, run_dir, tmp_path):
    command = commands[name]
    assert run(*command)[0] == 0
    [sidecar] = tmp_path.rglob("*.settings.json")
    recorded = json.loads(sidecar.read_text())
    settings = recorded["settings"]
    del settings["weights"], settings["step"]
    if name == "evaluate":
        settings["model"] = str(run_dir / "checkpoints" / "1" / "params")
    sidecar.write_text(json.dumps(recorded))
    shutil.copytree(run_dir, tmp_path / "other")
    other = [tmp_path / "other" if arg == run_dir else arg for arg in command]
    refused(run(*other), "model=")
    assert run(*command)[0] == 0
    # From now on its weights are known.
    name_best(run_dir, 2)
    refused(run(*command), "step=1", "step=2")


@pytest.mark.parametrize("moment", ["check", "open", "read"])
@pytest.mark.parametrize("name", ["sample", "evaluate", "convert"])
def test_a_step_that_its_run_deletes_meanwhile_is_not_called_damaged(
    name, moment, commands, run, run_dir, tmp_path, monkeypatch
):
    """At each moment: before tensors are checked, opened, and read one by one."""
    step, originals = run_dir / "checkpoints" / "1", ModelFiles.lazy_arrays

    def deleting(read):
        def delete_and_read(*args):
            shutil.rmtree(step, ignore_errors=True)
            return read(*args)

        return delete_and_read

    def lazy_arrays(files):
        return {
            name: dataclasses.replace(array, read=deleting(array.read))
            for name, array in originals(files).items()
        }

    convert_flags = (
        ["inspect", run_dir] if moment == "check" else ["to-hf", run_dir, "hf"]
    )
    command = commands.get(name, (convert, *convert_flags))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if moment == "read":
            patch.setattr(ModelFiles, "lazy_arrays", lazy_arrays)
        else:
            at = {"check": "check_saved", "open": "open_params"}[moment]
            patch.setattr(load, at, deleting(getattr(load, at)))
        refused(run(*command), f"{step} was deleted before it was read, by the run")
    assert not (tmp_path / "hf").exists()
    assert run(*command)[0] == 0  # of the step that is left


def test_a_digest_names_the_content(tmp_path, monkeypatch):
    digests = __import__("e1jax.checkpoint.digests", fromlist=["_"])
    monkeypatch.setattr(digests, "_WHOLE", 1000)
    monkeypatch.setattr(digests, "_BLOCK", 10)
    monkeypatch.setattr(digests, "_STRIDE", 100)
    file = tmp_path / "file"
    data = np.random.default_rng(0).integers(0, 256, 1500, np.uint8)
    found = set()
    for size, place in (
        (999, None),
        (999, 555),
        (1500, None),
        (1500, 1405),
        (1500, 1499),
    ):
        changed = data[:size].copy()
        if place is not None:
            changed[place] ^= 1
        file.write_bytes(changed.tobytes())
        found.add(files_digest([file]))
        assert files_digest([file]) in found
    assert len(found) == 5
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"large")
    (tmp_path / "model.safetensors").symlink_to(blob)
    named = files_digest([tmp_path / "model.safetensors"])
    blob.write_bytes(b"not read")
    assert files_digest([tmp_path / "model.safetensors"]) == named
    with pytest.raises(UserError, match="cannot be read"):
        files_digest([tmp_path / "none"])


def test_parameters_read_twice_are_one_set_of_arrays():
    loaded = load_model("nano")
    first = loaded.read_params()
    again = loaded.read_params()
    pairs = list(zip(*map(jax.tree.leaves, (first, again)), strict=True))
    assert all(a is b for a, b in pairs)
    values = np.asarray(first["embedding"])
    first["embedding"].delete()  # as a donation does
    third = loaded.read_params()
    np.testing.assert_array_equal(third["embedding"], values)


# Runs whose model, data or version changed.


class Begun(Exception):
    """The run directory is made, and training would begin."""


@pytest.fixture
def begin(tmp_path, monkeypatch, run_dir):
    """Begins, or resumes, a run of `train` up to its first step."""

    def stop(*args):
        raise Begun

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Learner", stop)
    for name in ("problems", "held_out"):
        line = {"problem": "47a+5b*3c-8?", "answer": "0"}
        Path(f"{name}.jsonl").write_text(json.dumps(line))
    shutil.copy(RECORDED / "train.yaml", "train.yaml")
    flags = ["--model", "model", "--data.problems", "problems.jsonl"]
    flags += ["--validation.problems", "held_out.jsonl", "--validation.budgets"]
    flags += ["[[4, 4]]"]
    argv = ["--config", "train.yaml", *flags]
    Path("model").symlink_to(run_dir)

    def begin():
        with pytest.raises(Begun):
            train.train(load_config(GRPOConfig, argv, "")[0], tmp_path / "grpo")

    def refuse(*words):
        before = contents(tmp_path / "grpo")
        with pytest.raises(UserError) as error:
            train.train(load_config(GRPOConfig, argv, "")[0], tmp_path / "grpo")
        assert contents(tmp_path / "grpo") == before
        for word in words:
            assert word in str(error.value)

    begin.refuse, begin.argv = refuse, argv
    return begin


def test_a_run_whose_model_or_data_changed_is_refused_by_name(begin, run_dir):
    begin()
    begin()
    for name in ("data", "validation"):
        path = Path("problems.jsonl" if name == "data" else "held_out.jsonl")
        text = path.read_text()
        path.write_text(text.replace('"0"', '"1"'))
        begin.refuse(f"{name}.problems", "take another --run-dir")
        path.write_text(text)
    name_best(run_dir, 2)
    begin.refuse("other content of model (")
    name_best(run_dir, 1)
    begin()


def test_a_run_whose_reward_function_changed_is_refused_by_name(
    begin, tmp_path, monkeypatch
):
    """Its source is content of the run; a run of before that was recorded goes on."""
    monkeypatch.syspath_prepend(tmp_path)
    source = Path("own_rewards.py")
    source.write_text("def of(completions, answers): return [1 for _ in completions]\n")
    begin.argv += ["--reward.function", "own_rewards:of"]
    begin()
    origin = json.loads(Path("grpo/origin.json").read_text())
    source.write_text(source.read_text().replace("[1", "[2"))
    begin.refuse("other content of reward.function (", "bring that back")
    del origin["reward.function"]
    Path("grpo/origin.json").write_text(json.dumps(origin))
    begin()
    source.write_text(source.read_text().replace("[2", "[3"))
    begin.refuse("reward.function")


def test_a_run_whose_model_directory_changed_is_refused_by_name(begin, tmp_path):
    Path("model").unlink()
    shutil.copytree(NANO, "model")
    begin()
    file = Path("model/model.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    begin.refuse("other content of model (", "bring that back")
    # So is another tokenizer, by the prompts that come of it.
    shutil.copy(NANO / "model.safetensors", file)
    settings = Path("model/tokenizer_config.json")
    value = json.loads(settings.read_text())
    value["chat_template"] = "again " + value["chat_template"]
    settings.write_text(json.dumps(value))
    begin.refuse("other content of data.problems (")


def test_a_converted_checkpoint_made_anew_and_a_hub_directory(tmp_path):
    """The digest is of the content: the same from any conversion, other for others."""
    found = []
    for number, source in enumerate(["nano", "nano", "nano-e1"]):
        convert.from_hf(source, tmp_path / f"{number}")
        convert.to_hf(str(tmp_path / f"{number}"), tmp_path / f"hf{number}")
        names = (f"{number}", f"hf{number}")
        found.append([load_model(str(tmp_path / n)).files.digest for n in names])
    assert found[0] == found[1]
    assert len({*found[0], *found[2]}) == 4


def test_a_run_of_the_version_before_resumes_and_is_recorded(begin):
    begin()
    Path("grpo/origin.json").unlink()
    begin()
    Path("problems.jsonl").write_text('{"problem": "12a+1?", "answer": "3"}\n')
    begin.refuse("data.problems")


@pytest.mark.parametrize("name, cls", [("train", GRPOConfig), ("sft", SFTConfig)])
def test_settings_as_an_older_version_wrote_them(name, cls, tmp_path):
    """The files of tests/runs_0.1 are as that version wrote them: do not write them anew."""
    recorded = RECORDED / f"{name}.yaml"
    shutil.copy(recorded, tmp_path / "config.yaml")
    given = yaml.safe_load(recorded.read_text())
    # Of the settings, those that a user gave.
    few = {key: given[key] for key in ("model", "steps", "checkpoint")}
    sections = ("data", "rollout", "update") if name == "train" else ("first", "second")
    few |= {key: given[key] for key in sections}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(few))
    config, _ = load_config(cls, ["--config", str(tmp_path / "few.yaml")], "")
    record_config(config, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == recorded.read_text()
    with pytest.raises(UserError, match=r"steps \(3 there, 4 now\)"):
        record_config(dataclasses.replace(config, steps=4), tmp_path)


# Two processes on one target.

OWNER = """
import sys
from pathlib import Path
from e1jax.cli.locks import owning
with owning(Path(sys.argv[1]), inside=len(sys.argv) > 2):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def owned(target: Path, *, inside: bool = False):
    """While it is entered, another process owns the target; then it is killed."""
    command = [sys.executable, "-c", OWNER, target, *["inside"] * inside]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    try:
        yield
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_the_second_process_is_refused_and_touches_nothing(
    run, run_dir, tmp_path, begin, commands
):
    results = tmp_path / "results.json"
    row = {"thinking_budget": 1, "solution_budget": 1, "accuracy": 0.5, "stderr": None}
    numbers = ("pass_at_n", "mean_tokens", "mean_thinking_tokens")
    row |= dict.fromkeys((*numbers, "mean_solution_tokens", "forced_share"), 1.0)
    results.write_text(json.dumps({"model": "m", "rows": [row]}))
    shutil.copy(RECORDED / "sft.yaml", "sft.yaml")
    line = {
        "id": 0,
        "sample": 0,
        "solution": "",
        "token_ids": [1],
        "thinking_tokens": 1,
    }
    line |= {"solution_tokens": 0, "thinking_end": None}
    Path("done.jsonl").write_text(json.dumps(line) + "\n")
    partial = tmp_path / ".hf.partial"
    partial.mkdir()
    (partial / "config.json").write_text("of the first")
    Path("ev").mkdir()
    Path("begun").mkdir()
    problems = ["--dataset", "problems.jsonl"]
    grade = ["grade", "done.jsonl", *problems, "--output", "ev"]
    of_train = ["--config", "train.yaml", "--data.problems", "problems.jsonl"]
    cases = [
        (Path("hf"), (convert, "to-hf", run_dir, "hf")),
        (Path("hf"), (convert, "from-hf", "nano", "hf")),
        (Path("ev"), commands["evaluate"]),
        (Path("ev"), (evaluate, *grade)),
        (Path("p.png"), (evaluate, "plot", results, "--output", "p.png")),
        (Path("begun"), (train, *of_train, "--run-dir", "begun")),
        (Path("begun"), (sft, "--config", "sft.yaml", "--run-dir", "begun")),
    ]
    for target in dict.fromkeys(target for target, _ in cases):
        with owned(tmp_path / target, inside=target.is_dir()):
            before = contents(tmp_path)
            for other, command in cases:
                if other == target:
                    refused(run(*command), "another run is writing", target)
            assert contents(tmp_path) == before
    # The owner was killed, which leaves its file behind.
    assert (tmp_path / ".p.png.lock").exists()
    assert run(evaluate, "plot", results, "--output", "p.png")[0] == 0
    assert Path("p.png").exists() and not list(tmp_path.glob(".p.png*"))
    assert run(evaluate, *grade)[0] == 0
    assert not (tmp_path / "ev" / ".lock").exists()
    assert run(convert, "to-hf", run_dir, "hf")[0] == 0
    assert not list(tmp_path.glob(".hf*"))
    with pytest.raises(Begun):
        train.train(load_config(GRPOConfig, of_train, "")[0], Path("begun"))


def test_two_conversions_at_once_make_one_whole_model(run_dir, tmp_path):
    command = [sys.executable, "-m", "e1jax.convert", "to-hf", run_dir, tmp_path / "hf"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    [error] = filter(None, errors)
    assert error.startswith("error: ") and error.count("\n") == 1
    convert.to_hf(str(run_dir), tmp_path / "alone")
    ours, theirs = (tmp_path / n / "model.safetensors" for n in ("hf", "alone"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "hf", "alone"}


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """The owner removes its file between our opening and our locking of it."""
    flock, calls = fcntl.flock, []

    def late(file, operation):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".target.lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with owning(tmp_path / "target"):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another run"), owning(tmp_path / "target"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with owning(tmp_path, inside=True):
        error = capsys.readouterr().err
    assert error.startswith(f"note: the file system of {tmp_path} has no locks")
    assert error.count("\n") == 1
    monkeypatch.setattr(
        fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(5, ""))
    )
    with pytest.raises(OSError), owning(tmp_path, inside=True):
        pass


# Damage.


def test_checksums_are_of_bits_and_places():
    generator = np.random.default_rng(0)

    def mixed(x):
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    arrays = {
        "float32": generator.normal(size=(3, 5, 7)).astype(np.float32),
        "bfloat16": generator.normal(size=(11,)).astype(jnp.bfloat16),
        "int8": generator.integers(-9, 9, (2, 3), np.int8),
        "count": np.int32(7),
    }
    found = checksums(arrays)
    for name, array in arrays.items():
        array = np.asarray(array)
        bits = array.reshape(-1).view(f"u{array.itemsize}").astype(np.uint32)
        places = np.arange(bits.size, dtype=np.uint32)
        expected = mixed(bits ^ mixed(places)).sum(dtype=np.uint32)
        assert found[name] == expected, name
    # -0.0 is not 0.0, and two elements in each other's place are noticed.
    sums = [checksums(jnp.array(x))[""] for x in ([0.0, 1], [-0.0, 1], [1, 0.0])]
    assert len(set(sums)) == 3


def restore(run_dir: Path, params):
    checkpoints = RunCheckpoints(run_dir, CheckpointConfig(keep=9), METRIC)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (params, {"count": jnp.array(0)}),
    )
    try:
        return checkpoints.restore(*shapes)
    finally:
        checkpoints.close()


def test_a_flipped_bit_is_found_at_restoring_and_at_loading(run_dir):
    params = load_model("nano").read_params()
    step, restored, state, record = restore(run_dir, params)
    assert (step, int(state["count"]), record["data"]) == (2, 2, {"next_index": 2})
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), params, restored)
    stored = contents(run_dir / "checkpoints" / "2" / "params")
    expected = checksums(jax.tree.map(lambda p: 2 * p, params))
    # Orbax divides the data among files as it comes.
    places = [(file, i) for file, data in stored.items() for i in range(len(data))]
    found = []
    for index in np.linspace(0, len(places) - 1, 14, dtype=int)[1:-1]:
        file, place = places[index]
        damaged = bytearray(stored[file])
        damaged[place] ^= 16
        file.write_bytes(damaged)
        for use in (
            lambda: restore(run_dir, params)[1],
            lambda: load_model(str(run_dir / "2")).read_params(),
        ):
            try:
                assert checksums(use()) == expected  # a bit that is not read
            except UserError as error:
                assert "checkpoints/2" in str(error) and "\n" not in str(error)
                found.append("by their checksums" in str(error))
        file.write_bytes(stored[file])
    assert len(found) >= 12 and sum(found) >= 8, found
    assert restore(run_dir, params)[0] == 2


def test_steps_without_checksums_are_restored(run_dir):
    record = run_dir / "checkpoints" / "2" / "record" / "metadata"
    value = json.loads(record.read_text())
    del value["checksums"]
    record.write_text(json.dumps(value))
    assert restore(run_dir, load_model("nano").read_params())[0] == 2
    name_best(run_dir, 2)
    loaded = load_model(str(run_dir))
    assert loaded.read_params() and len(loaded.files.digest) == 16


CONTENTS = {
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "half": b'{"step": ',
    "list": b"[1]",
    "number": b"5",
    "object": b"{}",
    "nested": b"[" * 100_000,
    "types": b'{"step": [], "seed": "a", "data": 1, "metrics": [], "checksums": 2}',
}


def continue_run(run_dir: Path) -> None:
    """Reads all files of a run, as its next start does."""
    config = load_config(GRPOConfig, ["--config", str(RECORDED / "train.yaml")], "")[0]
    record_config(config, run_dir)
    record_origin({"model": "ab", "data.problems": "cd"}, run_dir)
    load_model(str(run_dir))
    restored = restore(run_dir, load_model("nano").read_params())
    assert restored is not None
    if not _alike(restored[3].get("data"), {"next_index": 0}):
        raise UserError("error: record: the position in the data")
    MetricsLog(run_dir, 2, 3, ["loss"]).close()


def test_an_undamaged_run_goes_on(run_dir):
    continue_run(run_dir)


@pytest.mark.parametrize("content", [*CONTENTS, "directory"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "config.json", "origin.json", "metrics.jsonl"),
        *("checkpoints/best.json", "checkpoints/2/record/metadata"),
        *("checkpoints/2/metrics/metrics", "checkpoints/2/params/_METADATA"),
        "checkpoints/2/_CHECKPOINT_METADATA",
    ],
)
def test_a_damaged_file_is_one_sentence_or_no_matter(name, content, run_dir):
    path = run_dir / name
    harmless = {
        # As a kill leaves the last line.
        *(("metrics.jsonl", kind) for kind in CONTENTS if kind != "bytes"),
        *(("origin.json", kind) for kind in ("object", "types")),  # as of older runs
    }
    orbax = "metrics/" in name or "_CHECKPOINT" in name  # which may do without
    path.unlink()
    if content == "directory":
        path.mkdir()
    else:
        path.write_bytes(CONTENTS[content])
    try:
        continue_run(run_dir)
    except UserError as error:
        assert "\n" not in str(error), error
        assert (name, content) not in harmless, error
        return
    assert (name, content) in harmless or orbax


@pytest.mark.parametrize(
    "text",
    [
        *("a: &a {b: *a}", "data: &a {problems: *a}", "data: &a [*a]", "steps: [3]"),
        *("1: 2", "data: 5", "model: 2020-01-01", "? [1, 2]\n: 3", "a: 1\n---\nb: 2"),
        *("seed: !!python/object:os.system x", f"seed: {'9' * 5000}", "x: !!set {a}"),
    ],
)
def test_damaged_settings_of_a_run_are_one_sentence(text, tmp_path):
    config = load_config(GRPOConfig, ["--config", str(RECORDED / "train.yaml")], "")[0]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        record_config(config, tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize(
    "line",
    [
        *('{"loss": 1}', '{"step": 1.5, "loss": 1}', '{"step": 1, "loss": "a"}'),
        *('{"step": 1, "loss": null}', '{"step": true}', "[1, 2]", "5", "\x00", "é"),
        '{"step": 1, "lo',
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(line, run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1]]) + "\n", encoding="utf-8")
    before = contents(run_dir)
    with pytest.raises(UserError, match=r"metrics.jsonl line 2.*; remove that line"):
        MetricsLog(run_dir, 2, 3, ["loss"])
    assert contents(run_dir) == before


@pytest.mark.parametrize("name", ["²", "٣", "007", "2.5", "-1", "9" * 40])
def test_a_directory_that_is_named_like_a_step_is_none(name, run_dir):
    (run_dir / "checkpoints" / name / "params").mkdir(parents=True)
    with contextlib.suppress(UserError):
        continue_run(run_dir)
    assert load_model(str(run_dir)).files.step == 1
    with pytest.raises(UserError):
        load_model(str(run_dir / "checkpoints" / name)).read_params()


@pytest.mark.parametrize("content", [*CONTENTS, "directory"])
@pytest.mark.parametrize("name", ["sidecar", "manifest.json"])
def test_damaged_records_of_outputs_and_conversions(
    name, content, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if name == "sidecar":
        Path("out.jsonl").write_text('{"id": 0, "sample": 0}\n')
        path, command = Path("out.jsonl.settings.json"), (sample, "--output")
        command = (*command, "out.jsonl", "--solution-budget", "1", "1a+1?")
    else:
        shutil.copytree(NANO, "e1", ignore=shutil.ignore_patterns("*.safetensors"))
        Path("e1/params").mkdir()
        path, command = Path("e1/manifest.json"), (convert, "inspect", "e1")
    if content == "directory":
        path.mkdir()
    else:
        path.write_bytes(CONTENTS[content])
    before = contents(tmp_path)
    refused(run(*command), path.name)
    assert contents(tmp_path) == before
