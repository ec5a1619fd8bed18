"""Decoding by e1jax, google-tunix and transformers, on the same weights in one run.

    python benchmarks/decode.py --output decode.jsonl

Each library has a process of its own and `--threads` threads. The three take turns, so
that whatever else the machine does hits all. They decode greedily after random prompts
of 64 tokens, in batches of 1, 8 and 32, with a random Qwen2 of 49.8 million parameters
in float32 (12 layers, hidden 512, 8/2 heads of 64, mlp 2048, vocabulary 4096). Nothing
ends a response early. What they decode must agree token by token, or the script fails.
At the first run the others are installed into virtual environments of their own; where
pip brings torch with CUDA (gigabytes), make one with its CPU build beforehand, and name
it with --transformers-venv.

- `e1jax`: an `Engine` with as many slots as there are prompts.
- `tunix`: its `Sampler`.
- `transformers`: `generate` with a `StaticCache`, which is made once.
- `transformers, dynamic`: `generate` as it is called mostly, with a cache that grows;
  it has no capacity.

The cache holds 512 positions a row, and in batches of 1 and 8 also 32,768: of 32 rows
it would take 13 GB. There the others decode fewer tokens, since each step of theirs goes
through all positions anyway.

`step` is the time of 256 new tokens less that of 1, over 255: seconds of a decode step,
without compilation, prefill and what a call costs. `first` is the time of a call for 1
token: prefill of the batch, a step, and for Tunix the allocation of the cache. Ratios are
to e1jax at the same capacity; those named `_to_512` are of e1jax at 32,768 to itself at
512, and should be 1. `stream` is the time in which one float32 matrix-vector product goes
through as many bytes as the weights that a step reads, and `stream_share` its ratio to
the step. All are medians over the rounds, ratios too, with the smallest and the largest
beside them; `cpu` is processor time. The first round compiles and is not counted.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

TRANSFORMERS = ("transformers==5.23.0", "torch==2.13.0")  # torch for CPUs
PACKAGES = {
    "e1jax": ("e1jax", "jax"),
    "tunix": ("google-tunix", "jax"),
    "transformers": ("transformers", "torch"),
}
PROMPT, NEW, FEW = 64, 256, 32
SHORT, LONG = 512, 32768
CAPACITIES = {1: (SHORT, LONG), 8: (SHORT, LONG), 32: (SHORT,)}  # of each batch
# A tie that rounding decides differently changes the rest of a row.
AGREEMENT = 0.95

Case = dict[str, Any]  # batch, capacity (None: the cache grows), new: tokens to decode
Generate = Callable[[list[list[int]], int], Sequence[Sequence[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    parser.add_argument("--rounds", type=int, default=5, help="timed; default 5")
    parser.add_argument("--threads", type=int, default=2, help="of each; default 2")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[*CAPACITIES], choices=[*CAPACITIES]
    )
    for name in ("tunix", "transformers"):
        venv = common.VENVS / name
        text = f"its virtual environment; default {venv}"
        parser.add_argument(f"--{name}-venv", type=Path, default=venv, help=text)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        common.serve(lambda: work(args.worker))
        return
    pythons = {
        "e1jax": sys.executable,
        "tunix": common.install(args.tunix_venv, common.TUNIX),
        "transformers": common.install(args.transformers_venv, *TRANSFORMERS),
    }
    # XLA has a thread for each processor that it may use, torch as many as this says.
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, processors[: args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    # Torch's threads spin where they wait, and so starve each other wherever a machine
    # has other work to do: a step then takes up to 30 times as long.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    workers = {
        name: common.Worker(name, python, __file__) for name, python in pythons.items()
    }
    about = {
        "benchmark": "decode",
        "rounds": args.rounds,
        "threads": args.threads,
        "versions": {name: worker.ask(None) for name, worker in workers.items()},
    }
    print("batch  cache                         ms/step (low - high)   ratio  first ms")
    for batch in args.batch:
        lines = compare(workers, batch, args.rounds)
        about |= common.machine()
        common.append(args.output, [line | about for line in lines])
    for worker in workers.values():
        worker.close()


def compare(
    workers: dict[str, common.Worker], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Lets the libraries take turns; prints and returns their figures."""
    cases = []
    for capacity in CAPACITIES[batch]:
        cases += [(name, {"batch": batch, "capacity": capacity}) for name in workers]
    cases.append(("transformers", {"batch": batch, "capacity": None}))
    turns, tokens = [], {}
    for _ in range(1 + rounds):
        turn = []
        for name, case in cases:
            few = name != "e1jax" and case["capacity"] == LONG
            one = workers[name].ask(case | {"new": 1})
            whole = workers[name].ask(case | {"new": FEW if few else NEW})
            tokens[name, case["capacity"]] = np.array(whole["tokens"])
            steps = len(whole["tokens"][0]) - 1
            turn.append(
                {
                    "step": (whole["seconds"] - one["seconds"]) / steps,
                    "cpu": (whole["cpu"] - one["cpu"]) / steps,
                    "first": one["seconds"],
                    "stream": workers["e1jax"].ask("stream")["seconds"],
                }
            )
        turns.append(turn)
    same = agreement(tokens)
    lines = []
    for index, (name, case) in enumerate(cases):
        ours = cases.index(("e1jax", case | {"capacity": case["capacity"] or SHORT}))
        line = {"name": name if case["capacity"] else f"{name}, dynamic", **case}
        line["same_tokens"] = same[name, case["capacity"]]
        line |= figures(turns[1:], index, ours)
        if name == "e1jax" and case["capacity"] == LONG:
            for key in ("step", "cpu", "first"):
                line[f"{key}_to_512"] = ratio(turns[1:], index, 0, key)
        lines.append(line)
        print(
            "{batch:5} {capacity!s:>6}  {name:22} {0:7.2f} ({1:.2f} - {2:.2f}) "
            "{ratio[median]:5.2f}x {3:9.1f}".format(
                *(1e3 * line[key] for key in ("median", "low", "high")),
                1e3 * line["first"]["median"],
                **line,
            ),
            flush=True,
        )
    return lines


