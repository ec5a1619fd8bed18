"""Command: GRPO whose rollouts run under a thinking and a solution budget.

    python -m e1jax.train --config configs/nano_grpo.yaml

In order:
1. the configuration, the model and the problems, checked, and the run directory, which
   is a model: `config.yaml` and `config.json` beside the tokenizer files;
2. parameters and optimizer state, from the model or the latest checkpoint;
3. each step: prompts from the host (Grain), responses from the engine, which samples
   from the parameters being trained, rewards from worker processes while sampling goes
   on; then a few jitted updates with donated state, and a line of `metrics.jsonl`;
4. every few steps: accuracy on other problems, and a checkpoint with the position in
   the data, from which the run goes on bit for bit.

All that is random follows from the seed, the step and the position in the data, so a
checkpoint holds no generator.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from e1jax.checkpoint.load import LoadedModel
from e1jax.checkpoint.metrics import check_finite, import_wandb
from e1jax.checkpoint.runs import RunCheckpoints
from e1jax.cli.command import run_command
from e1jax.cli.outputs import digest
from e1jax.config.checks import UserError
from e1jax.config.load import load_config_and_flags
from e1jax.config.sampling import BUDGET_TEXT, SamplingParams
from e1jax.config.training import GRPOConfig, HostsConfig, ValidationConfig, budget_name
from e1jax.data.problems import Problem, load_problems
from e1jax.data.prompts import (
    default_instruction,
    prompt_batches,
    prompt_text,
    request_seed,
)
from e1jax.grpo.learner import Learner
from e1jax.grpo.rollouts import (
    Rollouts,
    longest_lengths,
    make_engine,
    num_unequal,
    prompt_lengths,
    read_examples,
    sample_rollouts,
    unequal_groups,
)
from e1jax.rewards import (
    Grader,
    RewardFunction,
    grade,
    load_function,
    source_digest,
)
from e1jax.sampling.engine import Engine
from e1jax.sharding.hosts import (
    any_process,
    divided_devices,
    joined,
    process_allgather,
)
from e1jax.sharding.runtime import enough_memory, use_compilation_cache
from e1jax.training import (
    Run,
    check_processes,
    load_trainable,
    owning_run,
    prepare_run,
    running,
)

if TYPE_CHECKING:
    import grain

    from e1jax.data.prompts import Prompt

ADVICE = (
    "lower update.microbatch, set update.remat or use more devices; on TPUs, "
    "python -m e1jax.plan says what fits"
)


MOST_BATCHES = 10  # of prompts in a step that drops equal groups


class Stopped(Exception):
    """A signal came while responses were sampled, and the step is given up."""


def main() -> None:
    """`python -m e1jax.train`."""
    config, run_dir, hosts = load_config_and_flags(
        GRPOConfig, HostsConfig, sys.argv[1:], "python -m e1jax.train"
    )
    with joined(hosts):
        train(config, run_dir)


def train(config: GRPOConfig, run_dir: Path) -> None:
    """Trains to the last step, from where the run directory left off.

    Of several processes, each samples and grades its share of the prompts; the first one
    writes everything but checkpoints, and prints.

    Raises UserError if sizes or problems do not fit together, if the directory was begun
    with other settings, another model or other problems, if another run writes there, if
    the processes differ in any of these, or once a metric is not a finite number; KeyboardInterrupt, after
    saving, if Ctrl-C came.
    """
    if config.wandb:
        import_wandb(config.wandb)  # or says, now, that it is missing
    name = config.reward.function
    function = None if name is None else load_function(name)
    loaded = load_policy(config)
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
    held_out = []
    if config.validation.problems is not None:
        held_out = load_problems(config.validation.problems, config.validation.limit)
    validate = make_validation(config.validation, held_out, engine, instruction)
    origin = {
        "model": loaded.files.digest,
        "data.problems": digest([(e.prompt_ids, e.answers) for e in examples]),
        "validation.problems": digest([(p.text, p.answers) for p in held_out]),
    }
    if name is not None:
        origin["reward.function"] = source_digest(name)
    check_processes(config, run_dir, origin)
    with owning_run(run_dir):
        prepare_run(config, loaded, instruction, run_dir, origin)
        use_compilation_cache()
        best = config.validation.best if validate else None
        checkpoints = RunCheckpoints(run_dir, config.checkpoint, best)
        lengths = prompt_lengths(config, loaded.tokenizer, examples)
        longest = longest_lengths(config, engine.cache_len, *lengths)
        learner = Learner(config, loaded, longest)
        step = learner.restore(checkpoints, batches)
        with (
            Grader() as grader,
            running(
                run_dir,
                config,
                checkpoints,
                step,
                config.steps,
                headline=["reward", "thinking_tokens", "forced_share", "kl"],
                next_command="python -m e1jax.evaluate",
                wandb=config.wandb,
            ) as run,
        ):
            take_steps(
                config, run, learner, engine, batches, grader, function, validate
            )


def take_steps(
    config: GRPOConfig,
    run: Run,
    learner: Learner,
    engine: Engine,
    batches: "grain.DatasetIterator[list[Prompt]]",
    grader: Grader,
    function: RewardFunction | None,
    validate: Callable[[Grader], dict[str, float]] | None,
) -> None:
    """Samples, learns, measures and saves, until the run ends.

    The next step goes on from `position` in the data, also where a signal came after its
    prompts were read.
    """

    def sample(step: int, agree: Agree = any_process) -> Rollouts | None:
        settings, signals = config.at_step(step), run.signals
        return sample_unless_stopped(
            settings, engine, batches, grader, signals, function, agree
        )

    take = side_by_side if config.rollout.ahead else one_after_the_other
    steps = take(run, learner, engine, batches, sample)
    position = batches.get_state()
    for metrics, position in steps:
        metrics["learning_rate"] = np.asarray(learner.schedule(run.step)).item()
        entropy_coef = learner.entropy_coefs(run.step)
        metrics["entropy_coef"] = np.asarray(entropy_coef, np.float32).item()
        check_finite(run.step + 1, metrics)
        run.add(metrics)
        measured = {}
        if validate and run.is_due(config.validation.every):
            engine.params = learner.sampling_params()
            measured = validate(grader)
        if measured or run.is_due(config.checkpoint.every):
            run.save(learner.params, learner.saved_state, position, measured)
    if run.step > run.saved:
        run.save(learner.params, learner.saved_state, position, {})


Agree = Callable[[Any], bool]  # as `any_process`


Sample = Callable[..., Rollouts | None]  # (step, agree)


Steps = Iterator[tuple[dict[str, float], Any]]


def one_after_the_other(
    run: Run,
    learner: Learner,
    engine: Engine,
    batches: "grain.DatasetIterator[list[Prompt]]",
    sample: Sample,
) -> Steps:
    """The metrics of each step, and the position in the data of the next one: responses are
    sampled from the latest parameters, and then learned."""
    while run.goes_on():
        if engine.params is None:  # else the validation has set them
            engine.params = learner.sampling_params()
        rollouts = sample(run.step)
        if rollouts is None:
            continue  # to where it ends
        engine.params = None  # the update may reuse their memory
        engine.release_cache()
        with enough_memory("an update", ADVICE):
            metrics = learner.learn(rollouts, run.step)
        yield metrics, batches.get_state()


def side_by_side(
    run: Run,
    learner: Learner,
    engine: Engine,
    batches: "grain.DatasetIterator[list[Prompt]]",
    sample: Sample,
) -> Steps:
    """As `one_after_the_other`, but the responses of a step are sampled while the ones of
    the step before are learned: from the parameters before that.

    A thread waits for the update; this one gives the devices all of their work, so that
    programs come to each of them in the same order. Processes exchange no numbers while an
    update goes on: Gloo, which connects CPUs, mixes up two collectives at the same time.
    """
    rollouts = None
    with ThreadPoolExecutor(1) as pool:
        while run.goes_on():
            start = time.perf_counter()
            step, sampling = run.step, 0.0
            if rollouts is None:  # of a run that begins, or goes on
                engine.params = learner.params_ahead(latest=False)
                rollouts = sample(step)
                if rollouts is None:
                    continue
                sampling = rollouts.seconds
            engine.params = learner.params_ahead(latest=True)
            position = batches.get_state()
            with enough_memory("an update", ADVICE):
                wait = learner.start_learning(rollouts, step)
                learned = pool.submit(timed, wait)
                rollouts = None
                if step + 1 < run.steps:
                    rollouts = sample(step + 1, partial(after, learned, any_process))
                metrics, learning = learned.result()
            sampling += rollouts.seconds if rollouts else 0
            seconds = time.perf_counter() - start
            metrics["staleness"] = float(min(step, 1))  # in steps
            metrics["sampler_idle"] = 1 - sampling / seconds
            metrics["learner_idle"] = 1 - learning / seconds
            yield metrics, position


def after(learned: Future[Any], agree: Agree, flag: Any) -> bool:
    """`agree(flag)`, once the update is done."""
    learned.result()
    return agree(flag)


def timed(wait: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float]:
    """The result, and the seconds that it took."""
    start = time.perf_counter()
    return wait(), time.perf_counter() - start


def sample_unless_stopped(
    config: GRPOConfig,
    engine: Engine,
    batches: "grain.DatasetIterator[list[Prompt]]",
    grader: Grader,
    signals: list[int],
    function: RewardFunction | None,
    agree: Agree,
) -> Rollouts | None:
    """The responses of a step, to one batch of prompts, or to several where equal groups
    are dropped; None if a process got a signal before it had its own. `agree` is called
    where the processes tell each other."""

    def stop_if_asked(new_tokens: int = 0) -> None:
        if signals:
            raise Stopped

    def sample() -> Rollouts | None:
        rollouts = None
        with suppress(Stopped):
            rollouts = sample_rollouts(
                config, engine, next(batches), grader, stop_if_asked, function=function
            )
        return None if agree(rollouts is None) else rollouts

    if not config.rollout.drop_equal_groups:
        return sample()
    parts: list[Rollouts] = []
    for _ in range(MOST_BATCHES):
        rollouts = sample()
        if rollouts is None:
            return None
        parts.append(rollouts)
        count = len(rollouts.rewards)
        if not agree(num_unequal(parts) < count):
            break
    return unequal_groups(config, parts, count)


def load_policy(config: GRPOConfig) -> LoadedModel:
    """The model that training begins with, on the mesh of the updates; its tokenizer
    states budgets as training does, and not as the model's own training did.

    Raises UserError for parameters of bfloat16: nothing carries the part of an update that
    rounding to 8 bits loses. Measured at a learning rate of 1e-6, 2 % of the parameters
    moved at all in 100 updates. Beside an adapter, the weights are in the dtype of the
    computation, or int8.
    """
    if config.update.param_dtype == "bfloat16":
        raise UserError(
            "update.param_dtype=bfloat16 cannot be trained: most updates are smaller than "
            "half a step of bfloat16 and round to nothing; leave it float32 (the "
            "computation is bfloat16 by --dtype)"
        )
    devices, _ = divided_devices(config.rollout_mesh)
    loaded = load_trainable(config, devices)
    text = config.data.budget_text or loaded.tokenizer.budget_text or BUDGET_TEXT
    text = text if config.rollout.state_budgets else None
    tokenizer = dataclasses.replace(loaded.tokenizer, budget_text=text)
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def make_validation(
    config: ValidationConfig,
    problems: Sequence[Problem],
    engine: Engine,
    instruction: str,
) -> Callable[[Grader], dict[str, float]] | None:
    """Measures accuracy and length at each pair of budgets; None without problems.

    Of several processes, each samples for its share of the problems. Requests are made,
    and refused, here. Problem i has the same seed at every budget and every step, so
    that budgets and steps are compared on the same random draws.
    """
    if not problems:
        return None
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
    for pair in config.budgets:
        params = SamplingParams(*pair)
        longest = max(len(engine.encode(text, params=params)) for text in texts)
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
        right, tokens = process_allgather([right, tokens]).sum(axis=0)
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
