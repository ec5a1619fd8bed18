"""Output that grows while a command runs: lines of JSON that resume, and progress."""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from e1jax.cli.command import stop_signals
from e1jax.cli.files import OBJECT, read_json
from e1jax.cli.locks import lock, owning
from e1jax.cli.mirror import Mirror
from e1jax.config.buckets import in_bucket, write_whole
from e1jax.config.checks import UserError, shown


def digest(value: Any) -> str:
    """Names a JSON value: equal ones, and hardly others, have the same digest."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Progress:
    """Progress of sampling on stderr. Called with the new tokens after each chunk.

    That is where Ctrl-C stops. Elsewhere it could come in the middle of JAX, which may
    lose it.
    """

    bar: tqdm
    signals: list[int]
    start: float

    def __init__(self, total: int, kept_in: Path | None):
        self.total, self.kept_in = total, kept_in
        self.completions = self.tokens = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While it is entered; it begins when the weights are there."""
        unit = "completion"
        self.bar = tqdm(total=self.total, unit=unit, file=sys.stderr, disable=None)
        self.start = time.monotonic()
        try:
            with self.bar, stop_signals() as self.signals:
                yield
        except KeyboardInterrupt:
            way_on = f", kept in {self.kept_in}; run the same command again to go on"
            raise KeyboardInterrupt(
                f"after {self.completions} of {self.total} completions"
                f"{way_on if self.kept_in else ''}"
            ) from None

    def __call__(self, new_tokens: int) -> None:
        self.tokens += new_tokens
        self.bar.set_postfix_str(self._speed())
        if self.signals:
            raise KeyboardInterrupt

    def step(self) -> None:
        """One more completion is done."""
        self.completions += 1
        self.bar.update()

    def summary(self) -> str:
        """A sentence for the end: completions, tokens, seconds, tokens/s."""
        return f"{self.total} completion{'s' * (self.total > 1)}, {self._speed()}"

    def _speed(self) -> str:
        seconds = time.monotonic() - self.start
        speed = self.tokens / seconds
        return f"{self.tokens} tokens in {seconds:.1f} s ({speed:.0f} tokens/s)"


@contextlib.contextmanager
def writing_output(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names --output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--output {path} cannot be written: {reason}; choose another one"
        ) from None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file of --output under its name once it is complete; where it cannot be
    written, an earlier one stays, and UserError is raised."""
    with writing_output(path):
        write_whole(path, content)


class JsonlOutput:
    """A file of completions, one JSON object a line: appended to as they finish, and read
    when the command is run again.

    Beside it, FILE.settings.json says how it was made, so that a run with
    other settings is refused and not mixed in. Nothing is written before the context is
    entered. A file in a bucket grows in a local directory, and is uploaded now and then
    and at the end; a kill loses the completions since the last upload, and no others.

    `requests` holds a digest of each request by its id. `entry` gives the key and the
    value under which `done` keeps a record; it raises KeyError or TypeError for
    anything else. Raises UserError for a file that cannot be written, or that is not ours.
    """

    def __init__(
        self,
        path: Path,
        requests: Mapping[str | int, str],
        entry: Callable[[dict[str, Any]], tuple[Any, Any]],
    ):
        self.path = path
        with self._reading():
            if path.exists() and not path.is_file():
                raise UserError(f"--output {path} is not a regular file; give one")
            self.sidecar = path.with_name(path.name + ".settings.json")
            content = path.read_bytes() if path.exists() else b""
            ours = self.sidecar.exists()
        self.made_how: dict[str, Any] = {}
        self.requests = {json.dumps(key): value for key, value in requests.items()}
        if content and not ours:
            raise UserError(
                f"{path} has content but no {self.sidecar.name} beside it, so it was "
                "not made by this command; choose another --output"
            )
        if not (in_bucket(path) or os.access(path.parent, os.W_OK)):
            raise UserError(f"--output {path}: {path.parent} is no writable directory")
        self.done, self.size = self._whole_lines(content, entry)
        self.size_read = len(content)
        self.content = content[: self.size] if in_bucket(path) else b""
        self.stack = contextlib.ExitStack()
        self.file: io.FileIO | None = None

    def compare(
        self,
        settings: dict[str, Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Refuses settings or requests that differ from the earlier run's.

        `upgrade` gives settings that an older version recorded as today's would.
        """
        self.made_how = {"settings": settings, "requests": self.requests}
        if not self.size:
            return
        old = read_json(self.sidecar, {"settings": OBJECT, "requests": OBJECT})
        before, requests = upgrade(old["settings"]), old["requests"]
        names = [n for n, v in settings.items() if before.get(n) != v]
        changed = [n for n, v in self.requests.items() if requests.get(n, v) != v]
        if names:
            there = ", ".join(f"{n}={shown(before.get(n))}" for n in names)
            here = ", ".join(f"{n}={shown(settings[n])}" for n in names)
            raise UserError(
                f"{self.path} was made with {there}, and this run has {here}; use the "
                "same settings or another --output"
            )
        if changed:
            raise UserError(
                f"{self.path} was made with another prompt or other parameters for id "
                f"{changed[0]}; choose another --output"
            )
        self.made_how["requests"] = {**requests, **self.requests}

    def __enter__(self) -> "JsonlOutput":
        with writing_output(self.path), contextlib.ExitStack() as stack:
            self.mirror = Mirror(self.path.parent)
            if in_bucket(self.path):
                stack.enter_context(owning(self.path))
                file = stack.enter_context(self._copy())
                size = len(self.path.read_bytes()) if self.path.exists() else 0
            else:
                # Unbuffered: closing a buffered file would retry the write that a full
                # disk refused.
                file = stack.enter_context(self.path.open("ab", buffering=0))
                lock(file.fileno(), self.path)
                size = os.fstat(file.fileno()).st_size
            if size != self.size_read:
                raise UserError(
                    f"another run has written {self.path} meanwhile; run the same "
                    "command again"
                )
            # A run that was killed while writing leaves half a line: written again.
            file.truncate(self.size)
            self.file, self.stack = file, stack.pop_all()
        text = json.dumps(self.made_how, indent=1) + "\n"
        replace_file(self.sidecar, text.encode())
        return self

    def _copy(self) -> io.FileIO:
        """The file with its earlier lines, in the local directory of the mirror."""
        copy = self.mirror.path / self.path.name
        copy.write_bytes(self.content)
        return copy.open("ab", buffering=0)

    def __exit__(self, *error: object) -> None:
        with self.stack, writing_output(self.path):
            self.mirror.close()

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record as one line, at once; raises UserError if it cannot."""
        assert self.file is not None
        left = json.dumps(record).encode() + b"\n"
        with writing_output(self.path):
            while left:  # a disk that is nearly full takes a part
                left = left[self.file.write(left) :]
            self.mirror.push_if_due()

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output {self.path} cannot be read: {reason}") from None

    def _whole_lines(
        self, content: bytes, entry: Callable[[dict[str, Any]], tuple[Any, Any]]
    ) -> tuple[dict[Any, Any], int]:
        """The file's records, and its bytes up to the end of the last complete line."""
        done, size = {}, content.rfind(b"\n") + 1
        for number, line in enumerate(content[:size].splitlines(), 1):
            try:
                key, value = entry(json.loads(line))
                done[key] = value
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{self.path} line {number} is not a completion of this command; "
                    "choose another --output"
                ) from None
        return done, size
