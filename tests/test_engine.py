"""The engine with a random Qwen2: what is sampled depends on the request and on nothing
else."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import AS_USERS_HAVE_IT, edit_json, set_everywhere, several_devices
from transformers import AutoModelForCausalLM

from e1jax import convert
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.nn.cache import KVCache
from e1jax.nn.model import forward, init_params, unembed
from e1jax.sampling.budget import TokenIds
from e1jax.sampling.decode import decode, empty_rows
from e1jax.sampling.engine import Engine
from e1jax.sharding.mesh import make_mesh
from e1jax.tokenizer import THINK_END, Tokenizer, write_byte_tokenizer

CONFIG = ModelConfig(
    vocab_size=272,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=700,
    rope_theta=1e4,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path, ["\\boxed{", "wait"])
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="module")
def params():
    """Random weights, large enough that the logits are far from flat."""
    made = init_params(CONFIG, make_mesh(None, CONFIG), jnp.float32, 0)
    return jax.tree.map(lambda p: p * 5 if p.ndim > 1 else p, made)


@pytest.fixture(scope="module")
def make(params, tokenizer):
    def make(cache_len=300, slots=3, params=params, tokenizer=tokenizer):
        return Engine(
            CONFIG,
            params,
            tokenizer,
            make_mesh(None, CONFIG),
            cache_len=cache_len,
            slots=slots,
        )

    return make


def compiled_programs():
    """A list that grows with every program that XLA compiles from now on."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: seen.append(name) if "backend_compile" in name else None
    )
    return seen


def mixed_requests():
    prompts = ["47a+5b*3?", "hello", [97], "x" * 150, "47a+5b*3?", [5, 6, 7] * 40]
    params = [
        SamplingParams(
            thinking_budget=30, solution_budget=20, n=2, temperature=1.0, seed=3
        ),
        SamplingParams(
            thinking_budget=0,
            solution_budget=40,
            n=1,
            temperature=0.7,
            top_k=5,
            top_p=1.0,
        ),
        SamplingParams(
            thinking_budget=7,
            solution_budget=None,
            n=1,
            temperature=1.3,
            seed=2**40 + 1,
        ),
        SamplingParams(
            thinking_budget=50, solution_budget=3, n=3, end_of_thinking_text="enough."
        ),
        SamplingParams(
            thinking_budget=30, solution_budget=20, n=4, temperature=1.0, seed=3
        ),
        SamplingParams(thinking_budget=12, solution_budget=12, n=1, temperature=0.0),
    ]
    return prompts, params


@pytest.fixture(scope="module")
def mixed_results(make):
    return make(slots=3).generate(*mixed_requests())


def tokens_of(results):
    return [[c.token_ids for c in samples] for samples in results]


def flat(results):
    return [completion for samples in results for completion in samples]


@pytest.mark.parametrize("slots", [1, 2, 5, 16])
def test_same_tokens_whatever_the_slots(make, mixed_results, slots):
    results = make(slots=slots).generate(*mixed_requests())
    assert tokens_of(results) == tokens_of(mixed_results)
    for got, want in zip(flat(results), flat(mixed_results), strict=True):
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        assert (got.text, got.thinking_end, got.forced) == (
            want.text,
            want.thinking_end,
            want.forced,
        )


def test_same_tokens_whatever_the_order_and_the_batch_mates(make, mixed_results):
    prompts, params = mixed_requests()
    reverse = make().generate(prompts[::-1], params[::-1])
    assert tokens_of(reverse)[::-1] == tokens_of(mixed_results)
    for i in (0, 3):
        alone = make().generate([prompts[i]], params[i])
        assert tokens_of(alone)[0] == tokens_of(mixed_results)[i]


def test_equal_requests_give_equal_samples_and_samples_differ(mixed_results):
    first, again = tokens_of(mixed_results)[0], tokens_of(mixed_results)[4]
    assert first == again[:2]
    assert len({tuple(ids) for ids in again}) == 4


