"""Command: GRPO whose rollouts run under a thinking and a solution budget.

    python -m e1jax.train --config configs/nano_grpo.yaml

In order:
1. the configuration, the model and the problems, checked, and the run directory, which
   is a model: `config.yaml` and `config.json` beside the tokenizer files;
2. parameters and optimizer state, those of the model or of the latest checkpoint;
3. each step: prompts from the host (Grain), responses from the engine, which samples
   from the parameters being trained, rewards from worker processes while sampling goes
   on; then a few jitted updates with donated state, and a line of `metrics.jsonl`;
4. every few steps: accuracy on other problems, and a checkpoint with the position in
   the data, from which the run goes on bit for bit.

All that is random follows from the seed, the step and the position in the data, so a
checkpoint holds no generator.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from e1jax.checkpoint import (
    MetricsLog,
    NoLog,
    RunCheckpoints,
    abstract_state,
    check_finite,
    find_params,
    import_wandb,
)
from e1jax.config import (
    AdamWConfig,
    GRPOConfig,
    HostsConfig,
    ModelConfig,
    SamplingParams,
    UserError,
    ValidationConfig,
    budget_name,
    load_config_and_flags,
    record_config,
    run_command,
    stop_signals,
    writing,
)
from e1jax.convert import LoadedModel, load_model, read_config
from e1jax.data import (
    EncodedProblem,
    Prompt,
    default_instruction,
    encode_problems,
    load_problems,
    prompt_batches,
    prompt_text,
    request_seed,
)
from e1jax.engine import Completion, Engine
from e1jax.grpo import (
    group_advantages,
    policy_loss,
    response_logprobs,
    token_weights,
)
from e1jax.hosts import (
    any_of,
    is_first,
    joined,
    local_mesh,
    make_local_copy,
    of_all,
    rows_of_all,
)
from e1jax.model import Params, Whole, abstract_params
from e1jax.rewards import Grader, grade
from e1jax.sharding import (
    COMPILER_OPTIONS,
    backward_options,
    enough_memory,
    make_whole,
    map_over_data,
    note_undivided,
    over_data,
    sum_over_data,
    use_compilation_cache,
)
from e1jax.tokenizer import INSTRUCTION_KEY, copy_files, read_json

# The prompts of a step are padded to one of this many lengths, and its responses too: each
# pair is a compilation.
NUM_LENGTHS = 4
TILE = 128  # positions

HEADLINE = ["reward", "thinking_tokens", "forced_share", "kl"]


class Stopped(Exception):
    """A signal came while responses were sampled, and the step is given up."""


class Batch(NamedTuple):
    """Responses of a step or a mini-batch: M micro-batches of B rows, which lie over
    `data`."""

    tokens: Any  # [M, B, T] int32: prompt, response, padding
    prompt_len: Any  # [M, B] int32
    advantages: Any  # [M, B] float32
    loss_mask: Any  # [M, B, R] bool: the response tokens that are learned
    old_logprobs: Any  # [M, B, R] float32
    ref_logprobs: Any = None  # [M, B, R] float32, where the divergence counts


def main() -> None:
    config, run_dir, hosts = load_config_and_flags(
        GRPOConfig, HostsConfig, sys.argv[1:], "python -m e1jax.train"
    )
    with joined(hosts):
        train(config, run_dir)


def train(config: GRPOConfig, run_dir: Path) -> None:
    """Trains to the last step, from where the run directory left off.

    Of several processes, each samples and grades its share of the prompts; the first one
    writes what is not a checkpoint, and prints.

    Raises UserError if sizes or problems do not fit together, if the directory was begun
    with other settings, or once a metric is not a finite number; KeyboardInterrupt, after
    saving, if Ctrl-C came.
    """
    if config.wandb:
        import_wandb(config.wandb)  # or says, now, that it is missing
    mesh = config.mesh or default_mesh(jax.device_count())
    loaded = load_model(config.model, mesh, config.update.param_dtype)
    if loaded.quantize:
        raise UserError(
            f"{config.model} has its weights as int8, which cannot be trained; train the "
            "model that it was made from"
        )
    instruction = config.data.instruction
    if instruction is None:
        instruction = default_instruction(loaded.tokenizer)
    examples = read_examples(config, loaded, instruction)
    batches = prompt_batches(
        examples,
        prompts=config.rollout.prompts,
        seed=config.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    engine = make_engine(config, loaded, examples)
    validate = make_validation(config.validation, engine, instruction)
    if is_first():
        prepare(config, loaded, instruction, run_dir)
    any_of(False)  # the others wait for that
    if not (run_dir / "config.yaml").exists():
        raise UserError(
            f"{run_dir} was made by the first process, and this one does not see it; "
            "take a --run-dir on a file system that all hosts share"
        )
    use_compilation_cache()

    best = config.validation.best if validate else None
    checkpoints = RunCheckpoints(run_dir, config.checkpoint, best)
    lengths = [len(example.prompt_ids) for example in examples]
    longest = longest_lengths(config, engine.cache_len, min(lengths), max(lengths))
    learner = Learner(config, loaded, longest)
    step = saved = learner.restore(checkpoints, batches)
    log = (
        MetricsLog(run_dir, step, config.steps, HEADLINE, config.wandb)
        if is_first()
        else NoLog()
    )
    with (
        closing(checkpoints),
        closing(log),
        Grader() as grader,
        stop_signals() as signals,
    ):

        def stop_if_asked(new_tokens: int = 0) -> None:
            if signals:
                raise Stopped

        def save(metrics: dict[str, float]) -> int:
            log.flush(metrics)
            record = {"seed": config.seed, "data": position, "metrics": metrics}
            checkpoints.save(step, learner.params, learner.state, record)
            return step

        advice = (
            "lower update.microbatch, set update.remat or use more devices; on TPUs, "
            "python -m e1jax.plan says what fits"
        )
        position = batches.get_state()
        while not (stopped := any_of(signals)) and step < config.steps:
            if engine.params is None:  # else it still has those of the validation
                engine.params = learner.sampling_params()
            rollouts = None
            with suppress(Stopped):
                rollouts = sample_rollouts(
                    config, engine, next(batches), grader, stop_if_asked
                )
            if any_of(rollouts is None) or rollouts is None:
                continue  # to where it ends
            engine.params = None  # the update may write where they lie
            engine.release_cache()
            with enough_memory("an update", advice):
                metrics = learner.learn(rollouts)
            step, position = step + 1, batches.get_state()
            metrics["learning_rate"] = float(learner.schedule(step - 1))
            check_finite(step, metrics)
            log.add(step, metrics)
            last, measured = step == config.steps, {}
            if validate and (last or step % config.validation.every == 0):
                engine.params = learner.sampling_params()
                measured = validate(grader)
            if measured or last or step % config.checkpoint.every == 0:
                saved = save(measured)
        if step > saved:
            save({})
    state = f"after step {step}, saved" if step else "before the first step was done"
    if is_first():
        stop = f"stopped {state}; repeat the command to go on"
        end = f"{run_dir} is trained; python -m e1jax.evaluate --model {run_dir}"
        print(stop if stopped else end)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


def default_mesh(devices: int) -> str:
    """All on `data`: an update gathers the weights layer by layer, and each device takes
    whole sequences."""
    return f"data={devices},tensor=1"


def read_examples(
    config: GRPOConfig, loaded: LoadedModel, instruction: str
) -> list[EncodedProblem]:
    """The problems to train on, as token ids."""
    problems = load_problems(config.data.problems)
    longest = config.data.max_prompt_len
    examples, dropped = encode_problems(
        problems, loaded.tokenizer, instruction, longest
    )
    if dropped and is_first():
        print(
            f"note: {dropped} of {len(problems)} prompts have more than {longest} "
            "tokens and are left out",
            file=sys.stderr,
        )
    return examples


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
    mesh = local_mesh(loaded.config, loaded.mesh)
    if mesh.shape != loaded.mesh.shape:
        shapes = abstract_params(loaded.config, mesh, computed_in(config))
        note_undivided(loaded.config, shapes)
    engine = Engine(
        *(loaded.config, None, loaded.tokenizer, mesh),
        cache_len=cache_len,
        slots=rollout.slots,
    )
    # Refuses, now, what the model cannot do.
    engine.stream([[0] * longest_prompt], rollout_request(config, 0), names=["rollout"])
    return engine


def rollout_cache_len(config: GRPOConfig, longest_prompt: int) -> int:
    """Positions of a slot: as the configuration says, else as many as are needed.

    Raises UserError if they are too few for such a prompt and both budgets.
    """
    rollout = config.rollout
    needed = longest_prompt + least_room(config)
    if rollout.cache_len is None:
        return needed
    if rollout.cache_len < needed:
        raise UserError(
            f"rollout.cache_len={rollout.cache_len} is too short for a prompt of "
            f"{longest_prompt} tokens, budgets of {rollout.thinking_budget} and "
            f"{rollout.solution_budget} and </think>; {needed} is enough"
        )
    return rollout.cache_len


def least_room(config: GRPOConfig) -> int:
    """Positions that a slot has for the response at least: for both budgets and
    `</think>`. An unlimited solution gets one token or more."""
    thinking, solution = config.rollout.thinking_budget, config.rollout.solution_budget
    return (thinking or 0) + 1 + (1 if solution is None else solution)


def prepare(
    config: GRPOConfig, loaded: LoadedModel, instruction: str, run_dir: Path
) -> None:
    """Writes what makes the run directory a model: settings, sizes and tokenizer.

    The instruction that prompts end with is recorded with the tokenizer, for whoever
    evaluates the model, wherever it is converted to.
    """
    record_config(config, run_dir)
    if (run_dir / "config.json").exists() and read_config(run_dir) != loaded.config:
        raise UserError(
            f"{run_dir} was begun with a model of other sizes than {config.model} has "
            "now; bring that model back, or take another --run-dir"
        )
    source = (find_params(loaded.path) or (None, loaded.path))[1]
    ids = ("bos_token_id", "eos_token_id")
    named = {k: v for k, v in read_json(source / "config.json").items() if k in ids}
    values = read_json(source / "tokenizer_config.json")
    values = {
        "tokenizer_config.json": {**values, INSTRUCTION_KEY: instruction},
        "config.json": loaded.config.to_hf(config.update.param_dtype) | named,
    }
    with writing(run_dir):
        copy_files(source, run_dir)
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
            new = run_dir / f"{name}.new"
            new.write_text(text, encoding="utf-8")
            new.replace(run_dir / name)  # whole, wherever the run is killed


def longest_lengths(
    config: GRPOConfig, cache_len: int, shortest_prompt: int, longest_prompt: int
) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest response that can come."""
    if None in (config.rollout.thinking_budget, config.rollout.solution_budget):
        return longest_prompt, cache_len - shortest_prompt
    return longest_prompt, least_room(config)


