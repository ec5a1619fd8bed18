"""Everything in a bucket: an emulator of Google Cloud Storage in a process beside."""

import importlib.util
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE

from e1jax import evaluate, sample
from e1jax.cli.command import run_command
from e1jax.config.buckets import BucketPath, open_path
from e1jax.config.checks import UserError

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))),
    reason="needs gcsfs and gcp-storage-emulator",
)

_EMULATOR = """
import sys, threading
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket="bucket").start()
threading.Event().wait()
"""


@pytest.fixture(scope="module", autouse=True)
def emulator():
    """Addresses of an emulator with the bucket gs://bucket, here and in child processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", _EMULATOR, str(port)], stderr=subprocess.DEVNULL
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
