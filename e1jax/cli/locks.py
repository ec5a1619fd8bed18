"""One writer at a time: a lock on the file or directory that a command writes."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from e1jax.cli.leases import leasing
from e1jax.config.buckets import BucketPath
from e1jax.config.checks import LOCK, UserError

# What flock answers on a file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


_ATTEMPTS = 10


@contextlib.contextmanager
def owning(target: Path, *, inside: bool = False) -> Iterator[None]:
    """While it is entered, no other process that asks for it owns `target`.

    The lock is a file beside `target`, or `inside` it, a directory that exists. The
    kernel releases it when this process ends, however it ends; the file is removed when
    the context is left, and a file that a kill left behind is no lock. On a file system
    without flock, a note on stderr says that nothing is locked. In a bucket it is an
    object, see `leases`. Raises UserError if
    another process owns `target`, OSError if the lock's file cannot be made.
    """
    path = target / LOCK if inside else target.with_name(f".{target.name}{LOCK}")
    if isinstance(path, BucketPath):
        with leasing(path, target):
            yield
        return
    file = _locked_file(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory may be gone
            path.unlink()
        os.close(file)


def _locked_file(path: Path, target: Path) -> int:
    """Descriptor of the lock file, locked. Python closes it in children that it starts."""
    attempts = 0
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(file, target)
        except BaseException:
            os.close(file)
            raise
        attempts += 1
        # The owner before us may have removed the file that we had opened by then. Not
        # for ever: a mounted bucket may number a file anew each time that it is asked.
        if _is_at(file, path) or attempts == _ATTEMPTS:
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def lock(file: int, target: Path) -> None:
    """Locks an open file; raises UserError if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another run is writing {target}; let it end, or choose another one"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"note: the file system of {target} has no locks; see to it that no other "
            "process writes there",
            file=sys.stderr,
        )
