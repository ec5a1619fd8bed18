"""Prompts of problems, and endless batches of them (Grain).

The order of an epoch depends on its number and a seed alone, so a position in the
stream is all that a checkpoint needs to hold.
"""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from e1jax.config.checks import UserError
from e1jax.data.problems import Problem
from e1jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain


# Of the released E1 recipe, and of DeepScaleR before it.
DEFAULT_INSTRUCTION = (
    r"Let's think step by step and output the final answer within \boxed{}."
)


def default_instruction(tokenizer: Tokenizer) -> str:
    """The sentence that ends a prompt: as recorded with the model, else the reference's."""
    if tokenizer.instruction is None:
        return DEFAULT_INSTRUCTION
    return tokenizer.instruction


def prompt_text(problem: str, instruction: str) -> str:
    """The user's message: the problem, a space, the instruction if there is one."""
    return f"{problem} {instruction}" if instruction else problem


def request_seed(seed: int, *index: int) -> int:
    """A seed of 64 bits for one of the requests of a run, which one or several numbers
    name; equal seeds would share their draws."""
    return int(np.random.SeedSequence([seed, *index]).generate_state(1, np.uint64)[0])


class EncodedProblem(NamedTuple):
    """A problem as its prompt's token ids, chat template included."""

    prompt_ids: list[int]
    answers: tuple[str, ...]
    text: str = ""  # the user's message, without the budgets that the ids state


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    instruction: str,
    max_prompt_len: int,
    statement: str = "",
) -> tuple[list[EncodedProblem], int]:
    """The problems whose prompts have at most `max_prompt_len` tokens, in their order,
    and how many are longer and left out. Every message begins with the `statement`.

    Raises UserError if none is left, or if the tokenizer has no chat template.
    """
    encoded = []
    for problem in problems:
        text = prompt_text(problem.text, instruction)
        ids = tokenizer.encode_chat([{"role": "user", "content": statement + text}])
        encoded.append(EncodedProblem(ids, problem.answers, text))
    kept = [e for e in encoded if len(e.prompt_ids) <= max_prompt_len]
    if not kept:
        shortest = min(len(e.prompt_ids) for e in encoded)
        raise UserError(
            f"no prompt has at most max_prompt_len={max_prompt_len} tokens; the shortest "
            f"of the {len(encoded)} has {shortest}"
        )
    return kept, len(encoded) - len(kept)


class Prompt(NamedTuple):
    """A prompt to be answered in training."""

    position: int  # in the stream of all prompts of the run, over all epochs
    index: int  # of the problem, among the kept ones
    prompt_ids: list[int]
    answers: tuple[str, ...]
    text: str = ""  # as in EncodedProblem


def prompt_batches(
    kept: Sequence[EncodedProblem],
    *,
    prompts: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> "grain.DatasetIterator[list[Prompt]]":
    """Endless batches; every epoch holds each problem once, in an order of its own.

    A batch of `prompts` is shared out among the processes: of the positions i * prompts
    to (i + 1) * prompts - 1, process p of P takes every P-th from the p-th on. The state
    is the number of batches read, so it restores the iterator of any process, also where
    their number has changed.
    """
    if prompts % processes:
        raise UserError(
            f"a batch of {prompts} prompts cannot be shared out evenly among "
            f"{processes} processes; choose a multiple of {processes}"
        )

    # Not Grain's own shuffle: of few problems, it takes milliseconds for each.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(kept))

    def prompt(position: int) -> Prompt:
        epoch, place = divmod(position, len(kept))
        index = int(order(epoch)[place])
        return Prompt(position, index, *kept[index])

    def batch(number: int) -> list[Prompt]:
        first, end = number * prompts + process, (number + 1) * prompts
        return [prompt(position) for position in range(first, end, processes)]

    # Slow to load, and only training needs it.
    import grain

    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    # Made when asked for: nothing here is worth a thread.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.to_iter_dataset(options))
