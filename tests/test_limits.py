"""Full disks, limits, streams that take no text, and Ctrl-C, by real processes.

Each of them ends in one sentence and exit code 2 (Ctrl-C: 130), and leaves no half file.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

PYTHON = sys.executable
TINY = {
    "model": "nano",
    "steps": 4,
    "data": {"problems": "problems.jsonl", "max_prompt_len": 32},
    "rollout": {
        "prompts": 2,
        "samples": 2,
        "thinking_budget": 4,
        "solution_budget": 4,
        "temperature": 1.0,
        "slots": 4,
        "cache_len": 64,
    },
    "update": {"minibatch_prompts": 2, "microbatch": 4, "remat": False},
    "checkpoint": {"every": 2, "keep": 2},
}
SFT = {
    "steps": 4,
    "first_phase": 0.5,
    "model": {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "first": {"batch_size": 4},
    "second": {"batch_size": 4},
    "checkpoint": {"every": 2},
}
SAMPLE = ["e1jax.sample", "--thinking-budget", "8", "--solution-budget", "8"]
SAMPLE += ["--cache-len", "64"]
EVALUATE = ["e1jax.evaluate", "--model", "nano", "--dataset", "problems.jsonl"]
EVALUATE += ["--budgets", "4", "--solution-budget", "4", "-n", "4"]
EVALUATE += ["--cache-len", "64", "--output"]
TRAIN = ["e1jax.train", "--config", "tiny.yaml", "--run-dir"]
SFT_RUN = ["e1jax.sft", "--config", "sft.yaml", "--run-dir"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, compilations_in):
    """A directory with settings, problems, a run and an evaluation."""
    path = tmp_path_factory.mktemp("faults")
    (path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (path / "sft.yaml").write_text(yaml.safe_dump(SFT))
    line = json.dumps({"problem": "1+1?", "answer": "2"})
    (path / "problems.jsonl").write_text(f"{line}\n" * 3)
    with compilations_in(path / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        for command in ([*TRAIN, "run"], [*EVALUATE, "evaluation"]):
            done = run(command)
            assert done.returncode == 0, done.stderr
        yield path


def run(
    command: list[str], limits: str = "true", **settings
) -> subprocess.CompletedProcess:
    """Runs a command, under limits that a shell sets."""
    script = f'{limits}; exec "$@"'
    words = ["bash", "-c", script, "bash", PYTHON, "-m", *command]
    options = {"capture_output": True, "text": True, "timeout": PATIENCE, **settings}
    return subprocess.run(words, **options)


def assert_one_sentence(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit code 2; on stderr nothing but notes, the progress, and one sentence."""
    assert done.returncode == 2, done.stderr
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith(("note: ", "step ")) and "completions, " not in line
    ]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def disk(tmp_path):
    """Makes a small disk of so many bytes; skips the test where that is not allowed."""
    with contextlib.ExitStack() as mounted:

        def make(size: str) -> Path:
            path = tmp_path / "disk"
            path.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
            with contextlib.suppress(OSError):
                if subprocess.run(mount, capture_output=True).returncode == 0:
                    mounted.callback(subprocess.run, ["umount", "-l", str(path)])
                    return path
            pytest.skip("mounting is not allowed")

        yield make


