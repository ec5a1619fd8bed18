"""Sampling on a slice: does it fit, and how fast can a step be?"""

import argparse
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e1jax.config.adapter import NO_ADAPTER, AdapterConfig
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig
from e1jax.grpo.rollouts import least_room
from e1jax.nn.cache import CACHE_AXES, KVCache, cache_sizes, init_cache, whole_slots
from e1jax.nn.model import abstract_params
from e1jax.nn.scores import BLOCK_LEN
from e1jax.plan.account import Account, account
from e1jax.plan.interconnect import Torus, torus_of, traffic
from e1jax.plan.programs import (
    Program,
    bisect,
    compile_for_tpu,
    computed_dtype,
    device_bytes,
    on_mesh,
)
from e1jax.plan.report import (
    LARGE_COPY,
    MOST_SLOTS,
    Report,
    add_seconds,
    all_fit,
    collective_bytes,
    count_seconds,
    new_report,
    note,
    set_most,
    warn_if_undivided,
    warn_of_copies,
)
from e1jax.plan.slices import GIB, Chip, Slice, host_slice, larger_slices, slice_mesh
from e1jax.sampling import decode
from e1jax.sampling.budget import TokenIds
from e1jax.sampling.decode import (
    SHORTEST_FORCED,
    Rows,
    admit,
    empty_rows,
    most_prompts,
    next_power,
    prefill_len,
)
from e1jax.sampling.prefill import fullest_group
from e1jax.sharding.mesh import sharding

