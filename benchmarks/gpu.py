"""Measures e1jax on one GPU: decode steps, prefill and updates, with torch beside it.

    pip install -e '.[cuda]'
    python benchmarks/gpu.py > gpu.jsonl              # 15 minutes on an H100
    python benchmarks/gpu.py --shape tiny --quick     # whether it runs, anywhere

Prints a JSON line for each figure: milliseconds of a decode step and its share of the measured
copy rate, seconds of a prefill and of an update and their share of the measured matrix rate.
Each case is a process of its own with a time limit; the most important ones come first. A case
that fails prints a line with its error, and the next one goes on. transformers is measured
where torch is installed with CUDA.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BIASED = {"max_position_embeddings": 32768, "rope_theta": 1e4}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
        **{"num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "head_dim": 128},
    },
    "1.5b": {
        **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960},
        **{"num_layers": 28, "num_heads": 12, "num_kv_heads": 2, "head_dim": 128},
    },
    "tiny": {
        **{"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512},
        **{"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    },
}

# As the decode loop is a CUDA graph. Each name is a kind of operation that may be in one.
GRAPHS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
    "CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION"
)

# (rows, cache, prompt, temperature) of decode steps after a prompt.
DECODE = [
    *((1, 32768, 64, 0.0), (1, 32768, 2048, 0.0), (1, 4096, 2048, 0.0)),
    *((8, 32768, 2048, 0.6), (32, 8192, 512, 0.0), (32, 8192, 512, 0.6)),
    (64, 4096, 2048, 0.6),
]
PREFILL = [(1, 2048), (8, 2048)]  # prompts, tokens of each


@dataclasses.dataclass(frozen=True)
class Case:
    """One process: the function of this file's CASES that it runs, and its settings."""

    name: str
    seconds: int  # after which it is ended
    flags: str = ""  # of XLA
    quantize: str = ""


def plan() -> list[Case]:
    """In the order of importance. The limits add up to 15 minutes."""
    cases = [
        Case("rates", 60),
        Case("decode", 240, GRAPHS),
        Case("prefill", 90),
        Case("update", 120),
        Case("decode_few", 90, GRAPHS, "int8"),
        Case("decode_few", 90),  # without graphs
    ]
    if importlib.util.find_spec("torch"):
        cases += [Case("torch_decode", 120), Case("torch_update", 90)]
    return cases


def main() -> None:
    """Runs the cases, or with --case one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of decode steps")
    parser.add_argument("--quick", action="store_true", help="few steps, short prompts")
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--quantize", default="", help="int8: the weights of the model")
    args = parser.parse_args()
    if args.case:
        CASES[args.case](args)
        return
    for case in plan():
        run(case, args)


def run(case: Case, args: argparse.Namespace) -> None:
    """Runs a case; prints its lines, and of a failure the last words."""
    command = [sys.executable, __file__, "--case", case.name, "--shape", args.shape]
    command += ["--quick"] * args.quick
    command += ["--quantize", case.quantize] if case.quantize else []
    flags = f"{os.environ.get('XLA_FLAGS', '')} {case.flags}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            timeout=case.seconds,
        )
    except subprocess.TimeoutExpired:
        say(case.name, error=f"not done after {case.seconds} seconds")
        return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        say(case.name, error=lines[-1][:300])


def say(case: str, **figures: Any) -> None:
    """Prints a JSON line."""
    print(json.dumps({"case": case, **figures}), flush=True)


def rates(args: argparse.Namespace) -> None:
    """The rates of the card that shares are of: a copy, and a product of matrices."""
    import jax
    import jax.numpy as jnp

    size = 2**24 if args.quick else 2**30
    x = jnp.ones((size,), jnp.bfloat16)
    seconds = timed(functools.partial(jax.jit(lambda x: x * 2), x))
    side = 512 if args.quick else 8192
    a = jnp.ones((side, side), jnp.bfloat16)
    product = timed(functools.partial(jax.jit(lambda a: a @ a), a))
    say(
        "rates",
        device=str(jax.devices()[0].device_kind),
        jax=jax.__version__,
        copy_gb_s=2 * x.nbytes / seconds / 1e9,
        product_tflop_s=2 * side**3 / product / 1e12,
    )


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call that gives arrays of JAX."""
    import jax

    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def decode(args: argparse.Namespace, cells: list[tuple] | None = None) -> None:
    """Milliseconds of a decode step of each cell of DECODE, after its prompt."""
    config, mesh, params, tokenizer = model(args)
    for rows, cache, prompt, temperature in cells or list(cells_of(args)):
        with reported("decode", rows=rows, cache=cache, prompt=prompt):
            engine = make_engine(config, mesh, params, tokenizer, rows, cache)
            draw = functools.partial(
                generate, engine, random_prompts(config, rows, prompt), temperature
            )
            new = 16 if args.quick else 64
            step, first = of_a_step(draw, new)
            read = read_bytes(args, rows, prompt + new / 2)
            say(
                "decode",
                **{"shape": args.shape, "rows": rows, "cache": cache},
                **{"prompt": prompt, "temperature": temperature},
                weights=args.quantize or "bfloat16",
                graphs="command_buffer" in os.environ.get("XLA_FLAGS", ""),
                step_ms=1e3 * step,
                first_token_s=first,
                gb_s=read / step / 1e9,
            )
            engine.release_cache()


