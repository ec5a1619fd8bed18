"""Prompts that are prefilled several at a time: the same values and tokens as one by one."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Chip, run_on_devices, set_everywhere
from test_engine import (
    CONFIG,
    compiled_programs,
    generated,
    make,
    params,
    tokenizer,
    tokens_of,
)
from test_live import ROUND, cached, completions, run

from e1jax.config.sampling import SamplingParams
from e1jax.nn.model import abstract_params, init_params
from e1jax.sampling import decode
from e1jax.sampling.engine import Engine
from e1jax.sampling.prefill import fullest_group
from e1jax.sharding.mesh import make_mesh
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer

__all__ = ["make", "params", "tokenizer"]  # fixtures

# Tokens of prompts, of which all but the last are prefilled: ten in the bucket of 16, one
# of them with nothing to prefill, one in that of 32, two in that of 64.
LENGTHS = (1, 9, 40, 14, 3, 17, 33, 16, 15, 7, 9, 38, 2)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 250, length).tolist() for length in lengths]


@pytest.fixture
def shapes(monkeypatch):
    """Rows and positions of each prefill, as they happen."""
    seen = []

    def listed(config, mesh, params, tokens, length, kv_dtype):
        seen.append(tokens.shape)
        return decode.prefill(config, mesh, params, tokens, length, kv_dtype)

    monkeypatch.setattr("e1jax.sampling.prefill.prefill", listed)
    return seen


@pytest.mark.parametrize(
    ("bucket", "lengths", "kv_dtype"),
    [
        (16, (16, 3, 0, 9), jnp.uint16),
        (256, (131, 256, 200), jnp.int8),
        (768, (1, 700, 257), jnp.float32),
    ],
)
def test_keys_and_values_are_those_of_each_prompt_alone(
    params, bucket, lengths, kv_dtype
):
    """In one pass, and in several pieces of 256 tokens."""
    mesh = make_mesh(None, CONFIG)
    tokens = np.zeros((4, bucket), np.int32)
    for row, prompt in enumerate(prompts_of(lengths)):
        tokens[row, : len(prompt)] = prompt
    together = decode.prefill(CONFIG, mesh, params, tokens, max(lengths), kv_dtype)
    assert together.k.shape[1] == 4
    for row, length in enumerate(lengths):
        alone = decode.prefill(
            CONFIG, mesh, params, tokens[row : row + 1], length, kv_dtype
        )
        for ours, theirs in zip(together[:2], alone[:2], strict=True):
            ours, theirs = ours[:, row, :, :length], theirs[:, 0, :, :length]
            if kv_dtype == jnp.float32:
                np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
            else:  # rounding may fall to the other side
                gap = np.abs(np.asarray(ours, np.int64) - np.asarray(theirs))
                assert gap.max(initial=0) <= 1 and (gap > 0).sum() <= 0.01 * gap.size
        for ours, theirs in zip(together[2:], alone[2:], strict=True):
            if ours is not None:
                ours = ours[:, row].reshape(*ours.shape[:1], 2, -1)[..., :length]
                theirs = theirs[:, 0].reshape(*theirs.shape[:1], 2, -1)[..., :length]
                np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize(("slots", "kv_dtype"), [(5, None), (32, None), (32, "int8")])
def test_tokens_are_those_of_each_prompt_alone(make, shapes, slots, kv_dtype):
    prompts = prompts_of(LENGTHS)
    requests = [
        dataclasses.replace(ROUND, n=1 + i % 3, seed=i) for i in range(len(prompts))
    ]

    def fresh(slots):
        engine = make(slots=slots)
        engine.kv_dtype = kv_dtype
        return engine

    want = [
        tokens_of(fresh(3).generate([prompt], request))[0]
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    assert {rows for rows, _ in shapes} == {1}
    shapes.clear()
    engine = fresh(slots)
    assert tokens_of(engine.generate(prompts, requests)) == want
    assert engine.stats.prefills == len(prompts)
    if slots == 32:  # which are enough for all samples
        assert shapes == [(8, 16), (2, 64), (1, 32), (2, 16)]
    assert max(rows for rows, _ in shapes) > 1


def test_greedy_tokens_are_those_of_transformers(tiny_hf, shapes):
    prompts = prompts_of((5, 30, 12, 16, 21, 17, 11, 25, 9), seed=1)
    path = tiny_hf(num_layers=3)
    engine = Engine.from_pretrained(str(path), cache_len=90, slots=9)
    greedy = SamplingParams(thinking_budget=None, solution_budget=None, temperature=0)
    got = tokens_of(engine.generate(prompts, greedy))
    assert sorted(shapes) == [(4, 32), (8, 16)]  # with one and two rows of padding
    for prompt, [tokens] in zip(prompts, got, strict=True):
        want = generated(path, prompt)[: len(tokens)]  # theirs goes on behind EOS
        assert tokens[: len(want)] == want and len(want) > 5


def test_a_group_takes_no_more_slots_than_are_free(make, shapes):
    engine = make(slots=5)
    prompts = prompts_of([9] * 6, seed=2)
    requests = [dataclasses.replace(ROUND, seed=i, n=2) for i in range(6)]
    for prompt, request in zip(prompts, requests, strict=True):
        engine.add(prompt, request)
    first = engine.step(seconds=0)
    assert engine.running == 5 and engine.waiting == 7
    assert shapes == [(2, 16), (1, 16)]  # of the third request one sample has a slot
    done = completions([first, *run(engine)])
    want = tokens_of(make(slots=1).generate(prompts, requests))
    got = [done[key][0].token_ids for key in sorted(done)]
    assert got == [tokens for samples in want for tokens in samples]


def test_a_group_goes_on_without_a_request_that_is_aborted(make, shapes):
    engine = make(slots=8)
    prompts = prompts_of([5, 12, 9, 16, 11, 3, 7], seed=3)
    ids = [engine.add(prompt, ROUND) for prompt in prompts]
    engine.abort(ids[1])  # before it is prefilled
    first = engine.step(seconds=0)
    assert shapes == [(8, 16)] and engine.running == 6  # two rows are padding
    engine.abort(ids[4])
    done = completions([first, *run(engine)])
    assert engine.running == 0 and not done.get((ids[4], 0))
    want = tokens_of(make(slots=1).generate(prompts, ROUND))
    for index in (0, 2, 3, 5, 6):
        assert [done[ids[index], 0][0].token_ids] == want[index]


def test_live_prompts_take_their_beginning_from_a_slot_of_the_group(make, shapes):
    """One that begins as another of the queue waits until that is in a slot; one whose
    beginning is in a slot already is not prefilled again."""
    engine = make(slots=8, cache_len=690)
    held, new = prompts_of([60, 60], seed=4)
    engine.add(held, ROUND)
    run(engine)
    shapes.clear()
    prompts = [new, [*new[:40], 1, 2], *prompts_of([50, 45]), [*held[:55], 9]]
    ids = [engine.add(prompt, ROUND) for prompt in prompts]
    steps = run(engine)
    # The second one's beginning of 32 tokens and the last one's of 48 are not computed.
    assert shapes == [(4, 64)]
    assert [cached(steps, id) for id in ids] == [{0}, {32}, {0}, {0}, {48}]
    done = completions(steps)
    got = [[done[id, 0][0].token_ids] for id in ids]
    assert got == tokens_of(make(slots=1, cache_len=690).generate(prompts, ROUND))
    assert engine.stats.prefills == 1 + len(prompts)


def test_a_group_between_steps_of_others_is_no_longer_than_a_piece(make, shapes):
    """About 128 tokens on a CPU; the rest comes after some steps of the others."""
    engine = make(slots=16)
    engine.add("first", dataclasses.replace(ROUND, solution_budget=100))
    engine.step(seconds=0)
    shapes.clear()
    prompts = prompts_of([31, 30, 33, 32, 29, 31], seed=5)
    ids = [engine.add(prompt, ROUND) for prompt in prompts]
    events = engine.step(seconds=0)
    # 122 tokens as a group, a further prompt as the last piece.
    assert shapes == [(4, 32)] and engine.running == 6
    assert {event.request_id for event in events} >= {*ids[:5]}
    assert ids[5] not in {event.request_id for event in events}
    done = completions([events, *run(engine)])
    assert shapes[1:] == [(1, 32)]
    got = [[done[id, 0][0].token_ids] for id in ids]
    assert got == tokens_of(make(slots=1).generate(prompts, ROUND))


def test_of_the_last_layer_only_keys_and_values_are_computed(params):
    def compiled(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        layers = jax.tree.map(lambda x: x[:num_layers], params["layers"])
        args = params | {"layers": layers}, np.zeros((1, 16), np.int32), 9
        lowered = decode.prefill.lower(config, make_mesh(None, config), *args)
        return lowered.compile().as_text() or ""

    of_mlp = f"f32[16,{CONFIG.intermediate_size}]"
    assert of_mlp in compiled(2) and of_mlp not in compiled(1)


def test_programs_of_groups_are_few(make):
    """For a bucket four programs that prefill, of 1, 2, 4 and 8 rows, and four that admit."""
    engine = make(cache_len=211, slots=13)
    seen = compiled_programs()
    short = SamplingParams(thinking_budget=1, solution_budget=1)
    for count in [*range(1, 14), 40]:
        engine.generate(prompts_of([7] * count), short)
    assert len(seen) <= 2 * 4 + 2
    count = len(seen)
    engine.generate(prompts_of([1 + i % 16 for i in range(37)]), short)
    assert len(seen) == count


@pytest.mark.parametrize(
    ("platform", "dtype", "wanted"),
    [
        ("cpu", "float32", {16: 8, 64: 8, 128: 4, 384: 1, 512: 1, 32768: 1}),
        ("tpu", "float32", {16: 8, 128: 4, 512: 1}),
        ("tpu", "bfloat16", {16: 8, 512: 8, 1024: 4, 1536: 2, 4096: 1, 32768: 1}),
        ("gpu", "bfloat16", {16: 8, 512: 8, 2048: 2, 8192: 1}),
    ],
)
def test_the_tokens_of_a_group_are_bounded(platform, dtype, wanted):
    config = dataclasses.replace(CONFIG, head_dim=128)
    mesh = make_mesh("data=1,tensor=1", config, [Chip(0, platform=platform)])
    got = {b: decode.most_prompts(config, mesh, jnp.dtype(dtype), b) for b in wanted}
    assert got == wanted


def test_at_most_a_quarter_of_a_group_is_padding():
    assert [fullest_group(count) for count in range(1, 9)] == [1, 2, 3, 4, 4, 6, 7, 8]


def on_meshes(tmp) -> None:
    """Rows of a group over `data` where it divides them, positions of the slots where they
    are few; blocks of 16, so that several hold a prompt. Run on 8 devices."""
    set_everywhere(pytest.MonkeyPatch(), "BLOCK_LEN", 16)
    set_everywhere(pytest.MonkeyPatch(), "LANES", 16)
    write_byte_tokenizer(tmp)
    tokenizer = Tokenizer.from_dir(tmp)
    one = make_mesh("data=1,tensor=1", CONFIG, jax.devices()[:1])
    made = init_params(CONFIG, one, jnp.float32, 0)
    made = jax.tree.map(lambda p: p * 5 if p.ndim > 1 else p, made)
    prompts = prompts_of([5, 12, 9, 16, 11, 3, 7, 2, 38, 34, 40], seed=6)
    request = dataclasses.replace(ROUND, seed=1)
    want = None
    for text, devices, slots in [
        ("data=1,tensor=1", 1, 12),
        ("data=8,tensor=1", 8, 16),
        ("data=4,tensor=2", 8, 3),
    ]:
        mesh = make_mesh(text, CONFIG, jax.devices()[:devices])
        shapes = abstract_params(CONFIG, mesh, jnp.float32)
        place = jax.tree.map(lambda shape: shape.sharding, shapes)
        engine = Engine(
            CONFIG,
            jax.device_put(made, place),
            tokenizer,
            mesh,
            cache_len=112,
            slots=slots,
            kv_dtype="int8",
        )
        got = tokens_of(engine.generate(prompts, request))
        want = want or got
        assert got == want, text


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one(tmp_path):
    code = (
        "import pathlib, test_prefill as t\n"
        f"t.on_meshes(pathlib.Path({os.fspath(tmp_path)!r}))"
    )
    run_on_devices(8, code)
