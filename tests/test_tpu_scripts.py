"""tpu_scripts, with a gcloud that only writes down how it is called.

What a script passes to gcloud is compared word by word, and what gcloud would run on a
TPU VM is run here, in an empty home.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

from e1jax.cli.flags import read_flags
from e1jax.config.load import load_config
from e1jax.config.training import GRPOConfig
from e1jax.serve import ServeFlags

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
PLACE = ["--zone=us-central1-a", "--project=my-project"]
INPUTS = {"PROJECT": "my-project", "ZONE": "us-central1-a", "TPU_NAME": "e1"}
MORE = {  # what the scripts need besides
    "ACCELERATOR": "v5litepod-8",
    "BUCKET": "my-bucket",
    "RUN_DIR": "/mnt/e1jax/runs/e1",
}
CONFIG = "configs/e1_math_7b.yaml"
ARGUMENTS = {  # spaces, quotes, a line break and what a shell would expand
    "convert.sh": ["from-hf", "some/model", '/mnt/e1jax/it\'s a "model"'],
    "sample.sh": ["What's $HOME + `id`?\n\\n", "", "--model", "nano*", "-n", "4"],
    "serve.sh": ["--model", "it's my model"],
    "evaluate.sh": ["--dataset", "aime 24", "--instruction", 'Don\'t; "think" && go'],
    "train.sh": [CONFIG, "--data.instruction", "it's $1 \\boxed{}"],
    "resume.sh": [CONFIG, "--data.instruction", "two  words"],
}

# Stands for gcloud and for the commands that need no TPU but have effects.
STUB = """#!{python} -S
import json, os, pathlib, sys
here = pathlib.Path({here!r})
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(call) + "\\n")
if os.environ.get("FAIL", "nothing fails") in " ".join(call):
    print("ERROR: (gcloud) no quota", file=sys.stderr)
    sys.exit(7)
answers = here / ("states" if "describe" in call else "answers")
if "describe" in call or "echo running" in " ".join(call):
    first, _, rest = answers.read_text().partition("\\n")
    answers.write_text(rest)
    print(first)
"""


class Cloud:
    """Runs the scripts against the stub."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("gcloud", "tar", "mkdir", "sleep"):
            file = path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(STUB.format(python=sys.executable, here=str(path)))
            file.chmod(0o755)
        self.say()

    def say(self, *states: str, training: str = "idle") -> None:
        """What the TPU's state is, each time it is asked for, and whether it trains."""
        (self.path / "states").write_text("\n".join(states or ["ACTIVE"]))
        (self.path / "answers").write_text(training)

    def bash(self, *words: str, text: str | None = None, **inputs: str):
        """A bash with the inputs; its result, and the calls made meanwhile."""
        (self.path / "calls").write_text("")
        path = f"{self.path / 'bin'}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", *words],
            input=text,
            env={"PATH": path, "HOME": str(self.path), **inputs},
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        calls = (self.path / "calls").read_text().splitlines()
        return result, [json.loads(line) for line in calls]

    def calls(self, script: str, *arguments: str, **inputs: str) -> list[list[str]]:
        result, calls = self.bash(
            str(SCRIPTS / script), *arguments, **(INPUTS | MORE | inputs)
        )
        assert result.returncode == 0, result.stderr
        return calls


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def remote(call: list[str]) -> str:
    """The commands that a call of gcloud ssh runs, as gcloud hands them on."""
    [command] = [word for word in call if word.startswith("--command=")]
    return " ".join(command.removeprefix("--command=").split(" "))


