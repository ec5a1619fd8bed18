"""Time and memory of converting and loading a checkpoint, beside `cp` of its files.

    python benchmarks/convert.py WORK --output convert.jsonl

WORK/hf holds the Hugging Face directory: one that is there is taken as it is, else one
with random weights is written, in the shape of E1-Math-7B (15.2 GB in bfloat16); options
that this script does not know are those of random_checkpoint.py. The disk must hold it
three times. At the end WORK/e1jax holds the converted checkpoint.

Five things take turns, each in a process of its own:

    cp        copies the Hugging Face directory
    from-hf   converts it (the command of e1jax.convert)
    to-hf     converts the result back
    load hf   gives the parameters of the Hugging Face directory to JAX, in the dtype
    load e1   that they are stored in; so with the converted checkpoint

Before each, what it reads is dropped from the page cache, so all of them read from the
disk; those that write end with a sync of the file system, which counts. Seconds are those
of the whole process, with its start and its imports. CPU seconds tell what a machine that
does something else besides could do. Memory is the largest resident size of the process
(Linux), which includes pages of files that it maps.

At the end all tensors of the original and of what `to-hf` wrote are compared bit for bit.
Ratios are to cp: that of the medians, then the smallest and the largest of a turn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors asks NumPy for bfloat16
import safetensors
from common import append, machine, versions

LOAD = """
import sys
import jax
from e1jax.convert import load_model
jax.config.update("jax_platforms", "cpu")
jax.block_until_ready(load_model(sys.argv[1], dtype=sys.argv[2]).read_params())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", metavar="WORK", type=Path, help="directory to work in")
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    args, sizes = parser.parse_known_args()
    hf = args.work / "hf"
    if not hf.is_dir():
        script = Path(__file__).with_name("random_checkpoint.py")
        subprocess.run([sys.executable, script, hf, *sizes], check=True)
    elif sizes:
        parser.error(f"{hf} is there already, so {' '.join(sizes)} has no effect")
    turns = [take_turn(args.work) for _ in range(args.turns)]
    size = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    about = {
        "benchmark": "convert",
        "checkpoint_gb": size / 1e9,
        "dtype": dtype_of(hf),
        "page_cache": "cold",
        "turns": args.turns,
        "versions": versions("e1jax", "jax", "orbax-checkpoint", "tensorstore"),
        **machine(),
    }
    compare(hf, args.work / "back")
    shutil.rmtree(args.work / "back")
    print(
        "         seconds (low - high)  / cp (low - high)  CPU s / cp's  GB/s  peak GB"
    )
    lines = figures(turns, size)
    for line in lines:
        print(
            "{name:8} {median:7.2f} ({low:.2f} - {high:.2f}) {ratio:5.2f} "
            "({ratio_low:.2f} - {ratio_high:.2f}) {cpu:6.1f} {cpu_ratio:5.2f} "
            "{gb_per_s:5.2f} {peak_gb:6.2f}".format(**line)
        )
    print(f"load {about['load']:.1f}; what came back is the same bit for bit")
    append(args.output, [line | about for line in lines])


def take_turn(work: Path) -> dict[str, dict[str, float]]:
    """Everything once; leaves the converted checkpoint, and what came back of it."""
    hf, e1, back = work / "hf", work / "e1jax", work / "back"
    convert = [sys.executable, "-m", "e1jax.convert"]
    load = [sys.executable, "-c", LOAD]
    dtype = dtype_of(hf)
    turn = {"cp": measure(["cp", "-r", hf, work / "copy"], hf, work / "copy")}
    shutil.rmtree(work / "copy")
    shutil.rmtree(e1, ignore_errors=True)
    turn["from-hf"] = measure([*convert, "from-hf", hf, e1], hf, e1)
    shutil.rmtree(back, ignore_errors=True)
    turn["to-hf"] = measure([*convert, "to-hf", e1, back], e1, back)
    turn["load hf"] = measure([*load, hf, dtype], hf)
    turn["load e1"] = measure([*load, e1, dtype], e1)
    return turn


def measure(
    command: list[Any], source: Path, written: Path | None = None
) -> dict[str, float]:
    """Runs a command that reads `source`, of which nothing is in the page cache."""
    os.sync()  # else pages that wait to be written would stay
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed; why is said above")
    if written:
        subprocess.run(["sync", "-f", written], check=True)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * (1024 / 1e9),
    }


def figures(
    turns: list[dict[str, dict[str, float]]], size: int
) -> list[dict[str, Any]]:
    """Figures of each thing that was done."""

    def median(name: str, key: str) -> float:
        return statistics.median(turn[name][key] for turn in turns)

    lines = []
    for name in turns[0]:
        seconds = [turn[name]["seconds"] for turn in turns]
        ratios = [turn[name]["seconds"] / turn["cp"]["seconds"] for turn in turns]
        peak = max(turn[name]["peak_gb"] for turn in turns)
        lines.append(
            {
                "name": name,
                "unit": "s",
                "median": median(name, "seconds"),
                "low": min(seconds),
                "high": max(seconds),
                "ratio": median(name, "seconds") / median("cp", "seconds"),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "cpu": median(name, "cpu"),
                "cpu_ratio": median(name, "cpu") / median("cp", "cpu"),
                "gb_per_s": size / 1e9 / median(name, "seconds"),
                "peak_gb": peak,
                "peak_share": peak * 1e9 / size,
            }
        )
    return lines


def dtype_of(hf: Path) -> str:
    config = json.loads((hf / "config.json").read_text())
    return config.get("dtype") or config["torch_dtype"]


def compare(original: Path, back: Path) -> None:
    """Ends the script unless both directories hold the same tensors, bit for bit."""
    a, b = tensors(original), tensors(back)
    if a.keys() != b.keys():
        sys.exit(f"{back} does not hold the tensors of {original}")
    for name in a:
        with safetensors.safe_open(a[name], "numpy") as one:
            ours = one.get_tensor(name)
        with safetensors.safe_open(b[name], "numpy") as other:
            theirs = other.get_tensor(name)
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not (same and (ours.view("u1") == theirs.view("u1")).all()):
            sys.exit(f"{name} came back changed")


def tensors(path: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    files = {}
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, "numpy") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


if __name__ == "__main__":
    main()
