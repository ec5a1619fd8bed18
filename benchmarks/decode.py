"""Decoding speed of the engine on this machine, as JSON lines.

    python benchmarks/decode.py

- `nano`: tokens per second of the bundled model on 128 held-out problems, at 1 and at 32
  slots (1 slot: 16 problems).
- `capacity`: seconds per decode step of a random model (12 layers, hidden 512, 8/2 heads
  of 64, mlp 2048, vocabulary 4096, float32) with a cache of 512 and of 32,768 positions a
  slot, at the same live length, taken in turns; their ratio should be 1.

Figures are medians of `ROUNDS`, with the smallest and the largest beside them.
"""

import dataclasses
import json
import os
import statistics
import time

import jax.numpy as jnp

from e1jax import Engine, SamplingParams, data, model
from e1jax.config import ModelConfig
from e1jax.convert import load_model
from e1jax.sharding import make_mesh

ROUNDS = 5
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


def main() -> None:
    problems = [p["problem"] for p in data.held_out_problems(128)]
    for slots, count in ((1, 16), (32, 128)):
        engine = Engine.from_pretrained("nano", slots=slots)
        rates = [nano_rate(engine, problems[:count]) for _ in range(ROUNDS + 1)][1:]
        useful = engine.stats.tokens / engine.stats.slot_steps
        say("nano", rates, slots=slots, unit="tokens/s", useful_slot_steps=useful)

    mesh = make_mesh(None, RANDOM)
    params = model.init_params(RANDOM, mesh, jnp.float32, 0)
    # No token ends a response: every run takes the steps that its budget says.
    never = RANDOM.vocab_size
    tokenizer = dataclasses.replace(load_model("nano").tokenizer, eos_id=never)
    for slots in (1, 8):
        engines = {
            cache_len: Engine(
                RANDOM, params, tokenizer, mesh, cache_len=cache_len, slots=slots
            )
            for cache_len in (512, 32768)
        }
        times: dict[int, list[float]] = {cache_len: [] for cache_len in engines}
        for _ in range(ROUNDS + 1):
            for cache_len, engine in engines.items():
                times[cache_len].append(step_seconds(engine))
        for cache_len, seconds in times.items():
            say(
                "capacity", seconds[1:], slots=slots, cache_len=cache_len, unit="s/step"
            )
        medians = [statistics.median(seconds[1:]) for seconds in times.values()]
        print(json.dumps({"capacity_ratio": medians[1] / medians[0], "slots": slots}))


def nano_rate(engine: Engine, problems: list[str]) -> float:
    start = time.perf_counter()
    engine.generate(problems, SamplingParams())
    return engine.stats.tokens / (time.perf_counter() - start)


def step_seconds(engine: Engine) -> float:
    """Seconds of a decode step: the difference of a long and a short run."""
    seconds, steps = [], []
    for budget in (64, 256):
        params = SamplingParams(thinking_budget=0, solution_budget=budget, seed=1)
        start = time.perf_counter()
        engine.generate([[7] * 64] * engine.slots, params)
        seconds.append(time.perf_counter() - start)
        steps.append(engine.stats.decode_steps)
    return (seconds[1] - seconds[0]) / (steps[1] - steps[0])


def say(name: str, values: list[float], **about: object) -> None:
    spread = {"median": statistics.median(values), "low": min(values)}
    load = os.getloadavg()[0]
    line = {"name": name, **about, **spread, "high": max(values), "load": load}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
