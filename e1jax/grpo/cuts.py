"""Several cuts of one thought (`rollout.cuts`), after AnytimeReasoner, arXiv 2505.13438.

A thought is sampled once, under the largest budget. At each of M budgets it is cut, its end
forced, and K solutions are sampled from there. A thought that has ended by then is not cut:
its own end stands, and all budgets from there on share one state, of which K solutions are
sampled for each. So there are always M * K solutions to a thought.

A solution is compared with the others from its state; a part of a thought, from one cut to
the next, by the rewards behind it with those before it: Budget Relative Policy
Optimization (BRPO). N are prompts, G thoughts to each.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from e1jax.config.sampling import SamplingParams
from e1jax.config.training import GRPOConfig, RolloutConfig
from e1jax.data.prompts import request_seed
from e1jax.sampling.completion import Completion
from e1jax.sampling.request import Following
from e1jax.tokenizer import THINK_END, Tokenizer

# How much a cut counts in the baseline, next to the cut before it: the later ones know more.
GROWTH = 2.0


def seen_tokens(thought: Completion, cut: int) -> int:
    """Tokens of the thought before `</think>`, where it is cut at a budget."""
    return min(cut, len(thought.token_ids) - 1)


def cut_requests(
    config: GRPOConfig, thought: Completion, position: int, num_prompts: int
) -> list[Following]:
    """The requests for the solutions to a thought: one of each state, whose samples are
    those of its cuts in turn. Their index is `num_prompts` or more: see `_place_of`."""
    rollout = config.rollout
    seen = [seen_tokens(thought, cut) for cut in rollout.cuts]
    number = thought.prompt_index * rollout.samples + thought.sample
    requests = []
    for tokens in sorted(set(seen)):
        first = seen.index(tokens)
        params = SamplingParams(
            None,
            rollout.solution_budget,  # type: ignore[arg-type]
            n=seen.count(tokens) * rollout.solutions_per_cut,
            temperature=rollout.temperature,
            top_p=1.0,
            seed=request_seed(config.seed, position, thought.sample, first),
        )
        prompt_ids = thought.prompt_ids + thought.token_ids[:tokens]
        prompt_ids = [*prompt_ids, thought.token_ids[-1]]
        index = num_prompts + number * len(rollout.cuts) + first
        requests.append(Following(index, prompt_ids, params))
    return requests


def _place_of(
    rollout: RolloutConfig, solution: Completion, num_prompts: int
) -> tuple[int, int, int, int]:
    """Prompt, thought, cut and number of a solution that was sampled for `cut_requests`."""
    number, first = divmod(solution.prompt_index - num_prompts, len(rollout.cuts))
    beyond, sample = divmod(solution.sample, rollout.solutions_per_cut)
    return *divmod(number, rollout.samples), first + beyond, sample


class CutStream:
    """The stream of an engine that samples thoughts and `cut_requests`: gives responses,
    and keeps the thoughts and solutions that they are made of."""

    def __init__(self, rollout: RolloutConfig, num_prompts: int, tokenizer: Tokenizer):
        self.rollout, self.num_prompts = rollout, num_prompts
        self.tokenizer = tokenizer
        self._thoughts: dict[tuple[int, int], Completion] = {}
        self._solutions: dict[tuple[int, int, int, int], Completion] = {}

    def responses(self, stream: Iterable[Completion]) -> Iterator[Completion]:
        """Each solution as a response to the prompt, as if sampled under its cut; the
        samples of a prompt are numbered thought by thought, cut by cut."""
        for completion in stream:
            if completion.prompt_index < self.num_prompts:
                place = completion.prompt_index, completion.sample
                self._thoughts[place] = completion
                continue
            place = _place_of(self.rollout, completion, self.num_prompts)
            self._solutions[place] = completion
            thought, cut = self._thoughts[place[:2]], self.rollout.cuts[place[2]]
            sizes = self.rollout.samples, len(self.rollout.cuts)
            sizes = *sizes, self.rollout.solutions_per_cut
            response = cut_response(thought, cut, completion, self.tokenizer)
            yield dataclasses.replace(
                response,
                prompt_index=place[0],
                sample=int(np.ravel_multi_index(place[1:], sizes)),
            )

    def rows(self) -> list[Completion]:
        """Each thought, and after it its solutions, cut by cut."""
        rows: list[Completion] = []
        for place in sorted(self._thoughts):
            rows.append(self._thoughts[place])
            own = sorted(at for at in self._solutions if at[:2] == place)
            rows += [self._solutions[at] for at in own]
        return rows


def cut_response(
    thought: Completion, cut: int, solution: Completion, tokenizer: Tokenizer
) -> Completion:
    """A thought up to a cut and a solution from there, as one response. Where the end was
    forced for the cut, it has no log-probability: NaN."""
    seen = seen_tokens(thought, cut)
    is_own = thought.thinking_end != "budget" and seen < cut
    is_last = seen == len(thought.token_ids) - 1
    is_sampled = is_own and thought.thinking_end == "model"
    thinking = tokenizer.decode(thought.token_ids[:seen])
    return dataclasses.replace(
        solution,
        prompt_ids=thought.prompt_ids,
        token_ids=[
            *thought.token_ids[:seen],
            thought.token_ids[-1],
            *solution.token_ids,
        ],
        logprobs=[
            *thought.logprobs[:seen],
            thought.logprobs[-1] if is_last else math.nan,
            *solution.logprobs,
        ],
        forced=[False] * seen + [not is_sampled] + solution.forced,
        thinking=thinking,
        text=thinking + THINK_END + solution.solution,
        thinking_tokens=seen + is_sampled,
        thinking_end=thought.thinking_end if is_own else "budget",
    )


def cut_advantages(
    rollout: RolloutConfig, rewards: np.ndarray, rows: Sequence[Completion], length: int
) -> np.ndarray:
    """Advantages [N*G*(1 + M*K), `length`] of the tokens of `rows`, which are as
    `CutStream.rows` gives them; `rewards` are [N, G*M*K]."""
    cuts, per_thought = np.array(rollout.cuts), 1 + rollout.solutions
    thoughts = rows[::per_thought]
    shape = (-1, rollout.samples, len(cuts), rollout.solutions_per_cut)
    rewards = rewards.reshape(shape)
    seen = [[seen_tokens(thought, cut) for cut in cuts] for thought in thoughts]
    seen = np.array(seen).reshape(rewards.shape[:3])
    of_parts = thinking_advantages(rewards).reshape(len(thoughts), -1)
    # The part of each token; a token beyond the last cut is forced, or padding.
    part = np.searchsorted(cuts[:-1], np.arange(length), side="right")
    of_solutions = solution_advantages(rewards, seen).reshape(len(thoughts), -1, 1)
    of_solutions = np.broadcast_to(of_solutions, (*of_solutions.shape[:2], length))
    of_rows = np.concatenate([of_parts[:, None, part], of_solutions], axis=1)
    return of_rows.reshape(-1, length).astype(np.float32)


def solution_advantages(rewards: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Reward less the mean of all solutions from the same state: of the same thought, and
    of cuts at which as much of it is seen.

    [N, G, M, K] of `rewards` [N, G, M, K] and of `seen` [N, G, M] tokens.
    """
    is_same = seen[..., :, None] == seen[..., None, :]  # [N, G, M, M]
    rewards = rewards.astype(float) - rewards[..., :1, :1]  # equal ones give exactly 0
    means = (is_same * rewards.mean(axis=-1)[..., None, :]).sum(axis=-1)
    return rewards - (means / is_same.sum(axis=-1))[..., None]


