"""Time and memory of a GRPO step after its rollouts, of e1jax and of google-tunix.

    python benchmarks/grpo.py --output grpo.jsonl

At the first run Tunix is installed into a virtual environment of its own (--venv). Each
library has its own process, and the two take turns, part by part, so that whatever else
the machine does hits both; the first two steps compile and are not counted.

A step has two parts: the log-probabilities of the responses under the reference policy,
and the update, which is forward, loss, backward and AdamW. It is that of a group, 4
responses to one prompt, all of whose tokens count, for a random Qwen2 of 49.8 million
parameters in float32 (12 layers, hidden 512, 8/2 heads of 64, mlp 2048, vocabulary 4096).
Prompt and response are 512 tokens. First the prompt is 128 of them, its share in Tunix's
own recipe, which has 256, 768 and groups of 4 (examples/rl/grpo/gsm8k/run_qwen3.sh in its
repository); both keep activations, and then both compute them again layer by layer
(remat). Last the prompt is 64, without remat. Tunix goes through a prompt with each
response, e1jax once.

Both updates get old and reference log-probabilities as inputs (the same at each step), and
take the mean over tokens of the clipped surrogate and of k3 (coefficient 0.001) at
temperature 0.6; both report the entropy, and clip the gradient by its global norm. For
e1jax this is `train.make_update`; for Tunix it is its `Trainer` with its "grpo" loss, wired
as its `GRPOLearner` does that. The reference policy is the trained one here; its pass is
`train.make_logprobs`, and in Tunix what its inference worker calls.

Weights and data come from one seed. What both report of every update, and their
log-probabilities after the last one, must agree, or the script fails.

Memory is the largest resident size of the whole process up to the last timed step
(Linux). Ratios are Tunix / e1jax: that of the medians, then the smallest and the largest
of a turn.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    TUNIX,
    VENVS,
    VOCAB,
    Worker,
    append,
    e1jax_model,
    install,
    machine,
    make_weights,
    serve,
    spread,
    tunix_model,
    versions,
)

from e1jax.config.training import (
    AdamWConfig,
    GRPOConfig,
    LossConfig,
    RolloutConfig,
    UpdateConfig,
)

VENV = VENVS / "tunix"
WARM_UP = 2  # Tunix compiles its step twice

ROWS, LENGTH = 4, 512
CASES = (128, False), (128, True), (64, False)  # tokens of the prompt, remat
PARTS = ("reference", "update")
TEMPERATURE, KL_COEF, CLIP, MAX_GRAD_NORM = 0.6, 0.001, 0.2, 1.0
# High enough for the updates to show in the losses that are compared.
ADAMW = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0}

METRICS = {"loss": "loss", "kl": "kl", "clip_fraction": "pg_clipfrac"}
METRICS |= {"entropy": "entropy", "grad_norm": "grad_norm"}  # our names: Tunix's
# Sums in another order differ by 1e-6, and the updates enlarge that.
TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=VENV, help=f"default {VENV}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; default 5")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--remat", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(lambda: work(args.worker, args.prompt, args.remat))
        return
    pythons = {"e1jax": sys.executable, "tunix": install(args.venv, TUNIX)}
    print("        prompt remat  reference s  update s (low - high)  step s  peak GB")
    for prompt, remat in CASES:
        append(args.output, compare(pythons, prompt, remat, args.steps))


def compare(
    pythons: dict[str, str], prompt: int, remat: bool, steps: int
) -> list[dict[str, Any]]:
    """Lets the libraries take turns; prints and returns their figures and ratios."""
    flags = [f"--prompt={prompt}", *["--remat"] * remat]
    workers = {
        name: Worker(name, path, __file__, *flags) for name, path in pythons.items()
    }
    turns = [
        {part: ask_all(workers, part) for part in PARTS} for _ in range(WARM_UP + steps)
    ]
    about = machine()
    reports = ask_all(workers, "report")
    for worker in workers.values():
        worker.close()
    lines = figures(turns)
    for line in lines:
        print(
            "{name:7} {prompt:6} {remat!s:5} {reference[median]:12.2f} "
            "{update[median]:8.2f} ({update[low]:.2f} - {update[high]:.2f}) "
            "{step[median]:9.2f} {peak_gb:8.2f}".format(
                prompt=prompt, remat=remat, **line
            )
        )
    differences = largest_differences(reports["e1jax"], reports["tunix"])
    text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"load {about['load']:.1f}; largest differences: {text}", flush=True)
    if not all(value <= TOLERANCE for value in differences.values()):
        sys.exit("the two do not compute the same")
    about |= {
        "benchmark": "grpo_update",
        "prompt": prompt,
        "remat": remat,
        "steps": steps,
        "differences": differences,
        "versions": {name: report["versions"] for name, report in reports.items()},
    }
    return [line | about for line in lines]


def ask_all(workers: dict[str, Worker], word: str) -> dict[str, dict[str, Any]]:
    return {name: worker.ask(word) for name, worker in workers.items()}


def figures(
    turns: list[dict[str, dict[str, dict[str, float]]]],
) -> list[dict[str, Any]]:
    """Of each library, and last their ratios. A step is both parts."""
    timed = turns[WARM_UP:]

    def each(name: str, key: str) -> dict[str, list[float]]:
        parts = [[turn[part][name][key] for turn in timed] for part in PARTS]
        step = [sum(both) for both in zip(*parts, strict=True)]
        return dict(zip((*PARTS, "step"), (*parts, step), strict=True))

    lines = [
        {
            "name": name,
            "unit": "s",
            **{part: spread(values) for part, values in each(name, "seconds").items()},
            **{
                f"{part}_cpu": statistics.median(values)
                for part, values in each(name, "cpu").items()
            },
            "peak_gb": timed[-1]["update"][name]["peak_gb"],
            "first_call": turns[0]["update"][name]["seconds"],
        }
        for name in SIDES
    ]
    ours, theirs = lines
    ratio: dict[str, Any] = {"name": "ratio", "unit": "Tunix / e1jax"}
    for key, value in theirs.items():
        if isinstance(value, float):
            ratio[key] = value / ours[key]
    seconds = each("tunix", "seconds")
    for part, values in each("e1jax", "seconds").items():
        ratios = [b / a for a, b in zip(values, seconds[part], strict=True)]
        median = theirs[part]["median"] / ours[part]["median"]
        ratio[part] = spread(ratios) | {"median": median}
    return [*lines, ratio]


def largest_differences(ours: dict, theirs: dict) -> dict[str, float]:
    """Between two reports, over all steps and tokens; relative to values above 1."""
    differences = {}
    for name, values in ours["values"].items():
        a, b = np.array(values), np.array(theirs["values"][name])
        differences[name] = float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b))))
    return differences


def work(name: str, prompt: int, remat: bool) -> Callable[[str], dict[str, Any]]:
    """The process of one library: does the part that it is told, and reports."""
    parts, report = SIDES[name](prompt, remat)
    library = {"e1jax": "e1jax", "tunix": "google-tunix"}[name]

    def answer(word: str) -> dict[str, Any]:
        if word == "report":
            about = versions("jax", "flax", "optax", library)
            return {"values": report(), "versions": about}
        start, cpu = time.perf_counter(), time.process_time()
        parts[word]()
        return {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1024 / 1e9),
        }

    return answer


def make_data(rng: np.random.Generator, prompt: int) -> dict[str, np.ndarray]:
    """One group: responses to the same prompt of so many tokens. Token 0, which Tunix
    takes for padding, does not occur."""

    def logprobs() -> np.ndarray:  # near those of a random model, -log(VOCAB) = -8.3
        shape = (ROWS, LENGTH - prompt)
        return (-8.5 + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    tokens = rng.integers(1, VOCAB, (ROWS, LENGTH), np.int32)
    tokens[:, :prompt] = tokens[0, :prompt]
    return {
        "tokens": tokens,
        "advantages": np.array([1.2, -0.5, -0.9, 0.2], np.float32),
        "old": logprobs(),
        "ref": logprobs(),
    }


def e1jax_side(prompt: int, remat: bool):
    # Each process has only its own library.
    import jax
    import jax.numpy as jnp

    from e1jax.checkpoint.runs import abstract_state
    from e1jax.grpo.learner import make_logprobs, make_update
    from e1jax.grpo.rollouts import Batch
    from e1jax.training import make_optimizer

    rng = np.random.default_rng(0)
    weights, data = make_weights(rng), make_data(rng, prompt)
    sizes, mesh, params = e1jax_model(weights, LENGTH)
    config = GRPOConfig(
        model="",
        steps=1,
        rollout=RolloutConfig(prompts=1, samples=ROWS, temperature=TEMPERATURE),
        loss=LossConfig(clip_low=CLIP, clip_high=CLIP, kl_coef=KL_COEF),
        optimizer=AdamWConfig(**ADAMW, max_grad_norm=MAX_GRAD_NORM),
        update=UpdateConfig(minibatch_prompts=1, microbatch=ROWS, remat=remat),
    )
    optimizer = make_optimizer(config.optimizer, config.steps, config.updates_per_step)
    shardings = jax.tree.map(
        lambda s: s.sharding, (params, abstract_state(optimizer, params, mesh))
    )
    state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
    update = make_update(
        config, sizes, optimizer, jnp.dtype("float32"), shardings, longest_response=9
    )
    batch = Batch(
        tokens=data["tokens"],
        prompt_len=np.full(ROWS, prompt, np.int32),
        advantages=data["advantages"],
        loss_mask=np.ones((ROWS, LENGTH - prompt), bool),
        old_logprobs=data["old"],
        ref_logprobs=data["ref"],
    )
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)  # one micro-batch
    temperature = jnp.float32(TEMPERATURE)
    logprobs = make_logprobs(sizes, jnp.dtype("float32"), shardings[0], ROWS)
    values = {name: [] for name in METRICS}

    def reference() -> jax.Array:
        return jax.block_until_ready(logprobs(params, batch, temperature))

    def update_policy() -> None:
        nonlocal params, state
        params, state, metrics = update(params, state, batch, False, temperature)
        jax.block_until_ready((params, state))
        for name in METRICS:
            values[name].append(float(metrics[name]))

    def report() -> dict[str, list]:
        return values | {"logprobs": np.asarray(reference()[0]).tolist()}

    return {"reference": reference, "update": update_policy}, report


def tunix_side(prompt: int, remat: bool):
    # Each process has only its own library.
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.rl import common, function_registry
    from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
    from tunix.rl.trainer import Trainer
    from tunix.sft.peft_trainer import TrainingConfig

    rng = np.random.default_rng(0)
    weights, data = make_weights(rng), make_data(rng, prompt)
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    policy = qwen2.RematConfig.DECODER if remat else qwen2.RematConfig.NONE
    model = tunix_model(weights, remat_config=policy)
    config = GRPOConfig(
        num_generations=ROWS,
        beta=KL_COEF,
        kl_loss_mode="low_var_kl",
        loss_agg_mode="token-mean",
        epsilon=CLIP,
    )
    config.temperature = TEMPERATURE  # GRPOLearner sets it from its rollout
    loss = function_registry.get_policy_loss_fn("grpo")
    optimizer = optax.chain(
        optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(**ADAMW)
    )
    ids = {"pad_id": 0, "eos_id": 1}
    with mesh:
        trainer = Trainer(
            model,
            optimizer,
            TrainingConfig(eval_every_n_steps=10**9),
            custom_checkpoint_metadata_fn=dict,
        )
    trainer.is_managed_externally = True  # train() may be called step by step
    trainer.with_loss_fn(
        lambda model, train_example: loss(model, train_example, config, **ids),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    trainer.with_rl_metrics_to_log(
        {METRICS[name]: np.mean for name in ("kl", "clip_fraction", "entropy")}
    )
    tokens = jnp.asarray(data["tokens"])
    example = TrainExample(
        prompt_ids=tokens[:, :prompt],
        prompt_mask=jnp.ones((ROWS, prompt), bool),
        completion_ids=tokens[:, prompt:],
        completion_mask=jnp.ones((ROWS, LENGTH - prompt), bool),
        advantages=jnp.asarray(data["advantages"]),
        ref_per_token_logps=jnp.asarray(data["ref"]),
        old_per_token_logps=jnp.asarray(data["old"]),
    )

    def reference() -> jax.Array:
        logprobs = common.compute_per_token_logps(
            *nnx.split(trainer.model),
            prompt_tokens=example.prompt_ids,
            completion_tokens=example.completion_ids,
            **ids,
            temperature=TEMPERATURE,
        )
        return jax.block_until_ready(logprobs)

    def update_policy() -> None:
        with mesh:
            trainer.train([example])
        jax.block_until_ready(nnx.state((trainer.model, trainer.optimizer)))

    def report() -> dict[str, list]:
        trainer.close()  # writes the metrics of the last step
        history = trainer.metrics_logger.get_metric_history
        values = {ours: history("", name, "train") for ours, name in METRICS.items()}
        values["logprobs"] = reference()
        return {name: np.asarray(value).tolist() for name, value in values.items()}

    return {"reference": reference, "update": update_policy}, report


SIDES = {"e1jax": e1jax_side, "tunix": tunix_side}

if __name__ == "__main__":
    main()