class Rollouts(NamedTuple):
    """The responses of a step with their rewards, prompt by prompt."""

    completions: list[Completion]  # N x G
    rewards: np.ndarray  # [N, G] float32
    metrics: dict[str, float]


def sample_rollouts(
    config: GRPOConfig,
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader,
    stop_if_asked: Callable[[int], None],
) -> Rollouts:
    """Samples the responses of a step and grades each while others are sampled."""
    start = time.perf_counter()
    failures = dict(grader.failures)
    stream = engine.stream(
        [prompt.prompt_ids for prompt in prompts],
        [rollout_request(config, prompt.position) for prompt in prompts],
        progress=stop_if_asked,
    )
    graded = list(grade(stream, [prompt.answers for prompt in prompts], grader))
    graded.sort(key=lambda pair: (pair[0].prompt_index, pair[0].sample))
    completions = [completion for completion, _ in graded]
    rewards = np.array([reward for _, reward in graded], np.float32)
    rewards = rewards.reshape(len(prompts), config.rollout.samples)
    seconds = time.perf_counter() - start
    metrics = rollout_metrics(completions, rewards) | {
        "reward_timeouts": grader.failures["timeout"] - failures["timeout"],
        "reward_crashes": grader.failures["crash"] - failures["crash"],
        "rollout_waste": 1 - engine.stats.tokens / engine.stats.slot_steps,
        "rollout_tokens_per_second": engine.stats.tokens / seconds,
    }
    return Rollouts(completions, rewards, metrics)


