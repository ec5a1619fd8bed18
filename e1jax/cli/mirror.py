"""A local directory whose files grow, in place of one in a bucket, where none can."""

import sys
import time
from pathlib import Path

from e1jax.config.buckets import BucketPath, keep_temporary, temporary_directory

PUSH_SECONDS = 30.0  # at least, between uploads of a file that grows
_MOST_TIME = 10  # and at least so many times as long as an upload takes


class Mirror:
    """A temporary directory whose files are uploaded to `directory` in a bucket, each as
    a complete object; of a local `directory`, that itself.

    Files are written below `path`. `push_if_due`, called often, uploads now and then what
    has changed; `push` does it at once.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.path = directory
        if isinstance(directory, BucketPath):
            self.path = temporary_directory(directory)
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._due = time.monotonic() + PUSH_SECONDS

    def push(self) -> None:
        """Uploads every file that has changed; raises OSError if it cannot."""
        if not isinstance(self.directory, BucketPath):
            return
        begin = time.monotonic()
        for file in sorted(self.path.rglob("*")):
            if file.is_dir():
                continue
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._uploaded.get(file) != state:
                (self.directory / str(file.relative_to(self.path))).upload(file)
                self._uploaded[file] = state
        end = time.monotonic()
        self._due = end + max(PUSH_SECONDS, _MOST_TIME * (end - begin))

    def close(self) -> None:
        """As `push`, for the last time: where it fails, the error says where the files are
        kept."""
        try:
            self.push()
        except OSError as error:
            keep_temporary(self.path)
            error.strerror = f"{error.strerror}; the files are kept in {self.path}"
            raise

    def push_if_due(self) -> None:
        """As `push`, at most every PUSH_SECONDS. A failure is a note: nothing is lost, and
        it is tried again."""
        if time.monotonic() < self._due:
            return
        try:
            self.push()
        except OSError as error:
            print(
                f"note: {self.directory} cannot be written now ({error.strerror or error});"
                " tried again later",
                file=sys.stderr,
            )
            self._due = time.monotonic() + PUSH_SECONDS
