"""Training on a slice: does it fit, and how long does a step take?"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e1jax.checkpoint.load import CHECKPOINT, LoadedModel, ModelFiles
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig
from e1jax.grpo.learner import Learner
from e1jax.grpo.logprobs import shares_prompts
from e1jax.grpo.rollouts import (
    Batch,
    least_room,
    longest_lengths,
    padded_lengths,
    rollout_cache_len,
)
from e1jax.nn.model import abstract_params
from e1jax.nn.quantize import Params
from e1jax.plan.account import Account, account
from e1jax.plan.interconnect import torus_of, traffic
from e1jax.plan.programs import (
    Program,
    compile_for_tpu,
    computed_dtype,
    device_bytes,
    on_mesh,
)
from e1jax.plan.report import (
    LARGE_COPY,
    LARGE_REDUCE,
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
from e1jax.plan.sampling import (
    Sampler,
    chip_seconds,
    count_step,
    rollout_sampler,
    sampling_phases,
    sampling_programs,
)
from e1jax.plan.slices import GIB, Slice, host_slice, larger_slices, slice_mesh
from e1jax.sharding.fsdp import default_mesh
from e1jax.sharding.hosts import by_process, make_copy_to_all
from e1jax.training import computed_in


def plan_training(
    config: GRPOConfig, sizes: ModelConfig, slice_: Slice, args: argparse.Namespace
) -> Report:
    """The update, the passes before it, and everything in memory meanwhile.

    Raises UserError for a mesh of the rollouts, as a program for a part of a slice cannot
    be compiled.
    """
    if config.rollout_mesh is not None:
        raise UserError(
            f"rollout_mesh={config.rollout_mesh} divides each host's devices, and only "
            "complete slices are planned; plan --part train on a slice of as many devices "
            "as learn, and --part sample on one of a host's others, without rollout_mesh"
        )
    named = args.mesh or config.mesh
    config = dataclasses.replace(config, mesh=named, dtype=computed_dtype(config).name)
    mesh = slice_mesh(slice_, named or default_mesh(len(slice_.devices)), sizes)
    learner, batch = abstract_learner(config, sizes, mesh)
    report = new_report("train", slice_, mesh)
    rows = config.update.microbatch // mesh.shape["data"]
    report.settings = {"tokens": batch.tokens.shape[-1], "rows": rows}
    report.settings["samples_in_pass"] = samples_in_pass(learner)
    warn_if_undivided(report, sizes, learner.frozen.shapes or learner.shapes)
    if config.update.param_dtype == "bfloat16":
        report.warnings.append("train refuses update.param_dtype=bfloat16")
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
    note(report, programs)
    for name, program in programs.items():
        if program.text:
            _cost_of_training(report, name, program.text, learner, slice_)
    phases = training_phases(learner, programs)
    phases |= rollout_phases(report, learner, slice_)
    phases = with_rollouts_beside(phases, learner)
    report.settings["phases"] = phases
    set_most(report, phases)
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
    adapter, dtype = config.adapter, jnp.dtype(update.param_dtype)
    if adapter.rank:
        dtype = computed_in(config)
    nowhere = Path()  # the weights are never read
    files = ModelFiles(config.model, nowhere, CHECKPOINT, nowhere, nowhere, {})
    loaded = LoadedModel(files, sizes, tokenizer, mesh, dtype, adapter.quantize)
    learner = Learner(config, loaded, longest)
    length, response_len = padded_lengths(longest, longest)
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    num_micro = update.minibatch_prompts * rollout.responses // update.microbatch

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        shape = (num_micro, update.microbatch, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    values = array(jnp.float32, response_len)
    batch = Batch(
        tokens=array(jnp.int32, length),
        prompt_len=array(jnp.int32),
        advantages=array(jnp.float32, *([response_len] if rollout.cuts else [])),
        loss_mask=array(jnp.bool_, response_len),
        old_logprobs=values,
        ref_logprobs=values if config.loss.kl_coef else None,
    )
    return learner, batch


def resident(learner: Learner) -> dict[str, int]:
    """Bytes on a device that are there all the time. Beside an adapter, which `parameters`
    then are, the frozen ones are the reference."""
    sizes, mesh = learner.loaded.config, learner.loaded.mesh
    held = {
        "parameters": device_bytes(learner.shapes),
        "optimizer": device_bytes(learner.state_shapes),
        "reference": 0,
    }
    if learner.frozen.shapes is not None:
        held["frozen"] = device_bytes(learner.frozen.shapes)
    elif learner.config.loss.kl_coef:
        computed = abstract_params(sizes, mesh, learner.dtype)
        held["reference"] = device_bytes(computed)
    if learner.config.rollout.ahead:
        held["sampled"] = device_bytes(learner.sampled_shapes)
    return held


def training_programs(learner: Learner, batch: Batch) -> dict[str, Program]:
    """The update, which needs most, and if it fits the passes that may go before it."""
    temperature = on_mesh(learner.loaded.mesh, np.float32(1))
    given = (learner.shapes, learner.state_shapes, batch, False, temperature)
    frozen = learner.frozen.shapes
    update = learner.update.trace(*given, None, frozen)
    programs = {"update": compile_for_tpu(update)}
    if programs["update"].fits and logprob_passes(learner.config):
        batch = batch._replace(ref_logprobs=None)  # as training calls it
        traced = learner.logprobs.trace(learner.shapes, batch, temperature, frozen)
        programs["logprobs"] = compile_for_tpu(traced)
    return programs


def logprob_passes(config: GRPOConfig) -> int:
    """How often a step computes the log-probabilities of a mini-batch: the reference's,
    and the old ones of mini-batches after a step's first update."""
    updates, epochs = config.updates_per_step, config.update.epochs
    minibatches = updates // epochs
    passes = minibatches if config.loss.kl_coef else 0
    if config.loss.old_logprobs == "recomputed":
        passes += min(updates - 1, minibatches)
    return passes