FULL = "No space left on device"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "size", "part"),
    [
        ([*TRAIN, "DISK/run"], "1m", "no step is there"),
        (
            [*TRAIN, "DISK/run", "--steps", "300", "--checkpoint.every", "300"],
            "48k",
            FULL,
        ),
        pytest.param([*TRAIN, "DISK/run"], "12k", FULL, marks=SLOW),
        pytest.param([*SFT_RUN, "DISK/run"], "128k", "no step is there", marks=SLOW),
        ([*SFT_RUN, "DISK/run"], "8k", FULL),
        (["e1jax.convert", "to-hf", "run", "DISK/to"], "256k", FULL),
        (
            ["e1jax.convert", "from-hf", "nano", "DISK/from"],
            "256k",
            "cannot be written",
        ),
        ([*SAMPLE, "x", "-n", "60", "--output", "DISK/o.jsonl"], "16k", FULL),
        pytest.param([*EVALUATE, "DISK"], "4k", FULL, marks=SLOW),
        ([*EVALUATE, "DISK"], "16k", FULL),
        (
            [
                "e1jax.evaluate",
                "plot",
                "evaluation/results.json",
                "--output",
                "DISK/a.png",
            ],
            "8k",
            FULL,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_full_disk_is_one_sentence(place, disk, command, size, part):
    path = disk(size)
    command = [word.replace("DISK", str(path)) for word in command]
    assert_one_sentence(run(command), part)
    for file in path.rglob("*"):  # what is there is whole
        assert file.suffix not in (".png", ".partial", ".new"), file
    for name in ("o.jsonl", "completions.jsonl", "run/metrics.jsonl"):
        if (path / name).exists():
            *lines, _ = (path / name).read_text().split("\n")
            assert all(map(json.loads, lines))


def test_nothing_is_lost_on_a_disk_that_gets_room(place, disk):
    path = disk("16k")
    command = [*SAMPLE, "x", "-n", "60", "--output", str(path / "o.jsonl")]
    assert_one_sentence(run(command), FULL)
    before = (path / "o.jsonl").read_text().rpartition("\n")[0]
    assert before.count("\n") > 3
    grow = ["mount", "-o", "remount,size=1m", str(path)]
    subprocess.run(grow, check=True)
    done = run(command)
    assert done.returncode == 0, done.stderr
    text = (path / "o.jsonl").read_text()
    assert text.startswith(before) and len(text.splitlines()) == 60


@pytest.mark.parametrize(
    ("command", "blocks"),
    [
        pytest.param([*TRAIN, "limited"], 100, marks=SLOW),
        (["e1jax.convert", "to-hf", "run", "limited-hf"], 100),
        ([*SAMPLE, "x", "-n", "60", "--output", "limited.jsonl"], 8),
        (
            [
                "e1jax.evaluate",
                "plot",
                "evaluation/results.json",
                "--output",
                "limit.png",
            ],
            8,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_a_limit_of_the_size_of_files_is_one_sentence(place, command, blocks):
    done = run(command, f"ulimit -f {blocks}")
    assert_one_sentence(done, "cannot be written")
    assert not Path("limited-hf").exists() and not Path("limit.png").exists()


@pytest.mark.parametrize("number", [16, 32, 100])
@pytest.mark.parametrize(
    "command",
    [[*TRAIN, "few"], ["e1jax.convert", "to-hf", "run", "few-hf"], [*SAMPLE, "x"]],
    ids=lambda command: command[0],
)
def test_too_few_open_files_are_refused(place, command, number):
    done = run(command, f"ulimit -n {number}", timeout=PATIENCE)
    assert_one_sentence(done, f"only {number} files", "ulimit -n")


@pytest.mark.slow
def test_the_fewest_open_files_are_enough(place):
    for command in ([*TRAIN, "fewest"], ["e1jax.convert", "to-hf", "run", "fewest-hf"]):
        done = run(command, "ulimit -n 128")
        assert done.returncode == 0, done.stderr
    assert run([*EVALUATE, "fewest-evaluation"], "ulimit -n 128").returncode == 0


# Standard output and standard error.


def test_a_full_standard_output_is_one_sentence(place):
    with open("/dev/full", "w") as full:
        for command in (
            [*SAMPLE, "x"],
            [*SAMPLE, "x", "--json"],
            ["e1jax.sample", "-h"],
        ):
            done = run(
                command, stdout=full, stderr=subprocess.PIPE, capture_output=False
            )
            assert_one_sentence(done, f"standard output cannot be written: {FULL}")


def test_a_closed_pipe_is_no_fault(place):
    command = [*SAMPLE, "x", "y", "--json", "-n", "3"]
    words = [PYTHON, "-m", *command]
    script = '"$@" | head -c 1 > head; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True
    )
    assert done.stdout == "0\n" and "Traceback" not in done.stderr
    assert "rror" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(place, closed):
    words = [
        "bash",
        "-c",
        f'"$@" {closed}',
        "bash",
        PYTHON,
        "-m",
        *SAMPLE,
        "x",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for line in done.stdout.splitlines():  # and nothing of stderr
        json.loads(line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:strict"])
def test_text_that_standard_output_cannot_encode(place, encoding):
    code = (
        "from e1jax.cli import run_command\n"
        "run_command(lambda: print('f\\u00fc\\u4f60', '\\ud83d', '\\U0001f600'))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding.partition(":")[0])
    assert text.encode().decode("unicode_escape", "replace").startswith("f")
    assert "\\ud83d \\U0001f600\n" in text


# Ctrl-C.


def ctrl_c_after(seconds: float, command: list[str]) -> tuple[int, str]:
    process = subprocess.Popen(
        [PYTHON, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    return process.returncode, error


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("module", ["sample", "train"])
def test_ctrl_c_in_the_first_seconds(place, module, seconds):
    command = {
        "sample": [*SAMPLE, "x", "-n", "5000"],
        "train": [*TRAIN, f"stopped{seconds}", "--steps", "5000"],
    }[module]
    code, error = ctrl_c_after(seconds, command)
    assert code == 130, error
    assert "Traceback" not in error and "Exception ignored" not in error
    assert error.splitlines()[-1].startswith("interrupted")


SWALLOWED = """
import gc, os, signal, sys
sys.argv[0] = "-m"
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as in CI
import e1jax
from e1jax.cli import run_command

def main():
    def kill(phase, info):
        gc.callbacks.remove(kill)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # Python raises it here
            pass
    gc.callbacks.append(kill)
    gc.collect()
    import time
    for _ in range(200):
        time.sleep(0.05)
    print("swallowed")

run_command(main)
"""


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    done = subprocess.run(
        [PYTHON, "-c", SWALLOWED], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted\n"
