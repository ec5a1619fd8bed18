"""Requests that come, are sampled and leave at any time: `add`, `step`, `abort`."""

import dataclasses
import itertools
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import make, mixed_requests, params, tokenizer, tokens_of

from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.sampling import decode
from e1jax.sampling.budget import DONE
from e1jax.sampling.completion import join_events
from e1jax.tokenizer import THINK_END

__all__ = ["make", "params", "tokenizer"]  # fixtures

ROUND = SamplingParams(thinking_budget=9, solution_budget=9, temperature=1.0)


def run(engine, until=lambda: False, seconds=0.0):
    """Steps until nothing is left; the events of each step."""
    steps = []
    while (engine.running or engine.waiting) and not until():
        steps.append(engine.step(seconds=seconds))
    return steps


def joined(steps):
    """(request, sample) -> its events, in order."""
    found = {}
    for event in [event for events in steps for event in events]:
        found.setdefault((event.request_id, event.sample), []).append(event)
    return found


def completions(steps):
    return {
        key: [e.completion for e in events if e.completion is not None]
        for key, events in joined(steps).items()
    }


@pytest.fixture(scope="module")
def wanted(make):
    return tokens_of(make(slots=3).generate(*mixed_requests()))


@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_when_a_request_was_added(make, wanted, seed):
    rng, engine = random.Random(seed), make(slots=2)
    requests = list(enumerate(zip(*mixed_requests(), strict=True)))
    rng.shuffle(requests)
    ids, steps = {}, []
    while requests or engine.running or engine.waiting:
        for _ in range(min(rng.choice([0, 0, 1, 2]), len(requests))):
            index, request = requests.pop()
            ids[engine.add(*request)] = index
        steps.append(engine.step(seconds=0))
    got = {
        (ids[request], sample): [c.token_ids for c in done]
        for (request, sample), done in completions(steps).items()
    }
    want = {
        (index, sample): [tokens]
        for index, samples in enumerate(wanted)
        for sample, tokens in enumerate(samples)
    }
    assert got == want
    assert engine.step() == []


def test_events_joined_are_the_completion(make):
    engine = make(slots=3)
    for prompt, request in zip(*mixed_requests(), strict=True):
        engine.add(prompt, request)
    plain = SamplingParams(thinking_budget=None, solution_budget=None, n=2, seed=5)
    engine.add("plain", dataclasses.replace(plain, temperature=1.0))
    for events in joined(run(engine)).values():
        *before, last = events
        done = last.completion
        assert done is not None and not any(e.completion for e in before)
        for name in ("token_ids", "logprobs", "forced"):
            parts = [value for e in events for value in getattr(e, name)]
            assert parts == getattr(done, name)
        assert "".join(e.text for e in events) == done.text
        text = {"thinking": "", "solution": ""}
        for event in events:
            assert len(event.token_ids) == len(event.logprobs) == len(event.forced) > 0
            text[event.phase] += event.text
        closer = "" if done.thinking_end is None else THINK_END
        assert text == {"thinking": done.thinking + closer, "solution": done.solution}
        order = [event.phase for event in events]
        assert order == sorted(order, reverse=True)  # thinking, then the solution


@pytest.mark.parametrize("together", [2, 5, 10**6])
def test_events_of_several_steps_are_one_a_sample_and_phase(make, together):
    """The same tokens and text, in fewer events."""
    engine = make(slots=3)
    for prompt, request in zip(*mixed_requests(), strict=True):
        engine.add(prompt, request)
    steps = run(engine)
    groups = [steps[at : at + together] for at in range(0, len(steps), together)]
    merged = [join_events(itertools.chain(*group)) for group in groups]
    for events in merged:
        keys = [(event.request_id, event.sample, event.phase) for event in events]
        assert len(set(keys)) == len(keys)
    assert sum(map(len, merged)) < sum(map(len, steps))
    apart, together = joined(steps), joined(merged)
    assert apart.keys() == together.keys()
    for key, events in apart.items():
        for name in ("token_ids", "logprobs", "forced", "text"):
            assert parts_of(events, name) == parts_of(together[key], name), name
        assert together[key][-1].completion is events[-1].completion
        assert [event.completion for event in together[key][:-1]] == [None] * (
            len(together[key]) - 1
        )


def parts_of(events, name):
    """By phase, all of a field."""
    found = {"thinking": [], "solution": []}
    for event in events:
        found[event.phase] += getattr(event, name)
    return found


