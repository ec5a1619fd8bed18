"""The server under load: what HTTP and streaming cost beside the engine alone.

    python benchmarks/serve.py --output serve.jsonl

The same requests, prompts and budgets mixed, are answered in three ways that take turns,
with one engine, its compiled programs, weights and seeds:
- `generate`: one call of `Engine.generate`, which starts the longest budgets first.
- `add_step`: all requests added, in their order, and stepped: as the server's thread does.
- `server`: streamed by the server to clients of another process, all at once.
Then, `open_loop`: the clients send the requests one by one, at times of a Poisson process
whose rate is `--load` of the one that `server` reached, whether or not earlier ones are
answered.

Models: `nano`, the bundled one, on held-out problems (it ends by itself); `random`, of 12
layers, hidden 512, vocabulary 4096, 50 million parameters, float32, on prompts of 16 to 256
random tokens, every budget used up. Budgets are log-uniform from 16 to `--longest` tokens.

Figures: tokens/s, medians of the turns, with the smallest and largest; `ratio` is the
median of tokens/s / those of `generate` within a turn; `cpu_ratio` is that of processor
time, the clients' left out, which other processes on the machine disturb less. Requests that
start in their order leave more slots empty at the end than `generate`, which shows in
`decode_steps`. Of the client, in milliseconds: to the first piece of an answer; between two
pieces (a piece is what a step gave, some tokens); and per token, from the first piece to
the last; medians, 95th and 99th percentiles.
"""

import argparse
import asyncio
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SLOTS, CACHE_LEN = 8, 2304
MODELS = ("nano", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="timed turns; default 3")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--requests", type=int, default=128, help="default 128")
    parser.add_argument("--longest", type=int, default=256, help="budget; default 256")
    parser.add_argument("--load", type=float, default=0.7, help="default 0.7")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    parser.add_argument("--client", help="(of the clients' process)")
    args = parser.parse_args()
    if args.client:
        asyncio.run(run_clients(args.client))
        return
    for name in args.model or MODELS:
        lines = compare(name, args)
        if args.output:
            with args.output.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lets the ways take turns; prints and returns their figures."""
    # Here, as the clients' process needs no JAX.
    import jax
    from serving import cores, cpu_model

    engine, requests = make_requests(name, args.requests, args.longest)
    compile_programs(engine)
    with Served(engine) as url:
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "generate": lambda: generate(engine, requests),
            "add_step": lambda: add_step(engine, requests),
            "server": lambda: from_clients(url, requests, rate=None),
        }
        turns = [
            {way: timed(way, run, engine) for way, run in ways.items()}
            for _ in range(args.turns)
        ]
        reached = statistics.median(turn["server"]["seconds"] for turn in turns)
        rate = args.load * len(requests) / reached
        open_loop = functools.partial(from_clients, url, requests, rate)
        loops = [
            {"open_loop": timed("open_loop", open_loop, engine)}
            for _ in range(args.turns)
        ]
    about = {
        "benchmark": "serve",
        "model": name,
        "requests": len(requests),
        "longest": args.longest,
        "slots": SLOTS,
        "turns": args.turns,
        "requests_per_second": rate,
        "load": os.getloadavg()[0],
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "e1jax")},
        "device": jax.devices()[0].device_kind,
        "cpu_model": cpu_model(),
        "cores": cores(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    lines = [figures(way, turns, turns) for way in ways]
    lines.append(figures("open_loop", loops, turns))
    for line in lines:
        print(name, json.dumps(line), flush=True)
    return [line | about for line in lines]


def timed(way: str, run: Callable[[], dict[str, Any]], engine) -> dict[str, Any]:
    cpu, before = time.process_time(), (engine.stats, engine.stats.decode_steps)
    work = run()
    work["cpu"] = time.process_time() - cpu
    # `generate` begins new counters.
    started = before[1] if engine.stats is before[0] else 0
    work["steps"] = engine.stats.decode_steps - started
    said = "{tokens} tokens in {seconds:.2f} s, CPU {cpu:.2f} s, {steps} steps"
    print(f"{way}: {said.format(**work)}", file=sys.stderr, flush=True)
    return work


def figures(
    way: str, works: list[dict[str, Any]], turns: list[dict[str, Any]]
) -> dict[str, Any]:
    rates = [turn[way]["tokens"] / turn[way]["seconds"] for turn in works]
    line: dict[str, Any] = {
        "name": way,
        "unit": "tokens/s",
        "median": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "decode_steps": works[-1][way]["steps"],
    }
    if way in turns[0]:
        for key, name in (("seconds", "ratio"), ("cpu", "cpu_ratio")):
            ratios = [turn["generate"][key] / turn[way][key] for turn in turns]
            line[name] = statistics.median(ratios)
        assert len({turn[way]["tokens"] for turn in turns}) == 1
        assert turns[0][way]["tokens"] == turns[0]["generate"]["tokens"]
    for key in ("first", "between", "per_token"):
        times = [seconds for turn in works for seconds in turn[way].get(key, [])]
        if times:
            cuts = np.percentile(times, [50, 95, 99])
            line[f"{key}_ms"] = " / ".join(
                f"{1000 * cut:,.0f}" if cut >= 0.1 else f"{1000 * cut:.3g}"
                for cut in cuts
            )
    return line


def make_requests(name: str, count: int, longest: int):
    """An engine, and requests as (prompt's token ids, SamplingParams)."""
    # Here, as the clients' process needs no JAX.
    import jax.numpy as jnp
    from serving import RANDOM

    from e1jax import Engine, SamplingParams, data
    from e1jax.checkpoint.load import load_model
    from e1jax.nn.model import init_params
    from e1jax.sharding.mesh import make_mesh

    rng = np.random.default_rng(0)
    nano = load_model("nano")
    if name == "nano":
        sizes = (nano.config, nano.read_params(), nano.tokenizer, nano.mesh)
        prompts = [
            nano.tokenizer.encode_chat([{"role": "user", "content": p["problem"]}])
            for p in data.held_out_problems(count)
        ]
    else:
        mesh = make_mesh(None, RANDOM)
        # Its EOS is never sampled.
        tokenizer = dataclasses.replace(nano.tokenizer, eos_id=RANDOM.vocab_size)
        sizes = (RANDOM, init_params(RANDOM, mesh, jnp.float32, 0), tokenizer, mesh)
        lengths = np.exp(rng.uniform(*np.log((16, 256)), count)).astype(int)
        # No tags among them, which would decide in which phase a response starts.
        prompts = [rng.integers(300, RANDOM.vocab_size, n).tolist() for n in lengths]
    engine = Engine(*sizes, cache_len=CACHE_LEN, slots=SLOTS)
    budgets = np.exp(rng.uniform(*np.log((16, longest)), (count, 2))).astype(int)
    params = [
        SamplingParams(thinking_budget=thinking, solution_budget=solution, seed=seed)
        for seed, (thinking, solution) in enumerate(budgets.tolist())
    ]
    return engine, list(zip(prompts, params, strict=True))


def compile_programs(engine) -> None:
    """Compiles the programs of each prompt bucket."""
    from e1jax import SamplingParams  # here, as the clients' process needs no JAX

    params = SamplingParams(thinking_budget=0, solution_budget=1)
    for power in range(3, 9):
        engine.generate([[7] * (2**power + 1)], params)


def generate(engine, requests) -> dict[str, Any]:
    start = time.perf_counter()
    results = engine.generate(*map(list, zip(*requests, strict=True)))
    seconds = time.perf_counter() - start
    tokens = sum(len(c.token_ids) for samples in results for c in samples)
    return {"tokens": tokens, "seconds": seconds}


def add_step(engine, requests) -> dict[str, Any]:
    start, tokens = time.perf_counter(), 0
    for prompt, params in requests:
        engine.add(prompt, params)
    while engine.running or engine.waiting:
        tokens += sum(len(event.token_ids) for event in engine.step())
    return {"tokens": tokens, "seconds": time.perf_counter() - start}


class Served:
    """The server in a thread of this process, as `python -m e1jax.serve` has it."""

    def __init__(self, engine):
        from e1jax.serving.app import make_app  # here, as above
        from e1jax.serving.metrics import Metrics
        from e1jax.serving.protocol import ServerSettings
        from e1jax.serving.server import Server
        from e1jax.serving.worker import EngineThread

        params = engine.params
        self.worker = EngineThread(engine, lambda: params, Metrics(engine, "model"))
        app = make_app(self.worker, ServerSettings("model", max_waiting=10**6))
        self.server = Server(app, self.worker, grace=0)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.socket]}
        )

    def __enter__(self) -> str:
        self.thread.start()
        while self.worker.state == "loading":
            time.sleep(0.05)
        return f"127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()


