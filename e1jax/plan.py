"""Command: what a configuration needs on a TPU slice, found out without one.

    python -m e1jax.plan --config configs/e1_math_7b.yaml --topology v5e:2x4
    python -m e1jax.plan topologies

The compiler for TPUs (libtpu) runs on any machine. It is given the programs that
`sample` and `train` run, with shapes in place of arrays, and either says that they do
not fit or gives memory, and a text that `e1jax.hlo` accounts for. Nothing here was timed
on a TPU:

- memory is the compiler's; what lies there beside a program's own arrays is added;
- bytes are those of the program's text; of a kernel, which has no text, those of the
  blocks that it reads;
- time is the compiler's estimate of cycles, plus kernels at the speed of what limits
  them. The interconnect is not in it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e1jax import attention, engine, hlo, model
from e1jax.checkpoint import find_params
from e1jax.config import (
    GRPOConfig,
    ModelConfig,
    Parser,
    UserError,
    aligned,
    load_config,
    quantize_flags,
    run_command,
    writing,
)
from e1jax.convert import LoadedModel, read_config, resolve
from e1jax.hosts import make_copy_to_all
from e1jax.sampling import TokenIds
from e1jax.sharding import make_mesh, replicated, sharding, undivided
from e1jax.tokenizer import read_json
from e1jax.train import (
    Batch,
    Learner,
    default_mesh,
    least_room,
    longest_lengths,
    padded_lengths,
    rollout_cache_len,
)

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind of TPU can do; a tpu7x chip is two of them."""

    hbm_bytes: int  # that the compiler lets a program use
    bytes_per_second: float
    flops_per_second: float  # bfloat16
    hertz: float
    devices: int  # JAX devices to a chip
    slices: tuple[str, ...]  # that the compiler can describe, from small to large
    # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm for speeds.


def _chip(gib, gb, tflops, ghz, slices, devices=1) -> Chip:
    return Chip(
        *(int(gib * GIB), gb * 1e9, tflops * 1e12, ghz * 1e9),
        *(devices, tuple(slices.split())),
    )


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"
CHIPS = {
    "v5e": _chip(15.75, 819, 197, 1.5, _FLAT),
    "v6e": _chip(31.24, 1640, 918, 1.75, _FLAT),
    "v5p": _chip(95.73, 2765, 459, 1.75, _CUBES),
    # Its clock is not needed: the compiler does not print programs for it.
    "tpu7x": _chip(94.74, 3690, 1153.5, math.nan, _CUBES, devices=2),
}
TOPOLOGIES = [f"{chip}:{shape}" for chip in CHIPS for shape in CHIPS[chip].slices]


def _qwen2(hidden, mlp, layers, heads, kv_heads, vocab, theta=1e4) -> ModelConfig:
    return ModelConfig(
        *(vocab, hidden, mlp, layers, heads, kv_heads),
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=theta,
    )


# Of models on the hub that the shipped configurations name, and of their kin: so that
# planning needs no network.
_7B = _qwen2(3584, 18944, 28, 28, 4, 152064)
_1_5B = _qwen2(1536, 8960, 28, 12, 2, 151936)
_14B = _qwen2(5120, 13824, 48, 40, 8, 152064, 1e6)
SIZES = {
    "Salesforce/E1-Math-1.5B": _1_5B,
    "Salesforce/E1-Math-7B": _7B,
    "Salesforce/E1-Code-14B": _14B,
    "Salesforce/E1-AceReason-14B": _14B,
    "agentica-org/DeepScaleR-1.5B-Preview": _1_5B,
    "agentica-org/DeepCoder-14B-Preview": _14B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _14B,
    "nvidia/AceReason-Nemotron-14B": _14B,
    "Skywork/Skywork-OR1-Math-7B": _7B,
}

DEFAULT_LIVE = 2048
MOST_SLOTS = 1024  # that are tried: programs for more compile long, and none needs them
_LARGE_COPY = 16 * 2**20  # bytes of an array, from which on a copy of it is told
_LARGE_REDUCE = 16 * 2**20


@dataclasses.dataclass
class Report:
    """What is printed of a part; bytes are of one device, a JAX one."""

    part: str
    topology: str
    mesh: str
    fits: bool = True
    hbm_bytes_per_chip: int = 0
    hbm_limit_bytes: int = 0
    devices: int = 0
    hosts: int = 0
    max_slots: int | None = None
    bytes_per_step: int | None = None
    floor_bytes: int | None = None
    estimated_seconds: float | None = None
    compile_seconds: float = 0.0
    warnings: list[str] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes by kind
    roofline_share: float | None = None
    collective_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    not_in_estimate: list[str] = dataclasses.field(default_factory=list)
    fitting: str | None = None  # if it does not fit: what would
    programs: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


def main() -> None:
    if sys.argv[1:2] == ["topologies"]:
        print(topology_table())
        return
    args, rest = _parser().parse_known_args()
    # Settings of the configuration can be changed as for train: --section.key value.
    argv = ["--config", args.config, *rest]
    config, _ = load_config(GRPOConfig, argv, "python -m e1jax.plan")
    if args.part == "train" and (args.quantize or args.kv_dtype):
        raise UserError(
            "--quantize and --kv-dtype are for sampling, and training uses neither; "
            "leave them out, or take --part sample"
        )
    given = {"slots": args.slots, "cache_len": args.cache_len}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, **given)
    )
    slice_ = describe(args.topology)
    sizes = model_sizes(config.model)
    parts = ("sample", "train") if args.part is None else (args.part,)
    reports = []
    for part in parts:
        plan = plan_sampling if part == "sample" else plan_training
        report = plan(config, sizes, slice_, args)
        reports.append(report)
        if args.dump_hlo:
            _dump(report, args.dump_hlo)
        print(_json(report) if args.json else _table(report), flush=True)
    if not all(report.fits for report in reports):
        sys.exit(3)


