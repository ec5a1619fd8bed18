"""Helper processes: fresh interpreters that work on untrusted text, under limits.

A parent writes a line for each request and reads a line for each reply. The process
holds itself to a limit of processor time and memory. A limit of wall clock would depend
on what else the machine does, so it is only a backstop, on the parent's side.
"""

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import IO, BinaryIO

READY = b"ready\n"  # the first line of a process
KILLED = b"killed"  # not a line: no process writes this
START_SECONDS = 60.0  # of wall clock
# A process is killed after that many seconds of wall clock for each second of processor
# time it may take: it was stopped, or a hundred others are busy.
PATIENCE = 100

Process = subprocess.Popen[bytes]


def spawn(module: str, *arguments: str) -> Process:
    """Runs `python -m module ARGUMENTS`, which writes READY when it has imported all it needs."""
    path = [os.path.abspath(entry) for entry in sys.path]  # "" is where we are
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",  # SymPy's order of terms, and so its results
    }
    # Not forked, because JAX's threads hold locks, nor made by multiprocessing,
    # which runs the user's script again. Ctrl-C does not reach its session.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=environment,
        start_new_session=True,
    )


def ask(process: Process, request: bytes, seconds: float) -> bytes:
    """The line that answers; b"" if the process ends, KILLED if it had to be killed after
    `seconds` of wall clock, be it stopped before it has read all."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    rest, reply = memoryview(request), bytearray()
    try:
        while rest:
            _wait(process.stdin, select.POLLOUT, deadline)
            # So many bytes never block.
            rest = rest[os.write(process.stdin.fileno(), rest[: select.PIPE_BUF]) :]
        while not reply.endswith(b"\n"):
            _wait(process.stdout, select.POLLIN, deadline)
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            reply += piece
    except TimeoutError:
        kill(process)
        return KILLED
    except OSError:  # nobody reads
        return b""
    return bytes(reply)


def _wait(pipe: IO[bytes], event: int, deadline: float) -> None:
    """Until a pipe can be read or written, or its other end is closed."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def kill(process: Process) -> None:
    """Kills a process and its children, which are a process group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)


def limit_itself(memory: int) -> BinaryIO:
    """Holds this process to `memory` bytes of address space; returns where replies go.

    Processor time is limited for each request, by `signal.ITIMER_PROF`, whose signal
    ends the process at once: a handler would wait for C code to return.
    """
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        # Some systems have no such limit, or a lower one already.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))
    logging.disable()
    return replies


def die_with_parent() -> None:
    """Ends this process when the thread that started it ends; on Linux alone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
