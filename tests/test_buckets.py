"""Everything in a bucket: an emulator of Google Cloud Storage in a process beside."""

import copy
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

import e1jax
from e1jax import convert, evaluate, sample, train
from e1jax.checkpoint.load import load_model
from e1jax.checkpoint.runs import find_params
from e1jax.cli import leases
from e1jax.cli.command import run_command
from e1jax.cli.locks import owning
from e1jax.cli.mirror import Mirror
from e1jax.cli.outputs import Progress
from e1jax.config.buckets import BucketPath, open_path, remove_temporary
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.training import GRPOConfig

gcsfs = pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

EMULATOR = str(Path(__file__).parent / "bucket_emulator.py")


@pytest.fixture(scope="module", autouse=True)
def emulator():
    """Addresses of an emulator with the bucket gs://bucket, here and in child processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, EMULATOR, str(port)], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            break
        except OSError:
            assert time.monotonic() < end and server.poll() is None
            time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        yield
    server.kill()
    server.wait()


@pytest.fixture
def bucket(request) -> BucketPath:
    """A directory of its own for each test."""
    return open_path(f"gs://bucket/{request.node.name.partition('[')[0]}")


def call(monkeypatch, command, *argv) -> int:
    """Runs a command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    try:
        run_command(command.main)
    except SystemExit as end:
        return end.code
    return 0


def test_a_path_has_the_methods_and_the_errors_of_a_local_one(bucket, tmp_path):
    for root in (tmp_path / "x", bucket):
        file = root / "a" / "b.txt"
        assert not file.exists() and not root.is_dir()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\ufeffhé", encoding="utf-8")
        assert file.exists() and file.is_file() and not file.is_dir()
        assert file.parent.is_dir() and not file.parent.is_file()
        assert file.read_text(encoding="utf-8-sig") == "hé"
        assert file.open("rb").read() == file.read_bytes()
        assert list(root.iterdir()) == [root / "a"]
        assert list(root.glob("a/*.txt")) == list((root / "a").glob("b.*")) == [file]
        assert list(root.glob("none/*")) == list((root / "none").glob("*")) == []
        assert str(file.relative_to(root)) == "a/b.txt"
        assert (file.name, file.suffix) == ("b.txt", ".txt")
        assert file.with_name("c").parent == file.parent
        for refused in ((root / "none").read_bytes, (root / "none").unlink):
            with pytest.raises(FileNotFoundError) as error:
                refused()
            assert error.value.strerror
        file.unlink()
        (root / "none").unlink(missing_ok=True)
        assert not file.exists()
    file.create(b"1")  # as no local path can
    with pytest.raises(FileExistsError):
        file.create(b"2")
    assert file.read_bytes() == b"1"
    assert str(file) == f"{bucket}/a/b.txt" == os.fspath(file.absolute().resolve())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/x", "neither a local path nor gs://"),
        ("gs:/bucket/x", "neither a local path nor gs://"),
        ("gs://Bucket/x", "names no bucket"),
        ("gs://ab", "names no bucket"),
        ("gs://", "names no bucket"),
    ],
)
def test_an_impossible_address_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        open_path(name)


def test_a_missing_package_is_named(monkeypatch):
    from e1jax.config.buckets import _file_system

    _file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'e1jax\[gcs\]'"):
        open_path("gs://bucket/x").exists()
    _file_system.cache_clear()


PROBLEMS = (
    '{"problem": "1 + 2 = ?", "answer": 3}\n{"problem": "2 + 2 = ?", "answer": 4}\n'
)