def test_a_text_of_bytes_that_are_no_characters(make):
    """As a random model writes them: each event holds what no later token can change."""
    engine = make(slots=2)
    engine.add("x", dataclasses.replace(ROUND, n=4, solution_budget=60))
    steps = run(engine)
    assert any("�" in c.text for [c] in completions(steps).values())
    for events in joined(steps).values():
        assert "".join(e.text for e in events) == events[-1].completion.text


def test_abort_frees_the_slots_at_the_next_step(make, wanted):
    engine = make(slots=3)
    prompts, all_params = mixed_requests()
    long = dataclasses.replace(ROUND, n=5, solution_budget=None)
    first = engine.add("long", long)
    engine.step(seconds=0)
    assert (engine.running, engine.waiting) == (3, 2)
    second = engine.add(prompts[0], all_params[0])
    engine.abort(first)
    events = engine.step(seconds=0)
    assert {event.request_id for event in events} == {second}
    assert (engine.running, engine.waiting) == (2, 0)
    # The rows of an aborted request step no further.
    assert int((engine._rows.state.phase != DONE).sum()) == 2
    got = completions([events, *run(engine)])
    assert [got[second, j][0].token_ids for j in (0, 1)] == wanted[0]
    assert {request for request, _ in got} == {second}


def test_abort_of_what_waits_has_ended_or_never_was(make, wanted):
    engine = make(slots=1)
    prompts, all_params = mixed_requests()
    first, second, third = (engine.add(prompts[i], all_params[i]) for i in (2, 3, 5))
    engine.abort(second)  # before it was taken in
    engine.abort(10**6)
    steps = run(engine)
    engine.abort(first)
    assert engine.step() == []
    got = {key: c.token_ids for key, [c] in completions(steps).items()}
    assert got == {(first, 0): wanted[2][0], (third, 0): wanted[5][0]}
    # All at once, with nothing left to step.
    ids = [engine.add(prompts[0], all_params[0]) for _ in range(3)]
    engine.step(seconds=0)
    for request in ids:
        engine.abort(request)
    assert engine.step() == [] and (engine.running, engine.waiting) == (0, 0)
    assert tokens_of(engine.generate(prompts, all_params)) == wanted


def test_requests_start_in_the_order_they_came(make):
    engine = make(slots=1)
    budgets = [3, 30, 2, 9]
    ids = [
        engine.add([9, index], dataclasses.replace(ROUND, solution_budget=budget))
        for index, budget in enumerate(budgets)
    ]
    assert list(joined(run(engine))) == [(request, 0) for request in ids]


def test_a_longer_forced_end_finds_room_later(make, tokenizer):
    """The rows that run already have room for the shortest only."""
    engine = make(slots=2)
    first = engine.add("a", dataclasses.replace(ROUND, thinking_budget=40))
    engine.step(seconds=0)
    text = "Time is up, so I have to answer now."
    late = dataclasses.replace(ROUND, thinking_budget=2, end_of_thinking_text=text)
    second = engine.add("b", late)
    got = completions(run(engine))
    [early], [later] = got[first, 0], got[second, 0]
    alone = make(slots=2).generate(
        ["a"], dataclasses.replace(ROUND, thinking_budget=40)
    )
    assert early.token_ids == alone[0][0].token_ids
    if later.thinking_end != "model":
        assert later.thinking.endswith(text)
        assert sum(later.forced) == len(text) + 1
    assert tokens_of(make(slots=2).generate(["b"], late)) == [[later.token_ids]]


def test_streams_and_live_requests_share_an_engine(make, wanted):
    engine = make(slots=3)
    prompts, all_params = mixed_requests()
    live = engine.add(prompts[3], all_params[3])
    streams = [engine.stream(prompts[i : i + 1], all_params[i : i + 1]) for i in (0, 4)]
    got = [[], []]
    while any(streams):
        for number, stream in enumerate(streams):
            completion = next(stream, None) if stream else None
            if completion is None:
                streams[number] = None
            else:
                got[number].append((completion.sample, completion.token_ids))
    assert [[ids for _, ids in sorted(part)] for part in got] == [wanted[0], wanted[4]]
    done = completions([*run(engine), engine.step()])
    assert [done[live, j][0].token_ids for j in range(3)] == wanted[3]


def test_a_stream_that_is_given_up_leaves_nothing_behind(make, wanted):
    engine = make(slots=3)
    prompts, all_params = mixed_requests()
    live = engine.add(prompts[5], dataclasses.replace(all_params[5], n=3))
    stream = engine.stream(prompts, all_params)
    next(stream)
    stream.close()
    got = completions([*run(engine), engine.step()])
    assert {request for request, _ in got} == {live}
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine._weights is None  # the parameters may be replaced
    assert tokens_of(engine.generate(prompts, all_params)) == wanted