def test_logprobs_and_greedy_tokens_are_those_of_one_full_forward(
    params, mixed_results
):
    """Independent of the cache, the prefill buckets and the decode loop; forced tokens
    included."""
    _, all_params = mixed_requests()
    for request, samples in zip(all_params, mixed_results, strict=True):
        for c in samples:
            tokens = jnp.array([c.prompt_ids + c.token_ids])
            positions = jnp.arange(tokens.shape[1])[None]
            hidden, _ = forward(CONFIG, params, tokens, positions)
            logits = unembed(CONFIG, params, hidden)[0, len(c.prompt_ids) - 1 : -1]
            scaled = logits / (request.temperature or 1.0)
            want = np.asarray(jax.nn.log_softmax(scaled))[
                np.arange(len(c.token_ids)), c.token_ids
            ]
            np.testing.assert_allclose(c.logprobs, want, atol=2e-4)
            if request.temperature == 0:
                free = ~np.array(c.forced)
                assert (
                    np.asarray(logits.argmax(-1))[free] == np.array(c.token_ids)[free]
                ).all()
                assert free.any()


def test_completion_texts(mixed_results, tokenizer):
    for c in flat(mixed_results):
        assert c.text == c.thinking + THINK_END + c.solution
        assert c.thinking_tokens + c.solution_tokens + sum(c.forced) == len(c.token_ids)
    cut = mixed_results[3][0]
    assert cut.thinking.endswith("enough.") and sum(cut.forced) == len("enough.") + 1


def test_nothing_recompiles_when_settings_change(make):
    engine = make(cache_len=257, slots=2)
    prompt = ["some prompt"]
    seen = compiled_programs()
    engine.generate(prompt, SamplingParams(thinking_budget=5, solution_budget=5))
    assert seen  # the counter counts
    seen.clear()
    for params in [
        SamplingParams(thinking_budget=0, solution_budget=11, temperature=0.0, seed=9),
        SamplingParams(thinking_budget=None, solution_budget=3, top_k=3, n=5),
        SamplingParams(thinking_budget=None, solution_budget=None, top_p=0.3, top_k=1),
        SamplingParams(
            thinking_budget=9,
            solution_budget=None,
            top_p=1.0,
            end_of_thinking_text="stop",
        ),
    ]:
        engine.generate(prompt, params)
    assert seen == []


def test_prefill_programs_are_few(make):
    engine = make(cache_len=300, slots=1)
    seen = compiled_programs()
    for length in [1, 2, 15, 16, 17, 18, 40, 64, 65, 100, 129, 130, 200, 257, 258, 280]:
        engine.generate(
            [[97] * length], SamplingParams(thinking_budget=2, solution_budget=2)
        )
    # Buckets of 16, 32, 64, 128, 256 and the whole cache; prefill, admit, and one
    # decode.
    assert len(seen) <= 2 * 6 + 2
    count = len(seen)
    for length in range(1, 280, 13):
        engine.generate(
            [[98] * length], SamplingParams(thinking_budget=1, solution_budget=1)
        )
    assert len(seen) == count


def test_a_prompt_of_n_samples_is_prefilled_once(make):
    engine = make(slots=2)
    engine.generate(
        ["a", "bc"], SamplingParams(thinking_budget=3, solution_budget=3, n=7)
    )
    assert engine.stats.prefills == 2