def test_files_are_read_from_a_bucket(bucket, monkeypatch, capsys, tmp_path):
    (bucket / "problems.jsonl").write_text(PROBLEMS)
    (bucket / "prompts.jsonl").write_text('{"prompt": "1 + 2 = ?", "id": "p"}\n')
    flags = ["--thinking-budget", "4", "--solution-budget", "4", "--cache-len", "64"]
    prompts = ["--prompts", bucket / "prompts.jsonl", "--json"]
    assert call(monkeypatch, sample, "--model", "nano", *prompts, *flags) == 0
    made = capsys.readouterr().out
    assert '"id": "p"' in made
    (bucket / "made.jsonl").write_text(made.replace('"p"', "1"))
    dataset = ["--dataset", bucket / "problems.jsonl"]
    argv = ["grade", bucket / "made.jsonl", *dataset, "--output", tmp_path]
    assert call(monkeypatch, evaluate, *argv) == 0
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("place", ["gs://bucket/none.jsonl", "gs://nobucket/x.jsonl"])
def test_a_file_that_is_not_there_is_one_sentence(place, refusal):
    for flag in ("--prompts", "--dataset"):
        command = sample if flag == "--prompts" else evaluate
        error = refusal(command.main, ["command", "--model", "nano", flag, place])
        assert place in error


def upload(directory: Path, target: BucketPath) -> None:
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            (target / str(file.relative_to(directory))).upload(file)


def completions(monkeypatch, capsys, model) -> str:
    flags = ["--thinking-budget", "6", "--solution-budget", "4", "--cache-len", "64"]
    argv = ["--model", model, "1 + 2 = ?", "--json", *flags]
    assert call(monkeypatch, sample, *argv) == 0
    return capsys.readouterr().out


def test_models_of_all_kinds_are_read_from_a_bucket(
    bucket, monkeypatch, capsys, tmp_path
):
    """A Hugging Face directory and a checkpoint sample as the local model does."""
    assert call(monkeypatch, convert, "from-hf", "nano", tmp_path / "ours") == 0
    capsys.readouterr()
    expected = completions(monkeypatch, capsys, "nano")
    upload(Path(e1jax.__file__).parent / "models" / "nano", bucket / "hf")
    upload(tmp_path / "ours", bucket / "ours")
    for name in ("hf", "ours"):
        assert completions(monkeypatch, capsys, bucket / name) == expected
    assert call(monkeypatch, convert, "inspect", bucket / "ours") == 0
    assert f"{bucket}/ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Name or service not known"), "service not known"),
        (OSError("Forbidden: b/bucket\nAnonymous caller"), "application-default login"),
        (RuntimeError("cannot be"), "RuntimeError: cannot be"),
    ],
)
def test_an_error_of_the_service_is_no_missing_file(error, words, monkeypatch, refusal):
    async def fail(*args, **options):
        raise error

    assert not open_path("gs://bucket/x").exists()
    monkeypatch.setattr(gcsfs.core.GCSFileSystem, "_call", fail)
    for path in (open_path("gs://bucket/x"), open_path("gs://bucket")):
        for ask in (path.exists, path.is_dir, path.is_file, path.read_bytes):
            with pytest.raises(OSError) as raised:
                ask()
            assert words in raised.value.strerror
    assert words in refusal(sample.main, ["sample", "--model", "gs://bucket/x", "?"])


def test_a_model_that_is_not_there_is_one_sentence(bucket, refusal):
    (bucket / "config.json").write_text("{}")
    for place in (bucket, bucket / "none", "gs://nobucket/model"):
        error = refusal(sample.main, ["sample", "--model", str(place), "x"])
        assert str(place) in error and "/tmp/" not in error


def test_a_step_without_orbax_mark_is_not_there(bucket):
    """As a kill leaves it in a bucket: the arrays under their name, but not the mark."""
    run = bucket
    for step in (1, 2):
        (run / "checkpoints" / str(step) / "params" / "x").write_text("x")
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        find_params(run)
    (run / "checkpoints" / "1" / "commit_success.txt").write_text("")
    (run / "checkpoints" / "best.json").write_text('{"step": 2}')
    assert find_params(run) == (run / "checkpoints" / "1" / "params", run)
    with pytest.raises(UserError, match="has no step 2; its saved steps: 1"):
        find_params(run / "2")