def test_requests_are_added_and_aborted_from_other_threads(make, wanted):
    engine, ids, lost = make(slots=2), {}, []
    requests = list(zip(*mixed_requests(), strict=True))

    def client(index):
        ids[engine.add(*requests[index])] = index
        aborted = engine.add(*requests[index])
        engine.abort(aborted)
        lost.append(aborted)

    threads = [threading.Thread(target=client, args=[i]) for i in range(len(requests))]
    steps = []
    for thread in threads:
        thread.start()
        steps.append(engine.step(seconds=0))
    for thread in threads:
        thread.join()
    got = completions(steps + run(engine))
    assert len({*ids, *lost}) == 2 * len(requests)
    for request, index in ids.items():
        samples = requests[index][1].n
        tokens = [got[request, j][0].token_ids for j in range(samples)]
        assert tokens == wanted[index]


def test_a_request_that_cannot_fit_is_refused_when_it_is_added(make, capsys):
    engine = make(cache_len=40)
    for prompt, request, words in [
        ([9] * 39, ROUND, "prompt: a prompt of 39 tokens"),
        ([999], ROUND, "999 is not a token id"),
        ("a", {"n": 3}, "must be SamplingParams"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.add(prompt, request)
    assert engine.step() == []
    for _ in range(2):
        engine.add([9] * 20, dataclasses.replace(ROUND, thinking_budget=30))
    assert capsys.readouterr().err.count("from 30 to 10 tokens") == 1


def test_a_failure_ends_all_requests_and_the_engine_goes_on(make, params, wanted):
    engine = make(slots=2)
    engine.params = {**params, "norm": {"scale": params["norm"]["scale"] * jnp.nan}}
    for _ in range(3):
        engine.add("a", ROUND)
    with pytest.raises(UserError, match="not finite"):
        engine.step()
    assert (engine.running, engine.waiting, engine.step()) == (0, 0, [])
    engine.params = params
    assert tokens_of(engine.generate(*mixed_requests())) == wanted


def sample_alone(make, prompt, request):
    """The completions of a fresh engine."""
    return tokens_of(make(slots=3).generate([prompt], request))[0]


@pytest.mark.parametrize("length", [2, 130, 513, 600, 650])
def test_a_long_prompt_is_prefilled_between_the_steps_of_others(
    make, tokenizer, length
):
    endless = dataclasses.replace(tokenizer, eos_id=272)
    engine = make(cache_len=690, slots=3, tokenizer=endless)
    others = dataclasses.replace(ROUND, thinking_budget=200, n=2)
    first = engine.add("a", others)
    steps = [engine.step(seconds=0)]
    prompt = [5 + i % 90 for i in range(length)]
    late = dataclasses.replace(ROUND, temperature=1.0, seed=4)
    second = engine.add(prompt, late)
    pieces = -(-(length - 1) // 128)  # on a CPU
    for _ in range(pieces):
        steps.append(engine.step(seconds=60))
        # The others get their steps, few of them while a piece is still to come.
        counts = [len(e.token_ids) for e in steps[-1] if e.request_id == first]
        assert len(counts) == 2
        is_behind = len(steps) <= pieces
        assert (max(counts) <= 4) == is_behind
        assert engine.running == 2 or not is_behind
    got = completions(steps + run(engine))
    fresh = make(cache_len=690, slots=3, tokenizer=endless)
    want = fresh.generate([prompt], late)
    assert got[second, 0][0].token_ids == want[0][0].token_ids
    np.testing.assert_allclose(
        got[second, 0][0].logprobs, want[0][0].logprobs, atol=1e-4
    )
    assert engine.stats.prefills == 2


def test_many_short_prompts_do_not_wait_for_one_step_each(make):
    engine = make(slots=12)
    engine.add("first", dataclasses.replace(ROUND, solution_budget=100))
    engine.step(seconds=0)
    for index in range(11):
        engine.add([9, index, 7], ROUND)
    engine.step(seconds=0)
    assert engine.running == 12


def cached(steps, request):
    return {
        e.cached_tokens for events in steps for e in events if e.request_id == request
    }


def test_a_conversation_goes_on_from_the_slot_that_holds_it(make):
    engine = make(cache_len=690, slots=2)
    request = dataclasses.replace(ROUND, thinking_budget=40, solution_budget=60)
    prompt = [5 + i % 90 for i in range(70)]
    first = engine.add(prompt, request)
    steps = run(engine)
    [done] = completions(steps)[first, 0]
    assert cached(steps, first) == {0}
    engine.generate([])
    assert engine._rows is None  # what slots hold can be read after that too
    # Everything but the last token is in the cache, in steps of 128 or, here, of 16.
    whole = [*prompt, *done.token_ids, 7, 8, 9]
    second = engine.add(whole, request)
    steps = run(engine)
    step = 16 if len(whole) - 1 <= 128 else 128
    kept = (len(whole) - 4) // step * step
    assert cached(steps, second) == {kept} and kept >= 64
    got = [c.token_ids for c in completions(steps)[second, 0]]
    assert got == sample_alone(lambda slots: make(690, slots), whole, request)
    # A prompt that leaves the conversation early shares its beginning.
    other = [*prompt[:50], 1, 2, 3]
    third = engine.add(other, request)
    steps = run(engine)
    assert cached(steps, third) == {48}
    got = [c.token_ids for c in completions(steps)[third, 0]]
    assert got == sample_alone(lambda slots: make(690, slots), other, request)


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "int8"])
def test_a_prefix_is_read_from_a_slot_that_runs(make, kv_dtype, params, tokenizer):
    def fresh():
        engine = make(cache_len=690, slots=3)
        engine.kv_dtype = kv_dtype
        return engine

    engine = fresh()
    prompt = [5 + i % 90 for i in range(300)]
    long = dataclasses.replace(ROUND, thinking_budget=100, solution_budget=100)
    first = engine.add(prompt, long)
    steps = [engine.step(seconds=0) for _ in range(3)]
    second = engine.add([*prompt[:290], 3, 4], dataclasses.replace(ROUND, n=2))
    steps += run(engine)
    assert cached(steps, second) == {256}
    assert engine.stats.prefills == 2
    got = completions(steps)
    want = fresh().generate([[*prompt[:290], 3, 4]], dataclasses.replace(ROUND, n=2))
    assert [got[second, j][0].token_ids for j in (0, 1)] == tokens_of(want)[0]
    [want] = fresh().generate([prompt], long)
    assert got[first, 0][0].token_ids == want[0].token_ids


def test_the_slot_left_longest_ago_is_taken_first(make):
    engine = make(slots=3)
    prompts = [[20 + i, *range(60, 60 + 40)] for i in range(5)]
    for prompt in prompts[:3]:
        engine.add(prompt, ROUND)
        run(engine)
    again = engine.add(prompts[0], ROUND)  # takes slot 0, and leaves it last
    steps = run(engine)
    assert cached(steps, again) == {32}
    engine.add(prompts[3], ROUND)  # takes the slot of prompt 1
    run(engine)
    kept = {}
    for index in (0, 2, 1):
        request = engine.add(prompts[index], ROUND)
        [kept[index]] = cached(run(engine), request)
    assert kept == {0: 32, 2: 32, 1: 0}


def test_weights_are_made_ready_once_for_requests_that_come_one_by_one(
    make, params, monkeypatch
):
    prepared = []

    def count(*args):
        prepared.append(args)
        return decode.prepare(*args)

    monkeypatch.setattr("e1jax.sampling.engine.prepare", count)
    engine = make(slots=2)
    for seed in range(3):
        engine.add("a", dataclasses.replace(ROUND, seed=seed))
        run(engine)
        assert engine.step() == [] and len(prepared) == 1
    want = make(slots=2).generate(["a"], dataclasses.replace(ROUND, seed=9))
    engine.params = params
    assert engine._weights is None
    last = engine.add("a", dataclasses.replace(ROUND, seed=9))
    got = completions(run(engine))[last, 0]
    assert got[0].token_ids == want[0][0].token_ids
    # A stream leaves room for what comes after it, an update of the parameters say.
    engine.generate(["a"], ROUND)
    assert engine._weights is None


def test_nothing_is_reused_after_the_parameters_change(make, params):
    engine = make(slots=2)
    prompt = list(range(50, 100))
    engine.add(prompt, ROUND)
    run(engine)
    engine.params = jax.tree.map(lambda p: p * 1.01, params)
    second = engine.add(prompt, ROUND)
    steps = run(engine)
    assert cached(steps, second) == {0}
    want = make(params=engine.params).generate([prompt], ROUND)
    assert completions(steps)[second, 0][0].token_ids == want[0][0].token_ids
    # Nor by a stream: the same call gives the same numbers to the last bit.
    engine.generate([prompt], ROUND)
    engine.release_cache()
    third = engine.add(prompt, ROUND)
    assert cached(run(engine), third) == {0}
