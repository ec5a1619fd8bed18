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
import signal
import subprocess
import sys
import threading
from typing import BinaryIO

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
        env=environment,
        start_new_session=True,
    )


def ask(process: Process, request: bytes, seconds: float) -> bytes:
    """The line that answers; b"" if the process ends, KILLED if it had to be killed after
    `seconds` of wall clock."""
    assert process.stdin is not None
    assert process.stdout is not None
    killed = threading.Event()

    def kill_late() -> None:
        killed.set()
        kill(process)

    # Also where writing blocks, because the process is stopped.
    timer = threading.Timer(seconds, kill_late)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:  # nobody reads
        reply = b""
    finally:
        timer.cancel()
    return KILLED if killed.is_set() else reply


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