def training_phases(learner: Learner, programs: dict[str, Program]) -> dict[str, int]:
    """Bytes on a device while each runs, with the arrays that wait beside it."""
    held = resident(learner)
    waiting = {"update": 0, "logprobs": held["optimizer"]}
    beside = held["reference"] + held.get("sampled", 0)
    return {
        name: program.total + waiting[name] + beside
        for name, program in programs.items()
    }


def host_sampler(learner: Learner, slice_: Slice) -> Sampler:
    """The engine of one of a slice's hosts, which samples on its own devices."""
    sizes = learner.loaded.config
    mesh = slice_mesh(host_slice(slice_), None, sizes)
    return rollout_sampler(learner.config, sizes, mesh)


def rollout_phases(report: Report, learner: Learner, slice_: Slice) -> dict[str, int]:
    """Bytes on a device while the parameters are copied to the engine's devices, if
    they are not there, and while it samples. The copy is made once after each update;
    it and the cache are released before the next."""
    if slice_.hosts > 1:
        report.settings["rollouts_on"] = host_slice(slice_).topology
    sampler, loaded = host_sampler(learner, slice_), learner.loaded
    copied, phases = {}, {}
    beside, own, shared = resident(learner), learner.shapes, "parameters"
    dtype = loaded.dtype
    if learner.config.rollout.ahead:
        own, shared, dtype = learner.sampled_shapes, "sampled", learner.sampled_dtype
    if learner.frozen.shapes is not None:
        form = loaded.quantize, learner.config.adapter
        own = abstract_params(loaded.config, loaded.mesh, learner.dtype, *form)
        shared, dtype = "frozen", loaded.dtype
    if (sampler.dtype, sampler.mesh.shape) == (dtype, loaded.mesh.shape):
        del beside[shared]  # the engine's are these
    else:
        given = jax.tree.map(_by_process, own)
        traced = make_copy_to_all(loaded.mesh, sampler.params).trace(given)
        copied["copy"] = compile_for_tpu(traced)
        waiting = sum(beside.values()) - beside[shared]
        if given != own:  # the copy is made of a copy in that order
            waiting += beside[shared]
        phases["copy"] = copied["copy"].total + waiting
        warn_if_undivided(report, sampler.sizes, sampler.params)
    programs = sampling_programs(sampler)
    note(report, copied | programs)
    most = max(sampling_phases(sampler, programs).values())
    if text := programs["decode"].text:
        _time_of_rollouts(report, text, sampler, learner, slice_)
    return phases | {"rollouts": sum(beside.values()) + most}


