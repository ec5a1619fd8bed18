"""Responses of a step: sampled, graded and laid out as micro-batches."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from e1jax.checkpoint.load import LoadedModel
from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams, stated_budgets
from e1jax.config.training import GRPOConfig, budget_name
from e1jax.data.problems import load_problems
from e1jax.data.prompts import EncodedProblem, Prompt, encode_problems, request_seed
from e1jax.grpo.cuts import CutStream, cut_advantages, cut_requests
from e1jax.grpo.loss import group_advantages
from e1jax.nn.model import abstract_params
from e1jax.rewards import Grader, RewardFunction, call_function, grade
from e1jax.sampling.completion import Completion
from e1jax.sampling.engine import Engine
from e1jax.sampling.request import Following
from e1jax.sharding.hosts import (
    allgather_rows,
    divided_devices,
    is_first,
    local_mesh,
    process_allgather,
)
from e1jax.sharding.mesh import make_mesh, note_undivided
from e1jax.tokenizer import Tokenizer
from e1jax.training import computed_in

# The prompts of a step are padded to one of this many lengths, and its responses too: each
# pair is a compilation.
NUM_LENGTHS = 4


TILE = 128  # positions


_BUDGET_DRAWS = 1  # beside the seeds of requests, which are drawn from two numbers


class Batch(NamedTuple):
    """Responses of a step or a mini-batch: M micro-batches of B rows, sharded over
    `data`."""

    tokens: Any  # [M, B, T] int32: prompt, response, padding
    prompt_len: Any  # [M, B] int32
    advantages: Any  # [M, B] float32; with cuts of each token, [M, B, R]
    loss_mask: Any  # [M, B, R] bool: the response tokens that are learned
    old_logprobs: Any  # [M, B, R] float32
    ref_logprobs: Any = None  # [M, B, R] float32, where the divergence counts


def read_examples(
    config: GRPOConfig, loaded: LoadedModel, instruction: str
) -> list[EncodedProblem]:
    """The problems to train on, as token ids, with the longest statement of budgets."""
    problems = load_problems(config.data.problems)
    longest = config.data.max_prompt_len
    *_, statement = statements(config, loaded.tokenizer)
    examples, dropped = encode_problems(
        problems, loaded.tokenizer, instruction, longest, statement
    )
    if dropped and is_first():
        print(
            f"note: {dropped} of {len(problems)} prompts have more than {longest} "
            "tokens and are left out",
            file=sys.stderr,
        )
    return examples


def statements(config: GRPOConfig, tokenizer: Tokenizer) -> list[str]:
    """How each pair of budgets that can be drawn is stated, by the number of tokens;
    [""] if budgets are not."""
    text = tokenizer.budget_text
    if text is None:
        return [""]
    stated = dict.fromkeys(stated_budgets(text, *pair) for pair in config.rollout.pairs)
    return sorted(stated, key=lambda statement: len(tokenizer.encode(statement)))


def prompt_lengths(
    config: GRPOConfig, tokenizer: Tokenizer, examples: Sequence[EncodedProblem]
) -> tuple[int, int]:
    """Tokens of the shortest and of the longest prompt, whatever budgets it states."""
    lengths = [len(example.prompt_ids) for example in examples]
    stated = [len(tokenizer.encode(s)) for s in statements(config, tokenizer)]
    return max(1, min(lengths) - (stated[-1] - stated[0])), max(lengths)


def make_engine(
    config: GRPOConfig, loaded: LoadedModel, examples: Sequence[EncodedProblem]
) -> Engine:
    """The engine that samples for training; it has no parameters yet.

    Raises UserError if its cache is too short for a prompt and both budgets.
    """
    rollout, data = config.rollout, loaded.mesh.shape["data"]
    if config.update.microbatch % data:
        raise UserError(
            f"update.microbatch={config.update.microbatch} is not a multiple of the "
            f"mesh's data={data}; change one of them"
        )
    longest_prompt = max(len(example.prompt_ids) for example in examples)
    cache_len = rollout_cache_len(config, longest_prompt)
    mesh = sampling_mesh(config, loaded)
    if mesh.shape != loaded.mesh.shape:
        shapes = abstract_params(loaded.config, mesh, computed_in(config))
        note_undivided(loaded.config, shapes)
    engine = Engine(
        loaded.config,
        params=None,
        tokenizer=loaded.tokenizer,
        mesh=mesh,
        cache_len=cache_len,
        slots=rollout.slots,
    )
    # Refuses budgets that do not fit the model now, not after the weights are read.
    engine.stream([[0] * longest_prompt], rollout_request(config, 0), names=["rollout"])
    return engine


def sampling_mesh(config: GRPOConfig, loaded: LoadedModel) -> Mesh:
    """The mesh of this process's engine: its own devices out of the mesh of the updates, or
    the ones that `rollout_mesh` sets apart."""
    if config.rollout_mesh is None:
        return local_mesh(loaded.config, loaded.mesh)
    _, devices = divided_devices(config.rollout_mesh)
    return make_mesh(config.rollout_mesh, loaded.config, devices)


def rollout_cache_len(config: GRPOConfig, longest_prompt: int) -> int:
    """Positions of a slot: as the configuration says, else as many as are needed.

    Raises UserError if they are too few for such a prompt and both budgets.
    """
    rollout = config.rollout
    needed = longest_prompt + least_room(config)
    if rollout.cache_len is None:
        return needed
    if rollout.cache_len < needed:
        budgets = list(rollout.cuts) or rollout.thinking_budget
        raise UserError(
            f"rollout.cache_len={rollout.cache_len} is too short for a prompt of "
            f"{longest_prompt} tokens, budgets of {budgets} and "
            f"{rollout.solution_budget} and </think>; {needed} is enough"
        )
    return rollout.cache_len


def least_room(config: GRPOConfig) -> int:
    """Positions that a slot has for the response at least: for both budgets and
    `</think>`. An unlimited solution gets one token or more."""
    rollout = config.rollout
    thinking = max(budget or 0 for budget in rollout.thinking_budgets)
    return thinking + 1 + max(1 if s is None else s for s in rollout.solution_budgets)


def longest_lengths(
    config: GRPOConfig, cache_len: int, shortest_prompt: int, longest_prompt: int
) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest response that can come. With cuts,
    a thought is a response, and the prompt of its solutions, `</think>` included."""
    if cuts := config.rollout.cuts:
        thought = cuts[-1] + 1
        solution = config.rollout.solution_budgets[0] or 0
        return longest_prompt + thought, max(thought, solution)
    if config.rollout.is_unlimited:
        return longest_prompt, cache_len - shortest_prompt
    return longest_prompt, least_room(config)


