"""Which samples have a slot, and which wait for one, in the order they came."""

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from e1jax.nn.cache import KVCache
from e1jax.sampling.completion import Sample
from e1jax.sampling.request import Request


@dataclasses.dataclass(eq=False)
class Waiting:
    """Samples of a request that have no slot yet."""

    request: Request
    samples: list[int]
    prefix: KVCache | None = None  # keys and values of prompts, while samples wait
    row: int = 0  # of the prefix, which has this prompt
    filled: int = 0  # tokens of the prompt that are in it
    cached_tokens: int = 0  # tokens that were taken from a slot
    goes_on: int | None = None  # the slot that holds little else than these

    @property
    def length(self) -> int:
        """Tokens to prefill: all of the prompt but the last, which starts the decoding."""
        return len(self.request.prompt_ids) - 1

    @property
    def is_filled(self) -> bool:
        """Whether the prefix has all of the prompt."""
        return self.prefix is not None and self.filled == self.length


Start = tuple[Request, int]  # a request, and the number of its sample


class Scheduler:
    """`add` and `abort` may be called from any thread; they take effect at `update`.
    Everything else is of the thread that steps the engine."""

    def __init__(self, slots: int):
        self.slots: list[Sample | None] = [None] * slots
        # Tokens whose keys and values are in a slot, and when the slot was left.
        self.held: list[list[int]] = [[]] * slots
        self.left_at: list[int] = [0] * slots
        self.queue: deque[Waiting] = deque()
        # By slot, followers of the sample that ended there; the next to start is last.
        self.followers: dict[int, list[Start]] = {}
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
        for starts in self.followers.values():
            starts[:] = [start for start in starts if start[0].id not in aborted]
        self._drop_empty()
        freed = [
            slot
            for slot, sample in enumerate(self.slots)
            if sample is not None and sample.request.id in aborted
        ]
        for slot in freed:
            self.leave(slot)
        return freed

    def leave(self, slot: int) -> None:
        """Frees a slot. Its keys and values can be read until it is taken again."""
        sample = self.slots[slot]
        assert sample is not None
        # The last token's would have come with the next step.
        self.held[slot] = sample.request.prompt_ids + sample.token_ids[:-1]
        self.slots[slot] = None
        self.left_at[slot] = max(self.left_at) + 1

    def follow(self, slot: int, requests: Sequence[Request]) -> None:
        """Queues followers of the sample that ended in a slot, whose keys and values they
        share.

        Followers with the longest prompt start first: in the slot itself, their tokens are
        written behind the positions that shorter prompts read.
        """
        ordered = sorted(requests, key=lambda r: len(r.prompt_ids))
        numbers = [(r, j) for r in ordered for j in reversed(range(r.params.n))]
        if numbers:
            self.followers[slot] = numbers

    def next_in_place(self) -> dict[int, Start]:
        """Takes the next follower of every free slot that has some."""
        free = [slot for slot in self.followers if self.slots[slot] is None]
        starts = {slot: self.followers[slot].pop() for slot in free}
        self._drop_empty()
        return starts

    def next_elsewhere(self) -> tuple[int, dict[int, Start]] | None:
        """The slot with the most followers, and which of them start in which free slots;
        None if no follower waits or no slot is free. The choice does not depend on the
        numbers of slots, so that it is the same with any number of them."""
        if not self.free or not self.followers:
            return None

        def most_followed(slot: int) -> tuple[int, int]:
            starts = self.followers[slot]
            return -len(starts), starts[-1][0].index

        slot = min(self.followers, key=most_followed)
        starts = self.followers[slot]
        taken = {free: starts.pop() for free in self.free[: len(starts)]}
        self._drop_empty()
        return slot, taken

    def _drop_empty(self) -> None:
        self.followers = {slot: s for slot, s in self.followers.items() if s}

    def next_requests(self) -> list[Waiting]:
        """The first of the queue, and the ones behind it as long as there are free slots for
        all samples."""
        left = len(self.free)
        found = []
        for waiting in self.queue:
            left -= len(waiting.samples)
            if found and left < 0:
                break
            found.append(waiting)
        return found

    def longest_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """The slot that holds most of the beginning of `tokens`, and how many of them."""

        def length(slot: int) -> int:
            sample = self.slots[slot]
            if sample is None:
                return common_tokens(tokens, self.held[slot])
            prompt_ids = sample.request.prompt_ids
            common = common_tokens(tokens, prompt_ids)
            if common < len(prompt_ids):
                return common
            return common + common_tokens(tokens[common:], sample.token_ids[:-1])

        lengths = [length(slot) for slot in range(len(self.slots))]
        longest = max(lengths)
        return lengths.index(longest), longest

    def forget(self) -> None:
        """Marks what free slots hold as unreadable."""
        self.held = [[]] * len(self.slots)

    def clear(self) -> None:
        """Drops every request."""
        with self._lock:
            self._added, self._aborted = [], set()
        self.queue.clear()
        self.followers.clear()
        self.slots = [None] * len(self.slots)
        self.forget()

    def next_starts(self, waiting: Waiting) -> dict[int, Start]:
        """Takes the samples of a request, or as many as there are free slots, with a slot
        for each; with the last one, the request leaves the queue. A conversation goes on in
        its own slot, so that others stay readable."""
        free = sorted(self.free, key=lambda slot: slot != waiting.goes_on)
        free = free[: len(waiting.samples)]
        starts = {slot: (waiting.request, waiting.samples.pop(0)) for slot in free}
        if not waiting.samples:
            self.queue.remove(waiting)
        return starts

    @property
    def free(self) -> list[int]:
        """The slots without a sample, the one left longest ago first."""
        free = [slot for slot, sample in enumerate(self.slots) if sample is None]
        return sorted(free, key=self.left_at.__getitem__)

    @property
    def num_waiting(self) -> int:
        """Samples without a slot."""
        with self._lock:
            waiting = sum(len(w.samples) for w in [*self.queue, *self._added])
        return waiting + sum(map(len, self.followers.values()))

    @property
    def is_idle(self) -> bool:
        """Whether no sample runs or waits, as of the last `update`."""
        return not self.queue and not self.followers and not any(self.slots)

    @property
    def has_more(self) -> bool:
        """Whether a sample waits for a slot, or one that runs will have followers."""
        running = filter(None, self.slots)
        to_come = any(sample.request.follow for sample in running)
        return bool(self.queue or self.followers) or to_come


def common_tokens(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared faster than tokens one by one
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
        )
    return low
