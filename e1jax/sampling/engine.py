"""The sampling engine: requests, slots and completions, on the host.

A request with n samples goes through these steps:
1. host: the prompt becomes token ids, the budgets become numbers; a request that cannot
   fit is refused before any work is done.
2. device, `decode.prefill`: keys and values of all prompt tokens but the last, once per
   request, into a buffer of the next larger bucket length.
3. device, `decode.admit`: that buffer is copied into the free slots of the cache that
   take the request's samples.
4. device, `decode.decode`: all slots step together, from the prompt's last token on,
   until enough of them are done; the host looks once per chunk, hands out the finished
   completions and refills their slots.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from e1jax.checkpoint.load import load_model
from e1jax.config.checks import UserError, check_choice, check_integer
from e1jax.config.model import KV_DTYPES, ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.config.texts import check_backslashes
from e1jax.nn.cache import KVCache, whole_slots
from e1jax.nn.cpu import unstack
from e1jax.nn.quantize import Params
from e1jax.sampling.budget import (
    DONE,
    FINISH_REASONS,
    SOLVE,
    THINK,
    THINKING_ENDS,
    Budget,
    BudgetState,
    ResolvedBudget,
    TokenIds,
    resolve_budget,
    start_state,
)
from e1jax.sampling.decode import (
    CHUNK_STEPS,
    Chunk,
    Rows,
    admit,
    decode,
    empty_rows,
    new_cache,
    next_power,
    prefill,
    prefill_len,
    prepare,
)
from e1jax.sampling.draw import Sampling
from e1jax.sharding.mesh import on_cpu, replicated
from e1jax.sharding.runtime import enough_memory
from e1jax.tokenizer import THINK_END, Tokenizer, extract_boxed

DEFAULT_CACHE_LEN = 32768


SHORTEST_FORCED = 8  # tokens that there is room for


_LOOK_SECONDS = 1.0


_MAX_FLOAT = float(np.finfo(np.float32).max)


Prompt = str | Sequence[dict[str, Any]] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response; its lists are of one length, forced tokens and EOS too."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]  # log-softmax of logits / temperature, before top-k and top-p
    forced: list[bool]
    thinking: str  # text before the first `</think>`
    solution: str  # text after it
    text: str  # the whole response, without a final EOS
    answer: str | None  # content of the solution's last \boxed{}
    thinking_tokens: int  # sampled tokens; forced ones are not counted
    solution_tokens: int
    thinking_end: str | None  # "model", "budget" or "eos"; None: `</think>` never came
    finish_reason: str  # "stop", "solution_budget" or "length"
    prompt_index: int  # which prompt of the call
    sample: int  # which sample of the prompt


@dataclasses.dataclass
class Stats:
    """Counters of the last `generate` or `stream`, up to now."""

    prefills: int = 0
    decode_steps: int = 0
    slot_steps: int = 0  # decode steps x slots
    tokens: int = (
        0  # slot steps that gave a token; the rest was spent on finished or empty slots
    )


@dataclasses.dataclass
class _Request:
    index: int
    prompt_ids: list[int]
    params: SamplingParams
    budget: ResolvedBudget
    forced_ids: list[int]
    waiting: list[int]  # samples that have no slot yet
    prefix: KVCache | None = None  # the prefilled prompt, while samples wait


@dataclasses.dataclass
class _Active:
    """A slot's unfinished completion."""

    request: _Request
    sample: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)


