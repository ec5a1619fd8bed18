"""Settings of fine-tuning and of GRPO: frozen dataclasses that are YAML keys and flags."""

import dataclasses
import itertools
import math
import re
from typing import Literal, get_args

from e1jax.config.adapter import NO_ADAPTER, AdapterConfig
from e1jax.config.checks import (
    UNLIMITED,
    UserError,
    check_choice,
    check_integer,
    check_known,
    check_number,
    check_share,
    shown,
)
from e1jax.config.model import ModelConfig
from e1jax.config.sampling import SamplingParams, check_budget_text
from e1jax.config.texts import check_backslashes


@dataclasses.dataclass(frozen=True)
class TraceMix:
    """How the solutions of one phase of nano fine-tuning are written, and batched."""

    batch_size: int = 32
    """Solutions in a step."""
    terse: float = 0.5
    """Share of solutions thought through in the terse style, the rest being verbose."""
    rechecks: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Probabilities that the thinking is checked again 0, 1, 2 times; sum to 1."""
    recap: float = 0.0
    """Share of solutions that repeat steps, tersely, between </think> and the box."""

    def __post_init__(self):
        check_integer("batch_size", self.batch_size, 1)
        for name in ("terse", "recap"):
            check_share(name, getattr(self, name))
        for share in self.rechecks:
            check_share("rechecks", share)
        if not math.isclose(sum(self.rechecks), 1, abs_tol=1e-6):
            raise UserError(f"rechecks must sum to 1, not {sum(self.rechecks)}")


@dataclasses.dataclass(frozen=True)
class StatedConfig:
    """Budgets that nano fine-tuning states before each problem; its solution keeps them."""

    text: str | None = None
    """As data.budget_text of train; recorded with the model. null: none are stated."""
    most_thinking: int = 64
    """Highest thinking budget that is stated; the lowest is the solution's own thinking.
    A solution that thinks for longer has an unlimited one."""
    most_solution: int = 40
    """As most_thinking, of the tokens after </think>."""
    unlimited: float = 0.2
    """Share of budgets that are unlimited where a number would do."""
    cut: float = 0.3
    """Share of solutions whose thinking is cut at the budget, a random one below its
    length, and goes on after </think>, tersely, from the step that was not completed."""

    def __post_init__(self):
        if self.text is not None:
            check_budget_text(self.text, "stated.text")
        for name in ("most_thinking", "most_solution"):
            check_integer(f"stated.{name}", getattr(self, name), 0, UNLIMITED - 1)
        for name in ("unlimited", "cut"):
            check_share(f"stated.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices in the layers, Adam for embeddings, norms and biases."""

    learning_rate: float = 4e-3
    """Peak learning rate of both."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0 to its peak."""
    final: float = 0.02
    """Learning rate of the last step, as a share of the peak; in between a cosine."""
    adam_b2: float = 0.98
    """Decay of Adam's second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    def __post_init__(self):
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), "above 0", lambda v: v > 0)
        check_share("final", self.final)
        for name in ("warmup", "adam_b2"):
            value = getattr(self, name)
            check_number(name, value, "from 0 to below 1", lambda v: 0 <= v < 1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 100
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep: int = 2
    """Latest checkpoints kept."""

    def __post_init__(self):
        check_integer("every", self.every, 1)
        check_integer("keep", self.keep, 1)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a new model on the nano task, in two phases."""

    model: ModelConfig
    steps: int
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Fixes the initial parameters and the data."""
    first_phase: float = 0.5
    """Share of the steps that train on the mix `first`; the others on `second`."""
    first: TraceMix = TraceMix()
    second: TraceMix = TraceMix()
    stated: StatedConfig = StatedConfig()
    optimizer: MuonConfig = MuonConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: str | None = None
    """Device mesh, like data=4,tensor=1; by default one that suits the model."""

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        check_share("first_phase", self.first_phase)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Problems to train on."""

    problems: str = "deepscaler"
    """Built-in name, or a file (JSON list, JSONL, parquet) with problem and answer."""
    instruction: str | None = None
    """Text after every problem; null: the one recorded with the model."""
    max_prompt_len: int = 1024
    """Tokens of the longest prompt, stated budgets included; longer ones are dropped, and
    counted."""
    budget_text: str | None = None
    """Text before every problem that states its budgets, with {thinking} and {solution};
    {thinking:none} says none where that is unlimited. null: the one recorded with the
    model, else a sentence. Takes effect by rollout.state_budgets."""

    def __post_init__(self):
        check_backslashes(self.instruction, "data.instruction")
        if self.budget_text is not None:
            check_budget_text(self.budget_text, "data.budget_text")
        check_integer("max_prompt_len", self.max_prompt_len, 1, UNLIMITED)


