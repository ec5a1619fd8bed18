"""Rows that several examples share, packed by Grain."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from e1jax.data.examples import Example

if TYPE_CHECKING:
    import grain


class Rows(NamedTuple):
    """Rows of T tokens; on the devices [M, B, T], the micro-batches of a step."""

    tokens: Any  # [B, T] int32
    positions: Any  # [B, T] int32: from 0 in each example
    segments: Any  # [B, T] int32: the example of the row, from 1; 0 is padding
    loss_mask: Any  # [B, T] bool: the tokens that are learned


class Packed(NamedTuple):
    """The rows of a step."""

    rows: Rows
    passed: int  # examples in this and all earlier steps
    tokens: int  # in these rows, without padding


def packed_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_len: int,
    seed: int,
    epochs: int | None,
) -> "grain.DatasetIterator[Packed]":
    """Batches of `batch_size` rows of `max_len` tokens, none of which the examples are
    longer than.

    Every epoch holds each example once, in an order of its own (None: endless epochs). An
    example goes into the first row of its batch that has room; if none has, the batch is
    complete. Rows that the last batch lacks are padding. The state, as JSON, restores the
    iterator of any process: all of them pack the same rows.
    """

    # Not Grain's own shuffle: of few examples, it takes milliseconds for each.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(examples))

    def element(position: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(position, len(examples))
        example = examples[order(epoch)[place]]
        count = np.full(len(example.token_ids), position + 1)
        return {
            "tokens": example.token_ids,
            "loss_mask": example.loss_mask,
            "passed": count,
        }

    def packed(batch: dict[str, np.ndarray]) -> Packed:
        names = ("tokens", "tokens_positions", "tokens_segment_ids", "loss_mask")
        missing = batch_size - len(batch["tokens"])
        rows = Rows(*(np.pad(batch[name], ((0, missing), (0, 0))) for name in names))
        tokens = int((rows.segments > 0).sum())
        return Packed(rows, int(batch["passed"].max()), tokens)

    # Slow to load, and only training needs it.
    import grain

    total = sys.maxsize if epochs is None else epochs * len(examples)
    # Made when asked for: nothing here is worth a thread.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parts = ("tokens", "loss_mask", "passed")
    batches = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.range(total).map(element).to_iter_dataset(options),
        length_struct=dict.fromkeys(parts, max_len),
        num_packing_bins=batch_size,
        shuffle_bins=False,
        meta_features=parts[1:],
    ).batch(batch_size)
    return iter(batches.map(packed))