class Rollouts(NamedTuple):
    """The responses of a step with their rewards, prompt by prompt."""

    # N x G; with cuts each thought and then its solutions, whose rewards alone are given
    completions: list[Completion]
    rewards: np.ndarray  # [N, G] float32
    metrics: dict[str, float]
    # [P, 5], of each pair of budgets that can be drawn: the number of responses, and sums
    # over them, see `pair_sums`
    of_pairs: np.ndarray
    seconds: float = 0.0  # of sampling and grading


def sample_rollouts(
    config: GRPOConfig,
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader,
    stop_if_asked: Callable[[int], None],
    function: RewardFunction | None = None,
) -> Rollouts:
    """Samples the responses of a step and grades each while others are sampled.

    With a `function`, that gives the rewards, once all are sampled.
    """

    def follow(thought: Completion) -> list[Following]:
        position = prompts[thought.prompt_index].position
        return cut_requests(config, thought, position, len(prompts))

    start = time.perf_counter()
    failures = dict(grader.failures)
    cut = CutStream(config.rollout, len(prompts), engine.tokenizer)
    states = engine.tokenizer.budget_text is not None  # of each prompt, by its pair
    stream = engine.stream(
        [prompt.text if states else prompt.prompt_ids for prompt in prompts],
        [rollout_request(config, prompt.position) for prompt in prompts],
        progress=stop_if_asked,
        follow=follow if config.rollout.cuts else None,
    )
    if config.rollout.cuts:
        stream = cut.responses(stream)
    answers = [prompt.answers for prompt in prompts]
    if function is None:
        graded = list(grade(stream, answers, grader))
    else:
        given = list(stream)
        accepted = [answers[completion.prompt_index] for completion in given]
        rewards = call_function(function, given, accepted)
        graded = list(zip(given, rewards, strict=True))
    graded.sort(key=lambda pair: (pair[0].prompt_index, pair[0].sample))
    completions = [completion for completion, _ in graded]
    base = np.array([reward for _, reward in graded], np.float32)
    costs = [length_cost(config, completion) for completion in completions]
    rewards = np.where(base == 1, base - np.array(costs, np.float32), base)
    base, rewards = (x.reshape(len(prompts), -1) for x in (base, rewards))
    seconds = time.perf_counter() - start
    metrics = rollout_metrics(completions, rewards, base == 1) | {
        "reward_timeouts": grader.failures["timeout"] - failures["timeout"],
        "reward_crashes": grader.failures["crash"] - failures["crash"],
        "rollout_waste": 1 - engine.stats.tokens / engine.stats.slot_steps,
        "rollout_tokens_per_second": engine.stats.tokens / seconds,
    }
    if config.rollout.cuts:
        pairs = list(range(len(config.rollout.cuts))) * len(prompts)
        pairs *= config.rollout.samples
    else:
        pairs = [drawn_pair(config, prompt.position) for prompt in prompts]
    by_pair = (x.reshape(len(pairs), -1) for x in (rewards, base == 1))
    sums = pair_sums(config, pairs, completions, *by_pair)
    rows = cut.rows() if config.rollout.cuts else completions
    return Rollouts(rows, rewards, metrics, sums, seconds)


