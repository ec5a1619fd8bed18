"""The worker process of `e1jax.rewards.grader`: `python -m e1jax.rewards.worker SECONDS`.

A fresh interpreter that knows nothing of JAX and holds itself to a time and a memory
limit: a model can write a comparison that would compute for ever, fill the memory or
crash (`9^{9^{9^{9}}}`).
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys

from e1jax.rewards.grader import READY

_MEMORY = 2 << 30  # bytes of address space of a worker
_ROOM = 1 << 28  # bytes that a worker must have left; not touched, so it costs nothing


def main(limit: float) -> None:
    """Answers each line on stdin, a JSON [answer, accepted texts], with 1 or 0.

    It ends when stdin does, and with its parent. The alarm that ends it after `limit`
    seconds has no handler: a handler would wait for C code to return.
    """
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for kind, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        # Some systems have no such limit, or a lower one already.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    logging.disable()
    try:
        # Here, because only workers may load SymPy, under their limits.
        from e1jax.rewards.equivalence import equivalent

        equivalent("x+1", "1+x")  # the first one builds tables
    except Exception as error:
        replies.write(f"{error!r}\n".encode())
        return
    replies.write(READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, limit)
        answer, accepted = json.loads(line)
        equal = any(equivalent(answer, text) for text in accepted)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Without memory SymPy finds nothing equal. A worker whose caches have filled its
        # memory ends here by MemoryError, and a fresh one compares again.
        bytes(_ROOM)
        replies.write(b"1\n" if equal else b"0\n")


if __name__ == "__main__":
    main(float(sys.argv[1]))