def _time_of_rollouts(
    report: Report, text: str, sampler: Sampler, learner: Learner, slice_: Slice
) -> None:
    """Adds to a report how long a step's responses take to be sampled if all are as long as
    they can be and no slot is empty: each host has its share of them. Prefills are not in
    it."""
    rollout, (_, longest) = learner.config.rollout, learner.longest
    tokens = rollout.prompts * rollout.samples * longest
    if rollout.cuts:
        thought, solution = rollout.cuts[-1], rollout.solution_budgets[0] or 0
        each = thought + rollout.solutions * solution
        tokens = rollout.prompts * rollout.samples * each
    live = min(sampler.prompt_len + longest // 2, sampler.cache_len)
    _, step = count_step(text, sampler, live)
    moved = traffic(step.collectives, torus_of(host_slice(slice_), sampler.mesh))
    seconds = moved.with_work(chip_seconds(step, slice_.chip))
    report.settings["decode_seconds"] = seconds
    steps = tokens / (slice_.hosts * sampler.slots)
    report.settings["rollout_seconds"] = steps * seconds


def with_rollouts_beside(phases: dict[str, int], learner: Learner) -> dict[str, int]:
    """The phases where responses are sampled while others are learned: whatever the
    engine has is there during an update too."""
    if not learner.config.rollout.ahead:
        return phases
    engine = phases["rollouts"] - sum(resident(learner).values())
    return phases | {"update": phases["update"] + max(0, engine)}


def _by_process(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert isinstance(x.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_process(x.sharding))


def _cost_of_training(
    report: Report, name: str, text: str, learner: Learner, slice_: Slice
) -> None:
    """Adds the cost of a program, per training step, to the report."""
    config, chip = learner.config, slice_.chip
    counted = account(text)
    times = config.updates_per_step if name == "update" else logprob_passes(config)
    kernels = _kernel_flops(counted, learner)
    seconds = counted.cycles / chip.hertz
    seconds += kernels / (_KERNEL_SHARE * chip.flops_per_second)
    report.bytes_per_step = (report.bytes_per_step or 0) + times * counted.bytes
    moved = traffic(counted.collectives, torus_of(slice_, learner.loaded.mesh))
    add_seconds(report, seconds, moved, times)
    report.not_in_estimate = ["the latency of collectives"]
    if kernels:
        report.not_in_estimate.append(
            "the attention kernel's real speed (half of the peak is assumed)"
        )
    if counted.unknown_loops:
        report.warnings.append(
            f"{name}: loops of unknown length count once: "
            f"{', '.join(sorted(set(counted.unknown_loops)))}"
        )
    warn_of_copies(report, counted, 16 * LARGE_COPY, calls=times)
    if name == "update":
        held = device_bytes((learner.shapes, learner.state_shapes))
        report.floor_bytes = (2 * held + device_bytes(learner.frozen.shapes)) * times
        useful = update_flops(learner) / learner.loaded.mesh.size
        report.flops = {
            "useful_per_update": useful,
            "matrix_per_update": float(counted.flops),
            "kernels_per_update": float(kernels),
            "matrix_to_useful": counted.flops / useful,
        }
        report.settings["update_seconds"] = moved.with_work(seconds)
        report.settings["update_chip_seconds"] = seconds
        report.settings["update_interconnect_seconds"] = moved.seconds
        least = useful / chip.flops_per_second
        report.roofline_share = least / moved.with_work(seconds)
        report.collective_bytes = collective_bytes(counted)
        large = [
            op
            for op in counted.collectives
            if op.opcode == "all-reduce" and op.payload >= LARGE_REDUCE
        ]
        if large:
            size = max(op.payload for op in large) / 2**20
            report.warnings.append(
                f"{len(large)} all-reduce of up to {size:.0f} MiB: gradients are not "
                "scattered as they are summed"
            )


_KERNEL_SHARE = 0.5  # of the peak, assumed: the compiler has no estimate of kernels


def update_flops(learner: Learner) -> float:
    """6 flops per weight of a matrix product and token, of one update, and 4 where it is
    frozen, as it gets no gradient; the output matrix sees responses only. Tokens of a
    prompt that several responses share count once. Attention's products are not in it."""
    config, sizes = learner.config, learner.loaded.config
    frozen, head = learner.frozen.shapes, sizes.hidden_size * sizes.vocab_size
    if frozen is None:
        per_token, head = 6.0 * _matrix_weights(learner.shapes["layers"]), 6.0 * head
    else:
        per_token = 4.0 * _matrix_weights(frozen["layers"])
        per_token += 6.0 * _matrix_weights(learner.shapes)
        head = 4.0 * head
    parts = parts_in_pass(learner)
    tokens = sum(rows * length for rows, _, length in parts)
    _, response_len = learner.longest
    sampled = rows_on_device(learner) * response_len
    if len(parts) == 3:  # thoughts, and solutions of another length
        sampled = sum(rows * length for rows, _, length in parts[1:])
    rows = config.update.minibatch_prompts * config.rollout.responses
    passes = rows / rows_on_device(learner)
    return passes * (tokens * per_token + sampled * head)


def _matrix_weights(layers: Params) -> int:
    """Weights in the stacked matrices of a tree."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(layers)]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 3)


def rows_on_device(learner: Learner) -> int:
    """Responses of a micro-batch on one device."""
    return learner.config.update.microbatch // learner.loaded.mesh.shape["data"]


def samples_in_pass(learner: Learner) -> int:
    """Responses, of cut ones thoughts, that go through the model with one prompt; see
    response_logprobs."""
    rollout, (_, response_len) = learner.config.rollout, learner.longest
    rows = rows_on_device(learner)
    if rollout.cuts:
        thoughts, rest = divmod(rows, 1 + rollout.solutions)
        return 1 if rest or thoughts % rollout.samples else rollout.samples
    return rollout.samples if shares_prompts(rows, rollout.samples, response_len) else 1


def parts_in_pass(learner: Learner) -> list[tuple[float, int, int]]:
    """What goes through the model on a device at a time: rows, tokens before them that
    they see, and tokens; of prompts, of responses and of the solutions to these, or of
    complete rows."""
    rollout, (prompt_len, response_len) = learner.config.rollout, learner.longest
    rows, samples = rows_on_device(learner), samples_in_pass(learner)
    if rollout.cuts and shares_prompts(rows, 1 + rollout.solutions, response_len):
        thoughts, thought_len = rows / (1 + rollout.solutions), rollout.cuts[-1] + 1
        prompt_len -= thought_len
        solution_len = rollout.solution_budgets[0] or 0
        return [
            (thoughts / samples, 0, prompt_len),
            (thoughts, prompt_len, thought_len),
            (thoughts * rollout.solutions, prompt_len + thought_len, solution_len),
        ]
    if rollout.cuts or samples == 1:
        return [(rows, 0, prompt_len + response_len)]
    return [(rows / samples, 0, prompt_len), (rows, prompt_len, response_len)]


def _kernel_flops(counted: Account, learner: Learner) -> float:
    """Flops of attention kernels: a product of scores or values over half a square.

    JAX's splash kernels state no cost (0.10.2); kernels that do are counted as they say.
    """
    count, stated = 0, 0
    for op in counted.custom_calls:
        if op.states_cost:
            stated += op.times * op.flops
        elif op.target == "tpu_custom_call":
            # Forward has two products; backward computes the scores again, and the
            # weights' gradient, once for queries and once for keys and values.
            passes = {"dkv": 4, "dq": 3}
            products = [n for kind, n in passes.items() if kind in op.op_name] or [2]
            count += op.times * products[0]
    return count * _product_flops(learner) + stated


def _product_flops(learner: Learner) -> float:
    """Flops of one of the products of a call of attention on one device; of several calls
    in turn, see `parts_in_pass`, the mean."""
    sizes, mesh = learner.loaded.config, learner.loaded.mesh
    heads = sizes.num_heads / mesh.shape["tensor"]
    parts = parts_in_pass(learner)
    pairs = sum(rows * own * (2 * before + own) for rows, before, own in parts)
    return heads * sizes.head_dim * pairs / len(parts)


def _fitting_learner(report: Report, learner: Learner, slice_: Slice) -> str:
    """Settings that would fit: a smaller micro-batch or fewer slots, else a larger slice."""
    limit, held = report.hbm_limit_bytes, resident(learner)
    state, phases = sum(held.values()), dict(report.settings["phases"])
    rollouts, copied = phases.pop("rollouts"), phases.pop("copy", 0)
    most = max(phases.values())
    itemsize = jax.tree.leaves(learner.shapes)[0].dtype.itemsize
    gradients = held["parameters"] * 4 // itemsize  # of float32
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
    """The largest that fits, with at most half the rows a device; found by compiling."""
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
        count_seconds(report, programs.values())
        if all_fit(report, programs, training_phases(learner, programs)):
            return rows * data
    return None


def _larger_learner(
    learner: Learner, slice_: Slice, temporaries: int, copied: int
) -> str:
    """The next larger slice by an estimate: state is divided among the devices,
    temporaries of the update go with the rows of a micro-batch on each, the copy to
    sample from keeps its size, and all of that comes in turn."""
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