def files_of(path) -> dict[str, bytes]:
    """Contents by name, but for the parameters, whose files Orbax names at random."""
    files = path.details() if isinstance(path, BucketPath) else path.rglob("*")
    names = [
        file if isinstance(file, str) else str(file.relative_to(path)) for file in files
    ]
    return {
        name: (path / name).read_bytes()
        for name in names
        if not name.startswith("params") and (path / name).is_file()
    }


def test_conversions_into_a_bucket_are_as_local_ones(
    bucket, monkeypatch, capsys, tmp_path
):
    for place in (tmp_path, bucket):
        assert call(monkeypatch, convert, "from-hf", "nano", place / "ours") == 0
        assert call(monkeypatch, convert, "to-hf", place / "ours", place / "hf") == 0
        assert str(place / "hf") in capsys.readouterr().out
    for name in ("ours", "hf"):
        assert files_of(bucket / name) == files_of(tmp_path / name)
    assert call(monkeypatch, convert, "from-hf", "nano", bucket / "ours") == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("kind", ["from-hf", "to-hf"])
def test_a_broken_conversion_leaves_nothing_that_reads_as_a_model(
    bucket, kind, killed, monkeypatch, capsys, tmp_path
):
    """Broken at each file that is uploaded: by an error, and as a kill leaves it."""
    source = "nano"
    if kind == "to-hf":
        source = tmp_path / "ours"
        convert.from_hf("nano", source)
    upload, empty = BucketPath.upload, convert._empty
    uploads, most = [], 0
    dst = bucket / kind / str(killed)

    def fail(self, file):
        if len(uploads) == most:
            raise OSError(5, "the network is away")
        uploads.append(self.name)
        upload(self, file)

    def leave(dst):  # a kill removes nothing
        if not uploads:
            empty(dst)

    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.0)
    monkeypatch.setattr(leases, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(BucketPath, "upload", fail)
    if killed:
        monkeypatch.setattr(convert, "_empty", leave)
    while call(monkeypatch, convert, kind, source, dst) == 2:
        assert "the network is away; nothing was written" in capsys.readouterr().err
        assert dst.exists() == (killed and most > 0)
        with pytest.raises(UserError):
            _ = load_model(str(dst))
        if killed:  # by a process elsewhere, of which the lock is left
            (dst / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
        uploads.clear()
        most += 1
    assert most == len(uploads) > 3 and uploads[-1] == "config.json"
    monkeypatch.undo()
    load_model(str(dst))


EVALUATION = [
    "--model",
    "nano",
    "--budgets",
    "4,6",
    "-n",
    "2",
    "--solution-budget",
    "4",
]
EVALUATION += ["--cache-len", "64", "--slots", "2"]


def test_an_evaluation_into_a_bucket_goes_on_after_ctrl_c(
    bucket, monkeypatch, capsys, tmp_path
):
    (tmp_path / "problems.jsonl").write_text(PROBLEMS)
    flags = [*EVALUATION, "--dataset", str(tmp_path / "problems.jsonl")]
    local, there = tmp_path / "local", bucket / "results"
    assert call(monkeypatch, evaluate, *flags, "--output", local) == 0

    def interrupted(self):
        step(self)
        if self.completions == 3:
            self.signals.append(2)

    with monkeypatch.context() as patch:
        step = Progress.step
        patch.setattr(Progress, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"kept in {there}"):
            evaluate.evaluate([*flags, "--output", str(there)])
    lines = (there / "completions.jsonl").read_text().splitlines()
    assert 3 <= len(lines) < 8
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, evaluate, *flags, "--output", there) == 0
    assert sorted(tmp_path.rglob("*")) == before
    names = ["accuracy.png", "completions.jsonl"]
    names += ["completions.jsonl.settings.json", "results.json"]
    assert [file.name for file in there.iterdir()] == names  # no lock is left
    found = (there / "completions.jsonl").read_text().splitlines()
    assert found[: len(lines)] == lines
    assert sorted(found) == sorted(
        (local / "completions.jsonl").read_text().splitlines()
    )
    assert (there / "results.json").read_text() == (local / "results.json").read_text()
    capsys.readouterr()
    assert call(monkeypatch, evaluate, *flags, "--output", there) == 0
    assert "are in gs://" in capsys.readouterr().err
    assert call(monkeypatch, evaluate, *flags, "--seed", "1", "--output", there) == 2
    assert "was made with seed=0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [sample, evaluate])
def test_an_output_in_no_bucket_is_one_sentence(command, refusal, tmp_path):
    (tmp_path / "problems.jsonl").write_text(PROBLEMS)
    argv = ["command", "--model", "nano", "--output", "gs://nobucket/x"]
    argv += ["--cache-len", "64", "--thinking-budget", "4", "--solution-budget", "4"]
    argv += ["x"] if command is sample else ["--dataset", "problems.jsonl"]
    if command is evaluate:
        argv[argv.index("--thinking-budget")] = "--budgets"
    assert "gs://nobucket/x cannot be written" in refusal(command.main, argv)


def test_a_failed_upload_is_tried_again_and_in_the_end_kept(
    bucket, monkeypatch, capsys
):
    mirror = Mirror(bucket)
    (mirror.path / "lines").write_text("1")
    with monkeypatch.context() as patch:

        def away(self, file):
            raise OSError(5, "the network is away")

        patch.setattr(BucketPath, "upload", away)
        mirror._due = 0.0
        mirror.push_if_due()
        assert "the network is away); tried again" in capsys.readouterr().err
        with pytest.raises(OSError) as error:
            mirror.close()
    assert f"kept in {mirror.path}" in error.value.strerror
    remove_temporary()
    assert (mirror.path / "lines").read_text() == "1"
    shutil.rmtree(mirror.path)


def test_one_writer_at_a_time(bucket, monkeypatch, capsys):
    """Refused while the owner lives, here or elsewhere; free where it has ended."""
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "_SETTLE_SECONDS", 0.0)
    lock = bucket / ".lock"
    refused = pytest.raises(UserError, match=f"another run is writing {bucket}")
    with owning(bucket, inside=True):
        with refused, owning(bucket, inside=True):
            pass
        # The same lock, seen by a process that does not hold it.
        with monkeypatch.context() as patch:
            patch.setattr(leases, "_is_gone", lambda owner: False)
            patch.setattr(leases, "_held", {"another"})
            with refused, owning(bucket, inside=True):
                pass
        assert json.loads(lock.read_bytes())["renewed"] > 0
    assert not lock.exists()
    capsys.readouterr()
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = {"host": leases._host(), "pid": gone.pid, "id": "x", "renewed": 7}
    for left in (here, here | {"host": "elsewhere"}, {"pid": "?"}):
        lock.write_text(json.dumps(left))
        with owning(bucket, inside=True):
            assert json.loads(lock.read_bytes())["pid"] == os.getpid()
        assert ("for up to" in capsys.readouterr().err) == (left != here)