def length_cost(config: GRPOConfig, completion: Completion) -> float:
    """Taken off the reward of a right answer, by its sampled tokens."""
    sampled = completion.thinking_tokens + completion.solution_tokens
    return config.reward.length_cost * sampled / 1000


def drawn_pair(config: GRPOConfig, position: int) -> int:
    """The index among `rollout.pairs` of the budgets of a prompt's responses, drawn from
    the run's seed and the prompt's position in the stream alone."""
    rng = np.random.default_rng([config.seed, position, _BUDGET_DRAWS])
    return int(rng.integers(len(config.rollout.pairs)))


def num_unequal(parts: Sequence[Rollouts]) -> int:
    """Prompts whose responses have unequal rewards."""
    return sum(int((p.rewards != p.rewards[:, :1]).any(axis=1).sum()) for p in parts)


def unequal_groups(
    config: GRPOConfig, parts: Sequence[Rollouts], count: int
) -> Rollouts:
    """Of several rollouts, the first `count` groups with unequal rewards (DAPO, arXiv
    2503.14476, section 3.2), then equal ones if these are too few. Metrics are of all."""
    rewards = np.concatenate([part.rewards for part in parts])
    completions = [c for part in parts for c in part.completions]
    is_equal = (rewards == rewards[:, :1]).all(axis=1)
    chosen = np.sort(np.argsort(is_equal, kind="stable")[:count])
    count = config.rollout.responses
    kept = [completions[g * count + j] for g in chosen for j in range(count)]
    names = parts[0].metrics
    metrics = {n: float(np.mean([part.metrics[n] for part in parts])) for n in names}
    metrics |= {
        "sampled_batches": float(len(parts)),
        "kept_mixed": float(1 - is_equal[chosen].mean()),
    }
    of_pairs = np.sum([part.of_pairs for part in parts], axis=0)
    seconds = sum(part.seconds for part in parts)
    return Rollouts(kept, rewards[chosen], metrics, of_pairs, seconds)


def rollout_request(config: GRPOConfig, position: int) -> SamplingParams:
    """How the prompt at a position of the stream is sampled in training; with cuts, the
    thoughts alone."""
    if config.rollout.cuts:
        thinking, solution = config.rollout.cuts[-1], 0
    else:
        thinking, solution = config.rollout.pairs[drawn_pair(config, position)]
    return SamplingParams(
        thinking,
        solution,
        n=config.rollout.samples,
        temperature=config.rollout.temperature,
        top_p=1.0,  # a ratio of probabilities needs the full distribution
        seed=request_seed(config.seed, position),
    )


def rollout_metrics(
    completions: Sequence[Completion], rewards: np.ndarray, is_right: np.ndarray
) -> dict[str, float]:
    """Means over responses; `solved` and `mixed` are shares of prompts. `is_right` is
    [N, G], as the rewards are."""

    def mean(value: Callable[[Completion], float]) -> float:
        return float(np.mean([value(completion) for completion in completions]))

    return {
        "reward": float(rewards.mean()),
        "accuracy": float(is_right.mean()),
        "solved": float(is_right.any(axis=1).mean()),
        "mixed": float((rewards.std(axis=1) > 0).mean()),  # the rest teaches nothing
        "response_tokens": mean(lambda c: len(c.token_ids)),
        "thinking_tokens": mean(lambda c: c.thinking_tokens),
        "solution_tokens": mean(lambda c: c.solution_tokens),
        "forced_share": mean(lambda c: any(c.forced)),
        "unfinished_share": mean(lambda c: c.finish_reason != "stop"),
    }


_SUMS = ("reward", "accuracy", "response_tokens", "forced_share")