def rollout_request(config: GRPOConfig, position: int) -> SamplingParams:
    """How the prompt at a position of the stream is sampled in training."""
    return SamplingParams(
        config.rollout.thinking_budget,
        config.rollout.solution_budget,
        n=config.rollout.samples,
        temperature=config.rollout.temperature,
        top_p=1.0,  # a ratio of probabilities is of the whole distribution
        seed=request_seed(config.seed, position),
    )


def rollout_metrics(
    completions: Sequence[Completion], rewards: np.ndarray
) -> dict[str, float]:
    """Means over responses; `solved` and `mixed` are shares of prompts."""

    def mean(value: Callable[[Completion], float]) -> float:
        return float(np.mean([value(completion) for completion in completions]))

    return {
        "reward": float(rewards.mean()),
        "accuracy": float((rewards == 1).mean()),
        "solved": float((rewards == 1).any(axis=1).mean()),
        "mixed": float((rewards.std(axis=1) > 0).mean()),  # the rest teaches nothing
        "response_tokens": mean(lambda c: len(c.token_ids)),
        "thinking_tokens": mean(lambda c: c.thinking_tokens),
        "solution_tokens": mean(lambda c: c.solution_tokens),
        "forced_share": mean(lambda c: any(c.forced)),
        "unfinished_share": mean(lambda c: c.finish_reason != "stop"),
    }