Budgets = int | None | tuple[int | None, ...]


BudgetsUntil = dict[int, Budgets] | None


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled for training: under one pair of budgets for all, or one
    that is drawn for each prompt, the same all the time or by a curriculum; or each thought
    cut at several budgets."""

    prompts: int = 128
    """Prompts in a step."""
    samples: int = 8
    """Responses to each prompt, whose rewards are compared with each other; with cuts,
    thoughts."""
    thinking_budget: Budgets = 1024
    """Tokens sampled before </think> is forced; null: unlimited. Of a list, like
    [8, 16, null], one is drawn for each prompt of a step."""
    solution_budget: Budgets = 1024
    """Tokens sampled after </think>; null: unlimited; a list as for thinking_budget."""
    thinking_budget_until: BudgetsUntil = None
    """Other budgets of earlier steps, by the last step that has them, like {60: 32, 120:
    [8, 16, 32]}: after step 120, thinking_budget. null: thinking_budget from the start."""
    solution_budget_until: BudgetsUntil = None
    """As thinking_budget_until."""
    state_budgets: bool = False
    """Whether each prompt states its budgets, by data.budget_text; recorded with the
    model, which then is sampled from with stated budgets too."""
    cuts: tuple[int, ...] = ()
    """Instead of thinking_budget, like [8, 16, 32]: a thought is sampled to the last of
    these budgets and answered from each, after a forced </think>."""
    solutions_per_cut: int = 4
    """Solutions sampled at each cut of a thought; only with cuts."""
    drop_equal_groups: bool = False
    """Whether a step draws prompts until it has as many as it needs whose responses have
    unequal rewards, the only ones that teach something; ten times as many at most."""
    temperature: float = 0.6
    """Above 0; log-probabilities in training are at this temperature too."""
    slots: int = 64
    """Responses that are sampled at a time, by each host of several."""
    cache_len: int | None = None
    """Positions of a slot, prompt included; null: the longest that budgets allow."""
    ahead: int = 0
    """1: responses are sampled while the step before is learned, from the parameters before
    that; with 0, from the latest ones. loss.old_logprobs: sampler weighs the difference."""

    def __post_init__(self):
        check_integer("ahead", self.ahead, 0, 1)
        check_integer("prompts", self.prompts, 1)
        check_integer("samples", self.samples, 2)
        for name in ("thinking_budget", "solution_budget"):
            until = getattr(self, f"{name}_until") or {}
            _check_budgets(name, getattr(self, name))
            for budgets in until.values():
                _check_budgets(f"{name}_until", budgets)
            for step in until:
                check_integer(f"{name}_until: the step", step, 1)
            if list(until) != sorted(until):
                steps = ", ".join(map(str, until))
                raise UserError(f"{name}_until has the steps {steps}; let them rise")
        if self.cuts:
            self._check_cuts()
        check_number("temperature", self.temperature, "above 0", lambda v: v > 0)
        check_integer("slots", self.slots, 1)
        if self.cache_len is not None:
            check_integer("cache_len", self.cache_len, 1, 2**30)
        elif self.is_unlimited:
            raise UserError(
                "a rollout without a budget needs rollout.cache_len, which then ends it"
            )

    def _check_cuts(self) -> None:
        """The rules of `cuts`, which are not empty."""
        for cut in self.cuts:
            check_integer("cuts", cut, 1, UNLIMITED - 1)
        for cut, following in itertools.pairwise(self.cuts):
            if following <= cut:
                raise UserError(
                    f"cuts must rise, and {following} comes after {cut}; sort them"
                )
        check_integer("solutions_per_cut", self.solutions_per_cut, 2)
        fixed = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("thinking_budget", "thinking_budget_until"):
            if getattr(self, name) != fixed[name]:
                raise UserError(
                    f"rollout.cuts are the thinking budgets, and rollout.{name}="
                    f"{shown(getattr(self, name))} is set too; leave one of them out"
                )
        solution = self.solution_budget
        if self.solution_budget_until or not isinstance(solution, int) or not solution:
            raise UserError(
                "rollout.cuts need one rollout.solution_budget of 1 or more, not "
                f"{shown(self.solution_budget_until or solution)}"
            )
        if self.state_budgets:
            raise UserError(
                "rollout.cuts end one thought at several budgets, of which a prompt can "
                "state one; set rollout.state_budgets: false, or leave the cuts out"
            )

    def at_step(self, step: int) -> "RolloutConfig":
        """The settings after so many steps, without a curriculum any more."""

        def budgets(until: BudgetsUntil, last: Budgets) -> Budgets:
            return next((b for end, b in (until or {}).items() if step < end), last)

        return dataclasses.replace(
            self,
            thinking_budget=budgets(self.thinking_budget_until, self.thinking_budget),
            solution_budget=budgets(self.solution_budget_until, self.solution_budget),
            thinking_budget_until=None,
            solution_budget_until=None,
        )

    @property
    def thinking_budgets(self) -> tuple[int | None, ...]:
        """The budgets that one is drawn from, at any step, or that a thought is cut at; one
        alone is fixed."""
        if self.cuts:
            return tuple(self.cuts)
        return _union(self.thinking_budget, self.thinking_budget_until)

    @property
    def solutions(self) -> int:
        """Solutions to each thought that is cut; 0 without cuts."""
        return len(self.cuts) * self.solutions_per_cut

    @property
    def responses(self) -> int:
        """Responses to a prompt; each thought that is cut is one, and each of its
        solutions."""
        return self.samples * (1 + self.solutions)

    @property
    def solution_budgets(self) -> tuple[int | None, ...]:
        """As `thinking_budgets`."""
        return _union(self.solution_budget, self.solution_budget_until)

    @property
    def pairs(self) -> list[tuple[int | None, int | None]]:
        """All pairs that responses can have, if there is no curriculum."""
        return list(itertools.product(self.thinking_budgets, self.solution_budgets))

    @property
    def is_unlimited(self) -> bool:
        """Whether a budget can be unlimited."""
        return None in (*self.thinking_budgets, *self.solution_budgets)


def _as_tuple(budgets: Budgets) -> tuple[int | None, ...]:
    return tuple(budgets) if isinstance(budgets, list | tuple) else (budgets,)


def _union(last: Budgets, until: BudgetsUntil) -> tuple[int | None, ...]:
    """The budgets of a run with a curriculum: first the budgets of its last steps, in their
    order, then the earlier steps' other budgets."""
    earlier = itertools.chain(*map(_as_tuple, (until or {}).values()))
    others = [budget for budget in earlier if budget not in _as_tuple(last)]
    return (*_as_tuple(last), *dict.fromkeys(others))