def pair_sums(
    config: GRPOConfig,
    drawn: Sequence[int],
    completions: Sequence[Completion],
    rewards: np.ndarray,
    is_right: np.ndarray,
) -> np.ndarray:
    """[P, 5]: of each pair of budgets the number of responses and the sums of _SUMS;
    `drawn` are the pairs of N prompts."""
    tokens = np.array([len(c.token_ids) for c in completions]).reshape(rewards.shape)
    forced = np.array([any(c.forced) for c in completions]).reshape(rewards.shape)
    values = np.ones_like(rewards), rewards, is_right, tokens, forced
    sums = np.zeros((len(config.rollout.pairs), len(values)))
    np.add.at(sums, list(drawn), np.stack([v.sum(axis=1) for v in values], axis=1))
    return sums


def pair_metrics(config: GRPOConfig, of_pairs: np.ndarray) -> dict[str, float]:
    """Means over the responses of each pair that the step has, like `reward_32_28`, if
    several can be drawn; `of_pairs` as `pair_sums` gives them, of all processes."""
    pairs = config.rollout.pairs
    if len(pairs) == 1:
        return {}
    return {
        f"{name}_{budget_name(*pair)}": float(value / count)
        for pair, (count, *sums) in zip(pairs, of_pairs, strict=True)
        for name, value in zip(_SUMS, sums, strict=True)
        if count
    }


def mean_over_processes(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of the step from the metrics of each process; all processes have equally
    many responses."""
    summed = ("reward_timeouts", "reward_crashes", "rollout_tokens_per_second")
    return {
        name: float(each.sum() if name in summed else each.mean())
        for name, each in zip(
            metrics, process_allgather(list(metrics.values())).T, strict=True
        )
    }


def make_batch(
    config: GRPOConfig, rollouts: Rollouts, longest_prompt: int, longest_response: int
) -> Batch:
    """Rollouts as arrays, of few different shapes, in the order of the prompts' stream;
    of several processes, each gets the rows of all.

    Masks follow from lengths and from `forced`, never from token ids.
    """
    completions = rollouts.completions
    lengths = [(len(c.prompt_ids), len(c.token_ids)) for c in completions]
    lengths = np.array(lengths, np.int32)
    own = lengths.max(axis=0)
    if cuts := config.rollout.cuts:  # room for a solution to the longest thought
        own[0] = lengths[:: 1 + config.rollout.solutions, 0].max() + cuts[-1] + 1
    of_step = process_allgather(own).max(axis=0).astype(int).tolist()
    length, response_len = padded_lengths((longest_prompt, longest_response), of_step)
    shape = (len(completions), response_len)
    tokens = np.zeros((len(completions), length), np.int32)
    mask, logprobs = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, c in enumerate(completions):
        ids = c.prompt_ids + c.token_ids
        tokens[row, : len(ids)] = ids
        logprobs[row, : len(c.logprobs)] = c.logprobs
        mask[row, : len(c.forced)] = config.loss.train_on_forced | ~np.array(c.forced)
    if config.rollout.cuts:
        advantages = cut_advantages(
            config.rollout, rollouts.rewards, completions, response_len
        )
    else:
        scale = config.loss.scale_rewards
        advantages = np.asarray(group_advantages(rollouts.rewards, scale=scale))
        advantages = advantages.reshape(-1)
    batch = Batch(tokens, lengths[:, 0], advantages, mask, logprobs)
    batch = allgather_rows(batch, config.rollout.responses)
    micro = config.update.microbatch
    return jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]), batch)


def padded_lengths(longest: Sequence[int], of_step: Sequence[int]) -> tuple[int, int]:
    """T and R of a step's arrays, where `longest` are the tokens of the longest prompt and
    response that can come, and `of_step` of the longest ones in the step.

    Prompts of a tile and less are all padded to the longest. The model sees T - 1 tokens,
    as the last one predicts nothing; where these are many, they fill tiles of a TPU.
    """

    def padded(length: int, longest: int, unit: int) -> int:
        unit = max(unit, -(-longest // NUM_LENGTHS))
        return min(-(-length // unit) * unit, longest)

    # A shorter statement of budgets may, by its tokenizer, take more tokens.
    prompt_len = padded(of_step[0], max(longest[0], of_step[0]), TILE)
    response_len = 1 + padded(max(1, of_step[1] - 1), longest[1] - 1, 1)
    seen = prompt_len + response_len - 1
    if seen > 4 * TILE:
        seen = -(-seen // TILE) * TILE
    return seen + 1, response_len
