"""Requests of mixed budgets: how much of the work is useful, and what one call saves.

    python benchmarks/serving.py --output serving.jsonl

64 requests are answered on 8 slots, in three ways that take turns, all with the same
engine, compiled programs, weights and seeds:
- `e1jax`: one call. A slot that is done takes the next request at once, and the end of
  thinking is forced in the middle of decoding.
- `two_calls`: what the authors' reference code does, for batches of 8. A call prefills
  the prompts and samples until each has `</think>` or its thinking budget, and the batch
  waits for its slowest; a second call prefills prompt, thinking and `</think>` once more
  and samples the solutions, and the batch waits again; then comes the next batch.
- `two_calls_refilled`: the same two calls, but each takes all 64 requests and refills
  slots as `e1jax` does, as an engine with its own queue would under that code. What is
  left is the cost of the second prefill and of waiting once between the calls.

Each request's thinking and solution budgets are drawn log-uniformly from 16 to 1,024
tokens. Models:
- `random`: 12 layers, hidden 512, 8/2 heads of 64, mlp 2048, vocabulary 4096, float32;
  prompts of 64 tokens. No token ends a response, so every budget is used up. A turn is
  about 21,500 steps, a quarter of an hour on a core; `--layers 1` is a quick look.
- `nano`: the bundled model on held-out problems, which ends by itself when it is done.

A useful slot step is one that gave a token of a response. The thinking that the ways
sample is the same token by token where the arithmetic is (float32 on a CPU): the share
of requests for which it was is `same_thinking`. All is compiled before the first turn.
Figures are medians of the turns, with the smallest and the largest beside them; ratios
are those of requests per second within a turn, e1jax / the other. `cpu_ratio` is that of
processor time, which other processes on the machine disturb less.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e1jax import Completion, Engine, SamplingParams, data
from e1jax.checkpoint.load import load_model
from e1jax.config.model import ModelConfig
from e1jax.nn.model import init_params
from e1jax.sharding.mesh import make_mesh

MODELS = ("random", "nano")
REQUESTS, SLOTS = 64, 8
BUDGETS = (16, 1024)
PROMPT = 64  # tokens, of the random model's
CACHE_LEN = 2304
RANDOM = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=12,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=32768,
    rope_theta=1e4,
)


class Work(NamedTuple):
    """What a way did in one turn."""

    seconds: float
    cpu: float  # seconds of processor time
    tokens: int  # slot steps that gave one
    slot_steps: int
    prefills: int
    thinking: list[list[int]]  # tokens of each request, without `</think>`


class Engines(NamedTuple):
    """One engine three times: as it is, and as each of the two calls needs it."""

    both: Engine
    think: Engine  # ends a response at `</think>`
    solve: Engine  # knows no `</think>`, as it stands in the prompt


Request = tuple[list[int], SamplingParams]  # the prompt's token ids
Way = Callable[[Engines, list[Request]], Work]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="timed turns; default 3")
    parser.add_argument("--seed", type=int, default=0, help="of the budgets; default 0")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument(
        "--layers",
        type=int,
        default=RANDOM.num_layers,
        help="of the random model; fewer for a quick look (default 12)",
    )
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    args = parser.parse_args()
    print("model   way          requests/s (low - high)   useful  prefills  ratio  CPU")
    for name in args.model or MODELS:
        lines = compare(name, args.seed, args.turns, args.layers)
        if args.output:
            with args.output.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def compare(name: str, seed: int, turns: int, layers: int) -> list[dict[str, Any]]:
    """Lets the ways take turns; prints and returns their figures."""
    engines, prompts = random_model(layers) if name == "random" else nano_model()
    requests = list(zip(prompts, mixed_budgets(seed), strict=True))
    compile_programs(engines.both)
    done: list[dict[str, Work]] = []
    for number in range(turns):
        done.append({})
        for way, run in WAYS.items():
            done[-1][way] = work = run(engines, requests)
            said = f"{work.seconds:.2f} s, CPU {work.cpu:.2f} s"
            said = f"turn {number + 1}: {name} {way} {said}"
            print(said, file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    about = {
        "benchmark": "serving",
        "model": name,
        "layers": engines.both.config.num_layers,
        "requests": REQUESTS,
        "slots": SLOTS,
        "turns": turns,
        "seed": seed,
        "load": load,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "e1jax")},
        "device": jax.devices()[0].device_kind,
        "cpu_model": cpu_model(),
        "cores": cores(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    lines = [figures(way, [turn[way] for turn in done], done) for way in WAYS]
    for line in lines:
        print(
            "{model:6} {name:18} {median:8.3f} ({low:.3f} - {high:.3f}) "
            "{useful_slot_steps:8.1%} {prefills:9} {ratio:6.2f} {cpu_ratio:4.2f}".format(
                model=name, **line
            )
        )
    print(f"load {load:.1f}", flush=True)
    return [line | about for line in lines]


def figures(
    name: str, works: list[Work], turns: list[dict[str, Work]]
) -> dict[str, Any]:
    """A way's figures, and what e1jax is to it."""
    rates = [REQUESTS / work.seconds for work in works]
    ratios = [turn[name].seconds / turn["e1jax"].seconds for turn in turns]
    cpu_ratios = [turn[name].cpu / turn["e1jax"].cpu for turn in turns]
    work, ours = works[0], turns[0]["e1jax"]
    same = sum(map(list.__eq__, work.thinking, ours.thinking)) / REQUESTS
    return {
        "name": name,
        "unit": "requests/s",
        "median": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "useful_slot_steps": work.tokens / work.slot_steps,
        "slot_steps": work.slot_steps,
        "tokens": work.tokens,
        "prefills": work.prefills,
        "same_thinking": same,
    }