class Engine:
    """Samples from a model on a mesh.

    `params` may be assigned anew between calls (same shapes and sharding).
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
        row's positions lie over `data` instead. `kv_dtype`: of the cached keys and
        values, "float32", "bfloat16" or "int8" with a scale per token and head; None is
        that of the weights, or of the rest of them if they are int8. Raises UserError
        for sizes below 1 and for another kv_dtype.
        """
        default = min(DEFAULT_CACHE_LEN, config.max_position_embeddings)
        self.cache_len = default if cache_len is None else cache_len
        check_integer("cache_len", self.cache_len, 1, 2**30)
        check_integer("slots", slots, 1, 2**20)
        self.config, self.params = config, params
        self.tokenizer, self.mesh = tokenizer, mesh
        self.slots = whole_slots(mesh, slots)
        if kv_dtype is not None:
            check_choice("kv_dtype", kv_dtype, KV_DTYPES)
        self.kv_dtype = kv_dtype
        self.stats = Stats()
        self._cache: KVCache | None = None

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
    ) -> "Engine":
        """Loads a hub id, a Hugging Face or e1jax directory, or the bundled "nano".

        `mesh` is text like "data=1,tensor=4" (None: all devices), `dtype` "float32" or
        "bfloat16" (None: float32 on a CPU, bfloat16 elsewhere), `quantize` "int8" for
        weights of half the size of bfloat16, `kv_dtype` as in the constructor. Raises
        UserError, a ValueError, for anything wrong with them.
        """
        loaded = load_model(name, mesh, dtype, quantize)
        return cls(
            loaded.config,
            loaded.read_params(),
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
        chat messages or a list of token ids (used as they are). Raises UserError before
        any work for a request that cannot fit, naming it.
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
    ) -> Iterator[Completion]:
        """Yields each Completion as it finishes. See `generate`. The longest budgets
        start first, equal ones in the order of the call.

        Requests are checked when this is called, before the first completion is asked
        for; `names` is what to call them in messages (default: "prompt 0", ...). Samples
        for which `skip(prompt_index, sample)` holds are left out (a resumed run has them
        already). `progress` is told after each chunk, once its completions are out, how
        many tokens it gave; what it raises ends the stream.
        """
        requests = self._requests(prompts, params, names)
        for request in requests:
            samples = range(request.params.n)
            request.waiting = [j for j in samples if not skip(request.index, j)]
        return self._run(requests, progress)

    def release_cache(self) -> None:
        """Frees the cache's memory until the next call."""
        self._cache = None

    def encode(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """Token ids of a prompt, checked; see `generate`."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, Sequence | np.ndarray):
            raise UserError(
                f"{where} is {prompt!r}; give a text, chat messages or token ids"
            )
        if not len(prompt):
            raise UserError(f"{where} is empty; a response needs a token to start from")
        if all(isinstance(item, dict) for item in prompt):
            check_backslashes(prompt, where)
            try:
                prompt = self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        last = self.config.vocab_size - 1
        for token in prompt:
            is_integer = isinstance(token, int | np.integer)
            if isinstance(token, bool) or not is_integer or not 0 <= token <= last:
                raise UserError(
                    f"{where}: {token!r} is not a token id of this model (0 to {last})"
                )
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        names: Sequence[str] | None,
    ) -> list[_Request]:
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
        requests = [self._request(index, *triple) for index, triple in triples]
        cut = [request for request in requests if request.budget.was_cut]
        if cut:
            given, left = cut[0].params.thinking_budget, cut[0].budget.thinking
            print(
                f"note: the thinking budget is cut in {len(cut)} of {len(requests)} "
                f"requests (in the first from {given} to {left} tokens), so that the "
                f"solution fits cache_len={self.cache_len}",
                file=sys.stderr,
            )
        return requests

    def _request(
        self, index: int, prompt: Prompt, params: SamplingParams, where: str
    ) -> _Request:
        prompt_ids = self.encode(prompt, where)
        if THINK_END in params.end_of_thinking_text:
            raise UserError(
                f"{where}: end_of_thinking_text holds {THINK_END}, which is appended to "
                "it anyway; leave it out"
            )
        forced_ids = []
        if self.tokenizer.think_end_id is not None:
            try:
                text_ids = self.tokenizer.encode(params.end_of_thinking_text)
            except UserError as error:
                raise UserError(f"{where}: end_of_thinking_text: {error}") from None
            forced_ids = [*text_ids, self.tokenizer.think_end_id]
        budget = resolve_budget(
            params,
            len(prompt_ids),
            len(forced_ids),
            self.cache_len,
            where,
            can_think=bool(forced_ids),
        )
        return _Request(index, prompt_ids, params, budget, forced_ids, [])

    def _run(
        self, requests: list[_Request], progress: Callable[[int], None]
    ) -> Iterator[Completion]:
        assert self.params is not None, (
            "assign Engine.params before drawing completions"
        )
        weights, kv_dtype = prepare(self.params, self.kv_dtype, self.mesh)
        # XLA on a CPU copies the weights of a layer that it takes from a stack. A longer
        # prompt does not feel that, and would wait for a program per layer and bucket.
        alone = on_cpu(self.mesh) and self.mesh.size == 1
        step_weights = unstack(weights) if alone else weights
        self.stats = Stats()
        # The longest budgets start first, so that the slots come to their ends together
        # and none waits long for the last; equal ones start in the order of the call.
        queue = [request for request in requests if request.waiting][::-1]
        queue.sort(key=_most_tokens)
        active: list[_Active | None] = [None] * self.slots
        longest = max((len(r.forced_ids) for r in requests), default=0)
        rows = empty_rows(self.slots, next_power(longest, SHORTEST_FORCED))
        rows = jax.device_put(rows, replicated(self.mesh))
        think_end = self.tokenizer.think_end_id
        eos_ids = np.array(self.tokenizer.eos_ids, np.int32)
        ids = TokenIds(eos_ids, -1 if think_end is None else think_end)
        # Steps per look of the host: as many as take about a second, so that progress
        # shows and Ctrl-C works on a slow device too.
        num_steps = 8
        sizes = f"this model with {self.slots} slots of {self.cache_len} positions"
        advice = "lower slots or cache_len, or use more devices"
        with enough_memory(sizes, advice):
            # Kept for the next call only if all ends well: one key that is not finite
            # would spoil every later row of its slot.
            cache, self._cache = self._cache or self._new_cache(kv_dtype), None
            # Slots are refilled a few at a time, at a step that the rows decide and not
            # the clock: the same requests meet in the same slots whenever they run.
            few = max(1, self.slots // 16)
            while queue or any(active):
                if active.count(None) >= few:
                    cache, rows = self._refill(queue, active, weights, cache, rows)
                enough = few if queue else self.slots
                start = time.monotonic()
                cache, rows, chunk = decode(
                    self.config,
                    self.mesh,
                    step_weights,
                    ids,
                    cache,
                    rows,
                    enough,
                    num_steps,
                )
                chunk, state = jax.device_get((chunk, rows.state))
                seconds = (time.monotonic() - start) / max(int(chunk.num_steps), 1)
                num_steps = min(CHUNK_STEPS, max(1, int(_LOOK_SECONDS / seconds)))
                new_tokens = self._collect(chunk, state, active)
                yield from self._finished(state, active)
                progress(new_tokens)
            self._cache = cache

    def _refill(
        self,
        queue: list[_Request],
        active: list[_Active | None],
        weights: Params,
        cache: KVCache,
        rows: Rows,
    ) -> tuple[KVCache, Rows]:
        """Gives the free slots to the samples that wait; the queue's end comes first."""
        while queue and not all(active):
            cache, rows = self._admit(queue[-1], active, weights, cache, rows)
            if not queue[-1].waiting:
                queue.pop()
        return cache, rows

    def _finished(
        self, state: BudgetState, active: list[_Active | None]
    ) -> Iterator[Completion]:
        """The completions whose rows are done; their slots are free from then on."""
        for slot in np.flatnonzero(state.phase == DONE):
            item, active[slot] = active[slot], None
            if item is not None:
                final = jax.tree.map(lambda field, slot=slot: int(field[slot]), state)
                yield self._completion(item, final)

    def _admit(
        self,
        request: _Request,
        active: list[_Active | None],
        weights: Params,
        cache: KVCache,
        rows: Rows,
    ) -> tuple[KVCache, Rows]:
        """Starts as many samples of the request as there are free slots."""
        if request.prefix is None:
            kv_dtype = cache.k.dtype
            request.prefix = self._prefill(weights, request.prompt_ids, kv_dtype)
        free = [slot for slot, item in enumerate(active) if item is None]
        count = min(len(free), len(request.waiting))
        free, samples = free[:count], request.waiting[:count]
        request.waiting = request.waiting[count:]
        for slot, sample in zip(free, samples, strict=True):
            active[slot] = _Active(request, sample)
        slots = np.array(free + [0] * (self.slots - count), np.int32)
        new = _request_rows(request, free, samples, rows)
        cache, rows = admit(self.mesh, cache, request.prefix, rows, slots, count, new)
        if not request.waiting:
            request.prefix = None
        return cache, rows

    def _prefill(
        self, weights: Params, prompt_ids: list[int], kv_dtype: Any
    ) -> KVCache:
        length = len(prompt_ids) - 1  # the last one starts the decoding
        tokens = np.zeros((1, prefill_len(length, self.cache_len)), np.int32)
        tokens[0, :length] = prompt_ids[:-1]
        self.stats.prefills += 1
        return prefill(self.config, self.mesh, weights, tokens, length, kv_dtype)

    def _new_cache(self, kv_dtype: Any) -> KVCache:
        sizes = self.slots, self.cache_len
        cache = new_cache(self.config, self.mesh, *sizes, kv_dtype)
        return jax.block_until_ready(cache)

    def _collect(
        self, chunk: Chunk, state: BudgetState, active: list[_Active | None]
    ) -> int:
        """Appends a chunk's tokens to the completions; returns how many there were."""
        new_tokens = 0
        for slot, item in enumerate(active):
            if item is None:
                continue
            count = int(state.num_tokens[slot]) - len(item.token_ids)
            item.token_ids += chunk.tokens[slot, :count].tolist()
            item.logprobs += chunk.logprobs[slot, :count].tolist()
            item.forced += chunk.forced[slot, :count].tolist()
            new_tokens += count
        self.stats.decode_steps += int(chunk.num_steps)
        self.stats.slot_steps += int(chunk.num_steps) * self.slots
        self.stats.tokens += new_tokens
        return new_tokens

    def _completion(self, item: _Active, state: BudgetState) -> Completion:
        if not all(map(math.isfinite, item.logprobs)):
            raise UserError(
                "the model's logits are not finite; its checkpoint is damaged, or its "
                "dtype is too narrow"
            )
        thinking, solution, text = self._texts(item)
        return Completion(
            prompt_ids=item.request.prompt_ids,
            token_ids=item.token_ids,
            logprobs=item.logprobs,
            forced=item.forced,
            thinking=thinking,
            solution=solution,
            text=text,
            answer=extract_boxed(solution),
            thinking_tokens=int(state.thinking_tokens),
            solution_tokens=int(state.solution_tokens),
            thinking_end=THINKING_ENDS[int(state.end)],
            finish_reason=FINISH_REASONS[int(state.finish)],
            prompt_index=item.request.index,
            sample=item.sample,
        )

    def _texts(self, item: _Active) -> tuple[str, str, str]:
        """Thinking, solution, and the whole response, without a final EOS."""
        ids, decode_text = item.token_ids, self.tokenizer.decode
        if ids[-1] in self.tokenizer.eos_ids and not item.forced[-1]:
            ids = ids[:-1]
        if not item.request.forced_ids:  # a model without `</think>`
            return "", decode_text(ids), decode_text(ids)
        if self.tokenizer.think_end_id not in ids:
            return decode_text(ids), "", decode_text(ids)
        split = ids.index(self.tokenizer.think_end_id)
        thinking, solution = decode_text(ids[:split]), decode_text(ids[split + 1 :])
        return thinking, solution, thinking + THINK_END + solution


def _most_tokens(request: _Request) -> int:
    """The most tokens that a response can have."""
    budget, forced = request.budget, len(request.forced_ids)
    thinking = budget.thinking if forced else 0  # a model may have no `</think>`
    return min(budget.total, thinking + forced + budget.solution)


def _request_rows(
    request: _Request, free: list[int], samples: list[int], rows: Rows
) -> tuple[np.ndarray, Rows]:
    """Which rows are new, and their state, which differs in the sample's number only."""
    slots, width = rows.budget.forced_ids.shape
    is_new, sample = np.zeros(slots, bool), np.zeros(slots, np.int32)
    is_new[free], sample[free] = True, samples
    params, budget, forced_ids = request.params, request.budget, request.forced_ids
    padding = [0] * (width - len(forced_ids))

    def fill(value, dtype: Any = np.int32) -> Any:
        return np.tile(np.array(value, dtype), (slots, *[1] * np.ndim(value)))

    fresh = Rows(
        token=fill(request.prompt_ids[-1]),
        position=fill(len(request.prompt_ids) - 1),
        sampling=Sampling(
            temperature=fill(min(params.temperature, _MAX_FLOAT), np.float32),
            # The most probable token survives any cut: greedy rows need none.
            top_p=fill(params.top_p if params.temperature else 1, np.float32),
            top_k=fill(params.top_k if params.temperature else 0),
            seed=fill([params.seed & 0xFFFFFFFF, params.seed >> 32], np.uint32),
            sample=sample,  # type: ignore[arg-type]
        ),
        budget=Budget(
            thinking=fill(budget.thinking),
            solution=fill(budget.solution),
            total=fill(budget.total),
            plain=fill(budget.plain, bool),
            forced_ids=fill(forced_ids + padding),
            num_forced=fill(len(forced_ids)),
        ),
        state=start_state(fill(THINK if forced_ids else SOLVE)),
    )
    return is_new, fresh