DEFAULT_LIVE = 2048


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
    adapter: AdapterConfig = NO_ADAPTER

    @property
    def params(self) -> Any:
        """Abstract parameters, laid out as sampling has them."""
        form = self.quantize, self.adapter
        return abstract_params(self.sizes, self.mesh, self.dtype, *form)

    @property
    def _cache_dtype(self) -> Any:
        return jnp.dtype(self.kv_dtype or self.dtype)

    @property
    def cache_sizes(self) -> tuple[int, int]:
        """Rows of the cache, and positions of each."""
        return cache_sizes(self.mesh, self.slots, self.cache_len)

    @property
    def cache(self) -> KVCache:
        """The abstract cache of all slots."""
        return self._cache(*self.cache_sizes)

    def _cache(self, rows: int, capacity: int) -> KVCache:
        init = init_cache
        shapes = jax.eval_shape(
            lambda: init(self.sizes, rows, capacity, self._cache_dtype)
        )

        def placed(x):
            place = sharding(self.mesh, CACHE_AXES, x.shape)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(placed, shapes)

    def _whole(self, tree: Any) -> Any:
        return on_mesh(self.mesh, tree)

    @property
    def _rows(self) -> Rows:
        return self._whole(empty_rows(self.slots, SHORTEST_FORCED))

    def decode(self) -> Program:
        """The compiled program of decode steps."""
        number, eos_ids = self._whole((np.int32(0), np.zeros(1, np.int32)))
        return compile_for_tpu(
            decode.decode.trace(
                self.sizes,
                self.mesh,
                self.params,
                TokenIds(eos_ids, number),
                self.cache,
                self._rows,
                number,
                number,
            )
        )

    @property
    def largest_prefix(self) -> tuple[int, int]:
        """Rows and positions of the largest buffer that prompts are prefilled into."""

        def prefix(bucket: int) -> tuple[int, int]:
            most = most_prompts(self.sizes, self.mesh, self.dtype, bucket)
            return next_power(fullest_group(min(most, self.slots)), 1), bucket

        longest = prefill_len(self.prompt_len, self.cache_len)
        # A bucket that ends with the cache may have room for fewer tokens in all.
        buckets = longest, prefill_len(longest // 2, self.cache_len)
        return max(map(prefix, buckets), key=math.prod)

    def prefill(self) -> Program:
        """The compiled program that reads the longest prompts."""
        tokens = self._whole(np.zeros(self.largest_prefix, np.int32))
        number = self._whole(np.int32(0))
        return compile_for_tpu(
            decode.prefill.trace(
                self.sizes,
                self.mesh,
                self.params,
                tokens,
                number,
                self._cache_dtype,
            )
        )

    def admit(self) -> Program:
        """The compiled program that copies the keys and values of prompts into slots."""
        slots = self._whole(np.zeros(self.slots, np.int32))
        is_new = self._whole(np.zeros(self.slots, bool))
        number = self._whole(np.int32(0))
        return compile_for_tpu(
            admit.trace(
                self.mesh,
                self.cache,
                self._cache(*self.largest_prefix),
                self._rows,
                slots,
                slots,
                number,
                (is_new, self._rows),
            )
        )


def plan_sampling(
    config: GRPOConfig, sizes: ModelConfig, slice_: Slice, args: argparse.Namespace
) -> Report:
    """The engine's programs, at the slots and lengths of the rollouts or the flags."""
    mesh = slice_mesh(slice_, args.mesh, sizes)
    sampler = rollout_sampler(config, sizes, mesh)
    quantize = args.quantize or sampler.quantize
    sampler = sampler._replace(quantize=quantize, kv_dtype=args.kv_dtype)
    slots, cache_len = sampler.slots, sampler.cache_len
    live = min(args.live or DEFAULT_LIVE, cache_len)
    report = new_report("sample", slice_, mesh)
    report.settings = {"slots": slots, "cache_len": cache_len, "live": live}
    forms = {"quantize": quantize, "kv_dtype": args.kv_dtype}
    report.settings |= {name: form for name, form in forms.items() if form}
    if slice_.hosts > 1:
        report.warnings.append(
            f"sampling uses one host, in training each by itself: of {slice_.topology}, "
            f"plan for {host_slice(slice_).topology}"
        )
    warn_if_undivided(report, sizes, sampler.params)
    programs = sampling_programs(sampler)
    note(report, programs)
    weights, cache = device_bytes(sampler.params), device_bytes(sampler.cache)
    report.memory = {"weights": weights, "cache": cache}
    set_most(report, sampling_phases(sampler, programs))
    decode = programs["decode"]
    if decode.fits:
        report.memory["temporaries"] = decode.temporaries
        _check_cache(report, decode, cache)
        rows, capacity = sampler.cache_sizes
        filled = live * cache * slots // (rows * capacity)
        report.floor_bytes = read_weights(sampler.params) + filled
        if decode.text:
            torus = torus_of(slice_, mesh)
            _cost_of_decoding(report, decode.text, sampler, slice_.chip, torus, live)
    rest = report.hbm_bytes_per_chip - sum(report.memory.values())
    report.memory["other" if decode.fits else "temporaries"] = max(0, rest)
    report.max_slots = largest_slots(report, sampler, programs.get("prefill"))
    if not report.fits:
        report.fitting = _fitting_sampler(report, sampler, slice_)
    return report


def rollout_sampler(config: GRPOConfig, sizes: ModelConfig, mesh: Mesh) -> Sampler:
    """The engine of the rollouts; its cache has room for the longest prompt allowed."""
    slots = whole_slots(mesh, config.rollout.slots)
    needed = config.data.max_prompt_len + least_room(config)
    cache_len = config.rollout.cache_len or needed
    prompt_len = min(config.data.max_prompt_len, cache_len)
    return Sampler(
        sizes,
        mesh,
        computed_dtype(config),
        slots,
        cache_len,
        prompt_len,
        quantize=config.adapter.quantize,
        adapter=config.adapter,
    )


def sampling_programs(
    sampler: Sampler, prefill: Program | None = None
) -> dict[str, Program]:
    """`decode`, and if it fits the programs that bring prompts into slots; a `prefill`
    that was compiled serves for any slots that take as many prompts at a time."""
    programs = {"decode": sampler.decode()}
    if programs["decode"].fits:
        programs["prefill"] = prefill or sampler.prefill()
        programs["admit"] = sampler.admit()
    return programs


def sampling_phases(sampler: Sampler, programs: dict[str, Program]) -> dict[str, int]:
    """Bytes on a device while each runs, with the arrays that wait beside it."""
    weights, cache = device_bytes(sampler.params), device_bytes(sampler.cache)
    waiting = {"decode": 0, "prefill": cache, "admit": weights}
    return {name: program.total + waiting[name] for name, program in programs.items()}


def sampler_fits(
    report: Report, sampler: Sampler, prefill: Program | None = None
) -> bool:
    """Whether a step and the longest prompt fit, found by compiling."""
    programs = sampling_programs(sampler, prefill)
    count_seconds(report, [p for p in programs.values() if p is not prefill])
    return all_fit(report, programs, sampling_phases(sampler, programs))


def largest_slots(report: Report, sampler: Sampler, prefill: Program | None) -> int:
    """The most slots, up to MOST_SLOTS, that fit.

    Memory is nearly linear in the slots, so the first guess is mostly right or one off.
    """
    if prefill is None:  # as `decode` did not fit
        prefill = sampler.prefill()
        count_seconds(report, [prefill])
    unit, cache = sampler.mesh.shape["data"], device_bytes(sampler.cache)
    fixed = max(report.hbm_bytes_per_chip - cache, prefill.total)
    row = cache / sampler.slots
    known = {sampler.slots: report.fits}

    def fits(slots: int) -> bool:
        if slots > max(MOST_SLOTS, sampler.slots):
            return False
        if slots not in known:
            trial = sampler._replace(slots=slots)
            serves = trial.largest_prefix == sampler.largest_prefix
            known[slots] = sampler_fits(report, trial, prefill if serves else None)
        return known[slots]

    guess = int(min((report.hbm_limit_bytes - fixed) // row, MOST_SLOTS)) // unit
    most = bisect(lambda units: fits(units * unit), guess) * unit
    return most or bisect(fits, unit - 1)


def count_step(text: str, sampler: Sampler, live: int) -> tuple[Account, Account]:
    """A program of decode steps: all of it once, and one step with `live` positions in each
    slot."""
    rows, _ = sampler.cache_sizes
    parts = rows // sampler.slots
    blocks = -(-live // (BLOCK_LEN * parts))  # of a row of the cache

    def trip_count(op_name: str) -> int | None:
        # The loop over steps counts once, that over blocks of the cache by its length.
        loops = op_name.split("/").count("while")
        return 1 if loops == 1 else blocks

    whole = account(text, trip_count)
    return whole, whole.per_iteration().filled(blocks * BLOCK_LEN)


def chip_seconds(step: Account, chip: Chip) -> float:
    """The time of a decode step on the chip, in seconds. A kernel's time is computed from
    the bytes and flops that it states."""
    kernels = [op for op in step.custom_calls if op.states_cost]
    return step.cycles / chip.hertz + sum(
        op.times * chip.seconds(op.bytes, op.flops) for op in kernels
    )


def _cost_of_decoding(
    report: Report,
    text: str,
    sampler: Sampler,
    chip: Chip,
    torus: Torus,
    live: int,
) -> None:
    """Bytes and time of a step of all slots, each with `live` positions."""
    whole, step = count_step(text, sampler, live)
    report.bytes_per_step = step.bytes
    assert report.floor_bytes is not None
    seconds = chip_seconds(step, chip)
    add_seconds(report, seconds, traffic(step.collectives, torus))
    assert report.estimated_seconds is not None
    floor = report.floor_bytes / chip.bytes_per_second
    report.roofline_share = floor / report.estimated_seconds
    report.settings["xla_to_floor"] = step.cycles / chip.hertz / floor
    report.collective_bytes = collective_bytes(step)
    outside = [op for op in step.ops if op.depth == 1 and not op.flops]
    rest = sum((op.cycles or 0) * op.times for op in outside)
    report.settings["sampling_share"] = rest / chip.hertz / seconds
    report.not_in_estimate = ["the latency of collectives"]
    if any(op.states_cost for op in step.custom_calls):
        report.not_in_estimate.append(
            "what kernels take beyond the bytes and flops that they state, at full speed"
        )
    layer = device_bytes(sampler.cache) // (2 * sampler.sizes.num_layers)
    warn_of_copies(report, whole, min(layer, LARGE_COPY))
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
    """Settings that would fit: fewer slots, else the next larger slice of one host, as sampling
    uses no more; found by compiling."""
    if report.max_slots:
        return f"--slots {report.max_slots} fits"
    for larger in larger_slices(slice_):
        if larger.hosts > 1:
            break
        mesh = slice_mesh(larger, None, sampler.sizes)
        slots = whole_slots(mesh, sampler.slots)
        candidate = sampler._replace(mesh=mesh, slots=slots)
        needed = device_bytes((candidate.params, candidate.cache))
        if needed > larger.chip.hbm_bytes:
            continue
        if sampler_fits(report, candidate):
            return f"{larger.topology} fits ({slots} slots)"
    return "no larger slice of one host fits; use another chip, or a shorter cache"
