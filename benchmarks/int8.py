"""What int8 costs in quality, as JSON lines.

    python benchmarks/int8.py --output int8.jsonl

- `accuracy`: each bundled model on 2,000 held-out problems at every budget, in float32,
  with int8 weights, and with int8 weights and cache. Requests have the same seeds, so
  differences are paired; each has its standard error beside it.
- `divergence`: KL of the next-token distributions, float32 against int8 weights, of a
  random model (12 layers, hidden 512, 8/2 heads of 64, mlp 2048, vocabulary 4096), in
  nats a token, mean and largest of 4 x 256 tokens, at temperature 1.
"""

import argparse
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from e1jax import Engine, SamplingParams, data
from e1jax.config.model import ModelConfig
from e1jax.nn.model import forward, init_params, unembed
from e1jax.nn.quantize import int8_on_host, map_kernels
from e1jax.sharding.mesh import make_mesh
from e1jax.sharding.runtime import use_compilation_cache

MODELS = ("nano", "nano-e1")
FORMS = {
    "float32": {},
    "int8 weights": {"quantize": "int8"},
    "int8 weights and cache": {"quantize": "int8", "kv_dtype": "int8"},
}
SOLUTION = 28
THINKING = (16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 96, None)
RANDOM = ModelConfig(
    *(4096, 512, 2048, 12, 8, 2, 64), max_position_embeddings=512, rope_theta=1e4
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=2000, help="default 2000")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    args = parser.parse_args()
    use_compilation_cache()
    lines = [divergence()]
    print(json.dumps(lines[0]), flush=True)
    for name in MODELS:
        correct = {form: accuracies(name, args.problems, form) for form in FORMS}
        for form in list(FORMS)[1:]:
            lines += compare(name, form, correct["float32"], correct[form])
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def accuracies(name: str, count: int, form: str) -> np.ndarray:
    """Whether each answer is right, [budgets, problems]."""
    problems = data.held_out_problems(count)
    engine = Engine.from_pretrained(name, slots=64, cache_len=512, **FORMS[form])
    params = [
        SamplingParams(
            thinking_budget=thinking,
            solution_budget=SOLUTION,
            seed=data.request_seed(0, index),
        )
        for thinking in THINKING
        for index in range(count)
    ]
    prompts = [problem["problem"] for problem in problems] * len(THINKING)
    answers = [problem["answer"] for problem in problems] * len(THINKING)
    results = engine.generate(prompts, params)
    right = [r[0].answer == a for r, a in zip(results, answers, strict=True)]
    return np.reshape(right, (len(THINKING), count)).astype(float)


def compare(name: str, form: str, plain: np.ndarray, ours: np.ndarray) -> list[dict]:
    lines = []
    rows = [*zip(THINKING, plain, ours, strict=True)]
    rows.append(("mean", plain.mean(axis=0), ours.mean(axis=0)))
    for thinking, before, after in rows:
        difference = after - before
        lines.append(
            {
                "name": "accuracy",
                "model": name,
                "form": form,
                "thinking_budget": thinking,
                "float32": before.mean(),
                "int8": after.mean(),
                "difference": difference.mean(),
                "stderr": difference.std(ddof=1) / math.sqrt(len(difference)),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def divergence() -> dict[str, object]:
    mesh = make_mesh(None, RANDOM)
    params = init_params(RANDOM, mesh, jnp.float32, 0)
    # Of a spread as trained ones have: of the initial ones, all logits are near zero.
    params = jax.tree.map(lambda p: p * 3 if p.ndim > 2 else p, params)
    tokens = np.random.default_rng(0).integers(0, RANDOM.vocab_size, (4, 256))
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.tile(jnp.arange(256)[None], (4, 1))

    @jax.jit
    def logprobs(params):
        hidden, _ = forward(RANDOM, params, tokens, positions, mesh=mesh)
        hidden = hidden.reshape(-1, RANDOM.hidden_size)
        return jax.nn.log_softmax(unembed(RANDOM, params, hidden, mesh))

    def int8(kernel, axis):
        values, scale = int8_on_host(np.asarray(kernel), axis)
        return {"values": values, "scale": scale}

    ours = logprobs(map_kernels(int8, params))
    plain = logprobs(params)
    kl = (jnp.exp(plain) * (plain - ours)).sum(axis=-1)
    entropy = -(jnp.exp(plain) * plain).sum(axis=-1).mean()
    return {
        "name": "divergence",
        "mean_kl": float(kl.mean()),
        "largest_kl": float(kl.max()),
        "entropy": float(entropy),
    }


if __name__ == "__main__":
    main()