def from_clients(url: str, requests, rate: float | None) -> dict[str, Any]:
    """Runs the client process; returns its measurements. `rate` is in requests per second."""
    bodies = [
        {
            "prompt": prompt,
            "thinking_token_budget": params.thinking_budget,
            "solution_token_budget": params.solution_budget,
            "seed": params.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt, params in requests
    ]
    times = np.zeros(len(requests))
    if rate is not None:
        times = np.random.default_rng(1).exponential(1 / rate, len(requests)).cumsum()
    done = subprocess.run(
        [sys.executable, __file__, "--client", url],
        input=json.dumps([bodies, times.tolist()]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


async def run_clients(url: str) -> None:
    """Reads requests from standard input, sends each at its time, and prints latencies."""
    bodies, times = json.load(sys.stdin)
    start = time.perf_counter()
    answers = await asyncio.gather(
        *(one_client(url, *item, start) for item in zip(bodies, times, strict=True))
    )
    result: dict[str, Any] = {"seconds": time.perf_counter() - start}
    result["tokens"] = sum(tokens for tokens, _ in answers)
    result["first"] = [pieces[1] - pieces[0] for _, pieces in answers]
    result["between"] = [
        gap for _, pieces in answers for gap in np.diff(pieces[1:]).tolist()
    ]
    result["per_token"] = [
        (pieces[-1] - pieces[1]) / tokens for tokens, pieces in answers
    ]
    print(json.dumps(result))


async def one_client(
    url: str, body: dict[str, Any], at: float, start: float
) -> tuple[int, list[float]]:
    """Tokens of the answer, and the times of the request and of each piece."""
    host, port = url.split(":")
    content = json.dumps(body).encode()
    await asyncio.sleep(at - (time.perf_counter() - start))
    pieces = [time.perf_counter()]
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**22)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
    writer.write(f"{head}\r\n\r\n".encode() + content)
    usage, is_new = None, False
    while (line := await reader.readline()) != b"data: [DONE]\n":
        assert line, "the server ended the connection"
        if b'"usage"' in line:
            usage = json.loads(line[6:])["usage"]
        elif b'"text"' in line and is_new:
            pieces.append(time.perf_counter())
        is_new = line.endswith(b"\r\n")  # the length of an HTTP chunk, which is a piece
    writer.close()
    assert usage is not None
    return usage["completion_tokens"], pieces


if __name__ == "__main__":
    main()