def decode_few(args: argparse.Namespace) -> None:
    """`decode` of one row and 2,048 tokens."""
    decode(args, list(cells_of(args))[1:2])


def cells_of(args: argparse.Namespace) -> Iterator[tuple]:
    """DECODE, or short ones."""
    for rows, cache, prompt, temperature in DECODE:
        if args.quick:
            cache, prompt = 512, min(prompt, 128)
        yield rows, cache, prompt, temperature


def of_a_step(draw: Callable[[int], float], new: int) -> tuple[float, float]:
    """Seconds of a step, by responses of `new` tokens and of one; and of the latter."""
    for count in (1, new):  # compiles
        draw(count)
    ones, many = zip(*[(draw(1), draw(new)) for _ in range(3)], strict=True)
    first = statistics.median(ones)
    return (statistics.median(many) - first) / (new - 1), first


def generate(engine: Any, prompts: Any, temperature: float, new: int) -> float:
    """Seconds until each prompt has a response of `new` tokens."""
    from e1jax import SamplingParams

    params = SamplingParams(
        thinking_budget=None,
        solution_budget=new,
        temperature=temperature,
        top_p=0.95 if temperature else 1.0,
    )
    start = time.perf_counter()
    results = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert all(len(of[0].token_ids) == new for of in results)
    return seconds


def prefill(args: argparse.Namespace) -> None:
    """Seconds until the first tokens of prompts, and the flops of their matrices."""
    config, mesh, params, tokenizer = model(args)
    for rows, prompt in PREFILL:
        prompt = 128 if args.quick else prompt
        with reported("prefill", rows=rows, prompt=prompt):
            engine = make_engine(config, mesh, params, tokenizer, rows, 4096)
            prompts = random_prompts(config, rows, prompt)
            generate(engine, prompts, 0.0, 1)
            seconds = statistics.median(
                generate(engine, random_prompts(config, rows, prompt), 0.0, 1)
                for _ in range(3)
            )
            flops = 2 * layer_weights(args.shape) * rows * prompt
            say(
                "prefill",
                **{"shape": args.shape, "rows": rows, "prompt": prompt},
                **{"seconds": seconds, "tflop_s": flops / seconds / 1e12},
            )
            engine.release_cache()


