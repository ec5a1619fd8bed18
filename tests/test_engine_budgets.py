"""The engine with a scripted model, against the plain-Python state machine."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import set_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import budgets, fits, reference

from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.sampling import SamplingParams
from e1jax.sampling.budget import DONE
from e1jax.sampling.engine import Engine
from e1jax.sharding.mesh import make_mesh
from e1jax.tokenizer import Tokenizer, write_byte_tokenizer

# A model that emits a script: the token after position p is script[p + 1], whatever
# came before.
CONFIG = ModelConfig(
    vocab_size=272,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=701,
    rope_theta=1e4,
)
CACHE_LEN = 40


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    tokenizer = Tokenizer.from_dir(path)

    def forward(config, params, tokens, positions, cache=None, **options):
        return params["script"][positions + 1][..., None].astype(jnp.float32), cache

    def unembed(config, params, hidden, mesh):
        return 50.0 * jax.nn.one_hot(hidden[..., 0].astype(int), config.vocab_size)

    patch = pytest.MonkeyPatch()
    set_everywhere(patch, "forward", forward)
    set_everywhere(patch, "unembed", unembed)
    params = {
        "norm": {"scale": jnp.zeros(1)},
        "layers": {"unused": jnp.zeros((1, 1))},
        "script": jnp.zeros(CACHE_LEN + 2, jnp.int32),
    }
    mesh = make_mesh(None, CONFIG)
    yield Engine(CONFIG, params, tokenizer, mesh, cache_len=CACHE_LEN, slots=3)
    patch.undo()


request = st.tuples(
    budgets,
    budgets,
    st.integers(1, 12),
    st.sampled_from(["", "a", "abc"]),
    st.integers(1, 4),
    st.sampled_from(["force", "stop", "solves"]),
)
script_token = st.sampled_from([256, 256, 261, 261, 97, 98, 99, 270])


@pytest.mark.parametrize("more_ends", [(), (270, 98)])
@given(
    st.lists(request, min_size=1, max_size=7),
    st.lists(script_token, min_size=CACHE_LEN + 2, max_size=CACHE_LEN + 2),
)
@settings(max_examples=60)
def test_engine_matches_the_plain_machine(scripted, more_ends, requests, script):
    ends, close = (256, *more_ends), 261
    scripted.tokenizer = dataclasses.replace(scripted.tokenizer, more_eos_ids=more_ends)
    requests = [r for r in requests if fits(r[0], r[1], len(r[3]), CACHE_LEN - r[2])]
    scripted.params = {**scripted.params, "script": jnp.array(script, jnp.int32)}
    results = scripted.generate(
        [
            [97] * (num_prompt - 1) + [close if way == "solves" else 97]
            for _, _, num_prompt, _, _, way in requests
        ],
        [
            SamplingParams(
                thinking_budget=t,
                solution_budget=s,
                end_of_thinking_text=text,
                n=n,
                seed=n,
                on_thinking_budget="stop" if way == "stop" else "force",
            )
            for t, s, _, text, n, way in requests
        ],
    )
    assert len(results) == len(requests)
    for (t, s, num_prompt, text, n, way), samples in zip(
        requests, results, strict=True
    ):
        forced = [*scripted.tokenizer.encode(text), close]
        room = CACHE_LEN - num_prompt
        stops, solves = way == "stop", way == "solves"
        want = reference(
            script[num_prompt:], t, s, forced, room, ends, close, stops, solves
        )
        assert [c.sample for c in samples] == list(range(n))
        for c in samples:
            assert want == (
                c.token_ids, c.forced, c.thinking_tokens, c.solution_tokens, c.thinking_end, c.finish_reason,
            )  # fmt: skip
            assert len(c.logprobs) == len(c.token_ids)
            kept = c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids
            assert c.text == scripted.tokenizer.decode(kept)
            assert num_prompt + len(c.token_ids) <= CACHE_LEN
    total = sum(len(c.token_ids) for samples in results for c in samples)
    assert scripted.stats.tokens == total <= scripted.stats.slot_steps


@pytest.mark.parametrize("text", ["é€😀", "a€</think>b😀", "�</think>�é"])
def test_a_text_is_never_cut_inside_a_character(scripted, text):
    """Each byte is a token here, and comes in a step of its own."""
    scripted.tokenizer = dataclasses.replace(scripted.tokenizer, more_eos_ids=())
    script = [97, *scripted.tokenizer.encode(text), scripted.tokenizer.eos_id]
    script += scripted.tokenizer.encode("b") * (CACHE_LEN + 2 - len(script))
    scripted.params = {**scripted.params, "script": jnp.array(script, jnp.int32)}
    scripted.add([97], SamplingParams(thinking_budget=20, solution_budget=9))
    events = []
    while scripted.running or scripted.waiting:
        events += step_once(scripted)
    done = events[-1].completion
    assert len(events) == len(done.token_ids)
    assert "".join(event.text for event in events) == done.text
    assert done.text.startswith(text)
    for event in events:
        assert "�" in text or "�" not in event.text
        assert len(event.text.replace("</think>", "")) <= 2


def step_once(engine):
    """One decode step, where the engine does not know yet how long a step takes."""
    engine._update()
    engine._start()
    engine._step_seconds = 1.0
    return engine.step(seconds=0)


def play(engine, text, params, prompt=(97,), one_step=True):
    """(completion, events) of a response in which the model writes the text, then EOS."""
    engine.tokenizer = dataclasses.replace(engine.tokenizer, more_eos_ids=())
    encode = engine.tokenizer.encode
    script = [97] * len(prompt) + encode(text) + [engine.tokenizer.eos_id]
    script += encode("x") * (CACHE_LEN + 2 - len(script))
    engine.params = {**engine.params, "script": jnp.array(script, jnp.int32)}
    engine.add(list(prompt), params)
    events = []
    while engine.running or engine.waiting:
        events += step_once(engine) if one_step else engine.step()
    assert "".join(event.text for event in events) == events[-1].completion.text
    return events[-1].completion, events


STOPPED = SamplingParams(
    thinking_budget=20, solution_budget=20, temperature=0, stop=("STOP", "€!")
)


@pytest.mark.parametrize(
    "text, thinking, solution, through",
    [
        ("aSTOP</think>bcSTOPde", "aSTOP", "bc", "aSTOP</think>bcSTOP"),
        ("a</think>STOPSTOP", "a", "", "a</think>STOP"),
        ("a</think>SSTOP", "a", "S", "a</think>SSTOP"),
        ("a</think>ST€€!STOP", "a", "ST€", "a</think>ST€€!"),
        ("a</think>bSTO", "a", "bSTO", "a</think>bSTO"),  # EOS comes before the P
        ("a</think>b€", "a", "b€", "a</think>b€"),
    ],
)
@pytest.mark.parametrize("one_step", [True, False])
def test_a_stop_text_ends_the_solution(
    scripted, text, thinking, solution, through, one_step
):
    completion, events = play(scripted, text, STOPPED, one_step=one_step)
    encode = scripted.tokenizer.encode
    by_eos = text == through and not any(s in text for s in STOPPED.stop)
    ended = [scripted.tokenizer.eos_id] if by_eos else []
    assert completion.token_ids == encode(through) + ended
    assert (completion.thinking, completion.solution) == (thinking, solution)
    assert completion.text == f"{thinking}</think>{solution}"
    assert (completion.finish_reason, completion.thinking_end) == ("stop", "model")
    of_solution = through.partition("</think>")[2]
    assert completion.solution_tokens == len(of_solution.encode()) + len(ended)
    assert (
        len(completion.logprobs) == len(completion.forced) == len(completion.token_ids)
    )
    assert len(events) > 2 or not one_step


def test_a_stopped_sample_gives_its_slot_back_and_disturbs_no_other(scripted):
    alone, _ = play(scripted, "a</think>bSTOPdefghi", STOPPED)
    free = dataclasses.replace(STOPPED, stop=())
    ids = [scripted.add([97], p) for p in (STOPPED, free, STOPPED, STOPPED, free)]
    done = {}
    while scripted.running or scripted.waiting:
        for event in scripted.step(seconds=0):
            if event.completion is not None:
                done[event.request_id] = event.completion
        if scripted.running:
            going = int((scripted._rows.state.phase != DONE).sum())
            assert going == scripted.running
    texts = [done[i].solution for i in ids]
    assert texts == ["b", "bSTOPdefghi", "b", "b", "bSTOPdefghi"]
    assert done[ids[2]].token_ids == alone.token_ids


def test_the_opener_is_never_sampled_in_a_solution(scripted):
    opener = scripted.tokenizer.think_start_id
    text = "a<think>b</think>c<think>d"
    for temperature in (0.0, 1.0):
        params = dataclasses.replace(STOPPED, stop=(), temperature=temperature)
        completion, _ = play(scripted, text, params)
        # Only the token in its place differs: the script goes by position.
        assert completion.thinking == "a<think>b"
        assert completion.solution_tokens == 4 and completion.solution[0] == "c"
        where = completion.token_ids.index(scripted.tokenizer.encode("c")[0]) + 1
        assert completion.token_ids[where] != opener
        assert completion.token_ids[where + 1] == scripted.tokenizer.encode("d")[0]
        # Its log-probability is of the logits as they are, before the ban.
        assert completion.logprobs[where] < -40
    # Neither after a forced end, nor where the prompt has closed its thinking.
    forced = dataclasses.replace(params, thinking_budget=1)
    completion, _ = play(scripted, "ab<think><think>", forced)
    assert completion.thinking_end == "budget" and opener not in completion.token_ids
    close = scripted.tokenizer.think_end_id
    completion, _ = play(scripted, "<think>b", params, prompt=[97, close, 97])
    assert opener not in completion.token_ids and completion.solution.endswith("b")


@pytest.mark.parametrize(
    "prompt, phase",
    [
        ("ab", "thinking"),
        ("<think>", "thinking"),
        ("</think>a<think>b", "thinking"),
        ("</think>", "solution"),
        ("<think>a</think>b", "solution"),
        ("</think>a</think>", "solution"),
    ],
)
def test_the_phase_a_response_starts_in_is_read_from_the_prompt(
    scripted, prompt, phase
):
    prompt = scripted.tokenizer.encode(prompt)
    params = SamplingParams(thinking_budget=2, solution_budget=3, temperature=0)
    completion, events = play(scripted, "abcdefgh", params, prompt=prompt)
    assert events[0].phase == phase
    if phase == "thinking":
        assert (completion.thinking, completion.solution) == ("ab", "def")
        assert completion.thinking_end == "budget" and sum(completion.forced) == 1
    else:
        assert (completion.thinking, completion.solution) == ("", "abc")
        assert completion.thinking_end is None and not any(completion.forced)
        assert completion.text == "abc" and completion.thinking_tokens == 0
        # A closer that is sampled in the solution is an ordinary token.
        completion, _ = play(scripted, "a</think>b", params, prompt=prompt)
        assert (completion.thinking, completion.solution) == ("", "a</think>b")


def test_a_budget_that_stops_forces_nothing(scripted):
    params = SamplingParams(
        thinking_budget=3, solution_budget=3, on_thinking_budget="stop", temperature=0
    )
    cut, _ = play(scripted, "abcdefgh", params)
    assert (cut.thinking, cut.solution, cut.text) == ("abc", "", "abc")
    assert (cut.finish_reason, cut.thinking_end) == ("length", "budget")
    assert not any(cut.forced) and cut.thinking_tokens == 3
    closed, _ = play(scripted, "ab</think>cd", params)
    assert (closed.thinking, closed.solution) == ("ab", "cd")
    assert (closed.finish_reason, closed.thinking_end) == ("stop", "model")
    ended, _ = play(scripted, "a", params)
    assert (ended.text, ended.thinking_end, ended.finish_reason) == ("a", "eos", "stop")
    assert ended.token_ids[-1] == scripted.tokenizer.eos_id
    none, events = play(scripted, "abc", dataclasses.replace(params, thinking_budget=0))
    assert (none.token_ids, none.text, none.finish_reason) == ([], "", "length")
    assert len(events) == 1 and scripted.stats.slot_steps >= 0


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("stop", ["a", ""], "stop must be a text or a list of texts"),
        ("stop", [3], "stop must be a text or a list of texts"),
        ("stop", 3, "stop must be a text or a list of texts"),
        ("on_thinking_budget", "halt", "must be force or stop, not 'halt'"),
    ],
)
def test_ways_to_end_are_checked(field, value, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**{field: value})
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=None).stop == ()
