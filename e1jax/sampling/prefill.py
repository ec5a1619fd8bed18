"""How the prompts of waiting requests are prefilled: several short ones at a time, a long
live one in pieces, and a live one whose beginning is in a slot from there on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from e1jax.config.model import ModelConfig
from e1jax.nn.cache import KVCache
from e1jax.nn.model import compute_dtype
from e1jax.nn.quantize import Params
from e1jax.nn.scores import BLOCK_LEN
from e1jax.sampling.decode import (
    PREFILL_LEN,
    empty_prefix,
    extend,
    most_prompts,
    next_power,
    prefill,
    prefill_len,
    prefix_step,
    read_prefix,
)
from e1jax.sampling.scheduler import Scheduler, Waiting, common_tokens
from e1jax.sharding.mesh import on_cpu


class Prefiller(NamedTuple):
    """A model as prompts go through it, and the requests that wait."""

    config: ModelConfig
    mesh: Mesh
    params: Params  # as `decode.prepare` gives them
    cache: KVCache  # of all slots
    cache_len: int
    scheduler: Scheduler

    @property
    def piece(self) -> int:
        """Tokens of waiting prompts that are prefilled at a time while samples run. For a
        CPU, which computes all the time, a token of a prompt is as much work as one of a
        running sample."""
        return BLOCK_LEN if on_cpu(self.mesh) else PREFILL_LEN

    def next_group(self, room: int) -> list[Waiting]:
        """The first request of the queue, and others to be prefilled with it.

        The others have prompts of the same bucket and free slots for all samples; together
        they have at most `room` tokens. A live prompt that begins as one in a slot, or as
        one of the group, is left out: it takes its beginning from a slot later.
        """
        head, *behind = self.scheduler.next_requests()
        group, room = [head], room - head.length
        if head.prefix is not None or room < 0 or self._is_begun(head, []):
            return group
        most = self._most_prompts(head)
        for waiting in behind:
            if len(group) == most:
                break
            fits = self._kind(waiting) == self._kind(head) and waiting.length <= room
            if fits and not self._is_begun(waiting, group):
                group.append(waiting)
                room -= waiting.length
        return group[: fullest_group(len(group))]

    def fill(self, group: Sequence[Waiting], room: int) -> int:
        """Brings keys and values of a group's prompts into a prefix, all of them, or of a
        single prompt up to about `room` tokens; returns the number of tokens."""
        head = group[0]
        if head.prefix is None and head.request.is_live:
            self._reuse(head)
        if head.prefix is None and head.length <= room:
            return self._fill_at_once(group)
        return self._fill_further(head, room)

    def _fill_at_once(self, group: Sequence[Waiting]) -> int:
        longest = max(waiting.length for waiting in group)
        tokens = self._tokens(group)
        prefix = prefill(*self._model, tokens, longest, self.cache.k.dtype)
        for row, waiting in enumerate(group):
            waiting.prefix, waiting.row, waiting.filled = prefix, row, waiting.length
        return sum(waiting.length for waiting in group)

    def _fill_further(self, waiting: Waiting, room: int) -> int:
        if waiting.prefix is None:
            bucket, dtype = self._bucket(waiting), self.cache.k.dtype
            waiting.prefix = empty_prefix(self.config, self.mesh, bucket, dtype)
        start = waiting.filled
        # To the end of a piece, where the next one can start.
        pieces = start // self.piece + max(1, room // self.piece)
        stop = min(waiting.length, pieces * self.piece)
        tokens = self._tokens([waiting])
        waiting.prefix = extend(*self._model, tokens, start, stop, waiting.prefix)
        waiting.filled = stop
        return stop - start

    def _reuse(self, waiting: Waiting) -> None:
        """Takes the beginning of a prompt from the slot that holds most of it."""
        slot, common = self.scheduler.longest_prefix(waiting.request.prompt_ids)
        bucket = self._bucket(waiting)
        step = prefix_step(bucket)
        common = min(common, waiting.length) // step * step
        if common:
            slots = len(self.scheduler.slots)
            waiting.prefix = read_prefix(self.mesh, slots, bucket, self.cache, slot)
            waiting.filled = waiting.cached_tokens = common
            if 2 * common >= len(self.scheduler.held[slot]):
                waiting.goes_on = slot

    def _is_begun(self, waiting: Waiting, group: Sequence[Waiting]) -> bool:
        """Whether `_reuse` finds a beginning of the prompt, once the group has slots."""
        if not waiting.request.is_live:
            return False
        prompt_ids = waiting.request.prompt_ids
        common = [common_tokens(prompt_ids, w.request.prompt_ids) for w in group]
        common.append(self.scheduler.longest_prefix(prompt_ids)[1])
        return min(max(common), waiting.length) >= prefix_step(self._bucket(waiting))

    def _kind(self, waiting: Waiting) -> tuple[int, bool]:
        return self._bucket(waiting), waiting.request.is_live

    def _bucket(self, waiting: Waiting) -> int:
        return prefill_len(waiting.length, self.cache_len)

    def _most_prompts(self, waiting: Waiting) -> int:
        dtype = compute_dtype(self.params)
        return most_prompts(self.config, self.mesh, dtype, self._bucket(waiting))

    def _tokens(self, group: Sequence[Waiting]) -> np.ndarray:
        """The prompts' tokens, one prompt a row, and rows of padding up to a power of two."""
        rows = next_power(len(group), 1)
        tokens = np.zeros((rows, self._bucket(group[0])), np.int32)
        for row, waiting in enumerate(group):
            tokens[row, : waiting.length] = waiting.request.prompt_ids[:-1]
        return tokens

    @property
    def _model(self) -> tuple[ModelConfig, Mesh, Params]:
        return self.config, self.mesh, self.params


def fullest_group(count: int) -> int:
    """How many of `count` prompts are prefilled at a time: all, unless more than a quarter of
    the rows would be padding."""
    rows = next_power(count, 1)
    return count if 4 * count >= 3 * rows else rows // 2