def update(args: argparse.Namespace) -> None:
    """Seconds of a GRPO update: 8 rows of 2,048 tokens, a prompt of 256 for each 4."""
    import jax
    import jax.numpy as jnp

    from e1jax.checkpoint.runs import abstract_state
    from e1jax.config.training import (
        AdamWConfig,
        GRPOConfig,
        LossConfig,
        RolloutConfig,
        UpdateConfig,
    )
    from e1jax.grpo.learner import make_update
    from e1jax.grpo.rollouts import Batch
    from e1jax.training import make_optimizer

    shape = "tiny" if args.quick else "1.5b"
    length, prompt, rows = (256, 64, 8) if args.quick else (2048, 256, 8)
    config, mesh, params, _ = model(
        argparse.Namespace(shape=shape, quantize=""), jnp.float32
    )
    settings = GRPOConfig(
        model="",
        steps=10,
        rollout=RolloutConfig(prompts=2, samples=4, temperature=0.6),
        loss=LossConfig(kl_coef=0.0),
        optimizer=AdamWConfig(),
        update=UpdateConfig(minibatch_prompts=2, microbatch=rows),
    )
    optimizer = make_optimizer(settings.optimizer, settings.steps, 1)
    shapes = (params, abstract_state(optimizer, params, mesh))
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
    response = length - prompt
    step = make_update(
        *(settings, config, optimizer, jnp.dtype("bfloat16"), shardings),
        longest_response=response,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (1, rows, length)).astype(np.int32)
    tokens.reshape(-1, 4, length)[:, :, :prompt] = tokens[0, ::4, None, :prompt]
    batch = Batch(
        tokens=tokens,
        prompt_len=np.full((1, rows), prompt, np.int32),
        advantages=rng.standard_normal((1, rows)).astype(np.float32),
        loss_mask=np.ones((1, rows, response), bool),
        old_logprobs=np.full((1, rows, response), -11.9, np.float32),
        ref_logprobs=None,
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        params, state, _ = step(params, state, batch, True, jnp.float32(0.6))
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - start)
    say("update", shape=shape, **of_update(seconds, shape, rows, length, prompt, 4))
    stats = jax.devices()[0].memory_stats() or {}
    say("update", peak_gb=stats.get("peak_bytes_in_use", 0) / 1e9)


def of_update(seconds, shape, rows, length, prompt, samples) -> dict[str, float]:
    """Median of the later updates; its 6ND with each prompt once (`samples` share it)."""
    tokens = rows * (length - prompt) + rows // samples * prompt
    head = SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]
    flops = 6 * (layer_weights(shape) * tokens + head * rows * (length - prompt))
    median = statistics.median(seconds[2:])
    return {
        **{"seconds": median, "first_seconds": seconds[0]},
        **{"tokens_s": rows * length / median, "tflop_s": flops / median / 1e12},
    }


def torch_decode(args: argparse.Namespace) -> None:
    """`decode` by transformers, its cache growing with the responses."""
    import torch
    from transformers import GenerationConfig

    network = torch_model(args.shape)
    for rows, _, prompt, temperature in cells_of(args):
        with reported("torch_decode", rows=rows, prompt=prompt):
            size = SHAPES[args.shape]["vocab_size"]
            ids = torch.randint(1, size, (rows, prompt), device="cuda")

            def draw(new: int, ids=ids, temperature=temperature) -> float:
                settings = GenerationConfig(
                    **{"max_new_tokens": new, "min_new_tokens": new},
                    **{"do_sample": bool(temperature), "pad_token_id": 0},
                    temperature=temperature or None,
                    top_p=0.95 if temperature else None,
                )
                torch.cuda.synchronize()
                start = time.perf_counter()
                network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                )
                torch.cuda.synchronize()
                return time.perf_counter() - start

            new = 16 if args.quick else 64
            step, first = of_a_step(draw, new)
            say(
                "torch_decode",
                **{"shape": args.shape, "rows": rows, "prompt": prompt},
                **{"temperature": temperature, "step_ms": 1e3 * step},
                first_token_s=first,
                gb_s=read_bytes(args, rows, prompt + new / 2) / step / 1e9,
            )


