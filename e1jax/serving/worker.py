"""The thread that owns the device and steps the engine, and requests on their way.

Everything but `EngineThread._run` belongs to the thread of the event loop: a request is
added there, and there the events of a step are handed out, all in one call. So a request
is known before its first event can come, and no lock is needed.
"""

import asyncio
import contextlib
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.nn.quantize import Params
from e1jax.sampling.completion import Completion, Event, join_events
from e1jax.sampling.engine import Engine
from e1jax.serving.metrics import Metrics, Timing
from e1jax.serving.protocol import ApiError, longest_prompt

# Steps of small models take a few milliseconds, and to send a piece of an answer costs as
# much as to sample it: the pieces of such steps are sent together.
_PIECE_SECONDS = 0.05


LOADING, READY, ENDING, FAILED = "loading", "ready", "ending", "failed"


class Live:
    """A request of which samples run or wait; `index` counts them, over all prompts."""

    def __init__(self, samples: int, per_prompt: int):
        self.samples, self.per_prompt = samples, per_prompt
        self.prompts: dict[int, int] = {}  # the engine's id -> which prompt
        self.completions: dict[int, Completion] = {}
        self.cached: dict[int, int] = {}  # tokens of each prompt, from a slot
        self.is_aborted = False
        self.timing = Timing()
        self._steps: asyncio.Queue[list[tuple[int, Event]] | ApiError] = asyncio.Queue()

    @property
    def left(self) -> int:
        """Samples that are not done."""
        return self.samples - len(self.completions)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were in the engine's cache before."""
        return sum(self.cached.values())

    def put(self, step: "list[tuple[int, Event]] | ApiError") -> None:
        """Hands out what a step gave, or the error that ends the request."""
        self._steps.put_nowait(step)

    async def steps(self) -> AsyncIterator[tuple[list[tuple[int, Event]], bool]]:
        """The events of each step, by sample, and whether more will come, until all
        samples are done; raises ApiError if the engine fails."""
        seen = 0
        while seen < self.samples:
            step = await self._steps.get()
            if isinstance(step, ApiError):
                raise step
            seen += sum(event.completion is not None for _, event in step)
            yield step, seen < self.samples


class EngineThread:
    """Steps the engine while there are requests; `read_params` gives it its weights."""

    def __init__(
        self, engine: Engine, read_params: Callable[[], Params], metrics: Metrics
    ):
        self.engine, self.metrics = engine, metrics
        self.state = LOADING
        self.is_loaded = False  # the weights, and the decode step is compiled
        self.error: BaseException | None = None  # that ended the thread
        self.max_prompt_chars = longest_prompt(engine.tokenizer, engine.cache_len)
        self._read_params = read_params
        self.open_samples = 0  # that run or wait
        self._live: dict[int, Live] = {}  # by the engine's id
        self._work = threading.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Called in the event loop's thread."""
        self._loop = asyncio.get_running_loop()
        # After each call of the device, the thread waits for Python's lock. By default,
        # the event loop may keep it for 5 ms then, which is a step of a small model.
        sys.setswitchinterval(0.0005)
        self._thread.start()

    async def stop(self, seconds: float = 5.0) -> None:
        """Ends the thread after the step that it is in, and waits for that, but not
        longer than `seconds`: see `is_alive`."""
        self._closing = True
        self._work.set()
        await asyncio.to_thread(self._thread.join, seconds)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and may be using the device."""
        return self._thread.is_alive()

    def check_open(self, max_waiting: int) -> None:
        """Raises ApiError unless a request can be taken in now."""
        if self.state != READY:
            said = {
                LOADING: "the model is still being loaded",
                FAILED: "the engine failed",
            }
            raise ApiError(503, said.get(self.state, "the server is ending"))
        if self.open_samples - self.engine.slots >= max_waiting:
            raise ApiError(
                429, f"the limit of {max_waiting} waiting samples is reached; try later"
            )

    def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]]) -> Live:
        """Adds a request's prompts to the engine; raises UserError, with nothing left
        behind, for one that cannot fit."""
        per_prompt = prompts[0][1].n
        live = Live(len(prompts) * per_prompt, per_prompt)
        self.open_samples += live.samples
        try:
            for number, (prompt_ids, params) in enumerate(prompts):
                id = self.engine.add(prompt_ids, params)
                live.prompts[id], self._live[id] = number, live
        except BaseException:
            self.abort(live)
            raise
        for prompt_ids, _ in prompts:
            self.metrics.note_prompt(len(prompt_ids))
        self._work.set()
        return live

    def abort(self, live: Live) -> None:
        """Ends a request, if it is not done; its slots are free from the next step on."""
        if live.left and not live.is_aborted:
            live.is_aborted = True
            self.open_samples -= live.left
            for id in live.prompts:
                del self._live[id]
                self.engine.abort(id)
            self._work.set()

    def fail(self, error: ApiError) -> None:
        """Ends all requests with an error."""
        for live in set(self._live.values()):
            live.put(error)
            self.abort(live)

    def _run(self) -> None:
        try:
            self._load()
            while not self._closing:
                self._work.wait()
                self._work.clear()
                self._step_until_idle()
        except BaseException as error:
            self.error = error
            self._loop.call_soon_threadsafe(self._fail)

    def _load(self) -> None:
        self.engine.params = self._read_params()
        # What the first request would have to wait for: importing what renders chat
        # templates, and compiling the decode step.
        with contextlib.suppress(UserError):  # the tokenizer may have none
            self.engine.encode("warm-up")
        self.engine.generate(
            [[0]], SamplingParams(thinking_budget=None, solution_budget=1)
        )
        # The objects that exist now live as long as the server: the garbage collector need
        # not scan them again.
        gc.freeze()
        self.is_loaded = True
        self._loop.call_soon_threadsafe(self._ready)

    def _ready(self) -> None:
        if self.state == LOADING:  # else the server is ending already
            self.state = READY

    def _step_until_idle(self) -> None:
        events: list[Event] = []
        handed_out, is_idle = 0.0, False
        while not (is_idle or self._closing):
            events += self.engine.step()
            is_idle = not (self.engine.running or self.engine.waiting)
            is_due = time.monotonic() - handed_out >= _PIECE_SECONDS
            if events and (is_due or is_idle):
                self._loop.call_soon_threadsafe(self._hand_out, join_events(events))
                events, handed_out = [], time.monotonic()

    def _hand_out(self, events: list[Event]) -> None:
        steps: dict[Live, list[tuple[int, Event]]] = {}
        for event in events:
            live = self._live.get(event.request_id)
            if live is not None:  # else it was aborted meanwhile
                prompt = live.prompts[event.request_id]
                live.cached[prompt] = event.cached_tokens
                index = prompt * live.per_prompt + event.sample
                steps.setdefault(live, []).append((index, event))
                if event.completion is not None:
                    live.completions[index] = event.completion
                    self.open_samples -= 1
        for live, step in steps.items():
            self.metrics.note_events(live.timing, step)
            live.put(step)
            if not live.left:
                for id in live.prompts:
                    del self._live[id]

    def _fail(self) -> None:
        self.state = FAILED
        reason = " ".join(str(self.error).split()) or repr(self.error)
        self.fail(ApiError(500, f"the engine failed: {reason}"))
