"""The frame of every command: run, report a user's mistake in one sentence, stop at a signal."""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from e1jax.config.checks import UserError, nearest, shortened, shown


def run_command(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake is one sentence and exit code 2, Ctrl-C 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted {error}".rstrip(), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Not sys.exit: taking JAX down while a device still computes can crash.
        os._exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone: no fault, but Python would complain at exit.
        sys.stderr.close()
        sys.exit(0)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors instead of a usage dump."""

    def __init__(self, **settings: Any):
        # --prompt, say, must not be taken for an abbreviation of --prompts.
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print its usage and exit."""
        flag = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
        flags = self._option_string_actions
        near = difflib.get_close_matches(flag[1], flags, cutoff=0.8) if flag else []
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        raise UserError(f"{shortened(message, 400)}; {hint}")


def check_command(
    argv: Sequence[str], commands: Sequence[str], prog: str
) -> str | None:
    """The command that a command line begins with; None if it begins with a flag.

    Raises UserError for another word, offering the nearest command.
    """
    if not argv or argv[0].startswith("-"):
        return None
    if argv[0] not in commands:
        raise UserError(
            f"{prog} has no command {shown(argv[0])}; {nearest(argv[0], commands)}"
        )
    return argv[0]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that a loop can stop where its state is complete.

    A second one has its usual effect, at once.
    """
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, usual[number])

    usual = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