def test_slots_are_refilled_while_others_go_on(make):
    engine = make(slots=2)
    short = SamplingParams(thinking_budget=0, solution_budget=4, temperature=0.0)
    long = SamplingParams(thinking_budget=200, solution_budget=4)
    results = engine.generate(["a"] + ["b"] * 20, [long] + [short] * 20)
    longest = max(len(samples[0].token_ids) for samples in results)
    total = sum(len(samples[0].token_ids) for samples in results)
    # One after the other would take `total` steps; the long one runs beside all the
    # others.
    assert engine.stats.decode_steps <= max(longest, total - longest) + 5


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_a_response_ends_where_transformers_ends_it(tiny_hf, tmp_path, where, several):
    """At any id that the model's files name, its text without that one."""
    prompt = list(b"47a+5")
    source = shutil.copytree(tiny_hf(), tmp_path / "hf")
    endless = generated(source, prompt)
    assert len(endless) == 40 and 256 not in endless
    end = endless[20]
    (source / "generation_config.json").unlink()
    if where != "config.json":
        (source / where).write_text("{}")
    edit_json(source / where, eos_token_id=[256, 3, end] if several else end)
    want = generated(source, prompt)
    assert want[-1] == end and len(want) == endless.index(end) + 1 < 40
    convert.from_hf(str(source), tmp_path / "e1")
    convert.to_hf(str(tmp_path / "e1"), tmp_path / "back")
    assert generated(tmp_path / "back", prompt) == want
    greedy = SamplingParams(thinking_budget=None, solution_budget=None, temperature=0)
    for name in ("hf", "e1", "back"):
        engine = Engine.from_pretrained(str(tmp_path / name), cache_len=100, slots=1)
        [[completion]] = engine.generate([prompt], greedy)
        assert completion.token_ids == want
        assert completion.finish_reason == "stop"
        assert completion.text == engine.tokenizer.decode(want[:-1])
    # While thinking under a budget, it is replaced as the tokenizer's own EOS is.
    budgets = dataclasses.replace(greedy, thinking_budget=40, solution_budget=5)
    [[completion]] = engine.generate([prompt], budgets)
    assert completion.thinking_end == "eos"
    assert completion.token_ids[: len(want)] == [*want[:-1], 261]