def thinking_advantages(rewards: np.ndarray) -> np.ndarray:
    """Advantages [N, G, M] of the parts of thoughts, part j being the tokens from cut j - 1
    to cut j; of `rewards` [N, G, M, K], with all cuts alike in probability.

    With r_i the mean reward at cut i, the return of part j (from 0) is
    R_j = (r_j + ... + r_(M-1)) / M, and its baseline (j * V1 + (M - j) * V2) / M. V1
    predicts R_j from the same thought: (M - j) / M times the weighted mean of
    r_0 ... r_(j-1), where r_i has GROWTH times the weight of r_(i-1). V2 is the mean of
    R_j over the G thoughts.
    """
    num_cuts = rewards.shape[2]
    # Equal rewards give exactly 0.
    rewards = rewards.astype(float) - rewards[:, :1, :1, :1]
    means = rewards.mean(axis=-1)
    returns = np.cumsum(means[..., ::-1], axis=-1)[..., ::-1] / num_cuts
    number = np.arange(num_cuts)
    weights = GROWTH ** (number - num_cuts)
    before = np.cumsum(means * weights, axis=-1) / np.cumsum(weights)
    before = np.concatenate([np.zeros_like(means[..., :1]), before[..., :-1]], axis=-1)
    own = before * (num_cuts - number) / num_cuts
    of_group = returns.mean(axis=1, keepdims=True)
    return returns - (number * own + (num_cuts - number) * of_group) / num_cuts
