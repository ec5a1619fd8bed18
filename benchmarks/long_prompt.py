"""A long prompt that comes while others are answered: how long they wait for a token.

    python benchmarks/long_prompt.py --output long_prompt.jsonl

The engine of a server answers `--others` requests, each with a token from every decode
step. Then a prompt of `--prompt` tokens comes. Two ways take turns, with the same engine and
requests:
- `pieces`: as the engine does it, the prompt's keys and values are computed in pieces, with
  some decode steps of the others after each.
- `at_once`: in one piece.

Model: 12 layers, hidden 512, vocabulary 4096, 50 million parameters, float32.

Figures: milliseconds from one piece of a running answer (the tokens that a step of the engine
gave) to the next, while the prompt is waiting for its first token: median, 95th and 99th
percentiles and the longest; `first_s`, seconds from the prompt's arrival to its first token.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import append, machine
from serving import RANDOM

from e1jax import Engine, SamplingParams
from e1jax.checkpoint.load import load_model
from e1jax.nn.model import init_params
from e1jax.sharding.mesh import make_mesh


class AtOnce(Engine):
    _piece = 2**30  # tokens of a prompt at a time


WAYS = {"pieces": Engine, "at_once": AtOnce}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="timed turns; default 3")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens; default 8192")
    parser.add_argument("--others", type=int, default=4, help="requests; default 4")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    args = parser.parse_args()
    engines = {way: make_engine(kind, args) for way, kind in WAYS.items()}
    for engine in engines.values():  # compiles
        run(engine, args)
    turns = [
        {way: run(engine, args) for way, engine in engines.items()}
        for _ in range(args.turns)
    ]
    about = {
        "benchmark": "long_prompt",
        "prompt": args.prompt,
        "others": args.others,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "e1jax")},
        "device": jax.devices()[0].device_kind,
        **machine(),
    }
    lines = [figures(way, [turn[way] for turn in turns]) for way in WAYS]
    for line in lines:
        print(json.dumps(line))
    append(args.output, [line | about for line in lines])


def make_engine(kind: type[Engine], args: argparse.Namespace) -> Engine:
    mesh, nano = make_mesh(None, RANDOM), load_model("nano")
    # Its EOS is never sampled.
    tokenizer = dataclasses.replace(nano.tokenizer, eos_id=RANDOM.vocab_size)
    params = init_params(RANDOM, mesh, jnp.float32, 0)
    cache_len = min(args.prompt + 1024, RANDOM.max_position_embeddings)
    sizes = {"cache_len": cache_len, "slots": args.others + 1}
    return kind(RANDOM, params, tokenizer, mesh, **sizes)


def run(engine: Engine, args: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds between the pieces of the others, and seconds to the prompt's first token."""
    engine.release_cache()  # or the prompt would be found in the cache
    rng = np.random.default_rng(0)
    endless = SamplingParams(thinking_budget=0, solution_budget=900)
    for _ in range(args.others):
        engine.add(rng.integers(300, RANDOM.vocab_size, 64).tolist(), endless)
    for _ in range(3):
        engine.step()
    tokens = rng.integers(300, RANDOM.vocab_size, args.prompt).tolist()
    late = engine.add(tokens, SamplingParams(thinking_budget=0, solution_budget=1))
    start = last = time.perf_counter()
    gaps: list[float] = []
    while True:
        events = engine.step()
        now = time.perf_counter()
        ids = {event.request_id for event in events}
        assert len(ids - {late}) == args.others, "an answer ended before the prompt's"
        gaps, last = [*gaps, now - last], now
        if late in ids:
            return gaps, now - start


def figures(way: str, turns: list[tuple[list[float], float]]) -> dict[str, Any]:
    gaps = np.concatenate([gaps for gaps, _ in turns])
    firsts = [first for _, first in turns]
    cuts = [*np.percentile(gaps, [50, 95, 99]), gaps.max()]
    return {
        "name": way,
        "between_ms": " / ".join(f"{1000 * cut:,.0f}" for cut in cuts),
        "first_s": statistics.median(firsts),
        "first_s_low": min(firsts),
        "first_s_high": max(firsts),
    }


if __name__ == "__main__":
    main()