def metrics_of_all(metrics: dict[str, float]) -> dict[str, float]:
    """Of the step, from those of each process, which all have as many responses."""
    summed = ("reward_timeouts", "reward_crashes", "rollout_tokens_per_second")
    return {
        name: float(each.sum() if name in summed else each.mean())
        for name, each in zip(metrics, of_all(list(metrics.values())).T, strict=True)
    }


def make_batch(
    config: GRPOConfig, rollouts: Rollouts, longest_prompt: int, longest_response: int
) -> Batch:
    """Rollouts as arrays, of few different shapes, in the order of the prompts' stream;
    of several processes, each gets the rows of all.

    Masks follow from lengths and from what was forced, never from token ids.
    """
    completions = rollouts.completions
    lengths = [(len(c.prompt_ids), len(c.token_ids)) for c in completions]
    lengths = np.array(lengths, np.int32)
    of_step = of_all(lengths.max(axis=0)).max(axis=0).astype(int).tolist()
    length, response_len = padded_lengths((longest_prompt, longest_response), of_step)
    shape = (len(completions), response_len)
    tokens = np.zeros((len(completions), length), np.int32)
    mask, logprobs = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, c in enumerate(completions):
        ids = c.prompt_ids + c.token_ids
        tokens[row, : len(ids)] = ids
        logprobs[row, : len(c.logprobs)] = c.logprobs
        mask[row, : len(c.forced)] = config.loss.train_on_forced | ~np.array(c.forced)
    advantages = np.asarray(group_advantages(rollouts.rewards)).reshape(-1)
    batch = Batch(tokens, lengths[:, 0], advantages, mask, logprobs)
    batch = rows_of_all(batch, config.rollout.samples)
    micro = config.update.microbatch
    return jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]), batch)