def agreement(tokens: dict[Any, np.ndarray]) -> dict[Any, float]:
    """Share of the tokens that are e1jax's; ends the script where it is too small."""
    wanted = tokens["e1jax", SHORT]
    same = {
        case: float(np.mean(found == wanted[:, : found.shape[1]]))
        for case, found in tokens.items()
    }
    if min(same.values()) < AGREEMENT:
        sys.exit(f"they do not compute the same; shares of equal tokens: {same}")
    return same


def figures(turns: list[list[dict]], index: int, ours: int) -> dict[str, Any]:
    """What the turns say of a case, and in relation to e1jax's."""
    mine = [turn[index] for turn in turns]
    line: dict[str, Any] = {
        "unit": "s/step",
        **common.spread([t["step"] for t in mine]),
    }
    line["cpu"] = statistics.median(t["cpu"] for t in mine)
    line["first"] = common.spread([t["first"] for t in mine])
    line["ratio"] = ratio(turns, index, ours, "step")
    line["cpu_ratio"] = ratio(turns, index, ours, "cpu")
    line["first_ratio"] = ratio(turns, index, ours, "first")
    line["stream"] = common.spread([t["stream"] for t in mine])
    line["stream_share"] = common.spread([t["stream"] / t["step"] for t in mine])
    return line


def ratio(turns: list[list[dict]], index: int, to: int, key: str) -> dict[str, float]:
    return common.spread([turn[index][key] / turn[to][key] for turn in turns])