def _check_budgets(name: str, budgets: Budgets) -> None:
    if not _as_tuple(budgets):
        raise UserError(f"{name} is an empty list; give budgets, like [512, null]")
    for budget in _as_tuple(budgets):
        if budget is not None:
            check_integer(name, budget, 0, UNLIMITED - 1)


# As the tables of grpo/loss.py have them.
Clip = Literal["ppo", "none", "cispo", "gspo"]
Aggregate = Literal["token", "sequence", "constant"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective of GRPO; see e1jax.grpo."""

    clip: Clip = "ppo"
    """ppo: clipped surrogate; none: as the reference code of E1, which drops the clip;
    cispo: clipped weights of the log-probabilities; gspo: one ratio for a response, which
    wants bounds of some 0.0004 and aggregate sequence."""
    clip_low: float = 0.2
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above 1 + clip_high."""
    kl_coef: float = 0.001
    """Weight of the divergence (k3) from the model that training began with."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, which is raised."""
    entropy_coef_end: float | None = None
    """Its weight at the last step, reached in equal parts; null: as at the first."""
    aggregate: Aggregate = "token"
    """token: mean over all tokens; sequence: mean over responses of their means;
    constant: sum over tokens, divided by responses times the longest one that can come."""
    scale_rewards: bool = True
    """Whether advantages are divided by the standard deviation of their group."""
    train_on_forced: bool = False
    """Whether forced tokens count, though the policy did not choose them."""
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"
    """recomputed: by the training forward, which for the first update of a step is its
    own; sampler: those seen while sampling, which saves that forward, with importance
    ratios truncated at max_ratio."""
    max_ratio: float = 2.0
    """Largest weight of a token where old_logprobs is sampler."""

    def __post_init__(self):
        check_choice("clip", self.clip, get_args(Clip))
        check_choice("aggregate", self.aggregate, get_args(Aggregate))
        check_choice("old_logprobs", self.old_logprobs, ("recomputed", "sampler"))
        check_share("clip_low", self.clip_low)
        for name in ("clip_high", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            check_number(name, value, "of 0 or more", lambda v: v >= 0)
        if self.entropy_coef_end is not None:
            end = self.entropy_coef_end
            check_number("entropy_coef_end", end, "of 0 or more", lambda v: v >= 0)
        check_number("max_ratio", self.max_ratio, "of 1 or more", lambda v: v >= 1)

    @property
    def raises_entropy(self) -> bool:
        """Whether entropy has a weight at any step."""
        return max(self.entropy_coef, self.entropy_coef_end or 0) > 0


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW, after the gradient is clipped by its global norm."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak, in equal parts."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the last step."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Share of a parameter, times the learning rate, taken off at each update."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    def __post_init__(self):
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_choice("schedule", self.schedule, ("constant", "linear", "cosine"))
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), "above 0", lambda v: v > 0)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check_number(name, value, "from 0 to below 1", lambda v: 0 <= v < 1)
        check_number(
            "weight_decay", self.weight_decay, "of 0 or more", lambda v: v >= 0
        )


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How the responses of a step are turned into parameter updates."""

    minibatch_prompts: int = 64
    """Prompts in a mini-batch, all of their responses together; one update each."""
    microbatch: int = 8
    """Responses that go through the model at a time, on all devices together. With cuts,
    each thought is one, and each of its solutions: take a multiple of these."""
    epochs: int = 1
    """Passes over the responses of a step."""
    remat: bool = True
    """Whether a layer's activations are computed again in the backward pass."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that are trained, their moments and their checkpoints. train
    refuses bfloat16, in which most updates of a small learning rate round to nothing."""

    def __post_init__(self):
        for name in ("minibatch_prompts", "microbatch", "epochs"):
            check_integer(name, getattr(self, name), 1)
        check_choice("param_dtype", self.param_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Accuracy on problems that are not trained on."""

    problems: str | None = None
    """As data.problems; null: no validation, the latest checkpoint is the best."""
    limit: int = 256
    """Problems, the first of the file."""
    every: int = 20
    """Steps from one validation to the next; each is followed by a checkpoint."""
    budgets: tuple[tuple[int | None, int | None], ...] = ((1024, 1024),)
    """Pairs of thinking and solution budget, null being unlimited."""
    temperature: float = 0.6
    """Of sampling; 0 is greedy."""
    top_p: float = 0.95
    """Of sampling; 1 is off."""
    best: str = "validation_accuracy"
    """Metric whose highest value names the best checkpoint: validation_accuracy (mean
    over the budgets), or validation_accuracy_32_28, say."""

    def __post_init__(self):
        check_integer("limit", self.limit, 1)
        check_integer("every", self.every, 1)
        if not self.budgets:
            raise UserError("validation.budgets is empty; give pairs, like [[32, 28]]")
        for thinking, solution in self.budgets:
            # The rules of a request hold for these too.
            SamplingParams(
                thinking, solution, temperature=self.temperature, top_p=self.top_p
            )
        check_known([self.best], self.metrics, "validation.best")

    @property
    def metrics(self) -> list[str]:
        """Names that `best` may take."""
        each = [f"validation_accuracy_{budget_name(*pair)}" for pair in self.budgets]
        return ["validation_accuracy", *each]