def tpus(*words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", *words, *PLACE]


def test_a_queued_resource_is_made_and_awaited(cloud):
    cloud.say("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    asked = tpus(*("queued-resources", "describe", "e1"), "--format=value(state.state)")
    assert cloud.calls("create.sh") == [
        tpus(
            *("queued-resources", "create", "e1", "--node-id=e1"),
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--accelerator-type=v5litepod-8",
        ),
        *[asked, ["sleep", "30"], asked, ["sleep", "30"], asked],
    ]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_a_spot_vm_is_made(cloud, accelerator, runtime):
    cloud.say("READY")
    inputs = {"QUEUED": "no", "SPOT": "yes", "SERVICE_ACCOUNT": "me@example.com"}
    first, second = cloud.calls("create.sh", ACCELERATOR=accelerator, **inputs)
    assert first == tpus(
        *("tpu-vm", "create", "e1", f"--version={runtime}"),
        *(f"--accelerator-type={accelerator}", "--spot"),
        "--service-account=me@example.com",
    )
    assert second == tpus("tpu-vm", "describe", "e1", "--format=value(state)")


def test_another_kind_needs_its_runtime(cloud):
    result, calls = cloud.bash(
        str(SCRIPTS / "create.sh"), **(INPUTS | {"ACCELERATOR": "v4-8"})
    )
    assert "RUNTIME: the TPU software version for v4-8" in result.stderr
    assert result.returncode and not calls
    inputs = {"ACCELERATOR": "v4-8", "RUNTIME": "tpu-ubuntu2204-base"}
    assert (
        "--runtime-version=tpu-ubuntu2204-base" in cloud.calls("create.sh", **inputs)[0]
    )


def test_a_request_that_fails_is_an_error(cloud):
    cloud.say("PROVISIONING", "FAILED")
    result, _ = cloud.bash(str(SCRIPTS / "create.sh"), **(INPUTS | MORE))
    assert result.returncode == 2
    assert "error: e1 is FAILED; delete.sh removes it" in result.stderr


def test_deleting(cloud):
    assert cloud.calls("delete.sh") == [
        tpus("queued-resources", "delete", "e1", "--force", "--quiet")
    ]
    assert cloud.calls("delete.sh", QUEUED="no") == [
        tpus("tpu-vm", "delete", "e1", "--quiet")
    ]


def test_copying(cloud):
    archive = str(ROOT / "build/e1jax.tar.gz")
    made, packed, copied, unpacked = cloud.calls("copy.sh")
    assert made == ["mkdir", "-p", str(ROOT / "build")]
    assert packed[:6] == [
        "tar",
        "-czf",
        archive,
        "--exclude=__pycache__",
        "-C",
        str(ROOT),
    ]
    assert copied == tpus("tpu-vm", "scp", archive, "e1:e1jax.tar.gz", "--worker=all")
    assert (
        unpacked[:6] == tpus("tpu-vm", "ssh", "e1")[:6] and "--worker=all" in unpacked
    )

    # The same, for real: what is packed is what an installation needs, and replaces
    # the old code there but not the environment.
    home = cloud.path / "home"
    old = [home / "e1jax/e1jax/deleted.py", home / "e1jax/.venv/kept"]
    for file in old:
        file.parent.mkdir(parents=True)
        file.touch()
    packed[2] = str(home / "e1jax.tar.gz")
    subprocess.run(packed, check=True)
    subprocess.run(["sh", "-c", remote(unpacked)], cwd=home, check=True)
    assert [file.exists() for file in old] == [False, True]
    for name in ("pyproject.toml", "README.md", "LICENSE", CONFIG, "e1jax/train.py"):
        assert (home / "e1jax" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(home.glob("e1jax/**/__pycache__"))


def test_installing(cloud):
    [installed] = cloud.calls("install.sh", BUCKET="")
    assert "--worker=all" in installed and '-e ".[tpu,serve,gcs]"' in remote(installed)
    installed_too, mounted = cloud.calls("install.sh")
    assert installed_too == installed and "--worker=all" in mounted
    assert "\nbucket=my-bucket\n" in remote(mounted)
    for call in (installed, mounted):
        subprocess.run(["bash", "-n", "-c", remote(call)], check=True)


@pytest.mark.parametrize("script", ["convert.sh", "sample.sh", "evaluate.sh"])
def test_arguments_arrive_on_the_vm_as_they_are(cloud, script):
    [call] = cloud.calls(script, *ARGUMENTS[script])
    assert call == tpus(
        "tpu-vm", "ssh", "e1", "--worker=0", f"--command={remote(call)}"
    )
    home = make_home(cloud.path)
    subprocess.run(["sh", "-c", remote(call)], cwd=home, check=True)
    [(directory, platforms, *argv)] = started(home)
    assert directory == str(home / "e1jax")
    assert platforms == ("cpu" if script == "convert.sh" else None)
    assert argv == ["-m", f"e1jax.{script.removesuffix('.sh')}", *ARGUMENTS[script]]


def test_serving_through_a_tunnel(cloud):
    for inputs, port in [({}, "8000"), ({"PORT": "81"}, "81")]:
        [call] = cloud.calls("serve.sh", *ARGUMENTS["serve.sh"], **inputs)
        tunnel = ["--ssh-flag=-t", f"--ssh-flag=-L {port}:localhost:{port}"]
        command = f"--command={remote(call)}"
        assert call == tpus("tpu-vm", "ssh", "e1", "--worker=0", *tunnel, command)
        words = shlex.split(remote(call).partition("exec ")[2])
        assert words[1:3] == ["-m", "e1jax.serve"]
        flags = read_flags(ServeFlags, words[3:], "serve")
        assert (flags.model, flags.port) == ("it's my model", int(port))
        assert flags.host == "127.0.0.1"


def test_the_deployment_serves_with_probes():
    deployment, service = yaml.safe_load_all((SCRIPTS / "gke_serve.yaml").read_text())
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "e1jax.serve"]
    flags = read_flags(ServeFlags, container["args"], "serve")
    assert flags.host == "0.0.0.0"
    assert flags.grace_seconds < pod["spec"]["terminationGracePeriodSeconds"]
    [environment] = container["env"]
    assert environment["name"] == "E1JAX_API_KEY"
    [port] = container["ports"]
    assert port["containerPort"] == flags.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    topology = pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert service["spec"]["selector"] == pod["metadata"]["labels"]


def make_home(path: Path) -> Path:
    """The home of a TPU VM, with commands that note how they are called and wait."""
    home = path / "vm"
    python = home / "e1jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys._base_executable)
    package = home / "e1jax/e1jax"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("convert", "sample", "evaluate", "train"):
        (package / f"{name}.py").write_text(
            "import json, os, pathlib, signal, sys, time\n"
            f"home = pathlib.Path({str(home)!r})\n"
            "platforms = os.environ.get('JAX_PLATFORMS')\n"
            "call = [os.getcwd(), platforms, *sys.orig_argv[1:]]\n"
            "print('trained', flush=True)\n"
            "def save(*_):\n"
            "    time.sleep(0.3)\n"
            "    sys.exit('saved')\n"
            "signal.signal(signal.SIGTERM, save)\n"
            "with (home / 'started').open('a') as file:\n"
            "    file.write(json.dumps(call) + '\\n')\n"
            "while (home / 'wait').exists():\n"
            "    time.sleep(0.01)\n"
        )
    (home / "started").touch()
    return home


def started(home: Path) -> list[list[str]]:
    file = home / "started"
    return [json.loads(line) for line in file.read_text().splitlines()]


def eventually(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_training_is_started_once_outlives_the_connection_and_stops(cloud):
    [call] = cloud.calls("train.sh", *ARGUMENTS["train.sh"])
    [stop] = cloud.calls("stop.sh")
    for words in (call, stop):
        command = f"--command={remote(words)}"
        assert words == tpus("tpu-vm", "ssh", "e1", "--worker=all", command)
    home = make_home(cloud.path)

    def connect(commands: str) -> str:
        return subprocess.run(
            ["bash", "-c", commands],
            cwd=home,
            check=True,
            capture_output=True,  # ends when nothing there holds the pipes
            text=True,
            timeout=PATIENCE,
        ).stdout

    asking = "flock -n train.lock true && echo idle || echo running"
    for run in (1, 2):
        (home / "wait").touch()
        assert connect(remote(call)) == ""
        eventually(lambda run=run: len(started(home)) == run)
        assert connect(remote(call)) == "training is running already\n"
        assert connect(asking) == "running\n"
        if run == 1:
            (home / "wait").unlink()
            eventually(lambda: connect(asking) == "idle\n")
    assert connect(remote(stop)) == ""
    assert connect(asking) == "idle\n"
    assert connect(remote(stop)) == "training is not running\n"
    config, *flags = ARGUMENTS["train.sh"]
    argv = ["-m", "e1jax.train", "--config", config, "--run-dir", MORE["RUN_DIR"]]
    assert started(home) == [[str(home / "e1jax"), None, *argv, *flags]] * 2
    assert (home / "train.log").read_text() == "trained\ntrained\nsaved\n"


def test_watching(cloud):
    [call] = cloud.calls("watch.sh")
    command = "--command=tail -n 100 -F train.log"
    assert call == tpus("tpu-vm", "ssh", "e1", "--worker=0", command)
    assert "--worker=3" in cloud.calls("watch.sh", "3")[0]


def verbs(calls: list[list[str]]) -> list[str]:
    return [call[4] if call[0] == "gcloud" else call[0] for call in calls]


PREPARE = ["mkdir", "tar", "scp", "ssh", "ssh", "ssh"]  # copy.sh and install.sh


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        # Training has ended or failed on a TPU that is there.
        (["ACTIVE"], ["describe", "ssh", *PREPARE, "ssh"]),
        # In the queue still.
        (
            ["ACCEPTED", "ACTIVE"],
            ["describe", "sleep", "describe", "ssh", *PREPARE, "ssh"],
        ),
        # Being taken away.
        (
            ["SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"],
            [
                *["describe", "sleep", "describe", "delete", "create"],
                *["describe", "sleep", "describe", *PREPARE, "ssh"],
            ],
        ),
        (
            ["FAILED", "ACTIVE"],
            ["describe", "delete", "create", "describe", *PREPARE, "ssh"],
        ),
    ],
    ids=lambda value: value[0],
)
def test_resuming(cloud, states, expected):
    cloud.say(*states)
    calls = cloud.calls("resume.sh", *ARGUMENTS["resume.sh"], SPOT="yes")
    assert verbs(calls) == expected
    cloud.say(*states)
    assert calls[-1] == cloud.calls("train.sh", *ARGUMENTS["resume.sh"])[0]
    if "create" in expected:
        assert "--spot" in calls[expected.index("create")]


def test_resuming_a_preempted_vm(cloud):
    cloud.say("PREEMPTED", "READY")
    calls = cloud.calls("resume.sh", CONFIG, QUEUED="no")
    assert verbs(calls)[:4] == ["describe", "delete", "create", "describe"]
    assert {call[3] for call in calls if call[0] == "gcloud"} == {"tpu-vm"}


def test_resuming_what_is_running_does_nothing(cloud):
    cloud.say("ACTIVE", training="running")
    assert verbs(cloud.calls("resume.sh", CONFIG)) == ["describe", "ssh"]


@pytest.mark.parametrize("script", NAMES)
def test_a_dry_run_prints_what_a_run_does(cloud, script):
    arguments = ARGUMENTS.get(script, [])
    states = ["SUSPENDED", "ACTIVE"] if script == "resume.sh" else ["ACTIVE"]
    cloud.say(*states)
    calls = cloud.calls(script, *arguments, SPOT="yes")
    words = [str(SCRIPTS / script), "--dry-run", *arguments]
    result, none = cloud.bash(*words, **(INPUTS | MORE), SPOT="yes")
    assert result.returncode == 0 and result.stderr == "" and none == []
    cloud.say(*states)
    assert cloud.bash("-eu", text=result.stdout)[1] == calls != []


PASS_ON = sorted(ARGUMENTS)


@pytest.mark.parametrize("script", NAMES)
def test_own_flags_stand_anywhere(cloud, script):
    """Also behind the arguments that are passed on, and between them."""
    arguments, inputs = ARGUMENTS.get(script, []), INPUTS | MORE
    first, _ = cloud.bash(str(SCRIPTS / script), "--dry-run", *arguments, **inputs)
    for place in range(1, len(arguments) + 1):
        words = [*arguments[:place], "--dry-run", *arguments[place:]]
        result, calls = cloud.bash(str(SCRIPTS / script), *words, **inputs)
        assert calls == [] and result.stdout == first.stdout != ""
    for flag in ("--help", "-h"):
        result, calls = cloud.bash(str(SCRIPTS / script), *arguments, flag)
        assert calls == [] and result.returncode == 0
        assert result.stdout.count("Inputs:") == 1


@pytest.mark.parametrize("script", PASS_ON)
def test_after_two_dashes_everything_is_passed_on(cloud, script):
    given = [*ARGUMENTS[script], "--dry-run", "-h", "--", "--help"]
    call = cloud.calls(script, "--", *given)[-1]
    module = {"resume.sh": "train"}.get(script, script.removesuffix(".sh"))
    command = remote(call)
    if module == "train":  # bash -c '...' in the command
        [command] = re.findall(r"bash -c ('.*') >> train.log", command, re.DOTALL)
        [command] = shlex.split(command)
    assert f"e1jax.{module} " in command
    passed_on = given[1:] if module == "train" else given  # after --config, --run-dir
    assert shlex.split(command)[-len(passed_on) :] == passed_on


@pytest.mark.parametrize("script", sorted({*NAMES} - {*PASS_ON}))
def test_a_misspelt_flag_runs_nothing(cloud, script):
    words = [str(SCRIPTS / script), "--dryrun"]
    result, calls = cloud.bash(*words, **(INPUTS | MORE))
    assert result.returncode == 2 and calls == []
    assert result.stderr.startswith("error: ") and "--dryrun" in result.stderr


@pytest.mark.parametrize("script", NAMES)
def test_help_is_the_header(cloud, script):
    result, calls = cloud.bash(str(SCRIPTS / script), "--help")
    assert result.returncode == 0 and not calls
    for part in (f"tpu_scripts/{script}", "Inputs:", "Hardware:", "Duration:", "Cost:"):
        assert part in result.stdout
    assert "set -euo" not in result.stdout
    assert "set -euo pipefail\n" in (SCRIPTS / script).read_text()
    assert os.access(SCRIPTS / script, os.X_OK)


NEEDED = {
    "create.sh": [*INPUTS, "ACCELERATOR"],
    "train.sh": [*INPUTS, "RUN_DIR"],
    "resume.sh": [*INPUTS, "BUCKET", "RUN_DIR"],
}


@pytest.mark.parametrize(
    ("script", "missing"),
    [(s, name) for s in NAMES for name in NEEDED.get(s, INPUTS)],
)
def test_a_missing_input_is_named(cloud, script, missing):
    inputs = {name: value for name, value in (INPUTS | MORE).items() if name != missing}
    result, calls = cloud.bash(str(SCRIPTS / script), CONFIG, **inputs)
    assert result.returncode != 0 and not calls
    [line] = result.stderr.splitlines()
    assert f" {missing}: the " in line


@pytest.mark.parametrize(
    ("script", "inputs"),
    [
        ("delete.sh", {"TPU_NAME": "e1;id"}),
        ("delete.sh", {"TPU_NAME": "--force"}),
        ("delete.sh", {"ZONE": "us-central1"}),
        ("delete.sh", {"PROJECT": "my project"}),
        ("delete.sh", {"QUEUED": "maybe"}),
        ("create.sh", {"SPOT": "1"}),
        ("create.sh", {"ACCELERATOR": "v5e:2x4"}),
        ("create.sh", {"RUNTIME": "-x"}),
        ("install.sh", {"BUCKET": "gs://my-bucket"}),
        ("train.sh", {"RUN_DIR": "s3://my-bucket/runs/e1"}),
        ("train.sh", {"RUN_DIR": "runs/e1"}),
    ],
    ids=str,
)
def test_a_wrong_input_is_refused(cloud, script, inputs):
    words = [str(SCRIPTS / script), CONFIG]
    result, calls = cloud.bash(*words, **(INPUTS | MORE | inputs))
    [(name, value)] = inputs.items()
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {name}='{value}' is not ")
    assert len(calls) == (script == "install.sh")


def test_a_configuration_that_is_not_there(cloud):
    words = [str(SCRIPTS / "train.sh"), "configs/e1_math_8b.yaml"]
    result, calls = cloud.bash(*words, **(INPUTS | MORE))
    assert result.returncode == 2 and not calls
    assert "there is no configs/e1_math_8b.yaml in" in result.stderr


@pytest.mark.parametrize(
    ("script", "failing"),
    [(script, "gcloud") for script in NAMES]
    + [("copy.sh", "scp"), ("install.sh", "gcsfuse"), ("create.sh", "describe")]
    + [
        ("resume.sh", what) for what in ("delete", "create", "scp", "uv", "e1jax.train")
    ],
)
def test_a_failing_gcloud_ends_the_script(cloud, script, failing):
    cloud.say("SUSPENDED" if script == "resume.sh" else "ACTIVE", "ACTIVE")
    words = [str(SCRIPTS / script), *ARGUMENTS.get(script, [])]
    result, calls = cloud.bash(*words, **(INPUTS | MORE), FAIL=failing)
    assert result.returncode == 2
    first, second, *_ = result.stderr.removeprefix(
        "e1 is SUSPENDED; making it anew\n"
    ).split("\n")
    assert first == "ERROR: (gcloud) no quota"
    assert second.startswith("error: exit code 7 from: gcloud compute tpus ")
    assert failing in " ".join(calls[-1])  # nothing came after it


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_shellcheck():
    files = sorted(SCRIPTS.glob("*.sh"))
    subprocess.run(["shellcheck", "-x", *files], check=True)


def replicated_job():
    manifest = yaml.safe_load((SCRIPTS / "gke.yaml").read_text())
    [replicated] = manifest["spec"]["replicatedJobs"]
    return replicated, replicated["template"]["spec"]


def test_the_manifest_is_a_whole_slice_that_trains():
    replicated, job = replicated_job()
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert chips == job["parallelism"] * resources["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"]
    assert replicated["replicas"] == 1 and job["completionMode"] == "Indexed"
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    *_, script = container["command"]
    [run_dir] = re.findall(r"^run=(.*)$", script, re.M)
    [argv] = re.findall(r"^python -m e1jax\.train (.*) &$", script, re.M)
    argv = argv.replace("configs/", f"{ROOT}/configs/").replace("$run", run_dir).split()
    config, found = load_config(GRPOConfig, argv, "train")
    assert str(found) == run_dir and run_dir.startswith(mount["mountPath"] + "/")
    assert config.update.microbatch % chips == 0
    assert f"ls -d $run/checkpoints/{config.steps}\n" in script


@pytest.mark.parametrize(
    ("training", "stopped", "code"),
    [
        ('mkdir -p "$RUN/checkpoints/200"', False, 0),
        ("exit 3", False, 3),
        # SIGTERM, and another pod's: both save and end without an error.
        (
            'trap \'touch "$RUN/saved"; exit 0\' TERM; touch "$RUN/on"; sleep 60 & wait',
            True,
            2,
        ),
        ("exit 0", False, 2),
    ],
)
def test_a_pod_succeeds_only_with_the_last_step(tmp_path, training, stopped, code):
    _, job = replicated_job()
    [container] = job["template"]["spec"]["containers"]
    run = tmp_path / "runs" / "e1_math_7b"
    run.mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\n{training}\n")
    python.chmod(0o755)
    command = [
        word.replace("/mnt/e1jax", str(tmp_path)) for word in container["command"]
    ]
    path = f"{tmp_path}:{os.environ['PATH']}"
    pod = subprocess.Popen(
        command,
        env={"PATH": path, "RUN": str(run)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if stopped:
        eventually((run / "on").exists)
        pod.terminate()
    assert pod.wait(timeout=PATIENCE) == code
    assert (run / "saved").exists() == stopped
