"""Planning: names and messages, tables and searches; with libtpu, real compilations."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import Chip, set_everywhere

from e1jax.checkpoint.params import named_shapes
from e1jax.cli.locks import owning
from e1jax.config.checks import UserError
from e1jax.config.load import load_config
from e1jax.config.model import ModelConfig
from e1jax.config.training import GRPOConfig
from e1jax.nn.model import abstract_params
from e1jax.plan import sizes as plan_sizes
from e1jax.plan import slices
from e1jax.plan.__main__ import main
from e1jax.plan.interconnect import Torus
from e1jax.plan.programs import Program, bisect, device_bytes, used_when_too_large
from e1jax.plan.report import Report, _time_rows, warn_of_copies
from e1jax.plan.sampling import Sampler, _cost_of_decoding, read_weights
from e1jax.plan.sizes import model_sizes
from e1jax.plan.slices import (
    CHIPS,
    TOPOLOGIES,
    Slice,
    _chips,
    check_topology,
    host_slice,
)
from e1jax.plan.training import (
    _kernel_flops,
    _time_of_rollouts,
    abstract_learner,
    update_flops,
)
from e1jax.sharding.mesh import make_mesh

SIZES = ModelConfig(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rope_theta=1e4,
)


@pytest.fixture
def config(tmp_path):
    """A configuration of a model that is nothing but its sizes."""
    (tmp_path / "model").mkdir()
    text = json.dumps(SIZES.to_hf("bfloat16"))
    (tmp_path / "model" / "config.json").write_text(text)
    settings = {
        "model": str(tmp_path / "model"),
        "steps": 3,
        "data": {"max_prompt_len": 40},
        "rollout": {
            **{"prompts": 4, "samples": 2, "slots": 6},
            **{"thinking_budget": 30, "solution_budget": 29},
        },
        "update": {"minibatch_prompts": 2, "microbatch": 2},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# Topologies and models.


def test_topologies_are_listed_with_chips_and_devices(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "topologies"])
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["v5e:2x4", "8", "8", "15.75", "819", "197"] in lines
    assert ["tpu7x:2x2x2", "8", "16", "94.74", "3690", "1154"] in lines
    assert {line[0] for line in lines[1:-1]} == set(TOPOLOGIES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5e:2x5", "v5e:2x4"),
        ("V5P:4x4x4", "v5p:4x4x4"),
        ("v5litepod-8", "are v5e:2x4 "),
        ("v5p-8", "are v5p:2x2x1 "),
        ("v6e-7", "v6e:"),
        ("h100", "it is like v5e:2x4"),
    ],
)
def test_an_unknown_topology_names_the_nearest(name, hint):
    with pytest.raises(UserError, match=hint) as raised:
        check_topology(name)
    assert "plan topologies" in str(raised.value)


def test_a_mistyped_command_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "topologys"])
    with pytest.raises(UserError, match=r"'topologys'; did you mean 'topologies'\?"):
        main()


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        slices.describe("v5e:2x4")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "ABORTED: The TPU is already in use; remove the libtpu lockfile",
            "another process holds libtpu",
        ),
        ("INVALID_ARGUMENT: no such thing", "cannot describe v5e:2x4"),
    ],
)
def test_a_compiler_that_cannot_start_is_one_sentence(monkeypatch, message, expected):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(slices, "_COMPILER_ENVIRONMENT", {})
    monkeypatch.setattr(slices.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=expected):
        slices.describe("v5e:2x4")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' pages on the hub say
        ("Salesforce/E1-Math-7B", 7_615_616_512),
        ("agentica-org/DeepScaleR-1.5B-Preview", 1_777_088_000),
        ("nvidia/AceReason-Nemotron-14B", 14_770_033_664),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_sizes_of_shipped_models_need_no_network(name, parameters):
    shapes = named_shapes(model_sizes(name))
    assert sum(map(math.prod, shapes.values())) == parameters


def test_sizes_of_a_directory_need_no_weights(config):
    assert model_sizes(str(config.parent / "model")) == SIZES


def test_sizes_of_an_unknown_model_are_asked_of_the_hub(monkeypatch, config):
    def download(name, file):
        assert (name, file) == ("somebody/something", "config.json")
        return str(config.parent / "model" / file)

    monkeypatch.setattr(plan_sizes.huggingface_hub, "hf_hub_download", download)
    assert model_sizes("somebody/something") == SIZES


def test_sizes_that_cannot_be_had_are_one_sentence():
    with pytest.raises(UserError, match="cannot be had from the hub"):
        model_sizes("nobody/nothing")


# Pieces.


@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("guess", [0, 1, 7, 8, 9, 60])
def test_bisection_finds_the_largest(most, guess):
    asked = []
    found = bisect(lambda n: asked.append(n) or n <= most, guess)
    assert found == most
    assert all(n >= 1 for n in asked)
    assert len(asked) == len(set(asked))
    if guess - most in (0, 1):
        assert len(asked) <= 2


@pytest.mark.parametrize(
    ("message", "used"),
    [
        ("RESOURCE_EXHAUSTED: Ran out. Used 17.50G of 15.75G hbm.", 17.5 * 2**30),
        (
            "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory "
            "required for HLO temporaries (512.5M) exceeds available HBM (15.75G).",
            512.5 * 2**20,
        ),
        ("RESOURCE_EXHAUSTED: something else", 0),
        ("INTERNAL: RET_CHECK failure", None),
    ],
)
def test_what_did_not_fit_is_read_from_the_refusal(message, used):
    assert used_when_too_large(message) == used


def test_a_step_reads_no_embedding_but_a_tied_one():
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])

    def read(**changes):
        sizes = dataclasses.replace(SIZES, **changes)
        params = abstract_params(sizes, mesh, jnp.bfloat16)
        return device_bytes(params), read_weights(params)

    whole, step = read()
    assert whole - step == 2 * 264 * 64
    whole, step = read(tie_word_embeddings=True)
    assert whole == step


ALONE = Torus([(0, 0)], [False, False], 50e9)


STEP = """
%body (p: (pred[], f32[2,64])) -> (pred[], f32[2,64]) {
  %p = (pred[]{:T(512)}, f32[2,64]{1,0:T(8,128)}) parameter(0)
  %go = pred[]{:T(512)} get-tuple-element(%p), index=0
  %x = f32[2,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[2,64]{1,0:T(8,128)} negate(%x), backend_config={"window_config":{"estimated_cycles":"1500"}}
  %z = f32[2,64]{1,0:T(8,128)} custom-call(%y), custom_call_target="tpu_custom_call"STATED
  ROOT %t = (pred[]{:T(512)}, f32[2,64]{1,0:T(8,128)}) tuple(%go, %z)
}

%test (q: (pred[], f32[2,64])) -> pred[] {
  %q = (pred[]{:T(512)}, f32[2,64]{1,0:T(8,128)}) parameter(0)
  ROOT %more = pred[]{:T(512)} get-tuple-element(%q), index=0
}

ENTRY %main (f: pred[], a: f32[2,64]) -> f32[2,64] {
  %f = pred[]{:T(512)} parameter(0)
  %a = f32[2,64]{1,0:T(8,128)} parameter(1)
  %b = f32[2,64]{0,1:T(8,128)} copy(%a)
  %s = (pred[]{:T(512)}, f32[2,64]{1,0:T(8,128)}) tuple(%f, %b)
  %w = (pred[]{:T(512)}, f32[2,64]{1,0:T(8,128)}) while(%s), condition=%test, body=%body, metadata={op_name="jit(decode)/while"}
  ROOT %r = f32[2,64]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


def stated(positions: int, num_bytes: int, flops: int) -> str:
    """What a kernel says of a full cache of so many positions, read in blocks of 512."""
    metadata = json.dumps({"block_len": "512", "positions": str(positions)}, indent=0)
    cost = {"flops": str(flops), "bytes_accessed": str(num_bytes)}
    config = json.dumps({"custom_call_config": {"cost_estimate": cost}})
    config = config.replace(": ", ":")
    return (
        f", frontend_attributes={{kernel_metadata={metadata}}}, backend_config={config}"
    )


@pytest.mark.parametrize(
    ("num_bytes", "flops", "seconds"),
    [
        (None, 0, 0),
        (8_000_000, 10**6, 4_000_000 / 819e9),
        (8_000_000, 10**10, 5 * 10**9 / 197e12),
    ],
)
def test_bytes_and_time_of_a_step(num_bytes, flops, seconds):
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    sampler = Sampler(SIZES, mesh, jnp.bfloat16, 5, 2048, 40)
    report = Report("sample", "v5e:1x1", "data=1,tensor=1", floor_bytes=10**4)
    attributes = stated(2048, num_bytes, flops) if num_bytes else ""
    text = STEP.replace("STATED", attributes)
    _cost_of_decoding(report, text, sampler, CHIPS["v5e"], ALONE, live=600)
    # Of 600 positions in blocks of 512 a kernel reads 1024, half of all.
    kernel = (num_bytes or 0) // 2
    assert report.bytes_per_step == 2 * 4 * 2 * 64 + kernel  # not the copy before it
    assert report.estimated_seconds == pytest.approx(1e-6 + seconds)
    floor = 10**4 / 819e9
    assert report.roofline_share == pytest.approx(floor / report.estimated_seconds)
    assert any("kernel" in text for text in report.not_in_estimate) == bool(num_bytes)


@pytest.mark.parametrize(("speed", "bound"), [(50e9, "chip"), (50e7, "interconnect")])
def test_a_step_waits_for_its_collectives(speed, bound):
    """An all-reduce of 512 bytes between two chips, and 1 us of other work."""
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    sampler = Sampler(SIZES, mesh, jnp.bfloat16, 5, 2048, 40)
    report = Report("sample", "v5e:1x1", "data=1,tensor=1", floor_bytes=10**4)
    report.settings = {"slots": 5}
    text = STEP.replace("STATED", "").replace(
        "  %z =",
        "  %w = f32[2,64]{1,0:T(8,128)} all-reduce(%y), replica_groups={{0,1}}\n  %z =",
    )
    pair = Torus([(0, 0), (0, 1)], [False, False], speed)
    _cost_of_decoding(report, text, sampler, CHIPS["v5e"], pair, live=600)
    assert report.chip_seconds == pytest.approx(1e-6)
    assert report.interconnect_seconds == pytest.approx(512 / speed)
    assert report.interconnect_beside_seconds == 0
    assert report.estimated_seconds == pytest.approx(1e-6 + 512 / speed)
    assert report.bound_by == bound
    bounds = [name for name, _, text in _time_rows(report) if "the bound" in text]
    assert bounds == [f"on the {bound}"]


def test_bytes_of_a_step_of_few_slots(config):
    """Positions of three slots lie over eight devices: of 40,000 none has more than
    40 of the 313 blocks of 128, for which a kernel reads ten of 512."""
    mesh = make_mesh("data=8,tensor=1", SIZES, [Chip(i) for i in range(8)])
    sampler = Sampler(SIZES, mesh, jnp.bfloat16, 3, 65536, 40)
    report = Report("sample", "v5e:2x4", "data=8,tensor=1", floor_bytes=10**4)
    text = STEP.replace("STATED", stated(sampler.cache_sizes[1], 8_192_000, 1))
    _cost_of_decoding(report, text, sampler, CHIPS["v5e"], ALONE, live=40_000)
    kernel = 8_192_000 * 10 * 512 // sampler.cache_sizes[1]
    assert report.bytes_per_step == 2 * 4 * 2 * 64 + kernel


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 60),  # of thinking, the forced end and the solution
        (
            {"thinking_budget": 1024, "cuts": [10, 30], "solutions_per_cut": 3},
            30 + 6 * 29,
        ),
    ],
)
def test_the_time_of_a_steps_responses(changes, tokens, config, monkeypatch):
    """Of 1 us a decode step; each of two hosts samples half of 4 x 2 responses in 6 slots."""
    settings, _ = load_config(GRPOConfig, ["--config", str(config)], "train")
    rollout = dataclasses.replace(settings.rollout, **changes)
    loss = dataclasses.replace(settings.loss, scale_rewards=not rollout.cuts)
    settings = dataclasses.replace(settings, rollout=rollout, loss=loss)
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    slice_ = Slice("v5e:2x4", CHIPS["v5e"], [Chip(i, i // 4) for i in range(8)])
    learner, _ = abstract_learner(settings, SIZES, mesh)
    sampler = Sampler(SIZES, mesh, jnp.bfloat16, 6, 2048, 40)
    report = Report("train", "v5e:2x4", "data=1,tensor=1")
    set_everywhere(monkeypatch, "host_slice", lambda slice_: slice_)
    set_everywhere(monkeypatch, "torus_of", lambda slice_, mesh: ALONE)
    _time_of_rollouts(report, STEP.replace("STATED", ""), sampler, learner, slice_)
    assert report.settings["decode_seconds"] == pytest.approx(1e-6)
    steps = 4 * 2 * tokens / (2 * 6)
    assert report.settings["rollout_seconds"] == pytest.approx(steps * 1e-6)


@pytest.mark.parametrize(("rows", "warns"), [(5, False), (6, True)])
def test_weights_that_are_sent_around_are_told_of(rows, warns):
    """In the loop over layers nothing is larger than five slots' float32 [5, 96]."""
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    sampler = Sampler(SIZES, mesh, jnp.bfloat16, 5, 2048, 40)
    report = Report("sample", "v5e:1x1", "data=1,tensor=1", floor_bytes=10**4)
    shape = f"f32[{rows},96]" + "{1,0:T(8,128)}"
    inner = f"""
%layer (p: (pred[], f32[1,1])) -> (pred[], f32[1,1]) {{
  %p = (pred[]{{:T(512)}}, {shape}) parameter(0)
  %go = pred[]{{:T(512)}} get-tuple-element(%p), index=0
  %x = {shape} get-tuple-element(%p), index=1
  %sum = {shape} all-reduce(%x), channel_id=3
  ROOT %t = (pred[]{{:T(512)}}, {shape}) tuple(%go, %sum)
}}
"""
    loop = (
        f"  %in = (pred[]{{:T(512)}}, {shape}) tuple(%go, %x)\n"
        f"  %layers = (pred[]{{:T(512)}}, {shape}) while(%in), condition=%test, "
        'body=%layer, metadata={op_name="jit(decode)/while/body/while"}\n  %y ='
    )
    text = inner + STEP.replace("STATED", "").replace("  %y =", loop)
    _cost_of_decoding(report, text, sampler, CHIPS["v5e"], ALONE, live=600)
    assert any("weights are sent around" in text for text in report.warnings) == warns


def test_copies_are_counted_over_all_calls_of_a_step():
    """A loop's 4 of 48 MiB, and one outside of loops."""
    sizes = {"bytes": 96 * 2**20, "name": "copy.1"}
    ops = [
        types.SimpleNamespace(**sizes, op_name="jit(f)", times=4, depth=1),
        types.SimpleNamespace(**sizes, op_name="", times=1, depth=0),
    ]
    report = types.SimpleNamespace(warnings=[])
    counted = types.SimpleNamespace(copies=lambda at_least: ops)
    warn_of_copies(report, counted, 1, calls=3)
    assert report.warnings == [
        "a copy of 48 MiB, 12 times a step (jit(f))",
        "a copy of 48 MiB, once a call (copy.1)",
    ]


@pytest.mark.parametrize(("microbatch", "tokens"), [(1, 4 * 100), (2, 2 * 40 + 4 * 60)])
def test_useful_flops_of_an_update(microbatch, tokens, config):
    """Of groups of 2 that are divided, and of groups that share their prompt."""
    argv = ["--config", str(config), "--update.microbatch", str(microbatch)]
    loaded, _ = load_config(GRPOConfig, argv, "python -m e1jax.plan")
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    learner, batch = abstract_learner(loaded, SIZES, mesh)
    shape = (4 // microbatch, microbatch)
    assert batch.tokens.shape == (*shape, 100)
    assert batch.loss_mask.shape == (*shape, 60)
    # q and o, k and v, and the three products of the mlp, in each of three layers.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert update_flops(learner) == 6 * (tokens * 3 * layer + 4 * 60 * 264 * 64)


def test_useful_flops_beside_frozen_parameters(config):
    """A frozen weight has no gradient: two products a token, and three of A and B."""
    argv = ["--adapter.rank", "5", "--adapter.targets", "[q, down]"]
    loaded, _ = load_config(GRPOConfig, ["--config", str(config), *argv], "plan")
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    learner, _ = abstract_learner(loaded, SIZES, mesh)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    adapter = 5 * (64 + 64 + 96 + 64)
    tokens, responses = 2 * 40 + 4 * 60, 4 * 60
    products = tokens * 3 * (4 * layer + 6 * adapter) + 4 * responses * 264 * 64
    assert update_flops(learner) == products


def test_flops_of_attention_with_shared_prompts(config):
    """Of 4 heads of 16: a product over half a square of each prompt, and over the
    responses' part of the square of both; a pass has a call for each."""
    loaded, _ = load_config(GRPOConfig, ["--config", str(config)], "plan")
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    learner, _ = abstract_learner(loaded, SIZES, mesh)
    op = types.SimpleNamespace(
        states_cost=False, target="tpu_custom_call", op_name="jvp", times=3, flops=0
    )
    counted = types.SimpleNamespace(custom_calls=[op, op])
    of_responses = sum(40 + i + 0.5 for i in range(60))
    pairs = 40**2 / 2 + 2 * of_responses
    flops = _kernel_flops(counted, learner)  # type: ignore[arg-type]
    assert flops == 3 * 2 * 2 * pairs * 4 * 16


@pytest.mark.parametrize(
    ("budgets", "cache_len", "lengths"),
    [  # T and R; the prompt has 40 tokens or, where that is all there is room for, 30
        ((30, 29), None, (100, 60)),
        ((30, 29), 4096, (100, 60)),
        ((30, 29), 90, (90, 60)),
        ((None, 29), 300, (339, 299)),  # after a prompt of one token
        ((30, None), 300, (339, 299)),
    ],
)
def test_lengths_of_training_are_those_that_train_has(budgets, cache_len, lengths):
    rollout = GRPOConfig("nano", 1).rollout
    rollout = dataclasses.replace(
        rollout,
        thinking_budget=budgets[0],
        solution_budget=budgets[1],
        cache_len=cache_len,
    )
    config = GRPOConfig("nano", 1, rollout=rollout)
    data = dataclasses.replace(config.data, max_prompt_len=40)
    config = dataclasses.replace(config, data=data)
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    learner, batch = abstract_learner(config, SIZES, mesh)
    assert batch.tokens.shape[-1] == lengths[0]
    assert batch.loss_mask.shape[-1] == learner.longest[1] == lengths[1]


# Whole plans, with a compiler that only adds up what a program is given.


@pytest.fixture
def fake(monkeypatch):
    """Plans for devices of which `limit` bytes can be used. A program takes its
    arguments and, unless it can write over these, its results, as if they were whole on
    each; `per_row` bytes for each row of a micro-batch; what `more_of` says of its name."""

    def set_limit(limit, per_row=0, **more_of):
        chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes=limit)

        def bytes_of(arrays):
            return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)

        def compiled(traced):
            given = jax.tree.leaves(traced.in_avals)
            donated = [a for a in jax.tree.leaves(traced.args_info) if a.donated]
            size = bytes_of(given)
            size += max(
                0, bytes_of(jax.tree.leaves(traced.out_info)) - bytes_of(donated)
            )
            tokens = [a.shape for a in given if a.ndim == 3 and a.dtype == np.int32]
            more = per_row * sum(rows for _, rows, _ in tokens)
            more += more_of.get(traced.fun_name, 0)
            fits, total = size + more <= limit, size + more
            return Program(fits, total, 1.0, more * fits, size)

        def describe(name):
            count = _chips(name.partition(":")[2])
            on_host = 8 if name.endswith(":2x4") else 4
            devices = [Chip(i, i // on_host) for i in range(count)]
            return Slice(name, chip, devices)

        set_everywhere(monkeypatch, "compile_for_tpu", compiled)
        set_everywhere(monkeypatch, "describe", describe)

    return set_limit


def run(monkeypatch, capsys, *argv) -> tuple[int, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, argv)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


FIELDS = [
    *("part", "topology", "mesh", "fits", "hbm_bytes_per_chip", "hbm_limit_bytes"),
    *("max_slots", "bytes_per_step", "floor_bytes", "estimated_seconds"),
    *("compile_seconds", "warnings"),
]
RESIDENT = ("parameters", "optimizer", "reference", "sampled")
PARAMETERS = sum(map(math.prod, named_shapes(SIZES).values()))
# Keys and values of 3 layers, 2 heads of 16 dims, in bfloat16, a block of 128 positions.
ROW = 2 * 3 * 2 * 16 * 2 * 128
# Of eight prompts of 64 tokens, which six slots or more are prefilled with at a time.
PREFIX = 8 * ROW // 2


def test_both_parts_with_all_fields(fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ("--config", config, "--topology", "v5e:1x1", "--json")
    code, reports = run(monkeypatch, capsys, *argv)
    assert code == 0
    assert [report["part"] for report in reports] == ["sample", "train"]
    for report in reports:
        assert set(FIELDS) <= set(report)
        assert report["fits"] and report["mesh"] == "data=1,tensor=1"
        assert report["topology"] == "v5e:1x1"
    sample, train = reports
    assert sample["memory"]["weights"] == 2 * PARAMETERS
    assert sample["memory"]["cache"] == 6 * ROW
    # float32 parameters and two moments (and two counters), a bfloat16 reference.
    assert train["memory"]["parameters"] == 4 * PARAMETERS
    assert 8 * PARAMETERS <= train["memory"]["optimizer"] <= 8 * PARAMETERS + 16
    assert train["memory"]["reference"] == 2 * PARAMETERS
    # While responses are sampled: all of that, the copy sampled from, the cache, and
    # while prompts are copied into it theirs.
    phases = train["settings"]["phases"]
    rollouts = (4 + 8 + 2 + 2) * PARAMETERS + 6 * ROW + PREFIX
    assert rollouts < phases["rollouts"] < rollouts + 10**4
    assert 14 * PARAMETERS < phases["update"] < 14 * PARAMETERS + 10**4
    assert phases["copy"] - 16 * PARAMETERS in range(17)  # two counters
    # A compiler that cannot print its programs is said to.
    unprinted = [text for text in train["warnings"] if "memory only" in text]
    assert "print update, logprobs for" in unprinted[0]
    assert "print copy, decode, prefill, admit for" in unprinted[1]


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_responses_ahead_are_in_memory_beside_the_update(
    topology, fake, config, monkeypatch, capsys
):
    fake(10**8)
    argv = ["--config", config, "--topology", topology, "--json", "--part", "train"]
    argv += ["--rollout.samples", 4, "--update.microbatch", 4]
    _, (in_turn,) = run(monkeypatch, capsys, *argv)
    _, (ahead,) = run(monkeypatch, capsys, *argv, "--rollout.ahead", 1)
    # What responses are sampled from stays while the parameters change.
    held = ahead["memory"]
    assert "sampled" not in in_turn["memory"]
    chips = 4 if topology == "v5e:2x2" else 1
    assert held["sampled"] == held["reference"]
    assert held["sampled"] == pytest.approx(2 * PARAMETERS / chips, rel=0.03)
    # The engine's cache, and where its mesh is another one its copy of the parameters.
    phases, before = ahead["settings"]["phases"], in_turn["settings"]["phases"]
    state = sum(size for name, size in held.items() if name in RESIDENT)
    assert phases["update"] - before["update"] == pytest.approx(
        held["sampled"] + phases["rollouts"] - state, abs=10**3
    )
    engine = phases["rollouts"] - state
    assert engine > 6 * ROW + (2 * PARAMETERS if chips > 1 else 0)


@pytest.mark.parametrize("form", [None, "int8"])
def test_an_adapter_is_all_that_is_trained(form, fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ["--config", config, "--topology", "v5e:1x1", "--json"]
    argv += ["--adapter.rank", "5", "--adapter.targets", "[q, v]"]
    argv += ["--adapter.quantize", form] if form else []
    code, (sample, train) = run(monkeypatch, capsys, *argv)
    assert code == 0
    count = 3 * 5 * (64 + 64 + 64 + 32)
    mesh = make_mesh("data=1,tensor=1", SIZES, jax.devices()[:1])
    own = device_bytes(abstract_params(SIZES, mesh, jnp.bfloat16, form))
    assert own == 2 * PARAMETERS or form
    assert sample["memory"]["weights"] == own + 2 * count
    held = train["memory"]
    assert held["frozen"] == own and held["parameters"] == 4 * count
    assert 8 * count <= held["optimizer"] <= 8 * count + 16
    assert held["reference"] == 0
    # The engine samples from the frozen parameters themselves, and a copy of A and B.
    phases = train["settings"]["phases"]
    assert "copy" not in phases
    rollouts = own + (4 + 8 + 2) * count + 6 * ROW + PREFIX
    assert rollouts < phases["rollouts"] < rollouts + 10**4
    update = own + (4 + 8) * count
    assert update < phases["update"] < update + 10**4


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_the_most_slots_are_found(slots, fake, config, monkeypatch, capsys):
    # Room for 20 rows, their state, which is some 200 bytes each, and the prompts' own
    # keys and values while they are copied; but not for 21.
    fake(2 * PARAMETERS + 20 * ROW + PREFIX + ROW // 4)
    argv = ("--config", config, "--topology", "v5e:1x1", "--json", "--part", "sample")
    code, (report,) = run(monkeypatch, capsys, *argv, "--slots", slots)
    assert report["max_slots"] == 20
    assert report["fits"] == (slots <= 20)
    assert code == (0 if slots <= 20 else 3)
    assert report["fitting"] == (None if slots <= 20 else "--slots 20 fits")


@pytest.mark.parametrize(
    ("more", "most"), [({}, 26), ({"prefill": 20 * ROW}, 6), ({"admit": 20 * ROW}, 6)]
)
@pytest.mark.parametrize("slots", [1, 12, 50])
def test_slots_have_room_for_a_prompt(
    more, most, slots, fake, config, monkeypatch, capsys
):
    """There is room for `decode` with 30 slots, but not for all that goes before it: the
    keys and values of eight prompts alone are four rows."""
    fake(2 * PARAMETERS + 30 * ROW + ROW // 4, **more)
    argv = ("--config", config, "--topology", "v5e:1x1", "--json", "--part", "sample")
    code, (report,) = run(monkeypatch, capsys, *argv, "--slots", slots)
    assert report["max_slots"] == most
    assert code == (0 if slots <= most else 3)
    assert report["fitting"] == (None if slots <= most else f"--slots {most} fits")
    if code:
        code, _ = run(monkeypatch, capsys, *argv, "--slots", most)
        assert code == 0


@pytest.mark.parametrize(
    ("slots", "prompt_len", "cache_len", "largest"),
    [
        (64, 300, 4096, (8, 512)),
        (64, 1000, 4096, (4, 1024)),
        (64, 1400, 1500, (4, 1024)),  # and not two of 1,536
        (64, 5000, 8192, (1, 8192)),
        (3, 300, 4096, (4, 512)),
        (1, 1400, 1500, (1, 1536)),
    ],
)
def test_the_largest_prefix_has_the_most_tokens(slots, prompt_len, cache_len, largest):
    sizes = dataclasses.replace(SIZES, head_dim=128)
    mesh = make_mesh("data=1,tensor=1", sizes, [Chip(0)])
    lengths = slots, cache_len, prompt_len
    sampler = Sampler(sizes, mesh, jnp.dtype("bfloat16"), *lengths)
    assert sampler.largest_prefix == largest


def test_what_fits_nowhere_says_so(fake, config, monkeypatch, capsys):
    fake(PARAMETERS)
    argv = ("--config", config, "--topology", "v5e:1x1", "--json")
    code, reports = run(monkeypatch, capsys, *argv)
    assert code == 3
    assert [report["max_slots"] for report in reports] == [0, None]
    assert all("another chip" in report["fitting"] for report in reports)
    assert all("does not fit" in report["warnings"][0] for report in reports)


@pytest.mark.parametrize(
    ("topology", "host"), [("v5e:2x2", None), ("v5e:2x4", None), ("v5e:4x4", "v5e:2x2")]
)
def test_sampling_uses_one_host(topology, host, fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ("--config", config, "--topology", topology, "--json", "--part", "sample")
    _, (report,) = run(monkeypatch, capsys, *argv)
    told = [text for text in report["warnings"] if "uses one host" in text]
    assert len(told) == (host is not None)
    assert not told or f"of {topology}, plan for {host}" in told[0]


@pytest.mark.parametrize(
    ("devices", "fitting"),
    [
        (4, "v5e:2x2 fits (6 slots)"),
        (8, "v5e:2x4 fits (8 slots)"),
        (16, "no larger slice of one host fits"),
    ],
)
def test_a_larger_slice_to_sample_on_is_one_host(
    devices, fitting, fake, config, monkeypatch, capsys
):
    fake(2 * PARAMETERS)
    set_everywhere(
        monkeypatch,
        "sampler_fits",
        lambda report, sampler, _=None: sampler.mesh.size >= devices,
    )
    argv = ("--config", config, "--topology", "v5e:1x1", "--json", "--part", "sample")
    code, (report,) = run(monkeypatch, capsys, *argv)
    assert code == 3
    assert report["fitting"].startswith(fitting)


@pytest.mark.parametrize("flag", ["--quantize", "--kv-dtype"])
def test_forms_of_sampling_are_not_for_training(config, monkeypatch, flag):
    argv = ["plan", "--config", str(config), "--topology", "v5e:1x1", flag, "int8"]
    monkeypatch.setattr(sys, "argv", [*argv, "--part", "train"])
    with pytest.raises(UserError, match="are for sampling"):
        main()


def test_the_table_for_people(fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ["plan", "--config", str(config), "--topology", "v5e:1x1", "--live", "9"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    out = capsys.readouterr().out
    assert "6 slots of 100" in out and "9 positions filled" in out
    assert "100 tokens" in out.partition("\ntrain")[2]
    assert all(len(line.rstrip()) == len(line) for line in out.splitlines())


def test_settings_can_be_changed_like_those_of_train(fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ("--config", config, "--topology", "v5e:1x1", "--json", "--part", "train")
    changes = ("--update.param_dtype", "bfloat16", "--loss.kl_coef", "0")
    _, (report,) = run(monkeypatch, capsys, *argv, *changes)
    assert report["memory"]["parameters"] == 2 * PARAMETERS
    assert report["memory"]["reference"] == 0
    assert "train refuses update.param_dtype=bfloat16" in report["warnings"]
    # There is no copy to sample from.
    rollouts = 6 * PARAMETERS + 6 * ROW + PREFIX
    phases = report["settings"]["phases"]
    assert rollouts < phases["rollouts"] < rollouts + 10**4
    assert set(phases) == {"update", "logprobs", "rollouts"}
    changes += ("--loss.old_logprobs", "sampler")
    _, (report,) = run(monkeypatch, capsys, *argv, *changes)
    assert set(report["settings"]["phases"]) == {"update", "rollouts"}


ON_DATA, SUITED = "data=4,tensor=1", "data=2,tensor=2"


@pytest.mark.parametrize(
    ("flags", "meshes"),
    [
        ([], [SUITED, ON_DATA]),
        (["--update.param_dtype", "bfloat16", "--mesh", ON_DATA], [ON_DATA, ON_DATA]),
        (["--update.param_dtype", "bfloat16", "--mesh", SUITED], [SUITED, SUITED]),
    ],
)
def test_meshes_of_sampling_and_of_training(
    flags, meshes, fake, config, monkeypatch, capsys
):
    fake(10**8)
    argv = ("--config", config, "--topology", "v5e:2x2", "--json")
    _, reports = run(monkeypatch, capsys, *argv, "--update.microbatch", 4, *flags)
    assert [report["mesh"] for report in reports] == meshes
    held, phases = reports[1]["memory"], reports[1]["settings"]["phases"]
    # Sampled from is a copy, unless it lies as sampling has it and has the dtype.
    shared = reports[1]["memory"]["parameters"] if meshes[1] == SUITED else 0
    state = held["parameters"] + held["optimizer"] + held["reference"]
    rollouts = state + 2 * PARAMETERS - shared + 6 * ROW
    assert rollouts < phases["rollouts"] < rollouts + 10**4


def test_the_configuration_has_the_mesh_of_updates(fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ("--config", config, "--topology", "v5e:2x2", "--json")
    settings = config.read_text() + "mesh: "
    for mesh in (ON_DATA, SUITED):
        config.write_text(settings + mesh)
        _, reports = run(monkeypatch, capsys, *argv, "--update.microbatch", 4)
        assert [report["mesh"] for report in reports] == [SUITED, mesh]


@pytest.mark.parametrize(
    ("topology", "samples", "microbatch", "fitting"),
    [("v5e:1x1", 9, 18, 3), ("v5e:1x1", 4, 8, 4), ("v5e:2x2", 8, 16, 4)],
)
def test_a_smaller_microbatch_is_found(
    topology, samples, microbatch, fitting, fake, config, monkeypatch, capsys
):
    """Of 18 rows 9, 3 and 1 come in question: others do not divide a mini-batch."""
    argv = ["--config", config, "--topology", topology, "--json", "--part", "train"]
    argv += ["--rollout.samples", samples, "--update.microbatch"]
    fake(10**8)
    _, (report,) = run(monkeypatch, capsys, *argv, microbatch)
    fake(report["hbm_bytes_per_chip"] + int(4.5 * 10**6), per_row=10**6)
    code, (report,) = run(monkeypatch, capsys, *argv, microbatch)
    assert code == 3
    assert report["fitting"] == f"--update.microbatch {fitting} fits"
    code, (report,) = run(monkeypatch, capsys, *argv, fitting)
    assert code == 0 and report["fits"]


@pytest.mark.parametrize("flags", [[], ["--mesh", "data=1,tensor=1"]])
def test_a_larger_slice_is_estimated(flags, fake, config, monkeypatch, capsys):
    argv = ["--config", config, "--topology", "v5e:1x1", "--json", "--part", "train"]
    argv += ["--update.microbatch", 4, *flags]
    state = (4 + 8 + 2) * PARAMETERS
    fake(state // 2)
    code, (report,) = run(monkeypatch, capsys, *argv)
    assert code == 3 and "nothing was compiled" in report["warnings"][0]
    mesh = " with --mesh data=4,tensor=1" if flags else ""
    assert report["fitting"].startswith(f"v5e:2x2{mesh} would fit (")
    # The cache, with which each host samples, is what no larger one has room for.
    code, (report,) = run(monkeypatch, capsys, *argv, "--rollout.slots", 1000)
    assert "no larger slice" in report["fitting"]


def test_fewer_slots_are_estimated(fake, config, monkeypatch, capsys):
    argv = ["--config", config, "--topology", "v5e:1x1", "--json", "--part", "train"]
    state = (4 + 8 + 2 + 2) * PARAMETERS
    fake(state + 20 * ROW + PREFIX + ROW // 4)
    code, (report,) = run(monkeypatch, capsys, *argv, "--rollout.slots", 50)
    assert code == 3
    assert report["fitting"] == "--rollout.slots 20 would fit by an estimate"
    code, _ = run(monkeypatch, capsys, *argv, "--rollout.slots", 20)
    assert code == 0


@pytest.mark.parametrize(
    ("topology", "mesh", "is_copied"),
    [
        ("v5e:2x2", SUITED, False),
        ("v5e:2x2", ON_DATA, True),
        ("v5e:4x4", "data=8,tensor=2", True),
    ],
)
def test_the_copy_to_sample_from(
    topology, mesh, is_copied, fake, config, monkeypatch, capsys
):
    argv = ["--config", config, "--topology", topology, "--json", "--part", "train"]
    argv += ["--mesh", mesh, "--update.param_dtype", "bfloat16"]
    argv += ["--rollout.samples", 16, "--update.microbatch", 16, "--rollout.slots", 4]
    fake(10**8, copy=10**6)
    _, (report,) = run(monkeypatch, capsys, *argv)
    phases, state = report["settings"]["phases"], sum(report["memory"].values())
    state -= report["memory"]["other"]
    assert ("copy" in phases) == is_copied
    if is_copied:
        # Both are whole on each device for this compiler.
        copied = (2 + 2) * PARAMETERS + 10**6
        assert phases["copy"] == state - report["memory"]["parameters"] + copied


@pytest.mark.parametrize("form", [[], ["--quantize", "int8"]])
def test_a_mesh_that_does_not_divide_is_a_warning(
    form, fake, config, tmp_path, monkeypatch, capsys
):
    """Of training on four devices, but not of sampling on two by two."""
    argv = ["--config", config, "--topology", "v5e:2x2", "--json"]
    argv += ["--update.microbatch", 4]
    fake(10**9)
    _, reports = run(monkeypatch, capsys, *argv)
    texts = [text for report in reports for text in report["warnings"]]
    assert len(reports) == 2 and "does not divide" not in " ".join(texts)
    sizes = dataclasses.replace(SIZES, hidden_size=66).to_hf("bfloat16")
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    part, size = ("sample", 1) if form else ("train", 4)
    for mesh in (ON_DATA, SUITED):
        flags = ["--mesh", mesh, "--part", part, *form]
        _, (report,) = run(monkeypatch, capsys, *argv, *flags)
        told = [text for text in report["warnings"] if "does not divide" in text]
        excess = size * 3 * (2 * 66 * (64 + 32) + 3 * 66 * 96) * 3 / 4 / 2**20
        assert told == [
            "mesh data=4,tensor=1 does not divide hidden_size=66, so every device keeps 7 "
            f"arrays of parameters whole in that dimension, {excess:.3g} MiB more than its "
            "share; on 4 devices, data=2,tensor=2 divides all"
        ] * (mesh == ON_DATA)
    # An odd size is divided by neither mesh of training, that of its rollouts included.
    sizes = dataclasses.replace(SIZES, hidden_size=65).to_hf("bfloat16")
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    _, (report,) = run(monkeypatch, capsys, *argv, "--part", "train")
    told = [text for text in report["warnings"] if "does not divide" in text]
    assert [text.split(" does")[0] for text in told] == [
        "mesh data=4,tensor=1",
        "mesh data=2,tensor=2",
    ]


def test_what_the_copy_takes_no_smaller_microbatch_saves(
    fake, config, monkeypatch, capsys
):
    argv = ["--config", config, "--topology", "v5e:1x1", "--json", "--part", "train"]
    argv += ["--update.microbatch", 4]
    fake(14 * 10**6, copy=12 * 10**6)
    code, (report,) = run(monkeypatch, capsys, *argv)
    assert code == 3
    most, phases = report["hbm_bytes_per_chip"], report["settings"]["phases"]
    assert most == phases["copy"] > report["hbm_limit_bytes"] > phases["rollouts"]
    # A quarter of the state is less, but what the copy takes is as much there.
    needed = 14 * PARAMETERS // 4 + 12 * 10**6 + 2 * PARAMETERS
    assert needed < 14 * 10**6
    assert report["fitting"].startswith("v5e:2x2 would fit (")
    fake(needed - 10**4, copy=12 * 10**6)
    code, (report,) = run(monkeypatch, capsys, *argv)
    assert "v5e:2x2 " not in report["fitting"]


def test_a_host_samples_on_its_own_slice(monkeypatch):
    devices = [Chip(i, i // 4) for i in range(16)]
    set_everywhere(monkeypatch, "describe", lambda name: name)
    slice_ = Slice("v5e:4x4", CHIPS["v5e"], devices)
    assert host_slice(slice_) == "v5e:2x2"
    # A chip of tpu7x is two devices.
    devices = [Chip(i, i // 8) for i in range(16)]
    slice_ = Slice("tpu7x:2x2x2", CHIPS["tpu7x"], devices)
    assert host_slice(slice_) == "tpu7x:2x2x1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2,tensor=1"], "v5e:1x1 has 1 devices on 1 hosts of 1"),
        (["--slots", "none"], "not a whole number"),
        (["--slots", "0"], "1 or more"),
        (["--part", "serve"], "invalid choice"),
        (["--cache-len", "60"], "cache_len=60 is too short .* 61 is enough"),
        (["--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_mistakes(flags, message, fake, config, monkeypatch, capsys):
    fake(10**8)
    argv = ["plan", "--config", str(config), "--topology", "v5e:1x1", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        main()


def test_texts_of_two_plans_are_not_mixed(config, tmp_path, monkeypatch, refusal):
    """--dump-hlo has one writer at a time, from before the first program is compiled."""
    set_everywhere(monkeypatch, "describe", lambda topology: None)
    argv = ["plan", "--config", str(config), "--topology", "v5e:2x2"]
    argv += ["--dump-hlo", str(tmp_path / "hlo")]
    (tmp_path / "hlo").mkdir()
    with owning(tmp_path / "hlo", inside=True):
        error = refusal(main, argv)
    assert f"another run is writing {tmp_path / 'hlo'}" in error


# With the TPU compiler.


@pytest.mark.libtpu
@pytest.mark.parametrize(
    "architecture", ["qwen2", pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_a_tiny_model_is_compiled_for_a_tpu(config, tmp_path, architecture):
    sizes = dataclasses.replace(SIZES, architecture=architecture).to_hf("bfloat16")
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    argv = ["--topology", "v5e:2x2", "--part", "sample", "--json", "--slots", "1020"]
    argv += ["--dump-hlo", str(tmp_path / "hlo"), "--live", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "e1jax.plan", "--config", str(config), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mesh"] == "data=2,tensor=2"
    assert report["fits"] and report["max_slots"] >= 1020
    assert report["memory"]["cache"] == 1020 * ROW // 4
    assert report["bytes_per_step"] >= 0.9 * report["floor_bytes"] > 0
    assert 0 < report["roofline_share"] < 1
    assert report["collective_bytes"]["all-reduce"] > 0
    text = (tmp_path / "hlo" / "sample_decode.hlo.txt").read_text()
    assert "is_scheduled=true" in text


@pytest.mark.libtpu
@pytest.mark.slow
def test_every_topology_can_be_described():
    code = (
        "from e1jax.plan import slices\n"
        "for name in slices.TOPOLOGIES:\n"
        "    slice_ = slices.describe(name)\n"
        "    print(name, len(slice_.devices), slice_.hosts)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    for name in TOPOLOGIES:
        chip, _, shape = name.partition(":")
        chips = math.prod(map(int, shape.split("x")))
        hosts = 1 if shape == "2x4" else -(-chips // 4)
        assert found[name] == [str(chips * CHIPS[chip].devices), str(hosts)]
