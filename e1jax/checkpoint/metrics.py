"""Metrics of a run: metrics.jsonl, TensorBoard and Weights & Biases."""

import contextlib
import json
import math
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from e1jax.cli.files import INTEGER, NUMBER, check_fields, read_text
from e1jax.cli.mirror import Mirror
from e1jax.config.buckets import (
    in_bucket,
    remove_tree,
    temporary_directory,
    write_whole,
)
from e1jax.config.checks import UserError, writing
from e1jax.config.texts import parse_json

_STEP = {"step": INTEGER}  # a line of metrics.jsonl, whose other fields are numbers

FLUSH_SECONDS = 120  # of TensorBoard


class MetricsLog:
    """RUN_DIR/metrics.jsonl, one object a step, and progress on stderr.

    The same numbers go to RUN_DIR/tensorboard and, if `wandb` names a project, to
    Weights & Biases. A step is written when the next one is added: its numbers are read
    from the device while that computes. Lines beyond `step`, where the run goes on from,
    are dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        steps: int,
        headline: Sequence[str],
        wandb: str | None = None,
    ):
        self.wandb = _wandb_run(wandb, run_dir) if wandb else None
        lines = read_metrics(run_dir / "metrics.jsonl")
        kept = [line for line in lines if line["step"] <= step]
        self.mirror = Mirror(run_dir)
        self.path = self.mirror.path / "metrics.jsonl"
        with writing(run_dir):
            write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
            # Drawn anew: a kill loses the points that TensorBoard still buffers.
            remove_tree(run_dir / "tensorboard")
            self.board = _TensorBoard(self.mirror.path / "tensorboard")
        for line in kept:
            self._draw(line)
        self.headline = headline
        self.waiting: dict[str, Any] | None = None
        self.clock = time.perf_counter()
        self.bar = tqdm(initial=step, total=steps, disable=not sys.stderr.isatty())

    def add(
        self, step: int, metrics: Mapping[str, Any], tokens: int | None = None
    ) -> None:
        """Notes a step's metrics, which may still be on the device. With its number of
        `tokens`, they have `tokens_per_second` too."""
        self.flush()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.waiting = {"step": step, **metrics, "seconds": round(seconds, 4)}
        if tokens is not None:
            self.waiting["tokens_per_second"] = tokens / seconds

    def flush(self, more: Mapping[str, float] | None = None) -> None:
        """Writes the step that was added last, with more metrics of it.

        Raises UserError if one of them is not a finite number: training has failed.
        """
        if self.waiting is None:
            return
        line = {key: np.asarray(v).item() for key, v in self.waiting.items()}
        line |= more or {}
        self.waiting = None
        check_finite(line["step"], line)
        # Opened for each line: a mounted bucket stores a file when it is closed.
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.mirror.push_if_due()
        values = self._draw(line)
        if self.wandb:
            self.wandb.log(values, step=line["step"])
        self._show(line)

    def push(self) -> None:
        """Of a run in a bucket, uploads all lines; raises UserError if it cannot."""
        with writing(self.mirror.directory):
            self.mirror.push()

    def _draw(self, line: dict[str, Any]) -> dict[str, Any]:
        """Hands a line to TensorBoard; its numbers without the step."""
        values = {key: value for key, value in line.items() if key != "step"}
        self.board.add(line["step"], values)
        return values

    def _show(self, line: dict[str, Any]) -> None:
        shown = ", ".join(f"{key} {line[key]:.4g}" for key in self.headline)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        step, steps = line["step"], self.bar.total
        if self.bar.disable and (step % max(1, steps // 20) == 0 or step == 1):
            print(f"step {step}/{steps}: {shown}", file=sys.stderr)

    def close(self) -> None:
        """Ends TensorBoard, Weights & Biases and the progress bar."""
        with contextlib.suppress(OSError):  # a full disk, of which `flush` has told
            self.board.close()
        if self.wandb:
            self.wandb.finish()
        self.bar.close()
        with writing(self.mirror.directory):
            self.mirror.close()


class _TensorBoard:
    """A directory of TensorBoard, written where it is called.

    Not by SummaryWriter, whose thread ends at a full disk and is then waited for for ever.
    A mounted bucket stores a file at each flush, so they are FLUSH_SECONDS apart.
    """

    def __init__(self, directory: Path):
        with _without_torch():
            # Slow to load, and `sample` needs none of it.
            from tensorboardX import event_file_writer, record_writer, summary

        self.directory = directory
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        # Not EventsWriter: on a full disk its close() leaves the file open, and Python prints
        # an error of its own when it exits.
        self.file = record_writer.RecordWriter(str(directory / name))
        self.flushed = time.monotonic()
        self.scalar = summary.scalar
        self.event: Any = vars(event_file_writer.event_pb2)["Event"]
        self._write(file_version="brain.Event:2")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step; raises UserError if it cannot."""
        with writing(self.directory):
            for name, value in values.items():
                self._write(step=step, summary=self.scalar(name, value))
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.file.flush()
                self.flushed = time.monotonic()

    def _write(self, **fields: Any) -> None:
        event = self.event(wall_time=time.time(), **fields)
        self.file.write(event.SerializeToString())

    def close(self) -> None:
        self.file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides PyTorch from imports: tensorboardX imports it if it is installed, which takes
    seconds, and does not need it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class NoLog:
    """In place of a MetricsLog, for a process that leaves it to another."""

    def add(
        self, step: int, metrics: Mapping[str, Any], tokens: int | None = None
    ) -> None: ...
    def flush(self, more: Mapping[str, float] | None = None) -> None: ...
    def push(self) -> None: ...
    def close(self) -> None: ...


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises UserError if a metric is not a finite number: training has failed."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: {name} is {value}; lower the learning rate and take "
                "another --run-dir"
            )


def import_wandb(project: str) -> Any:
    """The package wandb; raises UserError if it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an optional package)
    except ImportError:
        raise UserError(
            f"wandb: {project} needs the package wandb; pip install wandb, or leave it out"
        ) from None
    return wandb


def _wandb_run(project: str, run_dir: Path) -> Any:
    """A run of Weights & Biases that goes on where the run directory's earlier one did."""
    wandb = import_wandb(project)
    # Not the directory's name: a run made anew under it would be taken for the old one,
    # whose steps cannot be written again.
    file = run_dir / "wandb_id"
    if not file.exists():
        write_whole(file, uuid.uuid4().hex)
    key, name = read_text(file), run_dir.absolute().name
    place = temporary_directory(run_dir) if in_bucket(run_dir) else run_dir
    try:
        return wandb.init(project=project, id=key, name=name, dir=place, resume="allow")
    except Exception as error:  # many kinds: no login, no network, no right
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"wandb: {project} cannot be written ({reason}); log in, or leave it out"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each a step and its numbers; none without a file.

    Its last line may be half of one, if a kill came, and is left out. Raises UserError,
    naming the line, for any other damage.
    """
    lines = read_text(path).split("\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            at = f"{path} line {number}"
            record = check_fields(parse_json(line, path, number), _STEP, at)
            records.append(check_fields(record, dict.fromkeys(record, NUMBER), at))
        except UserError as error:
            if number < len(lines):
                raise UserError(f"{error}; remove that line") from None
    return records
