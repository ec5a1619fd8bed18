"""The worker process of `e1jax.rewards.grader`: `python -m e1jax.rewards.worker SECONDS`.

A fresh interpreter that knows nothing of JAX. It forks for every comparison, and holds
the child to a limit of processor time and memory: a model can write a comparison that
would compute for ever, fill the memory or crash (`9^{9^{9^{9}}}`). After that the worker
is as warm as before, and because every child begins in the same state, a reward depends
on no earlier comparison.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable

from e1jax.processes import READY, die_with_parent, limit_itself
from e1jax.rewards.grader import CRASH, DIFFERENT, EQUAL, TIMEOUT

_MEMORY = 2 << 30  # bytes of address space of a comparison
_ROOM = 1 << 28  # bytes that it must have left; not touched, so they cost nothing
# Building the tables of the parser, and of the solver of equations.
_FIRST = (("x+1", "1+x"), ("y=2x+3", "2x-y+3=0"))
# Exit codes of a child; a crash may have any other.
_CODES = {10: DIFFERENT, 11: EQUAL, -signal.SIGPROF: TIMEOUT}


def main(limit: float) -> None:
    """Answers each line on stdin, a JSON [answer, accepted texts], with a line.

    It ends when stdin does, and with its parent.
    """
    replies = limit_itself(_MEMORY)
    die_with_parent()
    try:
        # Here, because only workers may load SymPy, under their limits.
        from e1jax.rewards.equivalence import equivalent

        for pair in _FIRST:
            equivalent(*pair)
    except Exception as error:
        replies.write(f"{error!r}\n".encode())
        return
    gc.freeze()  # a collection in a child would copy every page
    replies.write(READY)
    for line in sys.stdin.buffer:
        answer, accepted = json.loads(line)
        replies.write(_compare(equivalent, answer, accepted, limit))


def _compare(
    equivalent: Callable[[str, str], bool],
    answer: str,
    accepted: list[str],
    limit: float,
) -> bytes:
    """Is the answer equivalent to an accepted one? In a child, which has `limit` seconds
    of processor time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            signal.setitimer(signal.ITIMER_PROF, limit)
            equal = any(equivalent(answer, text) for text in accepted)
            if not equal:
                bytes(_ROOM)  # without memory, SymPy finds nothing equal
            code = 10 + equal
        finally:  # whatever was raised
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return _CODES.get(os.waitstatus_to_exitcode(status), CRASH)


if __name__ == "__main__":
    main(float(sys.argv[1]))