# Topologies and models.


class Slice(NamedTuple):
    """A TPU slice that programs can be compiled for."""

    topology: str
    chip: Chip
    devices: Sequence[Any]

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def topology_table() -> str:
    """The known topologies, a line each."""
    rows = [("topology", "chips", "devices", "HBM GiB", "GB/s", "bf16 TFLOP/s")]
    for name, chip in CHIPS.items():
        for shape in chip.slices:
            chips = _chips(shape)
            rows.append(
                (
                    *(f"{name}:{shape}", f"{chips}", f"{chips * chip.devices}"),
                    f"{chip.hbm_bytes / GIB:.2f}",
                    f"{chip.bytes_per_second / 1e9:.0f}",
                    f"{chip.flops_per_second / 1e12:.0f}",
                )
            )
    return f"{aligned(rows)}\nHBM and speeds are those of one device, as JAX sees it."


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def check_topology(topology: str) -> Chip:
    """The chip of a known topology; raises UserError naming the nearest ones."""
    if topology in TOPOLOGIES:
        return CHIPS[topology.partition(":")[0]]
    near = difflib.get_close_matches(topology.lower(), TOPOLOGIES, n=3, cutoff=0.4)
    rented = re.fullmatch(r"(v5litepod|v5e|v6e|v5p|tpu7x)-(\d{1,6})", topology)
    if rented:  # an accelerator type, whose number is one of chips, or of their cores
        name = {"v5litepod": "v5e"}.get(rented[1], rented[1])
        chips = int(rented[2]) // (2 if name in ("v5p", "tpu7x") else 1)
        shapes = [s for s in CHIPS[name].slices if _chips(s) == chips]
        near = [f"{name}:{shape}" for shape in shapes] or near
    hint = f"the nearest are {', '.join(near)}" if near else "it is like v5e:2x4"
    raise UserError(
        f"the topology {topology!r} is not known; {hint} (all of them: "
        "python -m e1jax.plan topologies)"
    )


def describe(topology: str) -> Slice:
    """A slice, from the TPU compiler.

    Raises UserError if the topology is not known or there is no compiler.
    """
    chip = check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan needs the compiler for TPUs, which runs on any Linux machine but is "
            "not installed here; pip install libtpu"
        )
    # No TPU is used, even if there is one: others may be using it.
    jax.config.update("jax_platforms", "cpu")
    for name, value in _COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Eight chips are one host's, as they are rented; the compiler takes them for two.
    options = {"chips_per_host_bounds": [2, 4, 1]} if topology.endswith(":2x4") else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason and ("lock" in reason or "in use" in reason):
            raise UserError(
                "another process holds libtpu; wait for it to end, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from None
        raise UserError(
            f"libtpu cannot describe {topology} ({reason}); try another version of it"
        ) from None
    return Slice(topology, chip, description.devices)


# The compiler asks no metadata server, may be loaded beside a program that uses a TPU,
# and keeps its remarks about this machine to itself.
_COMPILER_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def model_sizes(name: str) -> ModelConfig:
    """Sizes of a model; of one on the hub, nothing but config.json is downloaded."""
    if name in SIZES and not Path(name).is_dir():
        return SIZES[name]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        try:
            file = huggingface_hub.hf_hub_download(name, "config.json")
        except Exception as error:  # many kinds: no network, no such repository
            reason = str(error).strip().split("\n")[0].strip(" .:")
            raise UserError(
                f"the sizes of {name!r} cannot be had from the hub ({reason}); give a "
                "directory with its config.json as --model"
            ) from None
        return ModelConfig.from_hf(read_json(Path(file)), name)
    path = resolve(name)
    saved = find_params(path)
    return read_config(saved[1] if saved else path)


def slice_mesh(slice_: Slice, text: str | None, sizes: ModelConfig) -> Mesh:
    """The mesh over all of a slice's devices; raises UserError if it is not one."""
    try:
        return make_mesh(text, sizes, slice_.devices)
    except UserError as error:
        count = len(slice_.devices)
        hosts = f"{slice_.hosts} hosts of {count // slice_.hosts}"
        raise UserError(
            f"{slice_.topology} has {count} devices on {hosts}: {error}"
        ) from None


# Programs.


class Program(NamedTuple):
    """A program that was compiled, or did not fit."""

    fits: bool
    total: int  # bytes on each device
    seconds: float  # of compiling
    temporaries: int = 0
    aliased: int = 0
    text: str | None = None  # None: the compiler cannot print it


def compile_for_tpu(traced: Any) -> Program:
    """Compiles what `jax.jit(...).trace` gave."""
    start = time.perf_counter()
    lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = used_when_too_large(str(error))
        if used is None:
            raise
        return Program(False, used, time.perf_counter() - start)
    memory = compiled.memory_analysis()
    temporaries, aliased = memory.temp_size_in_bytes, memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + temporaries
    total += memory.output_size_in_bytes - aliased
    try:
        with _silenced():
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    seconds = time.perf_counter() - start
    return Program(True, total, seconds, temporaries, aliased, text)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Where the compiler cannot print a program, it writes a stack trace to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def used_when_too_large(message: str) -> int | None:
    """Bytes that a program would use (0: not said), from the compiler's refusal of it;
    None if that is not about memory."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available", message
    )
    if not found:
        return 0
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Shapes of arrays that are whole on every device."""
    place = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place), tree
    )