def budget_name(thinking: int | None, solution: int | None) -> str:
    """A pair of budgets in the name of a metric: "32_28", "none_none"."""
    pair = (thinking, solution)
    return "_".join("none" if budget is None else str(budget) for budget in pair)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward of a response."""

    function: str | None = None
    """A function as package.module:name, of (completions, answers) -> rewards: it gets
    the completions of a step and the accepted answers of each, and gives a number for
    each. null: 1 for a right answer, else 0. Validation grades right or wrong anyway."""
    length_cost: float = 0.0
    """Taken off the reward of a right answer for every 1,000 sampled tokens."""

    def __post_init__(self):
        if self.function is not None and not re.fullmatch(
            r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", str(self.function)
        ):
            raise UserError(
                f"reward.function must be package.module:name, not {shown(self.function)}"
            )
        cost = self.length_cost
        check_number("reward.length_cost", cost, "of 0 or more", lambda v: v >= 0)
        if self.function is not None and cost:
            raise UserError(
                "reward.length_cost is for right answers, and reward.function gives its "
                "own rewards; set one of them"
            )


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """GRPO with rollouts under a thinking and a solution budget (arXiv 2505.05315)."""

    model: str
    """Model to start from: hub id, Hugging Face or e1jax directory, run, nano."""
    steps: int
    """Steps of the whole run; each samples new responses."""
    seed: int = 0
    """Fixes the order of the problems and all random draws."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    optimizer: AdamWConfig = AdamWConfig()
    update: UpdateConfig = UpdateConfig()
    adapter: AdapterConfig = NO_ADAPTER
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; null: float32 on a CPU, bfloat16 elsewhere."""
    mesh: str | None = None
    """Device mesh of the updates, like data=4,tensor=2; by default all devices on data.
    Each host samples on its own devices, as many of them on tensor as suits the model."""
    rollout_mesh: str | None = None
    """With rollout.ahead: 1, the devices of each host that sample and do not learn, like
    data=1,tensor=2, which mesh then leaves out; null: all devices do both in turn."""
    wandb: str | None = None
    """Weights & Biases project that gets the metrics too; null: none."""

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        rollout, update = self.rollout, self.update
        if self.data.budget_text is not None and not rollout.state_budgets:
            raise UserError(
                "data.budget_text is set, but rollout.state_budgets is false; set that, "
                "or leave the text out"
            )
        if self.rollout_mesh is not None and not rollout.ahead:
            raise UserError(
                f"rollout_mesh={shown(self.rollout_mesh)} samples beside the updates, and "
                "with rollout.ahead=0 one waits for the other; set rollout.ahead: 1"
            )
        if rollout.cuts:
            _check_loss_of_cuts(self.loss)
        _check_divides(
            ("rollout.prompts", rollout.prompts),
            ("update.minibatch_prompts", update.minibatch_prompts),
        )
        _check_divides(
            (
                _RESPONSES_OF_CUTS if rollout.cuts else _RESPONSES,
                update.minibatch_prompts * rollout.responses,
            ),
            ("update.microbatch", update.microbatch),
        )

    def at_step(self, step: int) -> "GRPOConfig":
        """The settings after so many steps, with the budgets of the curriculum then."""
        return dataclasses.replace(self, rollout=self.rollout.at_step(step))

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates by the responses of a step."""
        minibatches = self.rollout.prompts // self.update.minibatch_prompts
        return minibatches * self.update.epochs