TRAINING = {
    "model": "nano",
    "steps": 3,
    "data": {"max_prompt_len": 40},
    "rollout": {
        "prompts": 2,
        "samples": 2,
        "thinking_budget": 8,
        "solution_budget": 6,
        "slots": 4,
        "cache_len": 64,
    },
    "update": {"minibatch_prompts": 1, "microbatch": 2, "remat": False},
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 3},
    "validation": {"limit": 2, "every": 2, "budgets": [[8, 6]]},
    "checkpoint": {"every": 1, "keep": 2},
}
TIMED = {"seconds", "rollout_tokens_per_second", "update_tokens_per_second"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, compilations_in):
    """tiny.yaml, and beside it the run `unbroken` of it, to compare runs in a bucket with."""
    path = tmp_path_factory.mktemp("train")
    (path / "problems.jsonl").write_text(PROBLEMS)
    settings = copy.deepcopy(TRAINING)
    for section in ("data", "validation"):
        settings[section]["problems"] = str(path / "problems.jsonl")
    (path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with compilations_in(path / "cache"):
        train.train(*training(path, path / "unbroken"))
        yield path


def training(workplace: Path, run_dir: Path, *flags: str):
    argv = ["--config", str(workplace / "tiny.yaml"), "--run-dir", str(run_dir)]
    return load_config(GRPOConfig, [*argv, *flags], "train")


def content_of(run_dir: Path) -> dict:
    """What a run has made, but for its times: checksums of the last step, metrics, ..."""
    steps = sorted((run_dir / "checkpoints").glob("[0-9]*"))
    record = json.loads((steps[-1] / "record" / "metadata").read_text())
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "steps": [step.name for step in steps],
        "record": record,
        "metrics": [{k: v for k, v in x.items() if k not in TIMED} for x in lines],
        "best": (run_dir / "checkpoints" / "best.json").read_text(),
        "config.json": (run_dir / "config.json").read_text(),
        "tokenizer": (run_dir / "tokenizer_config.json").read_text(),
        "origin": (run_dir / "origin.json").read_text(),
    }


