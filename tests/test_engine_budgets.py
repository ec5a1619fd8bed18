"""The engine with a scripted model, against the plain-Python state machine."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import set_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import budgets, fits, reference

from e1jax.config.model import ModelConfig
from e1jax.config.sampling import SamplingParams
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
)
script_token = st.sampled_from([256, 256, 261, 261, 97, 98, 99, 270])


@pytest.mark.parametrize("more_ends", [(), (270, 98)])
@given(
    st.lists(request, min_size=1, max_size=7),
    st.lists(script_token, min_size=CACHE_LEN + 2, max_size=CACHE_LEN + 2),
)
@settings(max_examples=60, deadline=None)
def test_engine_matches_the_plain_machine(scripted, more_ends, requests, script):
    ends, close = (256, *more_ends), 261
    scripted.tokenizer = dataclasses.replace(scripted.tokenizer, more_eos_ids=more_ends)
    requests = [r for r in requests if fits(r[0], r[1], len(r[3]), CACHE_LEN - r[2])]
    scripted.params = {**scripted.params, "script": jnp.array(script, jnp.int32)}
    results = scripted.generate(
        [[97] * num_prompt for *_, num_prompt, _, _ in requests],
        [
            SamplingParams(
                thinking_budget=t,
                solution_budget=s,
                end_of_thinking_text=text,
                n=n,
                seed=n,
            )
            for t, s, _, text, n in requests
        ],
    )
    assert len(results) == len(requests)
    for (t, s, num_prompt, text, n), samples in zip(requests, results, strict=True):
        forced = [*scripted.tokenizer.encode(text), close]
        room = CACHE_LEN - num_prompt
        want = reference(script[num_prompt:], t, s, forced, room, ends, close)
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