_RESPONSES = "update.minibatch_prompts x rollout.samples"


_RESPONSES_OF_CUTS = f"{_RESPONSES} x (1 + cuts x solutions_per_cut)"


def _check_loss_of_cuts(loss: LossConfig) -> None:
    """Refuses what has no meaning for thinking whose parts have advantages of their own."""
    if loss.scale_rewards:
        raise UserError(
            "rollout.cuts compare the returns of different budgets, which have no common "
            "standard deviation; set loss.scale_rewards: false"
        )
    if loss.clip == "gspo":
        raise UserError(
            "loss.clip=gspo has one ratio for a response, and with rollout.cuts the parts "
            "of a thought have different advantages; take ppo, cispo or none"
        )
    if loss.train_on_forced:
        raise UserError(
            "loss.train_on_forced=true would train on the </think> of rollout.cuts, which "
            "no thought holds; leave it false"
        )


def _check_divides(whole: tuple[str, int], part: tuple[str, int]) -> None:
    if whole[1] % part[1]:
        raise UserError(
            f"{whole[0]}={whole[1]} is not a multiple of {part[0]}={part[1]}; "
            "change one of them"
        )


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other; not needed on TPU pods or one host."""

    coordinator: str | None = None
    """HOST:PORT, with any free port of process 0's host, where the others find it; each
    process gets the same command but for --process."""
    processes: int | None = None
    """How many processes the run has."""
    process: int | None = None
    """Which one this is, from 0."""

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) not in (0, 3):
            raise UserError(
                f"--{given[0]} came without all of --coordinator, --processes and "
                "--process; give all three or none"
            )
        if self.coordinator is None or self.processes is None:
            return
        address = re.fullmatch(r"\S+:([0-9]{1,5})", self.coordinator)
        if not address or int(address[1]) > 65535:
            raise UserError(
                f"--coordinator must be like 10.0.0.1:1234, not {shown(self.coordinator)}"
            )
        check_integer("--processes", self.processes, 1)
        check_integer("--process", self.process, 0, self.processes - 1)
