r"""The nano task: problems of the bundled models, and batches of solutions to fine-tune on.

A nano problem is text like `47a+5b*3c-8?`: a start value of two digits, then two to six
steps labelled a, b, ..., each an operator and a digit, all modulo 100. Its solution is
thought through in one of two styles, then boxed:

    verbose, 9 tokens a step   a47+5=52;b52*3=56;c56-8=48;
    terse, 5 tokens a step     a+552b*356c-848

Results have two digits in both. The box holds the plain integer (`\boxed{5}`, never
`\boxed{05}`), and so does the answer, so equal answers are equal strings.

Problems whose text has a CRC-32 divisible by 8 are held out: no training problem is
ever one of them, whatever the seed.

All that is random here depends on a seed and a position alone, so any element can be
made without the earlier ones: a position is all that a checkpoint needs to hold.
"""

import dataclasses
import functools
import operator
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from e1jax.config.sampling import stated_budgets
from e1jax.config.training import SFTConfig, StatedConfig, TraceMix
from e1jax.tokenizer import THINK_END, Tokenizer

if TYPE_CHECKING:
    import grain


LABELS = "abcdef"


WORDS = (r"\boxed{", "wait")  # single tokens of the nano tokenizer


NUM_IDS = 256 + 6 + len(WORDS)  # of that tokenizer: bytes, special tokens, words


MIN_STEPS = 2


MODULUS = 100


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


HELD_OUT_EVERY = 8


POOL_BATCHES = 8  # batches made at once, so that each can hold solutions of like length


# Batches are padded to one of these lengths, in tokens: each costs a compilation. The
# longest solution with its prompt is 226 tokens; stated budgets may add to it.
LENGTHS = (48, 64, 80, 96, 128, 160, 192, 232, 320)


# `tokens` [B, T] int32 and `loss_mask` [B, T] float32: 1 on a token that is learned.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NanoProblem:
    """A problem, its steps ("+5", ...) and its values: the start and every result."""

    steps: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def text(self) -> str:
        """The problem as it is written, such as `47a+5b*3?`."""
        steps = "".join(
            f"{a}{step}" for a, step in zip(LABELS, self.steps, strict=False)
        )
        return f"{self.values[0]:02}{steps}?"

    @property
    def answer(self) -> str:
        """The last result, modulo 100, without a leading zero."""
        return str(self.values[-1])

    @property
    def held_out(self) -> bool:
        """Whether the problem is for evaluation; training never sees it."""
        return zlib.crc32(self.text.encode()) % HELD_OUT_EVERY == 0

    def verbose(self) -> str:
        """Every step in full: label, value, operation, result."""
        parts = zip(LABELS, self.values, self.steps, self.values[1:], strict=False)
        return "".join(f"{a}{v:02}{step}={r:02};" for a, v, step, r in parts)

    def terse(self, first: int = 0) -> str:
        """Label, operation and result of each step from index `first` on."""
        parts = list(zip(LABELS, self.steps, self.values[1:], strict=False))[first:]
        return "".join(f"{a}{step}{r:02}" for a, step, r in parts)


def nano_problems(count: int, seed: int = 0, *, held_out: bool) -> list[NanoProblem]:
    """Distinct problems, all held out or all for training; equal seeds, equal lists."""
    rng = np.random.default_rng([seed, held_out])
    found: dict[str, NanoProblem] = {}
    while len(found) < count:
        problem = draw_problem(rng, held_out=held_out)
        found[problem.text] = problem
    return list(found.values())


def held_out_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct problems that no training run has seen: `problem` and `answer` texts."""
    problems = nano_problems(count, seed, held_out=True)
    return [{"problem": p.text, "answer": p.answer} for p in problems]


def draw_problem(rng: np.random.Generator, *, held_out: bool) -> NanoProblem:
    """A random problem: a quarter of its steps multiply, by 2 or 3."""
    while True:
        values, steps = [int(rng.integers(MODULUS))], []
        for _ in range(rng.integers(MIN_STEPS, len(LABELS) + 1)):
            sign = "*" if rng.random() < 0.25 else "+-"[rng.integers(2)]
            digit = int(rng.integers(2, 4) if sign == "*" else rng.integers(1, 10))
            steps.append(f"{sign}{digit}")
            values.append(APPLY[sign](values[-1], digit) % MODULUS)
        problem = NanoProblem(tuple(steps), tuple(values))
        if problem.held_out == held_out:
            return problem


def write_solution(
    problem: NanoProblem, mix: TraceMix, rng: np.random.Generator
) -> str:
    """A solution in the proportions of `mix`: thinking, `</think>`, recap, box.

    A re-check is `wait` and the complete pass again, in the same style. A recap repeats all
    steps, or (half of the time) the steps from a random one on, always in the terse style.
    """
    once = problem.terse() if rng.random() < mix.terse else problem.verbose()
    thinking = "wait".join([once] * (1 + rng.choice(3, p=mix.rechecks)))
    recap = ""
    if rng.random() < mix.recap:
        whole = rng.random() < 0.5
        recap = problem.terse(0 if whole else int(rng.integers(len(problem.steps))))
    return rf"{thinking}{THINK_END}{recap}\boxed{{{problem.answer}}}"


class Trace(NamedTuple):
    """A solution as token ids."""

    thinking: list[int]  # without </think>
    solution: list[int]  # after it, EOS included
    is_cut: bool = False  # by its budget: nobody chose its </think>


def encode_trace(solution: str, tokenizer: Tokenizer) -> Trace:
    """The tokens of `write_solution`'s text."""
    thinking, _, rest = solution.partition(THINK_END)
    return Trace(
        tokenizer.encode(thinking), [*tokenizer.encode(rest), tokenizer.eos_id]
    )


