"""The frame of every command: run, report a user's mistake in one sentence, stop at a signal."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from e1jax.config.buckets import as_named, remove_temporary
from e1jax.config.checks import UserError, nearest, shortened, shown

# Errors of exhausted resources: disk, quota, file size (ulimit -f), open files (ulimit -n).
_LACKING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
_STDOUT = "standard output"
_FEWEST_FILES = 128  # open at a time; JAX and Orbax stall without a word on fewer


def run_command(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake is one sentence and exit code 2, Ctrl-C 130. So is
    a disk or another resource that has come to its end.

    Whatever stdout cannot encode is printed as an escape.
    """
    interrupted = signal.getsignal(signal.SIGINT)
    # That of e1jax/__init__.py: this process is the command.
    alone = getattr(interrupted, "__module__", None) == "e1jax"
    if alone:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if alone or _is_the_program():
        sys.unraisablehook = _unraisable
    _open_streams()
    try:
        _allow_open_files()
        try:
            main()
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"interrupted {error}".rstrip(), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        remove_temporary()
        # Not sys.exit: taking JAX down while a device still computes can crash.
        os._exit(130)
    except BrokenPipeError:
        _discard_stdout()  # the reader (`| head`) has gone: no fault
        sys.exit(0)
    except (UserError, OSError) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        if isinstance(error, OSError) and error.filename == _STDOUT:
            _discard_stdout()
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    finally:
        if alone:  # only the interpreter's shutdown is left
            signal.signal(signal.SIGINT, interrupted)


def sentence_of(error: Exception) -> str | None:
    """The sentence about an error that the user can mend; None for a fault of ours."""
    if isinstance(error, UserError):
        return as_named(str(error))
    if not isinstance(error, OSError):
        return None
    if error.filename == _STDOUT:
        return f"{_STDOUT} cannot be written: {error.strerror}"
    if error.errno not in _LACKING:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}; make room or raise the limit, and run it again"


def _open_streams() -> None:
    """Makes streams that can be printed to: closed ones lead nowhere, and characters that
    stdout cannot encode, lone surrogates say, are no errors."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    if sys.stderr is None:  # or `print` would take stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        strict = sys.stdout.errors in ("strict", "surrogateescape")
        sys.stdout = _Stdout(
            sys.stdout.buffer,
            sys.stdout.encoding,
            "backslashreplace" if strict else sys.stdout.errors,
            line_buffering=sys.stdout.line_buffering,
        )


class _Stdout(io.TextIOWrapper):
    """Standard output whose errors say so, by the name of the file."""

    def write(self, s: str) -> int:
        with self._named():
            return super().write(s)

    def flush(self) -> None:
        with self._named():
            super().flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = _STDOUT
            raise


def _discard_stdout() -> None:
    """Drops what stdout still buffers: Python would complain of it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _allow_open_files() -> None:
    """Raises the limit of open files as far as it goes; refuses one that is too low."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if most < _FEWEST_FILES:
        raise UserError(
            f"only {most} files may be open at a time, and e1jax needs {_FEWEST_FILES}; "
            f"raise the limit, as by ulimit -n {_FEWEST_FILES}"
        )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_the_program() -> bool:
    """Whether this process was started as `python -m e1jax.NAME`, also where a shell made
    it ignore Ctrl-C, as of a job in the background."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.startswith("e1jax.")


def _unraisable(unraisable: Any) -> None:
    """Python's report of an exception that it could not raise, but for two of them.

    Ctrl-C in a callback of the garbage collector (JAX has one) is sent once more, or it
    would be lost. And when a write of a checkpoint fails, of which the command tells,
    tensorstore's other writes find Orbax's event loop closed.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors instead of a usage dump."""

    _words: Sequence[str] = ()  # of the command line

    def __init__(self, **settings: Any):
        # --prompt, say, must not be taken for an abbreviation of --prompts.
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which `parse_args` calls; remembers the words for `error`."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None):
        """As argparse's, which `parse_intermixed_args` calls."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print its usage and exit."""
        if message.startswith("the following arguments are required"):
            message = self._misspelt() or message
        flag = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
        near = self._near(flag[1]) if flag else None
        hint = f"did you mean {near}?" if near else f"see {self.prog} --help"
        raise UserError(f"{shortened(message, 400)}; {hint}")

    def _misspelt(self) -> str | None:
        """A flag that is nearly one of ours, said as argparse does: it would sooner say
        that the flag is missing."""
        for word in self._words:
            name = word.partition("=")[0]
            if name == "--":
                return None  # texts follow
            is_flag = name.startswith("--") and name not in self._option_string_actions
            if is_flag and self._near(name):
                return f"unrecognized arguments: {word}"
        return None

    def _near(self, name: str) -> str | None:
        flags = self._option_string_actions
        return next(iter(difflib.get_close_matches(name, flags, cutoff=0.8)), None)


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
