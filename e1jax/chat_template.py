"""Chat templates, rendered in a helper process: `python -m e1jax.chat_template`.

A template is a program that comes with a model. The sandbox of transformers keeps it from
files and from Python's insides, but not from loops without an end or from gigabytes of
text, for which Jinja has too many ways to forbid each (`replace`, `center`, `range`, `~`).
"""

import atexit
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from e1jax import processes
from e1jax.config.checks import UserError

MOST_CHARACTERS = 1 << 22  # of a prompt; far more than fit a context of 32,768 tokens
_SECONDS = 2.0  # of processor time; an ordinary template takes a millisecond
_MEMORY = 2 << 30  # bytes of address space


def render(
    template: str, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str]
) -> str:
    """The text of a conversation in a chat template, up to the answer.

    Raises UserError if the messages are not made of JSON values, or if the template
    refuses them, takes more than 2 s of processor time or 2 GiB, or renders more than
    MOST_CHARACTERS.
    """
    try:
        request = json.dumps([template, list(messages), special_tokens], default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"these messages cannot be written as JSON: {error}") from None
    if len(request) > 12 * MOST_CHARACTERS:  # JSON writes a character as 12 at most
        raise UserError(
            f"these messages have more than {MOST_CHARACTERS} characters; shorten them"
        )
    text, refusal = _renderer(os.getpid()).ask(request.encode() + b"\n")
    if text is None:
        raise UserError(f"the chat template {refusal}")
    return text


def warm_up() -> None:
    """Starts the helper process, which takes half a second, beside other work."""
    _renderer(os.getpid()).spawn()


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


@functools.cache
def _renderer(pid: int) -> "_Renderer":
    """The one of this process; a forked one must not share its parent's."""
    return _Renderer()


class _Renderer:
    """A helper process, started by the first request and after it was ended by one."""

    def __init__(self):
        self._lock = threading.Lock()  # requests come from several threads
        self._process: processes.Process | None = None
        self._is_ready = False

    def spawn(self) -> None:
        """Starts the process, if there is none, and does not wait for it."""
        with self._lock:
            self._spawn()

    def ask(self, request: bytes) -> tuple[str | None, str]:
        """The rendered text, or None and why there is none."""
        with self._lock:
            process = self._ready()
            try:
                reply = processes.ask(process, request, _SECONDS * processes.PATIENCE)
            except BaseException:  # Ctrl-C: the next request must not get this reply
                self._end()
                raise
            if reply.endswith(b"\n"):
                return json.loads(reply)
            code = self._end()
        if code == -signal.SIGPROF or reply == processes.KILLED:
            return None, f"took more than {_SECONDS:g} s for these messages"
        return None, f"ended the process that renders it (exit code {code})"

    def _spawn(self) -> processes.Process:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = processes.spawn("e1jax.chat_template")
            self._is_ready = False
            atexit.register(self._end)
        return self._process

    def _ready(self) -> processes.Process:
        process = self._spawn()
        if self._is_ready:
            return process
        reply = processes.ask(process, b"", processes.START_SECONDS)
        self._is_ready = True
        if reply != processes.READY:
            reason = reply.decode().strip() or f"exit code {self._end()}"
            raise RuntimeError(
                f"the process that renders chat templates did not start: {reason}"
            )
        return process

    def _end(self) -> int | None:
        """The exit code of the process, after it was killed if that was needed."""
        process, self._process = self._process, None
        if process is None:
            return None
        atexit.unregister(self._end)
        if process.poll() is None:
            processes.kill(process)
        process.communicate()
        return process.returncode


def main() -> None:
    """Answers each line on stdin, a JSON [template, messages, special tokens], with a
    JSON [text, reason], one of which is null. It ends when stdin does."""
    replies = processes.limit_itself(_MEMORY)
    try:
        # Here, because the parent does without it.
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception as error:
        replies.write(f"{error!r}\n".encode())
        return
    replies.write(processes.READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        reply = json.dumps(_render(render_jinja_template, *json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply.encode() + b"\n")


def _render(
    render_jinja_template: Any,
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
) -> tuple[str | None, str | None]:
    try:
        [text], _ = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=True,
            **special_tokens,
        )
    except MemoryError:
        return None, f"takes more than {_MEMORY >> 30} GiB for these messages"
    except Exception as error:  # templates may raise any error, as may jinja2
        return None, f"refuses these messages: {' '.join(str(error).split())[:1000]}"
    if len(text) > MOST_CHARACTERS:
        return None, (
            f"makes a prompt of {len(text)} characters, more than the {MOST_CHARACTERS} "
            "allowed"
        )
    return text, None


if __name__ == "__main__":
    main()
