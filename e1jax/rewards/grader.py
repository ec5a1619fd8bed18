r"""Rewards: 1 if the answer that a solution boxes is equivalent to an accepted one.

Equal texts and integers are compared at once. All else is compared by
`e1jax.rewards.equivalence` in worker processes (`e1jax.rewards.worker`), which read a
JSON line per comparison and answer with a line.
"""

import atexit
import collections
import functools
import hashlib
import json
import math
import numbers
import os
import queue
import re
import reprlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from decimal import Decimal
from typing import Any, Protocol, TypeVar

from e1jax import processes
from e1jax.config.checks import UserError, check_integer, check_number
from e1jax.config.texts import check_backslashes
from e1jax.processes import Process
from e1jax.tokenizer import THINK_END, extract_boxed

Accepted = str | float | Sequence[str | float]

_MAX_WORKERS = 8
_MAX_LENGTH = 2000  # characters; a longer answer is only right if it is the same text
_START_ATTEMPTS = 3
_MOST_KNOWN = 50_000  # comparisons that are remembered
# The lines with which a worker answers.
EQUAL, DIFFERENT, TIMEOUT, CRASH = b"1\n", b"0\n", b"timeout\n", b"crash\n"
_AROUND = " \t\r\n$"  # stripped from both ends of an answer
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")


class Solved(Protocol):
    """The fields of an engine's Completion that grading needs."""

    @property
    def solution(self) -> str: ...
    @property
    def prompt_index(self) -> int: ...


SolvedT = TypeVar("SolvedT", bound=Solved)


def score(responses: Sequence[str], answers: Sequence[Accepted]) -> list[float]:
    r"""1.0 or 0.0 for each response: is its answer equivalent to an accepted one?

    A response is all the text after the prompt. Its answer is the last `\boxed{}`
    after the first `</think>`; without either the reward is 0.0. `answers` holds, per
    response, a text, a number or a list of accepted ones; each text may itself be
    wrapped in `\boxed{}` or `$`. A comparison that takes too long or crashes gives 0.0.
    Raises UserError if the lengths differ, or for an answer of another kind.
    """
    for name, items in (("responses", responses), ("answers", answers)):
        if isinstance(items, str):
            raise UserError(f"{name} is one string; pass a list of them")
    if len(responses) != len(answers):
        raise UserError(
            f"{len(responses)} responses came with {len(answers)} answers; give one each"
        )
    accepted = _all_accepted(answers)
    grader = _shared_grader(os.getpid())
    futures: list[Future[float]] = []
    try:
        for response, texts in zip(responses, accepted, strict=True):
            futures.append(grader.submit(response, texts))
        return [future.result() for future in futures]
    finally:
        for future in futures:  # after Ctrl-C, say
            future.cancel()


def grade(
    completions: Iterable[SolvedT],
    answers: Sequence[Accepted],
    grader: "Grader | None" = None,
) -> Iterator[tuple[SolvedT, float]]:
    """Yields each completion with its reward, in the order in which they come.

    `completions` may be an engine's stream: workers compare its first answers while it
    goes on. `answers[completion.prompt_index]` are the accepted answers; see `score`. All
    of `completion.solution` counts, also if the model has no `</think>`. Without a `grader`, one shared by the process is used.
    """
    # Not in the generator, so that a wrong answer is found before any sampling.
    accepted = _all_accepted(answers)
    return _graded(completions, accepted, grader or _shared_grader(os.getpid()))


def _graded(
    completions: Iterable[SolvedT], accepted: list[list[str]], grader: "Grader"
) -> Iterator[tuple[SolvedT, float]]:
    waiting: collections.deque[tuple[SolvedT, Future[float]]] = collections.deque()
    try:
        for completion in completions:
            response = THINK_END + completion.solution
            future = grader.submit(response, accepted[completion.prompt_index])
            waiting.append((completion, future))
            while waiting and waiting[0][1].done():
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:  # the caller has stopped reading
            future.cancel()


