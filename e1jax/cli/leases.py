"""One writer at a time in a bucket: an object that its owner renews while it lives.

A lock of the kernel goes with its process; an object stays. So an owner writes the object
anew every RENEW_SECONDS, and one that is not renewed for LEASE_SECONDS is free. Clocks of
hosts are not compared: who wants the lock watches it for so long. An owner that finds
that it has lost the lock, having been suspended, say, exits at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from e1jax.config.buckets import BucketPath
from e1jax.config.checks import UserError

RENEW_SECONDS, LEASE_SECONDS = 10.0, 60.0
# After a lock without an owner was taken, another process that takes it too has so long
# to write its name.
_SETTLE_SECONDS = 2.0

_held: set[str] = set()  # the ids of the locks of this process


@contextlib.contextmanager
def leasing(path: BucketPath, target: Path) -> Iterator[None]:
    """While it is entered, the object `path` is the lock of this process on `target`.

    Raises UserError if another process owns it, OSError if the bucket cannot be written.
    """
    owner = {"host": _host(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    _take(path, target, owner)
    _held.add(owner["id"])
    ended = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(path, target, owner, ended), daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        _held.discard(owner["id"])
        with contextlib.suppress(OSError):
            if _owner(_read(path)).get("id") == owner["id"]:
                path.unlink(missing_ok=True)


def _take(path: BucketPath, target: Path, owner: dict) -> None:
    busy = UserError(
        f"another run is writing {target}; let it end, or choose another one"
    )
    found = _read(path)
    if found is not None and not _is_gone(_owner(found)):
        if _owner(found).get("id") in _held or _is_renewed(path, target, found):
            raise busy
        watched, found = found, _read(path)
        if found not in (None, watched):  # taken by another process meanwhile
            raise busy
    content = _content(owner, 0)
    if found is None:
        try:
            path.create(content)
        except FileExistsError:  # at this moment, by another process
            raise busy from None
    else:
        path.write_bytes(content)
        time.sleep(_SETTLE_SECONDS)
    if _read(path) != content:
        raise busy


def _is_renewed(path: BucketPath, target: Path, found: bytes) -> bool:
    """Watches a lock for as long as its owner may leave it alone."""
    owner = _owner(found)
    print(
        f"note: {target} has a lock of process {owner.get('pid')} on "
        f"{owner.get('host')}; looking for up to {LEASE_SECONDS:.0f} s whether that lives",
        file=sys.stderr,
    )
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, RENEW_SECONDS))
        now = _read(path)
        if now != found:
            return now is not None
    return False


def _host() -> str:
    """Where numbers of processes mean the same: this host or, on it, this container."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}".strip()


def _is_gone(owner: dict) -> bool:
    """Whether the owner was a process of this host that has ended."""
    pid = owner.get("pid")
    if owner.get("host") != _host() or type(pid) is not int:
        return False
    if pid == os.getpid():  # of an earlier process, or else this one holds it
        return owner.get("id") not in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _renew(path: BucketPath, target: Path, owner: dict, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(RENEW_SECONDS):
        count += 1
        with contextlib.suppress(OSError):  # the network is away: tried again
            if _owner(_read(path)).get("id") != owner["id"]:
                print(
                    f"error: another run has taken {target} over, as this one did not "
                    "renew its lock in time",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            path.write_bytes(_content(owner, count))


def _content(owner: dict, count: int) -> bytes:
    return json.dumps({**owner, "renewed": count}).encode()


def _read(path: BucketPath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _owner(content: bytes | None) -> dict:
    with contextlib.suppress(ValueError):
        value = json.loads(content or b"{}")
        if isinstance(value, dict):
            return value
    return {}
