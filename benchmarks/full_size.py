"""A whole E1-Math-7B on this machine: what sampling takes, in bfloat16 and in int8.

    python benchmarks/random_checkpoint.py DIR
    python benchmarks/full_size.py DIR --output full_size.jsonl

DIR is a model of any kind and size; its weights do not matter here. For each form, in a
process of its own, one prompt is sampled in one slot of 32,768 positions:
- `load_seconds`: until the weights are there, straight from DIR;
- `first`: seconds of the first call, for 8 thinking and 8 solution tokens; it compiles;
- `step`: seconds of a token: 8 + 24 tokens less 8 + 8, over 16, median of the rounds;
- `floor`: seconds in which the machine's memory gives the bytes of the weights that a
  token needs, by the copy of 1 GiB, which reads and writes, by all cores at once;
- `peak_gb`: the largest resident size of the process (Linux), 10^9 bytes.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np

FORMS = {"int8": {"quantize": "int8"}, "bfloat16": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="DIR", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    parser.add_argument("--worker", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        common.serve(lambda: sampler(args.model, args.worker))
        return
    script, path = str(Path(__file__)), str(args.model)
    lines = []
    for form in FORMS:
        rates = [bandwidth()]
        worker = common.Worker(form, sys.executable, script, path)
        answers = [worker.ask(None) for _ in range(args.rounds)]
        worker.close()
        rate = max(*rates, bandwidth())
        steps = sorted(answer["step"] for answer in answers)
        last = answers[-1]
        line = {
            "name": "full_size",
            "form": form,
            "load_seconds": last["load"],
            "first": answers[0]["first"],
            "step": statistics.median(steps),
            "step_low": steps[0],
            "step_high": steps[-1],
            "floor": last["bytes"] / rate,
            "memory_gb_per_second": rate / 1e9,
            "weights_gb": last["bytes"] / 1e9,
            "peak_gb": last["peak_gb"],
            **common.versions("e1jax", "jax"),
            **common.machine(),
        }
        print(json.dumps(line), flush=True)
        lines.append(line)
    common.append(args.output, lines)


def sampler(path: Path, form: str) -> Any:
    # Not in the process that measures the memory.
    import jax

    from e1jax import Engine, SamplingParams

    start = time.perf_counter()
    engine = Engine.from_pretrained(
        str(path), dtype="bfloat16", slots=1, cache_len=32768, **FORMS[form]
    )
    load = time.perf_counter() - start
    # The prompt's embedding is a row of a table.
    table = {"embedding"} if "lm_head" in engine.params else set()
    read = {name: part for name, part in engine.params.items() if name not in table}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(read))

    def seconds(solution: int) -> float:
        budgets = SamplingParams(thinking_budget=8, solution_budget=solution)
        start = time.perf_counter()
        [[completion]] = engine.generate([[7, 8, 9]], budgets)
        if completion.solution_tokens != solution:
            sys.exit("the response ended early; take random weights")
        return time.perf_counter() - start

    def measure(_: Any) -> dict[str, float]:
        first = seconds(8)
        step = (seconds(24) - seconds(8)) / 16
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {
            "load": load,
            "first": first,
            "step": step,
            "bytes": size,
            "peak_gb": peak,
        }

    return measure


def bandwidth() -> float:
    """Bytes a second of the memory: the best of five copies."""
    source = np.ones(2**28, np.float32)
    target = np.zeros_like(source)
    cores = common.machine()["cores"]
    parts = [*zip(*(np.array_split(x, cores) for x in (target, source)), strict=True)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), parts))
            best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