def work(name: str) -> Callable[[Any], dict[str, Any]]:
    """The process of one library: decodes the cases that it is given."""
    weights = common.make_weights(np.random.default_rng(0))
    prompts = np.random.default_rng(1).integers(1, common.VOCAB, (32, PROMPT)).tolist()
    make = SIDES[name](weights)
    made: dict[int | None, Generate] = {}  # of the batch that was asked for last
    last = None
    stream = stream_seconds(weights) if name == "e1jax" else None

    def answer(case: Any) -> dict[str, Any]:
        nonlocal last
        if case is None:
            return common.versions(*PACKAGES[name])
        if case == "stream":
            return {"seconds": stream()}
        batch, capacity = case["batch"], case["capacity"]
        if batch != last:
            last = batch
            made.clear()
        if capacity not in made:
            made[capacity] = make(batch, capacity)
        start, cpu = time.perf_counter(), time.process_time()
        tokens = made[capacity](prompts[:batch], case["new"])
        return {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "tokens": [[int(token) for token in row] for row in tokens],
        }

    return answer


def stream_seconds(weights: dict[str, np.ndarray]) -> Callable[[], float]:
    """A function that takes the time of a product of a vector and as many numbers as
    the weights that a decode step reads: all but the embedding."""
    import jax
    import jax.numpy as jnp

    size = sum(array.size for name, array in weights.items() if name != "embedding")
    vector, matrix = jnp.ones((1, 4096)), jnp.ones((4096, size // 4096))
    product = jax.jit(jnp.matmul)
    product(vector, matrix).block_until_ready()

    def seconds() -> float:
        taken = []
        for _ in range(9):
            start = time.perf_counter()
            product(vector, matrix).block_until_ready()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return seconds


def e1jax_side(weights: dict[str, np.ndarray]) -> Callable[[int, Any], Generate]:
    # Each process has only its own library.
    import dataclasses

    from e1jax import Engine, SamplingParams
    from e1jax.checkpoint.load import load_model

    config, mesh, params = common.e1jax_model(weights, LONG)
    # Of a model that has no `</think>`, and whose EOS never comes.
    tokenizer = dataclasses.replace(
        load_model("nano").tokenizer, eos_id=common.VOCAB, think_end_id=None
    )

    def make(batch: int, capacity: int) -> Generate:
        engine = Engine(
            config, params, tokenizer, mesh, cache_len=capacity, slots=batch
        )

        def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
            sampling = SamplingParams(
                thinking_budget=None, solution_budget=new, temperature=0, top_p=1
            )
            return [one.token_ids for (one,) in engine.generate(prompts, sampling)]

        return generate

    return make


def tunix_side(weights: dict[str, np.ndarray]) -> Callable[[int, Any], Generate]:
    # Each process has only its own library.
    from tunix.generate.sampler import CacheConfig, Sampler

    class Tokenizer:
        """Takes a JSON list of ids as the text; there is no BOS, EOS or padding."""

        encode = staticmethod(json.loads)
        decode = staticmethod(lambda ids: "")
        bos_id = staticmethod(lambda: None)
        eos_id = pad_id = staticmethod(lambda: -1)

    model = common.tunix_model(weights)

    def make(batch: int, capacity: int) -> Generate:
        sizes = CacheConfig(capacity, common.LAYERS, common.KV_HEADS, common.HEAD_DIM)
        sampler = Sampler(model, Tokenizer(), sizes)

        def generate(prompts: list[list[int]], new: int) -> list[np.ndarray]:
            texts = [json.dumps(prompt) for prompt in prompts]
            return sampler(texts, new, max_prompt_length=PROMPT, eos_tokens=[-1]).tokens

        return generate

    return make


def transformers_side(weights: dict[str, np.ndarray]) -> Callable[[int, Any], Generate]:
    # Each process has only its own library.
    import torch
    from transformers import GenerationConfig, StaticCache

    model = common.transformers_model(weights, LONG)

    def make(batch: int, capacity: int | None) -> Generate:
        cache = capacity and StaticCache(model.config, max_cache_len=capacity)

        def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
            if cache:
                cache.reset()
            tokens = torch.tensor(prompts)
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                generation_config=GenerationConfig(max_new_tokens=new, do_sample=False),
            )
            return out[:, PROMPT:].tolist()

        return generate

    return make


SIDES = {"e1jax": e1jax_side, "tunix": tunix_side, "transformers": transformers_side}

if __name__ == "__main__":
    main()
