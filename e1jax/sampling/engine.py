"""The sampling engine: requests, slots and completions, on the host.

A request with n samples goes through these steps:
1. host, `Engine.add`: the prompt becomes token ids, the budgets become numbers; a request
   that cannot fit is refused before any work is done. Its samples wait for slots.
2. device, `decode.prefill`: keys and values of all prompt tokens but the last, once per
   request, into a buffer of the next larger bucket length, of several requests at a time.
3. device, `decode.admit`: a row of that buffer is copied into the free slots of the cache
   that take the request's samples.
4. device, `decode.decode`: all slots step together, from the prompt's last token on,
   until enough of them are done, or for a while.
5. host: the new tokens become events and, of finished samples, completions; freed slots
   are refilled.

Steps 2 to 5 are `Engine.step`, over and over.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from e1jax.checkpoint.load import LoadedModel, load_model
from e1jax.config.checks import UserError, check_choice, check_integer
from e1jax.config.model import KV_DTYPES, ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.nn.cache import KVCache, whole_slots
from e1jax.nn.quantize import Params
from e1jax.sampling.budget import DONE, BudgetState, TokenIds
from e1jax.sampling.completion import Completion, Event, Sample
from e1jax.sampling.decode import (
    CHUNK_STEPS,
    SHORTEST_FORCED,
    Chunk,
    Rows,
    admit,
    decode,
    empty_rows,
    layers_apart,
    new_cache,
    next_power,
    prefill_len,
    prepare,
    read_prefix,
    request_rows,
    start_rows,
    stop_rows,
    widen_rows,
)
from e1jax.sampling.prefill import Prefiller
from e1jax.sampling.request import (
    Follow,
    Prompt,
    Request,
    encode_prompt,
    make_request,
)
from e1jax.sampling.scheduler import Scheduler, Start, Waiting
from e1jax.sharding.mesh import replicated
from e1jax.sharding.runtime import enough_memory
from e1jax.tokenizer import Tokenizer

DEFAULT_CACHE_LEN = 32768


# How long the host leaves the device to itself. A stream of completions looks for
# progress and Ctrl-C alone; live tokens are waited for.
_STREAM_SECONDS = 1.0


_LIVE_SECONDS = 0.1


_FIRST_STEPS = 8  # while the time of a step is not known


# Decode steps of the running samples for each piece of a prompt that waits.
_STEPS_BETWEEN_PIECES = 4


@dataclasses.dataclass
class Stats:
    """Counters since the engine was made, or the last `generate` or `stream` began."""

    prefills: int = 0
    decode_steps: int = 0
    slot_steps: int = 0  # decode steps x slots
    tokens: int = (
        0  # slot steps that gave a token; the rest was spent on finished or empty slots
    )


class Engine:
    """Samples from a model on a mesh.

    `params` may be assigned anew (same shapes and sharding) while no request runs.
    Live use is `add`, `step` and `abort`: the first and the last may be called from any
    thread, everything else from one.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        cache_len: int | None = None,
        slots: int = 16,
        kv_dtype: str | None = None,
    ):
        """Takes sizes and weights; the latter may be None until completions are drawn.

        `cache_len`: positions of a slot, prompt and response together; None is 32,768
        or the model's max_position_embeddings if smaller. `slots`: rows sampled at a
        time, rounded up to a multiple of the mesh axis `data`; if there are fewer, each
        row's positions are sharded over `data` instead. `kv_dtype`: of the cached keys and
        values, "float32", "bfloat16" or "int8" with a scale per token and head; None is
        the dtype of the weights, or of the norms if the weights are int8. Raises UserError
        for sizes below 1 and for another kv_dtype.
        """
        default = min(DEFAULT_CACHE_LEN, config.max_position_embeddings)
        self.cache_len = default if cache_len is None else cache_len
        check_integer("cache_len", self.cache_len, 1, 2**30)
        check_integer("slots", slots, 1, 2**20)
        self.config = config
        self.tokenizer, self.mesh = tokenizer, mesh
        self.slots = whole_slots(mesh, slots)
        if kv_dtype is not None:
            check_choice("kv_dtype", kv_dtype, KV_DTYPES)
        self.kv_dtype = kv_dtype
        self.stats = Stats()
        self._ids = itertools.count()
        self._scheduler = Scheduler(self.slots)
        self._unclaimed: list[Event] = []  # a stream met them; the next `step` has them
        self._noted_cut = False
        self._cache: KVCache | None = None
        self._rows: Rows | None = None
        # As decoding takes them: of a prompt, and of a step. Kept between live requests,
        # which may come one by one; a stream that leaves nothing running frees them.
        self._weights: tuple[Params, Params] | None = None
        self.params = params
        self._step_seconds: float | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        mesh: str | None = None,
        cache_len: int | None = None,
        slots: int = 16,
        dtype: str | None = None,
        quantize: str | None = None,
        kv_dtype: str | None = None,
        state_budgets: bool = True,
        adapter: str | None = None,
    ) -> "Engine":
        """Loads a hub id, a Hugging Face or e1jax directory, or the bundled "nano".

        `mesh` is text like "data=1,tensor=4" (None: all devices), `dtype` "float32" or
        "bfloat16" (None: float32 on a CPU, bfloat16 elsewhere), `quantize` "int8" for
        weights of half the size of bfloat16, `kv_dtype` as in the constructor. `adapter` is
        the run directory of an adapter (LoRA) to the model, or peft's directory. A model
        trained with stated budgets gets those of each request stated, unless
        `state_budgets` is false. Raises UserError, a ValueError, for anything wrong with
        them.
        """
        loaded = load_model(name, mesh, dtype, quantize, state_budgets, adapter)
        return cls(
            loaded.config,
            loaded.read_params(),
            loaded.tokenizer,
            loaded.mesh,
            cache_len=cache_len,
            slots=slots,
            kv_dtype=kv_dtype,
        )

    @classmethod
    def without_weights(
        cls,
        loaded: LoadedModel,
        *,
        slots: int,
        cache_len: int | None = None,
        kv_dtype: str | None = None,
    ) -> "Engine":
        """For checking requests before the weights, which can take minutes, are read:
        assign `loaded.read_params()` to `params` then. Raises UserError as the
        constructor does."""
        return cls(
            loaded.config,
            None,
            loaded.tokenizer,
            loaded.mesh,
            cache_len=cache_len,
            slots=slots,
            kv_dtype=kv_dtype,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Completion]]:
        """The completions of each prompt, in input order: a list per prompt, a
        Completion per sample.

        A prompt is a text (put into the chat template as the user's message), a list of
        chat messages or a list of token ids (used as they are). Of a model trained with
        stated budgets, a text and the last message of the user begin with the request's.
        Raises UserError before any work for a request that cannot fit, naming it.
        """
        results: list[list[Completion]] = [[] for _ in prompts]
        for completion in self.stream(prompts, params):
            results[completion.prompt_index].append(completion)
        return [sorted(samples, key=lambda c: c.sample) for samples in results]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        names: Sequence[str] | None = None,
        skip: Callable[[int, int], bool] = lambda prompt_index, sample: False,
        progress: Callable[[int], None] = lambda new_tokens: None,
        follow: Follow | None = None,
    ) -> Iterator[Completion]:
        """Yields each Completion as it finishes. See `generate`. The longest budgets
        start first, equal ones in the order of the call.

        Requests are checked when this is called, before the first completion is asked
        for; messages call them by `names` (default: "prompt 0", ...). Samples
        for which `skip(prompt_index, sample)` holds are left out (a resumed run has them
        already). `progress` is told after each chunk, once its completions are out, how
        many tokens it gave; an exception that it raises ends the stream.

        `follow` gives the requests that go on from a completion. They are sampled as any,
        but take the keys and values of their prompt from where that one was sampled, with
        nothing computed again; their own completions are not followed.
        """
        requests = self._requests(prompts, params, names)
        self._note_cut(requests)
        return self._stream(requests, skip, progress, follow)

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues a request, as `generate` takes them, behind the others; returns its id.

        Raises UserError for a request that cannot fit. Its tokens come from `step`, and
        depend neither on the time of the call nor on the other requests.
        """
        given = params or SamplingParams()
        request = self._request(0, prompt, given, "prompt", is_live=True)
        if request.budget.was_cut and not self._noted_cut:
            self._noted_cut = True  # said once, however many requests there will be
            self._note_cut([request])
        self._scheduler.add(request, range(request.params.n))
        return request.id

    def step(self, *, seconds: float = _LIVE_SECONDS) -> list[Event]:
        """Runs one chunk of decode steps, for about `seconds`, with the prefills before
        it; returns the new tokens, [] if there is no request.

        An exception (UserError for logits that are not finite, or for too little memory)
        ends all requests.
        """
        events, self._unclaimed = self._unclaimed, []
        return events + self._step(seconds)

    def abort(self, request_id: int) -> None:
        """Ends a request: its slots are free from the next step on, and no event of it
        comes any more. Does nothing for a request that has ended."""
        self._scheduler.abort([request_id])

    @property
    def params(self) -> Params | None:
        """The model's parameters."""
        return self._params

    @params.setter
    def params(self, params: Params | None) -> None:
        self._params = params
        self._weights = self._rows = None
        self._scheduler.forget()  # keys and values of other parameters

    @property
    def running(self) -> int:
        """Samples that have a slot."""
        return self.slots - len(self._scheduler.free)

    @property
    def waiting(self) -> int:
        """Samples that wait for a slot."""
        return self._scheduler.num_waiting

    def release_cache(self) -> None:
        """Ends all requests, and frees the cache's memory until the next one."""
        self._scheduler.clear()
        self._unclaimed = []
        self._cache = self._rows = self._weights = None

    def encode(
        self,
        prompt: Prompt,
        where: str = "prompt",
        *,
        params: SamplingParams | None = None,
    ) -> list[int]:
        """Token ids of a prompt, checked, with the budgets of `params` stated; see
        `generate`."""
        vocab_size = self.config.vocab_size
        return encode_prompt(prompt, where, self.tokenizer, vocab_size, params)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        names: Sequence[str] | None,
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise UserError("prompts is one string; pass a list of prompts")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if not all(isinstance(item, SamplingParams) for item in params):
            raise UserError(f"params must be SamplingParams, not {params!r}")
        if len(params) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts came with {len(params)} SamplingParams; "
                "give one for all or one each"
            )
        names = names or [f"prompt {index}" for index in range(len(prompts))]
        triples = enumerate(zip(prompts, params, names, strict=True))
        return [self._request(index, *triple) for index, triple in triples]

    def _request(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        where: str,
        *,
        is_live: bool = False,
    ) -> Request:
        return make_request(
            next(self._ids),
            index,
            prompt,
            params,
            where,
            is_live=is_live,
            tokenizer=self.tokenizer,
            vocab_size=self.config.vocab_size,
            cache_len=self.cache_len,
        )

    def _note_cut(self, requests: list[Request]) -> None:
        cut = [request for request in requests if request.budget.was_cut]
        if cut:
            given, left = cut[0].params.thinking_budget, cut[0].budget.thinking
            print(
                f"note: the thinking budget is cut in {len(cut)} of {len(requests)} "
                f"requests (in the first from {given} to {left} tokens), so that the "
                f"solution fits cache_len={self.cache_len}",
                file=sys.stderr,
            )

    def _stream(
        self,
        requests: list[Request],
        skip: Callable[[int, int], bool],
        progress: Callable[[int], None],
        follow: Follow | None,
    ) -> Iterator[Completion]:
        self.stats = Stats()
        left: dict[int, int] = {}  # samples of each request that are not done
        if follow is not None:
            requests = [self._followed(request, follow, left) for request in requests]
        # The longest budgets start first, so that the slots come to their ends together
        # and none waits long for the last; equal ones start in the order of the call.
        for request in sorted(requests, key=lambda r: -r.most_tokens):
            samples = [j for j in range(request.params.n) if not skip(request.index, j)]
            if samples:
                left[request.id] = len(samples)
                self._scheduler.add(request, samples)
        try:
            while left:
                events, self._unclaimed = self.step(seconds=_STREAM_SECONDS), []
                own = [event for event in events if event.request_id in left]
                self._unclaimed = [e for e in events if e.request_id not in left]
                for event in own:
                    if event.completion is not None:
                        left[event.request_id] -= 1
                        yield event.completion
                progress(sum(len(event.token_ids) for event in own))
                for id in [id for id, count in left.items() if not count]:
                    del left[id]
        finally:
            self._scheduler.abort(left)  # of a stream that is given up
            self._unclaimed = [e for e in self._unclaimed if e.request_id not in left]
            self._update()
            if self._scheduler.is_idle:
                # The parameters may be replaced now, and their memory reused.
                self._weights = self._rows = None

    def _followed(
        self, request: Request, follow: Follow, left: dict[int, int]
    ) -> Request:
        """The request with followers, which have its id, and are counted in `left`."""

        def requests(completion: Completion) -> list[Request]:
            made = [
                self._request(*following, f"a follower of prompt {request.index}")
                for following in follow(completion)
            ]
            left[request.id] += sum(follower.params.n for follower in made)
            return [dataclasses.replace(follower, id=request.id) for follower in made]

        return dataclasses.replace(request, follow=requests)

    def _update(self) -> None:
        """Applies the calls of `add` and `abort` since the last update."""
        self._stop(self._scheduler.update())

    def _stop(self, slots: Sequence[int]) -> None:
        """Ends the rows of slots whose samples are gone."""
        if slots and self._rows is not None:
            is_stopped = np.isin(np.arange(self.slots), slots)
            self._rows = stop_rows(self.mesh, self._rows, is_stopped)

    def _step(self, seconds: float) -> list[Event]:
        sizes = f"this model with {self.slots} slots of {self.cache_len} positions"
        advice = "lower slots or cache_len, or use more devices"
        try:
            self._update()
            if self._scheduler.is_idle:
                return []
            with enough_memory(sizes, advice):
                self._start()
                is_behind = self._refill()
                chunk, state = self._decode(seconds, is_behind)
            events = self._collect(chunk, state)
            self._update()
            return events
        except BaseException:
            # The cache may have been given away, or hold a key that is not finite, which
            # would spoil every later row of its slot.
            self.release_cache()
            raise

    def _start(self) -> None:
        """Makes weights and rows ready, and the cache unless it is there."""
        if self._weights is not None:
            return
        assert self.params is not None, "assign Engine.params before sampling"
        weights, kv_dtype = prepare(self.params, self.kv_dtype, self.mesh)
        self._cache = self._cache or self._new_cache(kv_dtype)
        # A longer prompt would wait for a program with all layers for each bucket.
        self._weights = weights, layers_apart(weights, self.mesh)
        rows = empty_rows(self.slots, SHORTEST_FORCED)
        first_tokens = [held[0] if held else 0 for held in self._scheduler.held]
        rows = rows._replace(first_token=np.array(first_tokens, np.int32))
        self._rows = jax.device_put(rows, replicated(self.mesh))
        self._step_seconds = None

    @property
    def _few(self) -> int:
        """Slots are refilled so many at a time, at a step that the rows decide and not
        the clock: the same requests meet in the same slots whenever they run."""
        return max(1, self.slots // 16)

    @property
    def _prefiller(self) -> Prefiller:
        assert self._weights and self._cache
        model = self.config, self.mesh, self._weights[0]
        return Prefiller(*model, self._cache, self.cache_len, self._scheduler)

    def _refill(self) -> bool:
        """Gives the free slots to samples that wait; whether a live prompt is to be
        prefilled further, with a free slot, after some steps of the running samples."""
        queue, room = self._scheduler.queue, self._prefiller.piece
        if len(self._scheduler.free) < self._few:
            return False
        if starts := self._scheduler.next_in_place():
            self._give_slots(starts)
            self._start_rows(starts)
        while queue and self._scheduler.free:
            first = queue[0]
            in_pieces = first.request.is_live and self.running > 0
            if in_pieces and room <= 0:
                return True
            limit = room if in_pieces else sys.maxsize
            group = self._prefiller.next_group(limit)
            if not first.is_filled:
                self.stats.prefills += sum(w.prefix is None for w in group)
                room -= self._prefiller.fill(group, limit)
            if not first.is_filled:
                return True
            self._admit(group)
        while found := self._scheduler.next_elsewhere():
            self._copy(*found)
        return False

    def _admit(self, group: Sequence[Waiting]) -> None:
        """Starts samples of requests whose prompts are in one prefix, as many as there are
        free slots."""
        starts: dict[int, Start] = {}
        sources: list[int] = []
        for waiting in group:
            taken = self._scheduler.next_starts(waiting)
            self._give_slots(taken, waiting.cached_tokens)
            starts |= taken
            sources += [waiting.row] * len(taken)
        self._start_rows(starts, group[0].prefix, sources)

    def _copy(self, source: int, starts: dict[int, Start]) -> None:
        """Starts followers of the sample that ended in the slot `source` in other slots, to
        which its keys and values are copied."""
        assert self._cache
        longest = max(len(request.prompt_ids) for request, _ in starts.values())
        bucket = prefill_len(longest - 1, self.cache_len)
        prefix = read_prefix(self.mesh, self.slots, bucket, self._cache, source)
        self._give_slots(starts)
        self._start_rows(starts, prefix, [0] * len(starts))

    def _give_slots(
        self, starts: dict[int, Start], cached_tokens: int | None = None
    ) -> None:
        """Gives a slot to each sample of `starts`. `cached_tokens` of every prompt were in
        the cache before: by default all but the last token."""
        for slot, (request, number) in starts.items():
            sample = Sample(request, number, self.tokenizer)
            cached = len(request.prompt_ids) - 1
            sample.cached_tokens = cached if cached_tokens is None else cached_tokens
            self._scheduler.slots[slot] = sample

    def _start_rows(
        self,
        starts: dict[int, Start],
        prefix: KVCache | None = None,
        sources: Sequence[int] = (),
    ) -> None:
        """Starts a row for each sample of `starts`, with the keys and values of the rows
        `sources` of a prefix, or with the ones that are in its slot already."""
        assert self._cache and self._rows
        rows = self._rows
        for request, _ in starts.values():
            width = next_power(len(request.forced_ids), SHORTEST_FORCED)
            rows = widen_rows(self.mesh, rows, width)
        new = request_rows(starts, rows)
        if prefix is None:
            self._rows = start_rows(self.mesh, rows, new)
            return
        padding = [0] * (self.slots - len(starts))
        copies = (np.array([*x, *padding], np.int32) for x in (starts, sources))
        self._cache, self._rows = admit(
            self.mesh, self._cache, prefix, rows, *copies, len(starts), new
        )

    def _decode(self, seconds: float, is_behind: bool) -> tuple[Chunk, BudgetState]:
        """One chunk of steps, and the state of the rows after it, on the host. `is_behind`:
        few steps, between two pieces of a prompt."""
        assert self._weights and self._cache and self._rows
        num_steps = _FIRST_STEPS
        if self._step_seconds is not None:
            num_steps = min(CHUNK_STEPS, max(1, int(seconds / self._step_seconds)))
        if is_behind:
            num_steps = min(num_steps, _STEPS_BETWEEN_PIECES)
        ends, starts = self.tokenizer.think_end_id, self.tokenizer.think_start_id
        eos_ids = np.array(self.tokenizer.eos_ids, np.int32)
        tags = (-1, -1) if ends is None else (ends, -1 if starts is None else starts)
        # Rows that are done, free slots among them, at which samples that wait can start.
        enough = self.slots
        if self._scheduler.has_more:
            enough = max(self._few, len(self._scheduler.free) + 1)
        start = time.monotonic()
        self._cache, rows, chunk = decode(
            self.config,
            self.mesh,
            self._weights[1],
            TokenIds(eos_ids, *tags),
            self._cache,
            self._rows,
            enough,
            num_steps,
        )
        self._rows = rows
        chunk, state = jax.device_get((chunk, rows.state))
        self._step_seconds = (time.monotonic() - start) / max(int(chunk.num_steps), 1)
        return chunk, state

    def _collect(self, chunk: Chunk, state: BudgetState) -> list[Event]:
        """Appends a chunk's tokens to the samples; frees the slots of finished ones."""
        events: list[Event] = []
        stopped: list[int] = []
        for slot, sample in enumerate(self._scheduler.slots):
            if sample is None:
                continue
            start = len(sample.token_ids)
            count = int(state.num_tokens[slot]) - start
            new = (x[slot, :count].tolist() for x in chunk[:3])
            sample.extend(*new)
            is_done, completion = bool(state.phase[slot] == DONE), None
            stop = sample.stop_end(start, is_done)
            if is_done or stop is not None:
                self._scheduler.leave(slot)
                row = jax.tree.map(lambda field, slot=slot: int(field[slot]), state)
                if stop is not None:
                    stopped.append(slot)
                    row = sample.stop(stop, row)
                completion = sample.completion(row)
                if sample.request.follow is not None:
                    following = sample.request.follow(completion)
                    self._scheduler.follow(slot, following)
            events += sample.events(start, completion)
            self.stats.tokens += count
        self._stop(stopped)
        self.stats.decode_steps += int(chunk.num_steps)
        self.stats.slot_steps += int(chunk.num_steps) * self.slots
        return events

    def _new_cache(self, kv_dtype: Any) -> KVCache:
        sizes = self.slots, self.cache_len
        cache = new_cache(self.config, self.mesh, *sizes, kv_dtype)
        return jax.block_until_ready(cache)