def mixed_budgets(seed: int) -> list[SamplingParams]:
    """The requests' settings; both budgets are log-uniform."""
    low, high = np.log(BUDGETS)
    rng = np.random.default_rng(seed)
    budgets = np.exp(rng.uniform(low, high, (REQUESTS, 2))).round().astype(int)
    return [
        SamplingParams(thinking_budget=thinking, solution_budget=solution, seed=index)
        for index, (thinking, solution) in enumerate(budgets.tolist())
    ]


def random_model(layers: int) -> tuple[Engines, list[list[int]]]:
    config = dataclasses.replace(RANDOM, num_layers=layers)
    mesh = make_mesh(None, config)
    params = init_params(config, mesh, jnp.float32, 0)
    nano = load_model("nano").tokenizer
    tokenizer = dataclasses.replace(nano, eos_id=config.vocab_size)  # is never sampled
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (REQUESTS, PROMPT)).tolist()
    engine = Engine(config, params, tokenizer, mesh, cache_len=CACHE_LEN, slots=SLOTS)
    return three(engine), prompts


def nano_model() -> tuple[Engines, list[list[int]]]:
    engine = Engine.from_pretrained("nano", cache_len=CACHE_LEN, slots=SLOTS)
    problems = data.held_out_problems(REQUESTS)
    return three(engine), [engine.encode(p["problem"]) for p in problems]


def three(engine: Engine) -> Engines:
    """The engine, and it again for each of the two calls."""

    def variant(**ids: Any) -> Engine:
        tokenizer = dataclasses.replace(engine.tokenizer, think_end_id=None, **ids)
        return Engine(
            *(engine.config, engine.params, tokenizer, engine.mesh),
            cache_len=CACHE_LEN,
            slots=SLOTS,
        )

    return Engines(engine, variant(eos_id=engine.tokenizer.think_end_id), variant())


def compile_programs(engine: Engine) -> None:
    """Those for each bucket that a prompt with its thinking can fall into; the engines
    share them."""
    params = SamplingParams(thinking_budget=0, solution_budget=1)
    for power in range(4, 12):
        engine.generate([[7] * (2**power + 1)], params)


def one_call(engines: Engines, requests: list[Request]) -> Work:
    start, cpu = time.perf_counter(), time.process_time()
    results, stats = call(engines.both, requests)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    thinking = [c.token_ids[: c.thinking_tokens] for c in results]
    end = engines.both.tokenizer.think_end_id
    return Work(seconds, cpu, *stats, [without(ids, end) for ids in thinking])


def two_calls(engines: Engines, requests: list[Request], batch: int = SLOTS) -> Work:
    start, cpu = time.perf_counter(), time.process_time()
    end = engines.both.tokenizer.think_end_id
    totals, all_thinking = np.zeros(3, int), []
    for first in range(0, len(requests), batch):
        part = requests[first : first + batch]
        think = [(prompt, plain(p.thinking_budget, p)) for prompt, p in part]
        thoughts, stats = call(engines.think, think)
        totals += stats
        thinking = [without(c.token_ids, end) for c in thoughts]
        solve = [
            ([*prompt, *ids, end], plain(p.solution_budget, p))
            for (prompt, p), ids in zip(part, thinking, strict=True)
        ]
        totals += call(engines.solve, solve)[1]
        all_thinking += thinking
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Work(seconds, cpu, *totals.tolist(), all_thinking)


def two_calls_refilled(engines: Engines, requests: list[Request]) -> Work:
    return two_calls(engines, requests, batch=len(requests))


def call(
    engine: Engine, requests: list[Request]
) -> tuple[list[Completion], tuple[int, int, int]]:
    """Completions, and (tokens, slot steps, prefills)."""
    results = engine.generate(*map(list, zip(*requests, strict=True)))
    stats = engine.stats
    counts = (stats.tokens, stats.slot_steps, stats.prefills)
    return [samples[0] for samples in results], counts


def plain(budget: int | None, params: SamplingParams) -> SamplingParams:
    """For an engine without `</think>`: all its tokens are the solution's."""
    budgets = {"thinking_budget": None, "solution_budget": budget}
    return dataclasses.replace(params, **budgets)


def without(ids: list[int], last: int | None) -> list[int]:
    return ids[:-1] if ids and ids[-1] == last else ids


def cores() -> int | None:
    """Those that this process may use, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


WAYS: dict[str, Way] = {
    "e1jax": one_call,
    "two_calls": two_calls,
    "two_calls_refilled": two_calls_refilled,
}

if __name__ == "__main__":
    main()