def cut_trace(
    problem: NanoProblem, trace: Trace, thinking_budget: int, tokenizer: Tokenizer
) -> Trace:
    """The trace with its thinking cut after so many tokens; its solution takes up, tersely,
    the first step that the thinking has not completed."""
    is_terse = trace.thinking[:2] == tokenizer.encode(problem.terse()[:2])
    completed = min(thinking_budget // (5 if is_terse else 9), len(problem.steps))
    rest = rf"{problem.terse(completed)}\boxed{{{problem.answer}}}"
    solution = [*tokenizer.encode(rest), tokenizer.eos_id]
    return Trace(trace.thinking[:thinking_budget], solution, is_cut=True)


def state_trace(
    problem: NanoProblem,
    trace: Trace,
    config: StatedConfig,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> tuple[Trace, tuple[int | None, int | None]]:
    """The trace, cut or not, and a pair of budgets that it keeps."""

    def budget(least: int, most: int) -> int | None:
        if rng.random() < config.unlimited or least > most:
            return None
        return int(rng.integers(least, most + 1))

    if rng.random() < config.cut:
        longest = min(len(trace.thinking), config.most_thinking)
        thinking = int(rng.integers(longest + 1))
        trace = cut_trace(problem, trace, thinking, tokenizer)
    else:
        thinking = budget(len(trace.thinking) + 1, config.most_thinking)
    return trace, (thinking, budget(len(trace.solution), config.most_solution))


class SFTBatches:
    """Random access to the batches of a fine-tuning run; batch i belongs to step i + 1.

    Solutions are made for 8 batches at a time and sorted by length, so that little of a
    batch is padding; the order of the 8 batches is random. The phases never share one.
    """

    def __init__(self, config: SFTConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.first_steps = round(config.steps * config.first_phase)
        self._pool = functools.lru_cache(maxsize=2)(self._make_pool)

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, index: int) -> Batch:
        second = index >= self.first_steps
        index -= self.first_steps if second else 0
        return self._pool(second, index // POOL_BATCHES)[index % POOL_BATCHES]

    def _make_pool(self, second: bool, pool: int) -> list[Batch]:
        mix = self.config.second if second else self.config.first
        rng = np.random.default_rng([self.config.seed, int(second), pool])
        rows = []
        for _ in range(POOL_BATCHES * mix.batch_size):
            problem = draw_problem(rng, held_out=False)
            trace = encode_trace(write_solution(problem, mix, rng), self.tokenizer)
            budgets = None, None
            if self.tokenizer.budget_text is not None:
                stated = self.config.stated
                trace, budgets = state_trace(
                    problem, trace, stated, self.tokenizer, rng
                )
            rows.append(
                self._row(encode_prompt(problem, self.tokenizer, budgets), trace)
            )
        rows.sort(key=lambda row: len(row[0]))
        starts = rng.permutation(POOL_BATCHES) * mix.batch_size
        return [
            pad_rows(rows[i : i + mix.batch_size], self.tokenizer.eos_id)
            for i in starts
        ]

    def _row(self, prompt: list[int], trace: Trace) -> tuple[list[int], list[int]]:
        """Token ids and mask of a prompt and its solution."""
        thinking, solution, is_cut = trace
        end = self.tokenizer.think_end_id
        assert end is not None
        learned = [1] * len(thinking) + [int(not is_cut)] + [1] * len(solution)
        return [*prompt, *thinking, end, *solution], [0] * len(prompt) + learned


def sft_batches(config: SFTConfig, tokenizer: Tokenizer) -> "grain.DatasetIterator":
    """Iterator over the batches of a run; its state, a position, restores it anywhere."""
    # Slow to load, and only training needs it.
    import grain

    dataset = grain.MapDataset.source(SFTBatches(config, tokenizer))
    # One thread, because a pool is made by whoever asks for its first batch.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=POOL_BATCHES)
    return iter(dataset.to_iter_dataset(options))


def encode_prompt(
    problem: NanoProblem,
    tokenizer: Tokenizer,
    budgets: tuple[int | None, int | None] = (None, None),
) -> list[int]:
    """Ids of the chat template around the problem's text, up to where thinking begins;
    before it the budgets, if the tokenizer has a text that states them."""
    text = problem.text
    if tokenizer.budget_text is not None:
        text = stated_budgets(tokenizer.budget_text, *budgets) + text
    return tokenizer.encode_chat([{"role": "user", "content": text}])


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """A batch of (token ids, mask) rows, left-aligned, padded to one of `LENGTHS`."""
    longest = max(len(ids) for ids, _ in rows)
    length = next(length for length in LENGTHS if length >= longest)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, (ids, ones) in enumerate(rows):
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = ones
    return {"tokens": tokens, "loss_mask": mask}
