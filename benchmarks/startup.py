"""How long `python -m e1jax.sample` takes to say something, and what it does meanwhile.

    python benchmarks/startup.py --output startup.jsonl

The command runs without flags: the bundled model solves three problems at two budgets.
Each round runs it with an empty directory of compiled programs (`cold`), and again with
what the first run left there (`warm`):
- `first_word`: seconds from its start to the first character that it prints;
- `whole`: seconds until it has ended;
- `cpu`: seconds of processor time that it took.

The same two runs are then made in a process that watches itself. `parts` says what the
seconds until the first word went into:
- `interpreter`: from the start of the process to the first line of Python;
- `imports`: of `e1jax.sample` and all that it needs;
- `templates`: import of transformers, for the chat template;
- `trace`: from the model's Python code to programs that XLA takes;
- `compile`: XLA's work; in a warm run, reading compiled programs;
- `rest`: settings, weights, and sampling.

Figures are medians of the rounds, with the smallest and the largest beside them. Two
cores do little at a time, so run nothing beside it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHE = "JAX_COMPILATION_CACHE_DIR"
COMMAND = [sys.executable, "-m", "e1jax.sample"]
WATCHED = [sys.executable, __file__, "--watched"]
TOTALS = ("first_word", "whole", "cpu")
PARTS = ("interpreter", "imports", "templates", "trace", "compile", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    parser.add_argument("--watched", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watched is not None:
        watch(args.watched)
        return
    rounds = [one_round() for _ in range(args.rounds)]
    about = {
        "benchmark": "startup",
        "rounds": args.rounds,
        "load": os.getloadavg()[0],
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "e1jax")},
        "cpu_model": cpu_model(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    lines = [figures(name, [one[name] for one in rounds]) for name in rounds[0]]
    for line in lines:
        print(
            "{name}: first word after {first_word:.2f} s, ended after {median:.2f} s "
            "({low:.2f} - {high:.2f}), CPU {cpu:.2f} s".format(**line)
        )
        parts = (f"{name} {value:.2f}" for name, value in line["parts"].items())
        print("  " + ", ".join(parts))
    print(f"load {about['load']:.1f}")
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(line | about) + "\n" for line in lines)


def one_round() -> dict[str, dict[str, float]]:
    """Seconds of a cold and a warm run, and of their parts."""
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as other:
        for name in ("cold", "warm"):
            seconds[name] = run(plain) | parts(other)
    return seconds


def run(cache: str) -> dict[str, float]:
    """The command as a user starts it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with started(COMMAND, cache) as process:
        assert process.stdout
        process.stdout.read(1)
        first_word = time.perf_counter() - start
        process.stdout.read()
    whole = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(COMMAND)} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first_word": first_word, "whole": whole, "cpu": cpu}


def parts(cache: str) -> dict[str, float]:
    """What the process that watches itself says."""
    with started([*WATCHED, str(time.time())], cache) as process:
        assert process.stdout
        *_, last = process.stdout
    return json.loads(last)


def started(command: list[str], cache: str) -> subprocess.Popen[bytes]:
    # Without PyTorch, transformers advises to install it.
    quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    environment = {**os.environ, **quiet, CACHE: cache}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def watch(started: float) -> None:
    """Runs the command in this process; the last line printed is a JSON object."""
    seconds = dict.fromkeys(PARTS, 0.0)
    seconds["interpreter"] = time.time() - started
    begun = time.time()
    # What is measured.
    from e1jax import sample

    seconds["imports"] = time.time() - begun
    begun = time.time()
    import transformers.utils.chat_template_utils  # noqa: F401

    seconds["templates"] = time.time() - begun
    # Loaded by now.
    import jax

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith(("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")):
            seconds["trace"] += duration
        elif event.endswith("backend_compile_duration"):
            seconds["compile"] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    say, first_words = sample.Printer._say, []

    def said(self: sample.Printer, text: str) -> None:
        first_words.append((time.time(), dict(seconds)))
        say(self, text)

    sample.Printer._say = said
    sys.argv = ["sample"]
    sample.main()
    at, seconds = first_words[0]
    seconds["rest"] = at - started - sum(seconds.values())
    print(json.dumps(seconds))


def figures(name: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    median = {
        key: statistics.median(one[key] for one in rounds) for key in (*TOTALS, *PARTS)
    }
    whole = [one["whole"] for one in rounds]
    return {
        "name": name,
        "unit": "s",
        "median": median["whole"],
        "low": min(whole),
        "high": max(whole),
        "first_word": median["first_word"],
        "cpu": median["cpu"],
        "parts": {key: median[key] for key in PARTS},
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