def torch_update(args: argparse.Namespace) -> None:
    """`update` by transformers: checkpointed layers, fused AdamW, logits in chunks."""
    import torch
    from torch.utils.checkpoint import checkpoint

    shape = "tiny" if args.quick else "1.5b"
    length, prompt, rows = (256, 64, 8) if args.quick else (2048, 256, 8)
    network = torch_model(shape).train()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    size = SHAPES[shape]["vocab_size"]
    ids = torch.randint(1, size, (rows, length), device="cuda")
    advantages = torch.randn(rows, 1, device="cuda")

    def logprobs(hidden, targets):
        logits = (hidden @ network.lm_head.weight.T).float() / 0.6
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        return chosen - torch.logsumexp(logits, -1)

    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        hidden = network.model(ids, use_cache=False).last_hidden_state
        hidden, targets = hidden[:, prompt - 1 : -1], ids[:, prompt:]
        chunks = [
            checkpoint(logprobs, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(256, 1), targets.split(256, 1), strict=True)
        ]
        own = torch.cat(chunks, 1)
        ratio = torch.exp(own - own.detach())
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (-clipped.mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    say(
        "torch_update",
        shape=shape,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        **of_update(seconds, shape, rows, length, prompt, 1),
    )


def torch_model(shape: str) -> Any:
    """The same shape in transformers, bfloat16, random."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = SHAPES[shape]
    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    named = {names.get(name, name): size for name, size in sizes.items()}
    config = Qwen2Config(
        **named, tie_word_embeddings=False, max_position_embeddings=32768
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config).eval()


def model(args: argparse.Namespace, dtype: Any = None) -> tuple:
    """(config, mesh, random parameters, a tokenizer without an end) in e1jax."""
    import jax
    import jax.numpy as jnp

    from e1jax.checkpoint.load import load_model
    from e1jax.config.model import ModelConfig
    from e1jax.nn.model import init_params
    from e1jax.nn.quantize import LARGEST, map_kernels
    from e1jax.sharding.mesh import make_mesh

    config = ModelConfig(**SHAPES[args.shape], **BIASED, tie_word_embeddings=False)
    mesh = make_mesh(None, config)
    params = init_params(config, mesh, dtype or jnp.bfloat16, 0)

    @functools.partial(jax.jit, static_argnums=1)
    def int8(x, axis):
        scale = jnp.abs(x).max(axis=axis, keepdims=True).astype(jnp.float32) / LARGEST
        values = jnp.round(x / scale).astype(jnp.int8)
        return {"values": values, "scale": scale.squeeze(axis)}

    if args.quantize:
        params = map_kernels(int8, params)
    tokenizer = load_model("nano").tokenizer
    endless = dataclasses.replace(
        tokenizer, eos_id=config.vocab_size, think_end_id=None
    )
    return config, mesh, params, endless


def make_engine(config, mesh, params, tokenizer, rows: int, cache: int) -> Any:
    """An engine with as many slots as rows."""
    from e1jax import Engine

    return Engine(config, params, tokenizer, mesh, cache_len=cache, slots=rows)


def random_prompts(config: Any, rows: int, length: int) -> list[list[int]]:
    """Random token ids, different in every call: an engine reuses the keys and values of a
    prompt that it has seen."""
    rng = np.random.default_rng(time.time_ns())
    return rng.integers(1, config.vocab_size, (rows, length)).tolist()


def layer_weights(shape: str) -> int:
    """Weights of the matrices of all layers."""
    s = SHAPES[shape]
    heads = (2 * s["num_heads"] + 2 * s["num_kv_heads"]) * s["head_dim"]
    return s["num_layers"] * s["hidden_size"] * (heads + 3 * s["intermediate_size"])


def read_bytes(args: argparse.Namespace, rows: int, live: float) -> float:
    """Bytes that a step has to read: layers, output matrix, live keys and values."""
    s = SHAPES[args.shape]
    weights = layer_weights(args.shape) + s["vocab_size"] * s["hidden_size"]
    per_token = 2 * s["num_layers"] * s["num_kv_heads"] * s["head_dim"]
    return weights * (1 if args.quantize else 2) + 2 * rows * live * per_token


@contextlib.contextmanager
def reported(case: str, **cell: Any) -> Iterator[None]:
    """Prints a line for an error inside, and goes on."""
    try:
        yield
    except Exception as error:
        say(case, **cell, error=f"{type(error).__name__}: {str(error)[:300]}")


CASES: dict[str, Callable[[argparse.Namespace], None]] = {
    function.__name__: function
    for function in (
        *(rates, decode, decode_few, prefill, update),
        *(torch_decode, torch_update),
    )
}

if __name__ == "__main__":
    main()