def padded_lengths(longest: Sequence[int], of_step: Sequence[int]) -> tuple[int, int]:
    """T and R of a step's arrays, where `longest` are the tokens of the longest prompt and
    response that can come, and `of_step` those of the step.

    Prompts of a tile and less are all padded to the longest. The model sees T - 1 tokens,
    as the last one predicts nothing; where these are many, they are whole tiles of a TPU.
    """

    def padded(length: int, longest: int, unit: int) -> int:
        unit = max(unit, -(-longest // NUM_LENGTHS))
        return min(-(-length // unit) * unit, longest)

    prompt_len = padded(of_step[0], longest[0], TILE)
    response_len = 1 + padded(max(1, of_step[1] - 1), longest[1] - 1, 1)
    seen = prompt_len + response_len - 1
    if seen > 4 * TILE:
        seen = -(-seen // TILE) * TILE
    return seen + 1, response_len


def computed_in(config: GRPOConfig) -> Any:
    """The dtype of the computation, and of the parameters that the engine samples from."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(config.dtype or ("float32" if on_cpu else "bfloat16"))


class Learner:
    """The policy in training: its parameters, the optimizer's state, the reference.

    The engine samples from `sampling_params()`, which are the parameters themselves
    where they have the dtype of the computation and lie as sampling has them.
    """

    def __init__(
        self,
        config: GRPOConfig,
        loaded: LoadedModel,
        longest: tuple[int, int],
    ):
        self.dtype = computed_in(config)
        self.config, self.loaded = config, loaded
        self.longest = longest  # prompt and response, in tokens
        self.optimizer = make_optimizer(config)
        self.schedule = learning_rates(config.optimizer, config.steps)
        self.shapes = abstract_params(loaded.config, loaded.mesh, loaded.dtype)
        local = local_mesh(loaded.config, loaded.mesh)
        sampled = abstract_params(loaded.config, local, self.dtype)
        self.to_local = make_local_copy(loaded.mesh, sampled)
        self.state_shapes = abstract_state(self.optimizer, self.shapes, loaded.mesh)
        shardings = jax.tree.map(lambda s: s.sharding, (self.shapes, self.state_shapes))
        self.update = make_update(
            config, loaded.config, self.optimizer, self.dtype, shardings
        )
        self.logprobs = make_logprobs(
            loaded.config, self.dtype, shardings[0], config.rollout.samples
        )
        self.params: Params = {}
        self.state: Any = None
        self.reference: Params | None = None

    def restore(self, checkpoints: RunCheckpoints, batches: Any) -> int:
        """Goes on from the latest checkpoint, or begins with the model; the step."""
        restored = checkpoints.restore(self.shapes, self.state_shapes)
        if restored:
            step, self.params, self.state, record = restored
            batches.set_state(record["data"])
            if self.config.loss.kl_coef:
                self.reference = _cast(self.loaded.params, self.dtype)
            return step
        self.params = self.loaded.params
        if self.config.loss.kl_coef:  # copied, because the update donates its input
            self.reference = _cast(self.params, self.dtype, copy=True)
        shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes)
        init = jax.jit(
            self.optimizer.init,
            out_shardings=shardings,
            compiler_options=COMPILER_OPTIONS,
        )
        self.state = init(self.params)
        return 0

    def sampling_params(self) -> Params:
        """The policy where the engine samples: on this process's own devices."""
        return self.to_local(self.params)

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """Updates the policy by the responses of a step; the metrics of the step."""
        start = time.perf_counter()
        config = self.config
        temperature = jnp.float32(config.rollout.temperature)
        measured = []
        for batch in self._minibatches(rollouts, temperature):
            # The first update is of the parameters that sampled.
            on_policy = config.loss.old_logprobs == "recomputed" and not measured
            self.params, self.state, metrics = self.update(
                self.params, self.state, batch, on_policy, temperature
            )
            measured.append(metrics)
        means = jax.tree.map(lambda *values: np.mean(values).item(), *measured)
        tokens = sum(len(c.token_ids) for c in rollouts.completions)
        tokens = of_all(tokens).sum()
        seconds = time.perf_counter() - start
        return {
            **metrics_of_all(rollouts.metrics),
            **means,
            "sampler_gap": measured[0]["sampler_gap"].item(),
            "update_tokens_per_second": tokens * config.update.epochs / seconds,
        }

    def _minibatches(self, rollouts: Rollouts, temperature: jax.Array) -> list[Batch]:
        """Of each update in turn. The old log-probabilities are the sampler's; if they
        are to be recomputed, those after the first update are, by the parameters as they
        are now."""
        loss, epochs = self.config.loss, self.config.update.epochs
        whole = make_batch(self.config, rollouts, *self.longest)
        num_micro = len(whole.tokens) * epochs // self.config.updates_per_step
        rows = NamedSharding(self.loaded.mesh, PartitionSpec(None, "data"))

        def logprobs(params: Params, batch: Batch) -> jax.Array:
            # Some batches have a reference's by then: it would be compiled twice.
            return self.logprobs(params, batch._replace(ref_logprobs=None), temperature)

        def minibatch(first: int) -> Batch:
            def put(x: np.ndarray) -> jax.Array:
                x = x[first : first + num_micro]
                return jax.make_array_from_process_local_data(rows, x, x.shape)

            batch = jax.tree.map(put, whole)
            if self.reference is None:
                return batch
            return batch._replace(ref_logprobs=logprobs(self.reference, batch))

        def recomputed(batch: Batch) -> Batch:
            return batch._replace(old_logprobs=logprobs(self.params, batch))

        batches = [minibatch(at) for at in range(0, len(whole.tokens), num_micro)]
        first, *others = batches
        if loss.old_logprobs == "recomputed":
            others = [recomputed(batch) for batch in others]
            batches = [recomputed(first) if epochs > 1 else first, *others]
        return [first, *others, *batches * (epochs - 1)]


def _cast(params: Params, dtype: Any, *, copy: bool = False) -> Params:
    """Parameters in another dtype; the same arrays, or copies, if they have it."""

    def cast(p):
        return (jnp.copy(p) if copy else p) if p.dtype == dtype else p.astype(dtype)

    return jax.tree.map(cast, params)


def make_optimizer(config: GRPOConfig) -> optax.GradientTransformation:
    """AdamW on clipped gradients; the learning rate is that of the step."""
    adam, updates = config.optimizer, config.updates_per_step
    rates = learning_rates(adam, config.steps)
    return optax.chain(
        clip_by_norm(adam.max_grad_norm),
        optax.adamw(
            lambda count: rates(jnp.asarray(count) // updates),
            b1=adam.b1,
            b2=adam.b2,
            weight_decay=adam.weight_decay,
        ),
    )


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm by one factor for all gradients. That one divides by
    the norm first, which is one pass more over arrays as large as the parameters."""

    def clip(grads, _):
        factor = jnp.minimum(1, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clip)


def learning_rates(config: AdamWConfig, steps: int) -> Callable[[Any], Any]:
    """Linear warm-up to the peak, which the last warm-up step has; then the schedule,
    which would be 0 one step after the last."""
    warmup = config.warmup_steps
    falls = {
        "constant": lambda left: 1.0,
        "linear": lambda left: left,
        "cosine": lambda left: 0.5 - 0.5 * jnp.cos(jnp.pi * left),
    }

    def rate(step):
        left = (steps - step) / max(1, steps - warmup)
        fall = falls[config.schedule](jnp.clip(left, 0, 1))
        rise = jnp.minimum(1, (step + 1) / max(1, warmup))
        return config.learning_rate * rise * fall

    return rate


def make_update(
    config: GRPOConfig,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    shardings: tuple[Any, Any],
):
    """One jitted update by a mini-batch, whose micro-batches are gone through in turn.

    (params, state, batch, on_policy, temperature) -> (params, state, metrics). With
    `on_policy` (bool), the batch was sampled from these parameters: the old
    log-probabilities are then the update's own, and those of the batch are only
    compared with them, for `sampler_gap`. The first two arguments are donated, and lie
    where `shardings` says. Each place on the mesh axis `data` goes through its own rows
    with the parameters gathered layer by layer, in `dtype`; gradients are summed up in
    float32.
    """
    mesh = jax.tree.leaves(shardings[0])[0].mesh
    whole = make_whole(shardings[0], dtype)

    def of_shard(params, batch, weights, on_policy, temperature):
        def add(grads, inputs):
            microbatch, weight = inputs
            new, metrics = jax.grad(grpo_loss, argnums=2, has_aux=True)(
                *(config, model, params, microbatch, weight[0]),
                *(on_policy, temperature),
                mesh=mesh,
                whole=whole,
            )
            return jax.tree.map(jnp.add, grads, new), metrics

        # So that gradients are of float32, whatever the parameters are.
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, metrics = jax.lax.scan(add, zeros, (batch, weights))
        return grads, sum_over_data(jax.tree.map(jnp.sum, metrics))

    specs, rows = over_data(shardings[0]), PartitionSpec(None, "data")
    of_shards = map_over_data(
        *(of_shard, mesh),
        in_specs=(specs, rows, rows, PartitionSpec(), PartitionSpec()),
        out_specs=(specs, PartitionSpec()),
    )

    def update(params, state, batch, on_policy, temperature):
        weights = _share_weights(
            batch.loss_mask, config.loss.aggregate, mesh.shape["data"]
        )
        grads, metrics = of_shards(params, batch, weights, on_policy, temperature)
        metrics["grad_norm"] = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return jax.jit(
        update,
        donate_argnums=(0, 1),
        out_shardings=(*shardings, None),
        compiler_options=backward_options(mesh),
    )


def _share_weights(
    loss_mask: Bool[Array, "M B R"], aggregate: str, shares: int
) -> Float[Array, "M S"]:
    """What the mean over each device's share of each micro-batch counts in the mean
    over all; see grpo.token_weights."""
    num_micro, rows, length = loss_mask.shape
    weights = token_weights(loss_mask.reshape(-1, length), aggregate)
    weights = weights.reshape(num_micro, shares, rows // shares, length)
    return weights.sum(axis=(2, 3))


def grpo_loss(
    config: GRPOConfig,
    model: ModelConfig,
    params: Params,
    batch: Batch,
    weight: Float[Array, ""],
    on_policy: Bool[Array, ""],
    temperature: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    whole: Whole = lambda part, name: part,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of a micro-batch and its metrics, both times `weight`; see make_update."""
    loss = config.loss
    logprobs, entropy = response_logprobs(
        *(model, params, batch.tokens, batch.prompt_len, batch.loss_mask.shape[-1]),
        temperature,
        mesh=mesh,
        remat=config.update.remat,
        whole=whole,
        entropy_grad=loss.entropy_coef > 0,
        samples=config.rollout.samples,
    )
    own = jax.lax.stop_gradient(logprobs)
    value, metrics = policy_loss(
        *(logprobs, jnp.where(on_policy, own, batch.old_logprobs), batch.ref_logprobs),
        *(batch.advantages, batch.loss_mask),
        clip=loss.clip,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        max_ratio=loss.max_ratio if loss.old_logprobs == "sampler" else None,
        kl_coef=loss.kl_coef,
        aggregate=loss.aggregate,
    )
    weights = token_weights(batch.loss_mask, loss.aggregate)

    def mean(values):
        return (jnp.where(batch.loss_mask, values, 0.0) * weights).sum()

    entropy = mean(entropy)
    value -= loss.entropy_coef * entropy
    gap = mean(jnp.abs(own - batch.old_logprobs))
    metrics |= {"loss": value, "entropy": entropy, "sampler_gap": gap}
    return value * weight, {name: v * weight for name, v in metrics.items()}


def make_logprobs(model: ModelConfig, dtype: Any, shardings: Any, samples: int = 1):
    """Log-probabilities of responses, a micro-batch at a time; `samples` rows in turn
    have the same prompt.

    (params, batch, temperature) -> [M, B, R] float32; see make_update.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    whole = make_whole(shardings, dtype)

    def of_shard(params, batch, temperature):
        def of_one(microbatch):
            logprobs, _ = response_logprobs(
                *(model, params, microbatch.tokens, microbatch.prompt_len),
                *(batch.loss_mask.shape[-1], temperature),
                mesh=mesh,
                whole=whole,
                samples=samples,
            )
            return logprobs

        return jax.lax.map(of_one, batch)

    rows = PartitionSpec(None, "data")
    in_specs = (over_data(shardings), rows, PartitionSpec())
    of_shards = map_over_data(of_shard, mesh, in_specs, rows)
    return jax.jit(of_shards, compiler_options=COMPILER_OPTIONS)


def make_validation(
    config: ValidationConfig, engine: Engine, instruction: str
) -> Callable[[Grader], dict[str, float]] | None:
    """Measures accuracy and length at each pair of budgets; None without problems.

    Of several processes, each samples for its share of the problems. Requests are made,
    and refused, here. Problem i has the same seed at every budget and every step, so
    that what is compared differs in nothing else.
    """
    if config.problems is None:
        return None
    problems = load_problems(config.problems, config.limit)
    texts = [prompt_text(problem.text, instruction) for problem in problems]
    requests = [
        SamplingParams(
            *pair,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=request_seed(0, index),
        )
        for pair in config.budgets
        for index in range(len(problems))
    ]
    prompts = texts * len(config.budgets)
    answers = [problem.answers for problem in problems] * len(config.budgets)
    names = [f"problem {p.id} of {config.problems}" for p in problems]
    longest = max(len(engine.encode(text)) for text in texts)
    for pair in config.budgets:
        needed = longest + sum(budget or 0 for budget in pair) + 1
        if needed > engine.cache_len:  # or thinking would be cut, and that measured
            raise UserError(
                f"validation.budgets {list(pair)} do not fit rollout.cache_len="
                f"{engine.cache_len} after a prompt of {longest} tokens; set it to "
                f"{needed} or more"
            )

    engine.stream(prompts, requests, names=names * len(config.budgets))  # checks them

    def validate(grader: Grader) -> dict[str, float]:
        shape = (len(config.budgets), len(problems))
        right, tokens = np.zeros(shape), np.zeros(shape)
        stream = engine.stream(
            prompts,
            requests,
            skip=lambda request, _: (
                request % jax.process_count() != jax.process_index()
            ),
        )
        for completion, reward in grade(stream, answers, grader):
            at = divmod(completion.prompt_index, len(problems))
            right[at], tokens[at] = reward, len(completion.token_ids)
        right, tokens = of_all([right, tokens]).sum(axis=0)
        metrics = {"validation_accuracy": right.mean().item()}
        for pair, accuracy, length in zip(
            config.budgets, right.mean(axis=1), tokens.mean(axis=1), strict=True
        ):
            name = budget_name(*pair)
            metrics[f"validation_accuracy_{name}"] = accuracy.item()
            metrics[f"validation_tokens_{name}"] = length.item()
        return metrics

    return validate


if __name__ == "__main__":
    run_command(main)
