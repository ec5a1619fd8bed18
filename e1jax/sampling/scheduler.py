"""Which samples have a slot, and which wait for one, in the order they came."""

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from e1jax.nn.cache import KVCache
from e1jax.sampling.completion import Sample
from e1jax.sampling.request import Request


@dataclasses.dataclass
class Waiting:
    """Samples of a request that have no slot yet."""

    request: Request
    samples: list[int]
    prefix: KVCache | None = None  # the prefilled prompt, once a sample has a slot


class Scheduler:
    """`add` and `abort` may be called from any thread; they take effect at `update`.
    Everything else is of the thread that steps the engine."""

    def __init__(self, slots: int):
        self.slots: list[Sample | None] = [None] * slots
        self.queue: deque[Waiting] = deque()
        self._lock = threading.Lock()
        self._added: list[Waiting] = []
        self._aborted: set[int] = set()

    def add(self, request: Request, samples: Sequence[int]) -> None:
        """Queues the samples, by number, of a request."""
        with self._lock:
            self._added.append(Waiting(request, list(samples)))

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drops the requests; an id that is not here, or done, is none."""
        with self._lock:
            self._aborted.update(request_ids)

    def update(self) -> list[int]:
        """Applies the calls of `add` and `abort` since the last update; returns the slots
        that this freed."""
        with self._lock:
            self.queue.extend(self._added)
            aborted, self._aborted, self._added = self._aborted, set(), []
        if not aborted:
            return []
        self.queue = deque(w for w in self.queue if w.request.id not in aborted)
        freed = [
            slot
            for slot, sample in enumerate(self.slots)
            if sample is not None and sample.request.id in aborted
        ]
        for slot in freed:
            self.slots[slot] = None
        return freed

    def clear(self) -> None:
        """Drops every request."""
        with self._lock:
            self._added, self._aborted = [], set()
        self.queue.clear()
        self.slots = [None] * len(self.slots)

    @property
    def free(self) -> list[int]:
        """The slots without a sample."""
        return [slot for slot, sample in enumerate(self.slots) if sample is None]

    @property
    def num_waiting(self) -> int:
        """Samples without a slot."""
        with self._lock:
            return sum(len(w.samples) for w in [*self.queue, *self._added])

    @property
    def is_idle(self) -> bool:
        """Whether no sample runs or waits, as of the last `update`."""
        return not self.queue and not any(self.slots)