def generated(path, prompt: list[int]) -> list[int]:
    """Up to 40 most probable tokens, by transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        tokens = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0
        )
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def endless(tokenizer):
    """No token ends a response: each is as long as its budgets."""
    return dataclasses.replace(tokenizer, eos_id=CONFIG.vocab_size)


@pytest.mark.parametrize(
    "can_think, order", [(True, [4, 5, 6, 1, 2, 0, 3]), (False, [5, 6, 1, 4, 2, 0, 3])]
)
def test_the_longest_budgets_start_first(make, endless, can_think, order):
    """And equal ones in the order of the call, as they are handed out."""
    think_end = endless.think_end_id if can_think else None
    tokenizer = dataclasses.replace(endless, think_end_id=think_end)
    pairs = [(3, 5), (0, 40), (20, 9), (3, 5), (None, 20), (1, None), (0, 41)]
    params = [
        SamplingParams(thinking_budget=t if can_think else None, solution_budget=s)
        for t, s in pairs
    ]
    prompts = [[10 + index, 7] for index in range(len(pairs))]
    engine = make(cache_len=90, slots=1, tokenizer=tokenizer)
    stream = list(engine.stream(prompts, params))
    assert [c.prompt_index for c in stream] == order
    assert [c.prompt_ids for c in stream] == [prompts[i] for i in order]


def test_few_slot_steps_are_wasted_on_mixed_budgets(make, endless):
    """The longest request comes last, and would run alone were it to start last."""
    budgets = np.geomspace(2, 120, 24).astype(int).tolist()
    params = [SamplingParams(thinking_budget=0, solution_budget=b) for b in budgets]
    engine = make(slots=3, tokenizer=endless)
    results = engine.generate([[7, 8]] * len(params), params)
    assert [len(c.token_ids) for [c] in results] == [1 + b for b in budgets]
    assert engine.stats.tokens >= 0.98 * engine.stats.slot_steps


def lowered_decode(engine):
    rows = empty_rows(engine.slots, 8)
    ids = TokenIds(256, 261)
    args = (
        CONFIG,
        engine.mesh,
        engine.params,
        ids,
        engine._new_cache(jnp.float32),
        rows,
        1,
        8,
    )
    return decode.lower(*args).compile(AS_USERS_HAVE_IT)


def test_cache_is_updated_in_place(make):
    """No temporary of the size of the cache, whose buffers are reused for the result."""
    engine = make(cache_len=8192, slots=4)
    cache = engine._new_cache(jnp.float32)
    size = cache.k.nbytes + cache.v.nbytes
    memory = lowered_decode(engine).memory_analysis()
    assert memory.alias_size_in_bytes >= size
    # Room for one block of keys and the logits, nothing that grows with cache_len.
    small = lowered_decode(make(cache_len=1024, slots=4)).memory_analysis()
    assert memory.temp_size_in_bytes <= small.temp_size_in_bytes + 4096
    assert memory.temp_size_in_bytes < size / 10


@pytest.mark.cpu
@pytest.mark.parametrize("slots", [1, 8, 32])
def test_a_decode_step_on_a_cpu_copies_no_cache(make, slots):
    """Else its time would go with the capacity, as it does where several rows are
    written by one scatter."""
    compiled = lowered_decode(make(cache_len=2048, slots=slots))
    shape = re.escape(
        f"[{CONFIG.num_layers},{slots},{CONFIG.num_kv_heads},2048,{CONFIG.head_dim}]"
    )
    made = re.findall(rf"= \w+{shape}\S* ([\w-]+)\(", compiled.as_text())
    assert "dynamic-update-slice" in made or "fusion" in made
    assert not {"copy", "scatter"} & set(made), made


def test_attention_does_not_touch_blocks_beyond_the_live_ones(make, mixed_results):
    """Stale keys of NaN beyond the longest row would spoil every sum they took part in."""
    engine = make(cache_len=690, slots=3)
    cache = engine._new_cache(jnp.float32)
    spoil = lambda x: x.at[..., 384:, :].set(jnp.nan)  # noqa: E731
    engine._cache = KVCache(spoil(cache.k), spoil(cache.v))
    prompts, params = mixed_requests()
    del prompts[2], params[2]  # its solution runs to the end of the cache
    want = tokens_of(mixed_results)
    del want[2]
    assert tokens_of(engine.generate(prompts, params)) == want


def test_stream_yields_as_completions_finish_and_can_be_abandoned(make, mixed_results):
    engine = make()
    prompts, params = mixed_requests()
    stream = engine.stream(prompts, params)
    first = next(stream)
    assert first.token_ids == mixed_results[first.prompt_index][first.sample].token_ids
    stream.close()
    assert tokens_of(engine.generate(prompts, params)) == tokens_of(mixed_results)


def test_skip_leaves_samples_out_and_changes_no_other(make, mixed_results):
    done = {(0, 1), (4, 0), (1, 0)}
    stream = make().stream(*mixed_requests(), skip=lambda i, j: (i, j) in done)
    got = {(c.prompt_index, c.sample): c.token_ids for c in stream}
    want = {
        (i, c.sample): c.token_ids
        for i, samples in enumerate(mixed_results)
        for c in samples
    }
    assert got == {key: ids for key, ids in want.items() if key not in done}


def test_prompt_forms(make, tokenizer):
    engine = make()
    text = engine.encode("hi")
    assert text == engine.encode([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(text).count("<｜begin▁of▁sentence｜>") == 1
    assert engine.encode([0, 271]) == engine.encode(np.array([0, 271])) == [0, 271]
    for bad, words in [
        ([], "empty"),
        ([272], "272 is not a token id"),
        ([-1], "-1 is not a token id"),
        ([True], "True is not a token id"),
        ([1.5], "1.5 is not a token id"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.encode(bad)


def test_requests_are_refused_before_any_work(make):
    engine = make(cache_len=40)
    good = SamplingParams(thinking_budget=2, solution_budget=2)
    for prompts, params, words in [
        ("one string", good, "pass a list"),
        ([5], good, "prompt 0 is 5"),
        ([None], good, "prompt 0 is None"),
        (["a"], {"n": 3}, "must be SamplingParams"),
        (["a\ud800"], good, "prompt 0: "),
        ([[{"role": "ghost", "content": "x"}]], good, "prompt 0: .*ghost"),
        (["a", "b"], [good], "2 prompts came with 1"),
        (["a", [9] * 39], good, "prompt 1: a prompt of 39 tokens"),
        (
            [[9]],
            dataclasses.replace(good, solution_budget=39),
            "does not fit cache_len=40",
        ),
        (
            [[9]],
            dataclasses.replace(good, end_of_thinking_text="no</think>"),
            "holds </think>",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            engine.stream(prompts, params)
    assert engine.stats.prefills == 0
    for sizes in [{"cache_len": 0}, {"slots": 0}, {"slots": True}]:
        with pytest.raises(UserError, match="whole number"):
            make(**sizes)


def test_a_cut_thinking_budget_is_said_once(make, capsys):
    engine = make(cache_len=60)
    params = SamplingParams(thinking_budget=50, solution_budget=20)
    results = engine.generate(
        [[9] * 10, [8] * 10, [9]],
        [params, params, dataclasses.replace(params, thinking_budget=5)],
    )
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "cut in 2 of 3 requests (in the first from 50 to 29 tokens)" in said
    )
    assert all(len(samples[0].token_ids) <= 50 for samples in results)
    engine.generate([[9] * 10], dataclasses.replace(params, thinking_budget=None))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cache_len", [20, 127, 128, 129])
def test_cache_len_is_exact_though_blocks_are_rounded(make, tokenizer, cache_len):
    endless = dataclasses.replace(tokenizer, eos_id=CONFIG.vocab_size)
    engine = make(cache_len=cache_len, slots=1, tokenizer=endless)
    params = SamplingParams(thinking_budget=0, solution_budget=None)
    [[c]] = engine.generate([[9] * 10], params)
    assert (10 + len(c.token_ids), c.finish_reason) == (cache_len, "length")
    [[c]] = engine.generate([[9] * (cache_len - 2)], params)
    assert len(c.token_ids) == 2
    with pytest.raises(UserError, match="does not fit"):
        engine.generate([[9] * (cache_len - 1)], params)


def test_model_without_think_end(make, tokenizer):
    plain = dataclasses.replace(tokenizer, think_end_id=None)
    engine = make(tokenizer=plain)
    with pytest.raises(UserError, match="no </think> token"):
        engine.generate(["a"], SamplingParams(thinking_budget=5))
    params = SamplingParams(thinking_budget=None, solution_budget=6, temperature=1.0)
    [[c]] = engine.generate(["a"], params)
    assert (c.thinking, c.thinking_end, c.thinking_tokens) == ("", None, 0)
    assert c.solution_tokens == len(c.token_ids) and c.text == c.solution
    with pytest.raises(UserError, match="prompt 0: a prompt of 295 tokens"):
        engine.generate([[9] * 295], params)


def test_bfloat16_runs_and_says_what_it_sampled(make, params):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    engine = make(params=narrow)
    [samples] = engine.generate(
        ["hello"], SamplingParams(thinking_budget=20, solution_budget=20, n=4)
    )
    on_cpu = jax.default_backend() == "cpu"  # which has the bits of bfloat16
    assert engine._cache.k.dtype == (jnp.uint16 if on_cpu else jnp.bfloat16)
    assert all(math.isfinite(p) and p <= 0 for c in samples for p in c.logprobs)


def test_too_little_memory_is_said_in_a_sentence(make, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    engine = make(cache_len=77, slots=2)
    set_everywhere(monkeypatch, "decode", exhausted, within="e1jax.sampling.engine")
    with pytest.raises(UserError, match="2 slots of 77 positions"):
        engine.generate(["a"], SamplingParams(thinking_budget=2, solution_budget=2))


def test_broken_weights_are_reported_and_leave_nothing_behind(make, params):
    """As when a training step diverges and an older checkpoint is taken up again."""
    engine, request = (
        make(),
        ["a", SamplingParams(thinking_budget=9, solution_budget=9)],
    )
    want = tokens_of(engine.generate(request[:1], request[1]))
    engine.params = {**params, "norm": {"scale": params["norm"]["scale"] * jnp.nan}}
    with pytest.raises(UserError, match="not finite"):
        engine.generate(request[:1], request[1])
    engine.params = params
    assert tokens_of(engine.generate(request[:1], request[1])) == want


def live_tokens(engine):
    """Tokens of a prompt that takes 96 of its tokens from the slot of another."""
    engine.add(
        list(range(10, 130)), SamplingParams(thinking_budget=5, solution_budget=5)
    )
    events = []
    while engine.running or engine.waiting:
        events += engine.step()
    engine.add(
        [*range(10, 110), 3], SamplingParams(thinking_budget=9, solution_budget=9)
    )
    events = []
    while engine.running or engine.waiting:
        events += engine.step()
    return events[-1].completion.token_ids, events[-1].cached_tokens


MESH_SCRIPT = """
import sys, jax, pytest
sys.path.insert(0, {tests!r})
import test_engine as t
from pathlib import Path
from conftest import set_everywhere
from e1jax.nn import model
from e1jax.sampling.engine import Engine
from e1jax.sharding.mesh import make_mesh
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer
set_everywhere(pytest.MonkeyPatch(), "BLOCK_LEN", 16)
assert jax.device_count() == 8
write_byte_tokenizer(Path({tmp!r}), ["\\\\boxed{{", "wait"])
tokenizer = Tokenizer.from_dir(Path({tmp!r}))
one = make_mesh("data=1,tensor=1", t.CONFIG, jax.devices()[:1])
made = model.init_params(t.CONFIG, one, "float32", 0)
made = jax.tree.map(lambda p: p * 5 if p.ndim > 1 else p, made)
want, first_live = None, None
for text, devices, slots in [("data=1,tensor=1", 1, 3), ("data=8,tensor=1", 8, 3), ("data=4,tensor=2", 8, 5)]:
    mesh = make_mesh(text, t.CONFIG, jax.devices()[:devices])
    place = jax.tree.map(lambda s: s.sharding, model.abstract_params(t.CONFIG, mesh, "float32"))
    engine = Engine(t.CONFIG, jax.device_put(made, place), tokenizer, mesh, cache_len=300, slots=slots)
    got = t.tokens_of(engine.generate(*t.mixed_requests()))
    want = want or got
    assert got == want, text
    seen = t.compiled_programs()
    prompts, params = t.mixed_requests()
    assert t.tokens_of(engine.generate(prompts[4:], params[4:])) == want[4:] and seen == [], (text, seen)
    assert engine._cache.k.sharding.num_devices == devices
    live = t.live_tokens(engine)
    first_live = first_live or live
    assert live == first_live and live[1] == 96, text
    # Of three slots, each device of eight has a part of every one: 19 blocks, 3 at most.
    if devices == 8 and slots == 3:
        part = engine._cache.k.addressable_shards[5].data
        assert engine.slots == 3 and part.shape[1:4] == (3, t.CONFIG.num_kv_heads, 48)
print("meshes agree")
"""


def test_eight_devices_give_the_tokens_of_one(tmp_path):
    script = MESH_SCRIPT.format(tests=os.path.dirname(__file__), tmp=str(tmp_path))
    environment = {**os.environ, "XLA_FLAGS": several_devices(8)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "meshes agree\n", done.stderr[-3000:]


def test_collected_logprobs_are_plain_numbers(mixed_results):
    completion = mixed_results[0][0]
    assert all(type(p) is float for p in completion.logprobs)
    assert all(type(t) is int for t in completion.token_ids)
    assert all(type(f) is bool for f in completion.forced)