def device_bytes(tree: Any) -> int:
    """What shapes take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class Sampler(NamedTuple):
    """An engine of one size, as shapes."""

    sizes: ModelConfig
    mesh: Mesh
    dtype: Any
    slots: int
    cache_len: int
    prompt_len: int  # of the longest prompt
    quantize: str | None = None
    kv_dtype: str | None = None

    @property
    def params(self) -> Any:
        sizes, mesh = self.sizes, self.mesh
        return model.abstract_params(sizes, mesh, self.dtype, self.quantize)

    @property
    def _cache_dtype(self) -> Any:
        return jnp.dtype(self.kv_dtype or self.dtype)

    @property
    def cache_sizes(self) -> tuple[int, int]:
        """Rows of the cache, and positions of each."""
        return engine.cache_sizes(self.mesh, self.slots, self.cache_len)

    @property
    def cache(self) -> model.KVCache:
        return self._cache(*self.cache_sizes)

    def _cache(self, rows: int, capacity: int) -> model.KVCache:
        init = model.init_cache
        shapes = jax.eval_shape(
            lambda: init(self.sizes, rows, capacity, self._cache_dtype)
        )

        def placed(x):
            place = sharding(self.mesh, model.CACHE_AXES, x.shape)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(placed, shapes)

    def _whole(self, tree: Any) -> Any:
        return on_mesh(self.mesh, tree)

    @property
    def _rows(self) -> engine.Rows:
        return self._whole(engine.empty_rows(self.slots, engine.SHORTEST_FORCED))

    def decode(self) -> Program:
        number, eos_ids = self._whole((np.int32(0), np.zeros(1, np.int32)))
        return compile_for_tpu(
            engine.decode.trace(
                *(self.sizes, self.mesh, self.params, TokenIds(eos_ids, number)),
                *(self.cache, self._rows, number, number),
            )
        )

    @property
    def _bucket(self) -> int:
        return engine.prefill_len(self.prompt_len, self.cache_len)

    def prefill(self) -> Program:
        tokens = self._whole(np.zeros((1, self._bucket), np.int32))
        number = self._whole(np.int32(0))
        return compile_for_tpu(
            engine.prefill.trace(
                *(self.sizes, self.mesh, self.params, tokens, number),
                self._cache_dtype,
            )
        )

    def admit(self) -> Program:
        slots = self._whole(np.zeros(self.slots, np.int32))
        is_new = self._whole(np.zeros(self.slots, bool))
        number = self._whole(np.int32(0))
        return compile_for_tpu(
            engine.admit.trace(
                *(self.mesh, self.cache, self._cache(1, self._bucket), self._rows),
                *(slots, number, (is_new, self._rows)),
            )
        )


# Sampling.


def plan_sampling(
    config: GRPOConfig, sizes: ModelConfig, slice_: Slice, args: argparse.Namespace
) -> Report:
    """The engine's programs, at the slots and lengths of the rollouts or the flags."""
    mesh = slice_mesh(slice_, args.mesh, sizes)
    sampler = rollout_sampler(config, sizes, mesh)
    sampler = sampler._replace(quantize=args.quantize, kv_dtype=args.kv_dtype)
    slots, cache_len = sampler.slots, sampler.cache_len
    live = min(args.live or DEFAULT_LIVE, cache_len)
    report = _report("sample", slice_, mesh)
    report.settings = {"slots": slots, "cache_len": cache_len, "live": live}
    forms = {"quantize": args.quantize, "kv_dtype": args.kv_dtype}
    report.settings |= {name: form for name, form in forms.items() if form}
    if slice_.hosts > 1:
        report.warnings.append(
            f"sampling uses one host, in training each by itself: of {slice_.topology}, "
            f"plan for {host_slice(slice_).topology}"
        )
    _warn_if_undivided(report, sizes, sampler.params)
    programs = sampling_programs(sampler)
    _note(report, programs)
    weights, cache = device_bytes(sampler.params), device_bytes(sampler.cache)
    report.memory = {"weights": weights, "cache": cache}
    _set_most(report, sampling_phases(sampler, programs))
    decode = programs["decode"]
    if decode.fits:
        report.memory["temporaries"] = decode.temporaries
        _check_cache(report, decode, cache)
        rows, capacity = sampler.cache_sizes
        filled = live * cache * slots // (rows * capacity)
        report.floor_bytes = read_weights(sampler.params) + filled
        if decode.text:
            _cost_of_decoding(report, decode.text, sampler, slice_.chip, live)
    rest = report.hbm_bytes_per_chip - sum(report.memory.values())
    report.memory["other" if decode.fits else "temporaries"] = max(0, rest)
    report.max_slots = largest_slots(report, sampler, programs.get("prefill"))
    if not report.fits:
        report.fitting = _fitting_sampler(report, sampler, slice_)
    return report


def rollout_sampler(config: GRPOConfig, sizes: ModelConfig, mesh: Mesh) -> Sampler:
    """The engine of the rollouts; its cache has room for the longest prompt allowed."""
    slots = engine.whole_slots(mesh, config.rollout.slots)
    needed = config.data.max_prompt_len + least_room(config)
    cache_len = config.rollout.cache_len or needed
    prompt_len = min(config.data.max_prompt_len, cache_len)
    return Sampler(sizes, mesh, _dtype(config), slots, cache_len, prompt_len)


def sampling_programs(
    sampler: Sampler, prefill: Program | None = None
) -> dict[str, Program]:
    """`decode`, and if it fits what brings a prompt into slots; a `prefill` that was
    compiled serves for any number of slots."""
    programs = {"decode": sampler.decode()}
    if programs["decode"].fits:
        programs["prefill"] = prefill or sampler.prefill()
        programs["admit"] = sampler.admit()
    return programs