def killed_and_resumed(workplace: Path, run_dir: Path, seed: int) -> None:
    """Kills a training run at a random moment of its steps, and lets it go on."""
    moment = random.Random(seed).uniform(0, 2)
    argv = ["--config", str(workplace / "tiny.yaml"), "--run-dir", str(run_dir)]
    with (workplace / "stderr").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "e1jax.train", *argv], stdout=log, stderr=log
        )
    end = time.monotonic() + PATIENCE
    while not (run_dir / "checkpoints").is_dir():
        assert time.monotonic() < end
        assert process.poll() is None, (workplace / "stderr").read_text()
        time.sleep(0.05)
    time.sleep(moment)
    process.kill()
    process.wait()
    complete = [
        int(step.name)
        for step in (run_dir / "checkpoints").glob("[0-9]*")
        if (step / "commit_success.txt").exists()
    ]
    if complete:  # and not a step after it, of which a part may be there
        params, _ = find_params(run_dir)
        assert int(params.parent.name) in complete
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert len(lines) >= max(complete)
    else:
        with pytest.raises(UserError):
            find_params(run_dir)
    train.train(*training(workplace, run_dir))
    assert content_of(run_dir) == content_of(workplace / "unbroken")


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_after_a_kill_as_if_unbroken(
    bucket, workplace, monkeypatch, capsys
):
    killed_and_resumed(workplace, bucket, seed=int.from_bytes(os.urandom(4)))
    assert not (bucket / ".lock").exists()
    assert list((bucket / "tensorboard").iterdir())
    capsys.readouterr()
    expected = completions(monkeypatch, capsys, workplace / "unbroken")
    assert completions(monkeypatch, capsys, bucket) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kills_of_runs_in_a_bucket(bucket, workplace, seed):
    killed_and_resumed(workplace, bucket / str(seed), seed)


@pytest.mark.slow
def test_an_adapter_in_a_bucket(bucket, workplace, monkeypatch, capsys, tmp_path):
    """The run that trained it, and what peft would read."""
    argv = ["--adapter.rank", "2", "--adapter.targets", "[q, down]", "--steps", "2"]
    argv += ["--optimizer.learning_rate", "0.1"]
    config, _ = training(workplace, tmp_path, *argv)
    train.train(config, bucket / "run")
    for place in (tmp_path, bucket):
        to_hf = ("to-hf", bucket / "run", place / "peft", "--peft")
        assert call(monkeypatch, convert, *to_hf) == 0
    capsys.readouterr()
    expected = completions(monkeypatch, capsys, tmp_path / "peft")
    assert completions(monkeypatch, capsys, "nano") != expected
    for name in ("run", "peft"):
        assert completions(monkeypatch, capsys, bucket / name) == expected


def test_a_run_in_no_bucket_is_one_sentence(workplace, refusal):
    argv = ["train", "--config", str(workplace / "tiny.yaml")]
    error = refusal(train.main, [*argv, "--run-dir", "gs://nobucket/run"])
    assert "gs://nobucket/run cannot be written" in error