def accepted_texts(answer: Accepted, where: str) -> list[str]:
    r"""The accepted answers as texts, without `\boxed{}` and `$` around them.

    Of a worked solution, the last box or the text behind the last `####` (GSM8K) is the
    answer. Raises UserError naming `where` it stands if `answer` is not a text, a finite
    number or a list of texts and numbers, is empty, has lost a backslash, or has several lines and
    neither mark.
    """
    items = answer if isinstance(answer, list | tuple) else [answer]
    texts = [final_answer(_text(item, where), where).strip(_AROUND) for item in items]
    check_backslashes(texts, where)
    if not texts or not all(texts):
        raise UserError(f"{where} is empty; write what answer is accepted")
    return texts


class Grader:
    """Worker processes that compare answers, at most `workers` of them.

    They start with the first comparison that needs them. `limit` is in seconds of
    processor time per comparison; one that takes longer, or crashes twice, gives 0.0
    and is counted in `failures`. Close it, or use it as a context manager.
    """

    def __init__(self, workers: int | None = None, limit: float = 1.0):
        """`workers` None: half of the CPU cores, as sampling needs the rest; from 2, so
        that a hostile answer does not hold up all others, to 8. `limit`: ordinary answers
        take milliseconds, and 0.4 s at most in all that the tests hold.

        Raises UserError for numbers that are not above 0.
        """
        if workers is None:
            workers = min(max(2, (os.cpu_count() or 1) // 2), _MAX_WORKERS)
        check_integer("workers", workers, 1)
        check_number("limit", limit, "of seconds, up to 3600", lambda v: 0 < v <= 3600)
        self.workers, self.limit = workers, limit
        self.failures = {"timeout": 0, "crash": 0}
        self._queue: queue.SimpleQueue[tuple[Future[float], bytes] | None]
        self._queue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: set[Process] = set()
        self._known: dict[bytes, bytes] = {}  # digest of a request: its reply
        self._lock = threading.Lock()
        self._closed = False
        atexit.register(self.close)

    def submit(self, response: str, accepted: Accepted) -> Future[float]:
        """The future reward of a response; see `score`.

        Raises UserError for a response that is no text, or unusable accepted answers.
        """
        if not isinstance(response, str):
            raise UserError(f"a response must be a text, not {reprlib.repr(response)}")
        texts = accepted_texts(accepted, "the accepted answer")
        answer = _answer(response)
        reward = _reward_at_once(answer, texts)
        future: Future[float] = Future()
        if reward is not None:
            future.set_result(reward)
            return future
        with self._lock:
            if self._closed:
                raise RuntimeError("this Grader is closed")
            self._queue.put((future, json.dumps([answer, texts]).encode() + b"\n"))
            if len(self._threads) < self.workers:
                thread = threading.Thread(target=self._serve, daemon=True)
                thread.start()
                self._threads.append(thread)
        return future

    def close(self) -> None:
        """Ends the workers at once; comparisons that are not done are cancelled."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                processes.kill(process)
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _serve(self) -> None:
        """Passes comparisons to a worker process, which lives as long as this thread."""
        process = None
        while (item := self._queue.get()) is not None:
            future, request = item
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                process, reward = self._compare(process, request)
                future.set_result(reward)
            except Exception as error:  # raised where the reward is asked for
                process = None
                future.set_exception(error)
        if process is not None:
            self._end(process)

    def _compare(
        self, process: Process | None, request: bytes
    ) -> tuple[Process | None, float]:
        """The reward, and the process if it can go on.

        After a crash, which may have had nothing to do with this comparison, it is
        tried once more. A verdict of the worker, a limit of processor time included, is
        remembered: a model writes the same answer often.
        """
        digest = hashlib.sha256(request).digest()
        for _ in range(2):
            reply = self._known.get(digest)
            if reply is None:
                process = process or self._start()
                reply = processes.ask(process, request, self.limit * processes.PATIENCE)
                if reply in (EQUAL, DIFFERENT, TIMEOUT):
                    self._remember(digest, reply)
                elif reply != CRASH:
                    self._end(process)
                    process = None
            if reply in (EQUAL, DIFFERENT):
                return process, float(reply)
            if self._closed:
                raise RuntimeError("this Grader was closed")
            timed_out = reply in (TIMEOUT, processes.KILLED)
            with self._lock:
                self.failures["timeout" if timed_out else "crash"] += 1
            if timed_out:
                break
        return process, 0.0

    def _remember(self, digest: bytes, reply: bytes) -> None:
        with self._lock:
            if len(self._known) >= _MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[digest] = reply

    def _start(self) -> Process:
        """A worker that has imported all it needs, so that this costs no one's limit.

        Raises RuntimeError if it cannot start: then nothing could ever be compared.
        """
        reason = b""
        for _ in range(_START_ATTEMPTS):
            process = self._spawn()
            reply = processes.ask(process, b"", processes.START_SECONDS)
            if reply == processes.READY:
                return process
            self._end(process)
            reason = reply.strip() or b"exit code %d" % process.returncode
        raise RuntimeError(
            f"a worker process that compares answers did not start: {reason.decode()}"
        )

    def _spawn(self) -> Process:
        with self._lock:
            if self._closed:
                raise RuntimeError("this Grader was closed")
            process = processes.spawn("e1jax.rewards.worker", str(self.limit))
            self._processes.add(process)
        return process

    def _end(self, process: Process) -> None:
        processes.kill(process)
        with self._lock:
            self._processes.discard(process)
        process.communicate()  # waits, and closes the pipes


@functools.cache
def _shared_grader(pid: int) -> Grader:
    """The Grader of this process; a forked one has none of its parent's threads."""
    return Grader()


def _all_accepted(answers: Sequence[Accepted]) -> list[list[str]]:
    return [accepted_texts(a, f"answers[{i}]") for i, a in enumerate(answers)]


def _text(answer: Any, where: str) -> str:
    """An accepted answer as text; a float is written without an exponent."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, numbers.Integral) and not isinstance(answer, bool):
        return str(int(answer))
    if isinstance(answer, numbers.Real) and not isinstance(answer, bool):
        value = float(answer)
        if math.isfinite(value):
            return f"{Decimal(repr(value)):f}".removesuffix(".0")
    raise UserError(
        f"{where} is {reprlib.repr(answer)}; give a text, a number, or a list of them"
    )


def _answer(response: str) -> str:
    """The answer in a response's solution, or an empty text."""
    _, _, solution = response.partition(THINK_END)
    return (extract_boxed(solution) or "").strip(_AROUND)


def final_answer(text: str, where: str) -> str:
    r"""The part of an accepted text that is the answer.

    That is the content of its last `\boxed{}`, else the line behind the last `####` (as in
    GSM8K), else all of it. Raises UserError naming `where` for several lines without
    either mark: a worked solution, which no answer could equal.
    """
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, last = text.rpartition("####")
    if mark:
        return next((line for line in last.splitlines() if line.strip()), "")
    # A matrix may be written in several lines.
    start, end = text.find(r"\begin{"), text.rfind(r"\end{")
    one_line = text if end < start or start < 0 else text[:start] + text[end:]
    one_line = one_line.strip()
    if re.search(r"[\n\r]", one_line):
        raise UserError(
            f"{where} has several lines, and neither \\boxed{{}} nor #### says which part "
            f"is the answer: {reprlib.repr(text)}; give the answer alone"
        )
    return text


def _reward_at_once(answer: str, accepted: list[str]) -> float | None:
    """The reward where no algebra is needed, else None."""
    if answer in accepted:
        return 1.0
    if not answer or len(answer) > _MAX_LENGTH:
        return 0.0
    if all(map(_INTEGER.fullmatch, [answer, *accepted])):
        return float(int(answer) in map(int, accepted))
    return None