def sampling_phases(sampler: Sampler, programs: dict[str, Program]) -> dict[str, int]:
    """Bytes on a device while each runs; what it is not given waits beside it."""
    weights, cache = device_bytes(sampler.params), device_bytes(sampler.cache)
    waiting = {"decode": 0, "prefill": cache, "admit": weights}
    return {name: program.total + waiting[name] for name, program in programs.items()}


def sampler_fits(
    report: Report, sampler: Sampler, prefill: Program | None = None
) -> bool:
    """Whether a step and the longest prompt fit, found by compiling."""
    programs = sampling_programs(sampler, prefill)
    _count_seconds(report, [p for p in programs.values() if p is not prefill])
    return all_fit(report, programs, sampling_phases(sampler, programs))


def largest_slots(report: Report, sampler: Sampler, prefill: Program | None) -> int:
    """The most slots, up to MOST_SLOTS, that fit.

    Memory is nearly linear in the slots, so the first guess is mostly right or one off.
    """
    if prefill is None:  # as `decode` did not fit
        prefill = sampler.prefill()
        _count_seconds(report, [prefill])
    unit, cache = sampler.mesh.shape["data"], device_bytes(sampler.cache)
    fixed = max(report.hbm_bytes_per_chip - cache, prefill.total)
    row = cache / sampler.slots
    known = {sampler.slots: report.fits}

    def fits(slots: int) -> bool:
        if slots > max(MOST_SLOTS, sampler.slots):
            return False
        if slots not in known:
            trial = sampler._replace(slots=slots)
            known[slots] = sampler_fits(report, trial, prefill)
        return known[slots]

    guess = int(min((report.hbm_limit_bytes - fixed) // row, MOST_SLOTS)) // unit
    most = bisect(lambda units: fits(units * unit), guess) * unit
    return most or bisect(fits, unit - 1)


def bisect(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, or 0, asking as little as possible near `guess`."""
    low, high = 0, None  # what fits, and what does not
    at, step = max(1, guess), 1
    while high is None or high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = low + step
        else:
            at = (low + high) // 2 if low else max(1, high - step)
        step *= 2
    return low


def _cost_of_decoding(
    report: Report, text: str, sampler: Sampler, chip: Chip, live: int
) -> None:
    """Bytes and time of a step of all slots, each with `live` positions."""
    rows, capacity = sampler.cache_sizes
    parts = rows // sampler.slots
    blocks = -(-live // (attention.BLOCK_LEN * parts))  # of a row of the cache

    def trip_count(op_name: str) -> int | None:
        # The loop over steps counts once, that over blocks of the cache by its length.
        loops = op_name.split("/").count("while")
        return 1 if loops == 1 else blocks

    whole = hlo.account(text, trip_count)
    step = whole.per_iteration()
    position = device_bytes(sampler.cache) // capacity
    kernels = [op for op in step.custom_calls if op.target == "tpu_custom_call"]
    block = min(attention.tpu_block_len(sampler.cache.k.dtype), capacity)
    filled = -(-blocks * attention.BLOCK_LEN // block) * block
    kernel_bytes = filled * position if kernels else 0
    report.bytes_per_step = step.bytes + kernel_bytes
    assert report.floor_bytes is not None
    seconds = step.cycles / chip.hertz + kernel_bytes / chip.bytes_per_second
    report.estimated_seconds = seconds
    floor = report.floor_bytes / chip.bytes_per_second
    report.roofline_share = floor / seconds
    report.settings["xla_to_floor"] = step.cycles / chip.hertz / floor
    report.collective_bytes = _collective_bytes(step)
    outside = [op for op in step.ops if op.depth == 1 and not op.flops]
    rest = sum((op.cycles or 0) * op.times for op in outside)
    report.settings["sampling_share"] = rest / chip.hertz / seconds
    report.not_in_estimate = ["collectives", "the cache's writes"]
    if kernels:
        report.not_in_estimate.append(
            "the work of the kernels: attention (its bytes are in, at full speed), the "
            "heads before it, top-k and top-p"
        )
    layer = device_bytes(sampler.cache) // (2 * sampler.sizes.num_layers)
    _warn_of_copies(report, whole, min(layer, _LARGE_COPY))
    sizes, tensor = sampler.sizes, sampler.mesh.shape["tensor"]
    widest = max(sizes.hidden_size, sizes.intermediate_size // tensor)
    activation = 4 * sampler.slots * widest
    moved = [op for op in step.collectives if op.depth > 1 and op.payload > activation]
    if moved:
        size = sum(op.times * op.payload for op in moved) / 2**20
        report.warnings.append(
            f"collectives of {size:.0f} MiB a step are larger than activations: weights "
            "are sent around"
        )


def read_weights(params: Any) -> int:
    """Bytes of the weights that a step reads on a device: of an embedding that is not
    the output matrix too, only a few rows."""
    read = {name: part for name, part in params.items() if name != "embedding"}
    return device_bytes(read if "lm_head" in params else params)


def _check_cache(report: Report, decode: Program, cache: int) -> None:
    if decode.aliased < cache:
        report.warnings.append(
            "the cache is not updated in place: "
            f"{(cache - decode.aliased) / GIB:.2f} GiB of it are there twice"
        )


def _fitting_sampler(report: Report, sampler: Sampler, slice_: Slice) -> str:
    """What would fit: fewer slots, else the next larger slice of one host, as sampling
    uses no more; found by compiling."""
    if report.max_slots:
        return f"--slots {report.max_slots} fits"
    for larger in larger_slices(slice_):
        if larger.hosts > 1:
            break
        mesh = slice_mesh(larger, None, sampler.sizes)
        slots = engine.whole_slots(mesh, sampler.slots)
        candidate = sampler._replace(mesh=mesh, slots=slots)
        needed = device_bytes((candidate.params, candidate.cache))
        if needed > larger.chip.hbm_bytes:
            continue
        if sampler_fits(report, candidate):
            return f"{larger.topology} fits ({slots} slots)"
    return "no larger slice of one host fits; use another chip, or a shorter cache"


def larger_slices(slice_: Slice) -> Iterator[Slice]:
    """Slices of the same chip with more devices, from small to large."""
    name, _, shape = slice_.topology.partition(":")
    for larger in slice_.chip.slices[slice_.chip.slices.index(shape) + 1 :]:
        yield describe(f"{name}:{larger}")


# Training.


def plan_training(
    config: GRPOConfig, sizes: ModelConfig, slice_: Slice, args: argparse.Namespace
) -> Report:
    """The update, what goes before it, and all that lies in memory meanwhile."""
    named = args.mesh or config.mesh
    config = dataclasses.replace(config, mesh=named, dtype=_dtype(config).name)
    mesh = slice_mesh(slice_, named or default_mesh(len(slice_.devices)), sizes)
    learner, batch = abstract_learner(config, sizes, mesh)
    report = _report("train", slice_, mesh)
    rows = config.update.microbatch // mesh.shape["data"]
    report.settings = {"tokens": batch.tokens.shape[-1], "rows": rows}
    _warn_if_undivided(report, sizes, learner.shapes)
    held = report.memory = resident(learner)
    state = sum(held.values())
    if state > report.hbm_limit_bytes:  # no need to compile for minutes
        report.hbm_bytes_per_chip, report.fits = state, False
        report.warnings.append(
            "does not fit: parameters, optimizer and reference alone take "
            f"{state / GIB:.2f} GiB; nothing was compiled"
        )
        report.fitting = _larger_learner(learner, slice_, 0, 0)
        return report
    programs = training_programs(learner, batch)
    _note(report, programs)
    for name, program in programs.items():
        if program.text:
            _cost_of_training(report, name, program.text, learner, slice_.chip)
    phases = training_phases(learner, programs)
    phases |= rollout_phases(report, learner, slice_)
    report.settings["phases"] = phases
    _set_most(report, phases)
    held["temporaries"] = programs["update"].temporaries
    rest = phases["update"] - sum(held.values())
    held["other" if programs["update"].fits else "temporaries"] = max(0, rest)
    if not report.fits:
        report.fitting = _fitting_learner(report, learner, slice_)
    return report


def abstract_learner(
    config: GRPOConfig, sizes: ModelConfig, mesh: Mesh
) -> tuple[Learner, Batch]:
    """The learner, without parameters, and a mini-batch of the longest responses.

    Raises UserError if the mesh does not divide the rows of a micro-batch, or the cache
    is too short for both budgets.
    """
    data, update, rollout = mesh.shape["data"], config.update, config.rollout
    if update.microbatch % data:
        raise UserError(
            f"update.microbatch={update.microbatch} is not a multiple of the mesh's "
            f"data={data}; change one of them, as by --update.microbatch"
        )
    longest_prompt = config.data.max_prompt_len
    if rollout.cache_len is not None:  # in which training takes no prompt without room
        room = rollout.cache_len - least_room(config)
        longest_prompt = max(1, min(longest_prompt, room))
    cache_len = rollout_cache_len(config, longest_prompt)
    longest = longest_lengths(config, cache_len, 1, longest_prompt)
    tokenizer: Any = None  # no text is made
    dtype = jnp.dtype(update.param_dtype)
    loaded = LoadedModel(config.model, Path(), sizes, tokenizer, mesh, dtype)
    learner = Learner(config, loaded, longest)
    length, response_len = padded_lengths(longest, longest)
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    num_micro = update.minibatch_prompts * rollout.samples // update.microbatch

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        shape = (num_micro, update.microbatch, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    values = array(jnp.float32, response_len)
    batch = Batch(
        tokens=array(jnp.int32, length),
        prompt_len=array(jnp.int32),
        advantages=array(jnp.float32),
        loss_mask=array(jnp.bool_, response_len),
        old_logprobs=values,
        ref_logprobs=values if config.loss.kl_coef else None,
    )
    return learner, batch


def resident(learner: Learner) -> dict[str, int]:
    """Bytes on a device that are there all the time."""
    sizes, mesh = learner.loaded.config, learner.loaded.mesh
    computed = model.abstract_params(sizes, mesh, learner.dtype)
    return {
        "parameters": device_bytes(learner.shapes),
        "optimizer": device_bytes(learner.state_shapes),
        "reference": device_bytes(computed) if learner.config.loss.kl_coef else 0,
    }


def training_programs(learner: Learner, batch: Batch) -> dict[str, Program]:
    """The update, which needs most, and if it fits what may go before it."""
    temperature = on_mesh(learner.loaded.mesh, np.float32(1))
    given = (learner.shapes, learner.state_shapes, batch, False, temperature)
    programs = {"update": compile_for_tpu(learner.update.trace(*given))}
    if programs["update"].fits and logprob_passes(learner.config):
        batch = batch._replace(ref_logprobs=None)  # as training calls it
        traced = learner.logprobs.trace(learner.shapes, batch, temperature)
        programs["logprobs"] = compile_for_tpu(traced)
    return programs


def logprob_passes(config: GRPOConfig) -> int:
    """How often a step computes the log-probabilities of a mini-batch: the reference's,
    and the old ones of those that an update after the first one sees."""
    updates, epochs = config.updates_per_step, config.update.epochs
    minibatches = updates // epochs
    passes = minibatches if config.loss.kl_coef else 0
    if config.loss.old_logprobs == "recomputed":
        passes += min(updates - 1, minibatches)
    return passes


def training_phases(learner: Learner, programs: dict[str, Program]) -> dict[str, int]:
    """Bytes on a device while each runs; what it is not given waits beside it."""
    held = resident(learner)
    waiting = {"update": 0, "logprobs": held["optimizer"]}
    return {
        name: program.total + waiting[name] + held["reference"]
        for name, program in programs.items()
    }


def host_sampler(learner: Learner, slice_: Slice) -> Sampler:
    """The engine of one of a slice's hosts, which samples on its own devices."""
    sizes = learner.loaded.config
    mesh = slice_mesh(host_slice(slice_), None, sizes)
    return rollout_sampler(learner.config, sizes, mesh)


def host_slice(slice_: Slice) -> Slice:
    """The slice that one of a slice's hosts would be alone: a program for a part of a
    slice cannot be compiled."""
    if slice_.hosts == 1:
        return slice_
    name = slice_.topology.partition(":")[0]
    chips = len(slice_.devices) // slice_.hosts // slice_.chip.devices
    return describe(
        next(
            f"{name}:{shape}" for shape in slice_.chip.slices if _chips(shape) == chips
        )
    )


def rollout_phases(report: Report, learner: Learner, slice_: Slice) -> dict[str, int]:
    """Bytes on a device while the parameters are copied to where the engine samples, if
    they do not lie there, and while it does. The copy is made once after each update;
    it and the cache are released before the next."""
    if slice_.hosts > 1:
        report.settings["rollouts_on"] = host_slice(slice_).topology
    sampler, loaded = host_sampler(learner, slice_), learner.loaded
    copied, phases = {}, {}
    beside = resident(learner)
    if (sampler.dtype, sampler.mesh.shape) == (loaded.dtype, loaded.mesh.shape):
        del beside["parameters"]  # the engine's are these
    else:
        traced = make_copy_to_all(loaded.mesh, sampler.params).trace(learner.shapes)
        copied["copy"] = compile_for_tpu(traced)
        waiting = beside["optimizer"] + beside["reference"]
        phases["copy"] = copied["copy"].total + waiting
        _warn_if_undivided(report, sampler.sizes, sampler.params)
    programs = sampling_programs(sampler)
    _note(report, copied | programs)
    most = max(sampling_phases(sampler, programs).values())
    return phases | {"rollouts": sum(beside.values()) + most}


def _cost_of_training(
    report: Report, name: str, text: str, learner: Learner, chip: Chip
) -> None:
    """Adds what a program costs in a step to the report."""
    config = learner.config
    counted = hlo.account(text)
    times = config.updates_per_step if name == "update" else logprob_passes(config)
    kernels = _kernel_flops(counted, learner)
    seconds = counted.cycles / chip.hertz
    seconds += kernels / (_KERNEL_SHARE * chip.flops_per_second)
    report.bytes_per_step = (report.bytes_per_step or 0) + times * counted.bytes
    report.estimated_seconds = (report.estimated_seconds or 0.0) + times * seconds
    report.not_in_estimate = ["collectives"]
    if kernels:
        report.not_in_estimate.append(
            "the attention kernel's real speed (half of the peak is assumed)"
        )
    if counted.unknown_loops:
        report.warnings.append(
            f"{name}: loops of unknown length count once: "
            f"{', '.join(sorted(set(counted.unknown_loops)))}"
        )
    _warn_of_copies(report, counted, 16 * _LARGE_COPY, calls=times)
    if name == "update":
        held = device_bytes((learner.shapes, learner.state_shapes))
        report.floor_bytes = 2 * held * times
        useful = update_flops(learner) / learner.loaded.mesh.size
        report.flops = {
            "useful_per_update": useful,
            "matrix_per_update": float(counted.flops),
            "kernels_per_update": float(kernels),
            "matrix_to_useful": counted.flops / useful,
        }
        report.settings["update_seconds"] = seconds
        report.roofline_share = useful / chip.flops_per_second / seconds
        report.collective_bytes = _collective_bytes(counted)
        large = [
            op
            for op in counted.collectives
            if op.opcode == "all-reduce" and op.payload >= _LARGE_REDUCE
        ]
        if large:
            size = max(op.payload for op in large) / 2**20
            report.warnings.append(
                f"{len(large)} all-reduce of up to {size:.0f} MiB: gradients are not "
                "scattered as they are summed"
            )


_KERNEL_SHARE = 0.5  # of the peak, assumed: the compiler has no estimate of kernels


def update_flops(learner: Learner) -> float:
    """6 flops per weight of a matrix product and token, of one update; the output
    matrix sees responses only. Attention's products are not in it."""
    config, sizes = learner.config, learner.loaded.config
    matrices = jax.tree.leaves(learner.shapes["layers"])
    per_token = sum(math.prod(leaf.shape) for leaf in matrices if len(leaf.shape) == 3)
    head = sizes.hidden_size * sizes.vocab_size
    prompt_len, response_len = learner.longest
    rows = config.update.minibatch_prompts * config.rollout.samples
    tokens = prompt_len + response_len
    return 6.0 * rows * (tokens * per_token + response_len * head)


def _kernel_flops(counted: hlo.Account, learner: Learner) -> float:
    """Flops of attention kernels: a product of scores or values over half a square."""
    sizes, mesh = learner.loaded.config, learner.loaded.mesh
    tokens = sum(learner.longest)
    rows = learner.config.update.microbatch / mesh.shape["data"]
    heads = sizes.num_heads / mesh.shape["tensor"]
    product = rows * heads * tokens**2 * sizes.head_dim
    count = 0
    for op in counted.custom_calls:
        if op.target == "tpu_custom_call":
            # Forward has two products; backward computes the scores again, and those
            # of the weights' gradient, once for queries and once for keys and values.
            passes = {"dkv": 4, "dq": 3}
            products = [n for kind, n in passes.items() if kind in op.op_name] or [2]
            count += op.times * products[0]
    return count * product


def _fitting_learner(report: Report, learner: Learner, slice_: Slice) -> str:
    """What would fit: a smaller micro-batch or fewer slots, else a larger slice."""
    limit, held = report.hbm_limit_bytes, resident(learner)
    state, phases = sum(held.values()), dict(report.settings["phases"])
    rollouts, copied = phases.pop("rollouts"), phases.pop("copy", 0)
    most = max(phases.values())
    gradients = held["parameters"] * 4 // learner.loaded.dtype.itemsize  # of float32
    if max(rollouts, copied, state + gradients) <= limit:
        if microbatch := smaller_microbatch(report, learner):
            return f"--update.microbatch {microbatch} fits"
    elif max(most, copied) <= limit < rollouts:
        sampler = host_sampler(learner, slice_)
        row = device_bytes(sampler.cache) / sampler.slots
        data = sampler.mesh.shape["data"]
        slots = int(sampler.slots - (rollouts - limit) / row) // data * data
        if slots > 0:
            return f"--rollout.slots {slots} would fit by an estimate"
    return _larger_learner(learner, slice_, max(0, most - state), copied - state)


def smaller_microbatch(report: Report, learner: Learner) -> int | None:
    """The largest that fits of those with half the rows a device or less; found by
    compiling."""
    config, loaded = learner.config, learner.loaded
    data = loaded.mesh.shape["data"]
    rows = config.update.microbatch // data
    while rows > 1:
        # A divisor of the present one divides the rows of a mini-batch too.
        rows = max(n for n in range(1, rows // 2 + 1) if rows % n == 0)
        update = dataclasses.replace(config.update, microbatch=rows * data)
        trial = dataclasses.replace(config, update=update)
        learner, batch = abstract_learner(trial, loaded.config, loaded.mesh)
        programs = training_programs(learner, batch)
        _count_seconds(report, programs.values())
        if all_fit(report, programs, training_phases(learner, programs)):
            return rows * data
    return None


def _larger_learner(
    learner: Learner, slice_: Slice, temporaries: int, copied: int
) -> str:
    """The next larger slice by an estimate: state is divided among the devices,
    temporaries of the update go with the rows of a micro-batch on each, what the copy
    to sample from takes stays, and all of that comes in turn."""
    config, loaded = learner.config, learner.loaded
    data, tensor = loaded.mesh.shape["data"], loaded.mesh.shape["tensor"]
    for larger in larger_slices(slice_):
        new_data = len(larger.devices) // tensor
        if config.update.microbatch % new_data:
            continue
        text = f"data={new_data},tensor={tensor}"
        mesh = slice_mesh(larger, text, loaded.config)
        larger_learner, _ = abstract_learner(config, loaded.config, mesh)
        sampler = host_sampler(larger_learner, larger)
        needed = sum(resident(larger_learner).values()) + max(
            temporaries * data / new_data,
            copied,
            device_bytes((sampler.params, sampler.cache)),
        )
        if needed <= larger.chip.hbm_bytes:
            with_mesh = f" with --mesh {text}" if config.mesh else ""
            what = "" if temporaries else ", temporaries of the update not counted"
            return (
                f"{larger.topology}{with_mesh} would fit ({needed / GIB:.1f} GiB by an "
                f"estimate{what})"
            )
    return (
        "no larger slice of this chip would fit with this micro-batch and these slots; "
        "use another chip"
    )


# What programs have in common.


def _dtype(config: GRPOConfig) -> Any:
    return jnp.dtype(config.dtype or "bfloat16")


def _report(part: str, slice_: Slice, mesh: Mesh) -> Report:
    text = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return Report(
        *(part, slice_.topology, text),
        hbm_limit_bytes=slice_.chip.hbm_bytes,
        devices=len(slice_.devices),
        hosts=slice_.hosts,
    )


def _note(report: Report, programs: dict[str, Program]) -> None:
    _count_seconds(report, programs.values())
    unprinted = [name for name, p in programs.items() if p.fits and not p.text]
    if unprinted:
        report.warnings.append(
            f"the compiler cannot print {', '.join(unprinted)} for this chip: memory only"
        )
    for name, program in programs.items():
        if program.text:
            report.programs[name] = program.text
        if not program.fits:
            report.fits = False
            report.warnings.append(
                f"{name} does not fit: {program.total / GIB:.2f} GiB of "
                f"{report.hbm_limit_bytes / GIB:.2f} GiB"
            )


def _warn_if_undivided(report: Report, sizes: ModelConfig, params: Any) -> None:
    if text := undivided(sizes, params):
        report.warnings.append(text)


def _count_seconds(report: Report, programs: Iterable[Program]) -> None:
    report.compile_seconds += sum(program.seconds for program in programs)


def _set_most(report: Report, phases: dict[str, int]) -> None:
    report.hbm_bytes_per_chip = max(phases.values())
    report.fits &= report.hbm_bytes_per_chip <= report.hbm_limit_bytes


def all_fit(
    report: Report, programs: dict[str, Program], phases: dict[str, int]
) -> bool:
    """Whether each does, alone and beside what waits meanwhile."""
    each = all(program.fits for program in programs.values())
    return each and max(phases.values()) <= report.hbm_limit_bytes


def _collective_bytes(counted: hlo.Account) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for op in counted.collectives:
        sizes[op.opcode] = sizes.get(op.opcode, 0) + op.times * op.payload
    return sizes


def _warn_of_copies(
    report: Report, counted: hlo.Account, at_least: int, calls: int = 1
) -> None:
    """Of a program; a step of training calls it so often."""
    for op in counted.copies(2 * at_least):  # each is read and written
        how = f"{calls * op.times} times a step" if op.depth else "once a call"
        report.warnings.append(
            f"a copy of {op.bytes / 2 / 2**20:.0f} MiB, {how} ({op.op_name or op.name})"
        )


# What the user sees.


def _json(report: Report) -> str:
    values = dataclasses.asdict(report)
    del values["programs"]
    return json.dumps(values)


def _table(report: Report) -> str:
    """Aligned text: what, how much, and of what."""
    limit = report.hbm_limit_bytes
    kinds = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in report.memory.items() if size
    )
    used = report.hbm_bytes_per_chip
    verdict = "fits" if report.fits else "does not fit"
    rows = [
        (report.part, f"{report.topology}, {report.mesh}", verdict),
        (
            "",
            _counted(report.devices, "device"),
            f"on {_counted(report.hosts, 'host')}",
        ),
        ("settings", *_settings(report)),
        ("HBM a device", f"{used / GIB:.2f} of {limit / GIB:.2f} GiB", kinds),
    ]
    phases = report.settings.get("phases")
    if phases:
        texts = [f"{name} {size / GIB:.2f}" for name, size in phases.items()]
        host = report.settings.get("rollouts_on")
        texts[-1] += f" (each host on its own {host})" if host else ""
        rows.append(("", "in turn", ", ".join(texts)))
    if report.max_slots is not None:
        note = "or more" if report.max_slots >= MOST_SLOTS else "found by compiling"
        rows.append(("most slots", str(report.max_slots), note))
    if report.bytes_per_step is not None and report.floor_bytes:
        least = f"{report.floor_bytes / 1e9:.3f} GB"
        ratio = report.bytes_per_step / report.floor_bytes
        note = f"{ratio:.2f} x the floor of {least}"
        if report.part == "train":
            note = f"{least} for the state, the rest for products"
        amount = f"{report.bytes_per_step / 1e9:.3f} GB"
        rows.append(("HBM traffic a step", amount, note))
    if report.estimated_seconds is not None:
        rows.extend(_time_rows(report))
    if report.collective_bytes:
        texts = [f"{n} {s / 1e6:.1f}" for n, s in report.collective_bytes.items()]
        rows.append(("collectives, MB", "", ", ".join(texts)))
    rows.append(("compiled in", f"{report.compile_seconds:.0f} s", ""))
    rows.extend(("warning", "", text) for text in report.warnings)
    if report.fitting:
        rows.append(("instead", "", report.fitting))
    return aligned(rows, left=True) + "\n"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _settings(report: Report) -> tuple[str, str]:
    settings = report.settings
    if report.part == "train":
        return f"{settings['rows']} x {settings['tokens']} tokens", "a device's rows"
    forms = {"quantize": "weights", "kv_dtype": "cache"}
    told = [f", {forms[key]} {settings[key]}" for key in forms if key in settings]
    return (
        f"{settings['slots']} slots of {settings['cache_len']}",
        f"{settings['live']} positions filled in each{''.join(told)}",
    )


def _time_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    seconds, share = report.estimated_seconds or 0.0, report.roofline_share or 0.0
    left_out = f"without {' and '.join(report.not_in_estimate)}"
    if report.part == "sample":
        rate = report.settings["slots"] / seconds
        note = f"{rate:.0f} tokens a second, {100 * share:.0f} % of the roofline"
        yield "time a step, at best", f"{1e3 * seconds:.2f} ms", note
        ratio = report.settings["xla_to_floor"]
        yield "", f"{ratio:.2f} x floor", "the part that is not in kernels"
        sampling = 100 * report.settings["sampling_share"]
        yield "", f"{sampling:.1f} %", "of it outside of layers and matrix products"
    else:
        update = report.settings["update_seconds"]
        note = f"{100 * share:.0f} % of the peak in useful products (6ND)"
        yield "time of an update", f"{update:.2f} s", note
        yield "all but rollouts", f"{seconds:.2f} s", "a step, at best"
        ratio = report.flops["matrix_to_useful"]
        yield "matrix flops", f"{ratio:.2f} x 6ND", "with what is computed again"
    yield "", "", left_out


def _dump(report: Report, directory: Path) -> None:
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in report.programs.items():
            (directory / f"{report.part}_{name}.hlo.txt").write_text(text)


def _size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m e1jax.plan",
        description="Compiles the programs of sampling and training for a TPU slice, "
        "without a TPU, and says what fits and how fast it can be.",
        epilog="'plan topologies' lists the known slices. Settings of the configuration "
        "can be changed as for train: --section.key value. Exit code 3: it does not fit.",
    )
    flag = parser.add_argument
    flag(
        "--config", required=True, metavar="FILE.yaml", help="of training; see configs/"
    )
    flag(
        "--topology",
        required=True,
        metavar="v5e:2x4",
        help="kind of TPU and shape of the slice, in chips",
    )
    flag(
        "--part",
        choices=["sample", "train"],
        help="what to plan (default: both)",
    )
    flag(
        "--mesh",
        metavar="data=2,tensor=4",
        help="device mesh (default: for sampling all devices, as many on tensor as the "
        "model's heads allow; for training the configuration's, else all on data)",
    )
    flag("--slots", type=_size, metavar="N", help="default: the configuration's")
    flag(
        "--cache-len",
        type=_size,
        metavar="TOKENS",
        help="positions of a slot (default: the configuration's, or as the longest "
        "prompt needs)",
    )
    flag(
        "--live",
        type=_size,
        metavar="TOKENS",
        help=f"positions filled in every slot, for bytes and time (default: "
        f"{DEFAULT_LIVE}, or all if there are fewer)",
    )
    quantize_flags(flag)
    flag("--json", action="store_true", help="print one JSON object per part")
    flag(
        "--dump-hlo",
        type=Path,
        metavar="DIR",
        help="write the compiled text of each program there",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
