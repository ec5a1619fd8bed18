"""The budget state machine against a plain-Python one, the draw against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import set_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.sampling.budget import (
    DONE,
    FINISH_REASONS,
    SOLVE,
    THINK,
    THINKING_ENDS,
    Budget,
    TokenIds,
    advance,
    resolve_budget,
    start_state,
)
from e1jax.sampling.draw import (
    Sampling,
    _draw_until_kept,
    _gaps,
    sample_token,
    token_keys,
    token_logprobs,
    top_k_top_p_mask,
)
from e1jax.sampling.draw import row_keys as row_keys_of

EOS, CLOSE = 0, 1
TEXT = [7, 8]  # tokens of an end_of_thinking_text


def reference(
    stream,
    thinking,
    solution,
    forced,
    room,
    ends,
    close=CLOSE,
    stops=False,
    solves=False,
):
    """The budget rules, one token at a time: stream[i] is what the model would
    draw at position i.

    `thinking` and `solution` may be None; `forced` is the inserted text with
    `</think>`; `room` is what the cache holds; `ends` are the EOS ids; `stops`: nothing
    is forced, a used up budget ends the response; `solves`: it starts in the solution.
    Returns (tokens, forced marks, thinking tokens, solution tokens, thinking end, finish
    reason).
    """
    plain = thinking is None and solution is None
    stops = stops and not plain
    forced = [] if stops or solves else forced
    if not plain:
        longest = room - len(forced) - (1 if solution is None else solution)
        thinking = longest if thinking is None else min(thinking, longest)
    tokens, marks, end, thought = [], [], None, 0
    while end is None and not solves:
        if stops and thought == thinking:
            return tokens, marks, thought, 0, "budget", "length"
        if not plain and thought == thinking:
            end = "budget"
        elif stream[len(tokens)] in ends and not plain and not stops:
            end = "eos"
        else:
            token = stream[len(tokens)]
            tokens.append(token)
            marks.append(False)
            thought += 1
            if token == close:
                end = "model"
            elif token in ends:
                return tokens, marks, thought, 0, "eos" if stops else None, "stop"
            if len(tokens) == room and not (stops and end is None):
                return tokens, marks, thought, 0, end, "length"
    if end != "model" and not solves:
        tokens += forced
        marks += [True] * len(forced)
    solved = 0
    while True:
        if solved == solution:
            return tokens, marks, thought, solved, end, "solution_budget"
        if len(tokens) == room:
            return tokens, marks, thought, solved, end, "length"
        token = stream[len(tokens)]
        tokens.append(token)
        marks.append(False)
        solved += 1
        if token in ends:
            return tokens, marks, thought, solved, end, "stop"


@jax.jit
def run_machine(streams, budget, phase, ends=(EOS,)):
    """Steps `advance` over streams [B, N]; tokens and marks [B, N], and the final
    state."""

    def step(state, sampled):
        token, forced, state = advance(
            state, sampled, budget, TokenIds(jnp.array(ends), CLOSE)
        )
        return state, (token, forced)

    state, (tokens, marks) = jax.lax.scan(step, start_state(phase), streams.T)
    return tokens.T, marks.T, state


ROWS, STEPS, WIDTH = 16, 40, 4
budgets = st.one_of(st.none(), st.integers(0, 12))
row = st.tuples(
    budgets,
    budgets,
    st.integers(0, len(TEXT)),
    st.integers(1, STEPS),
    st.sampled_from(["force", "stop", "solves"]),
    st.lists(st.sampled_from([EOS, CLOSE, 5, 6, 9]), min_size=STEPS, max_size=STEPS),
)


def fits(thinking, solution, num_text, room):
    if thinking is None and solution is None:
        return True
    return room >= num_text + 1 + (1 if solution is None else solution)


@pytest.mark.parametrize("ends", [(EOS,), (EOS, 9, 6)])
@given(st.lists(row, min_size=ROWS, max_size=ROWS))
@settings(max_examples=200)
def test_any_budgets_match_the_plain_machine(ends, rows):
    rows = [row for row in rows if fits(*row[:4])]
    if not rows:
        return
    padded = rows + [rows[0]] * (ROWS - len(rows))
    resolved = []
    for t, s, f, room, way, _ in padded:
        how = "stop" if way == "stop" else "force"
        params = SamplingParams(
            thinking_budget=t, solution_budget=s, on_thinking_budget=how
        )
        args = params, 3, f + 1, room + 3, "prompt 0"
        resolved.append(resolve_budget(*args, starts_thinking=way != "solves"))
    forced = [[*TEXT[:f], CLOSE] for _, _, f, *_ in padded]
    budget = Budget(
        thinking=np.array([r.thinking for r in resolved], np.int32),
        solution=np.array([r.solution for r in resolved], np.int32),
        total=np.array([r.total for r in resolved], np.int32),
        plain=np.array([r.plain for r in resolved]),
        forced_ids=np.array(
            [ids + [0] * (WIDTH - len(ids)) for ids in forced], np.int32
        ),
        num_forced=np.array([len(ids) for ids in forced], np.int32),
        stops=np.array([r.stops for r in resolved]),
    )
    streams = np.array([stream for *_, stream in padded], np.int32)
    phases = [SOLVE if way == "solves" else THINK for *_, way, _ in padded]
    tokens, marks, state = jax.device_get(
        run_machine(streams, budget, np.array(phases, np.int32), ends)
    )
    for i, (t, s, _, room, way, stream) in enumerate(rows):
        stops, solves = way == "stop", way == "solves"
        if (solves and s == 0) or (stops and t == 0) or (stops and room == (s or 1)):
            continue  # a response of no token, which the machine is never given
        want = reference(stream, t, s, forced[i], room, ends, CLOSE, stops, solves)
        count = int(state.num_tokens[i])
        got = (
            tokens[i, :count].tolist(),
            marks[i, :count].tolist(),
            int(state.thinking_tokens[i]),
            int(state.solution_tokens[i]),
            THINKING_ENDS[state.end[i]],
            FINISH_REASONS[state.finish[i]],
        )
        assert got == want, (t, s, room)
        assert state.phase[i] == DONE
        # The laws, beside the reference: worst-case length, one forced closer at most.
        most = len(forced[i]) if way == "force" else 0
        limit = room if t is None or s is None else min(room, t + most + s)
        assert count <= limit
        assert sum(marks[i, :count]) in (0, len(forced[i]) if way == "force" else 0)
        assert solves or t is None or state.thinking_tokens[i] <= t
        assert s is None or state.solution_tokens[i] <= s


def one_row(stream, thinking, solution, phase=THINK, text=(), total=STEPS):
    forced = [*text, CLOSE]
    budget = Budget(
        thinking=np.array([thinking], np.int32),
        solution=np.array([solution], np.int32),
        total=np.array([total], np.int32),
        plain=np.array([False]),
        forced_ids=np.array([forced + [0] * (WIDTH - len(forced))], np.int32),
        num_forced=np.array([len(forced)], np.int32),
        stops=np.array([False]),
    )
    padded = np.array([stream + [5] * (STEPS - len(stream))], np.int32)
    tokens, marks, state = jax.device_get(
        run_machine(padded, budget, np.array([phase], np.int32))
    )
    count = int(state.num_tokens[0])
    return tokens[0, :count].tolist(), marks[0, :count].tolist(), state


def test_edges_spelled_out():
    # t = 0: forced at once, and nothing is sampled while thinking.
    tokens, marks, state = one_row([9, 9, 9], 0, 2)
    assert (tokens, marks) == ([CLOSE, 9, 9], [True, False, False])
    assert (state.thinking_tokens[0], state.solution_tokens[0]) == (0, 2)
    # A natural `</think>` as exactly the t-th token closes; nothing is forced.
    tokens, marks, state = one_row([9, CLOSE, 9, EOS], 2, 5)
    assert (tokens, any(marks)) == ([9, CLOSE, 9, EOS], False)
    assert THINKING_ENDS[state.end[0]] == "model"
    # EOS when t is used up already: the end is the budget.
    tokens, _, state = one_row([9, EOS, EOS], 1, 5)
    assert tokens == [9, CLOSE, EOS]
    assert THINKING_ENDS[state.end[0]] == "budget"
    # EOS while thinking is replaced and counts nowhere; the inserted text comes before
    # `</think>`.
    tokens, marks, state = one_row([9, EOS, 5, 5, 9, EOS], 5, 5, text=TEXT)
    assert tokens == [9, *TEXT, CLOSE, 9, EOS]
    assert marks == [False, True, True, True, False, False]
    assert (state.thinking_tokens[0], THINKING_ENDS[state.end[0]]) == (
        1,
        "eos",
    )
    # `</think>` in the solution is an ordinary token.
    tokens, _, _ = one_row([CLOSE, CLOSE, CLOSE, EOS], 5, 5)
    assert tokens == [CLOSE, CLOSE, CLOSE, EOS]
    # EOS as exactly the s-th token: the model stopped.
    _, _, state = one_row([CLOSE, 9, EOS], 5, 2)
    assert FINISH_REASONS[state.finish[0]] == "stop"
    # s = 0: done as soon as thinking is closed.
    tokens, _, state = one_row([9, 9], 1, 0)
    assert tokens == [9, CLOSE]
    assert FINISH_REASONS[state.finish[0]] == "solution_budget"
    # A model without `</think>` is in its solution from the start.
    tokens, _, state = one_row([9, 9, 9], 0, 2, phase=SOLVE)
    assert (tokens, state.thinking_tokens[0], state.end[0]) == ([9, 9], 0, 0)


def test_resolve_budget_reserves_the_solution():
    def resolve(t, s, num_prompt, num_forced, cache_len, **kw):
        params = SamplingParams(thinking_budget=t, solution_budget=s)
        return resolve_budget(
            params, num_prompt, num_forced, cache_len, "prompt 4", **kw
        )

    assert resolve(10, 5, 3, 1, 100)[:2] == (10, 5)
    assert resolve(None, 5, 3, 1, 100).thinking == 100 - 3 - 1 - 5
    assert not resolve(None, 5, 3, 1, 100).was_cut
    cut = resolve(1000, 5, 3, 2, 100)
    assert (cut.thinking, cut.was_cut) == (90, True)
    assert (
        resolve(10, None, 3, 1, 14).thinking == 9
    )  # one token is kept for the solution
    assert resolve(0, 5, 3, 1, 9).thinking == 0  # fits to the last token
    assert resolve(None, None, 3, 1, 9).plain
    for bad in [
        (0, 6, 3, 1, 9),
        (10, 5, 3, 1, 8),
        (None, None, 9, 1, 9),
        (10, None, 8, 1, 9),
    ]:
        with pytest.raises(
            UserError, match=rf"prompt 4: .*{bad[2]} tokens.*cache_len={bad[4]}"
        ):
            resolve(*bad)
    # Without `</think>`: plain sampling under the solution budget, nothing reserved for
    # a forced end.
    assert resolve(None, 6, 3, 1, 9, can_think=False)[1:3] == (6, 6)
    with pytest.raises(UserError, match="no </think> token"):
        resolve(10, 5, 3, 1, 100, can_think=False)


def numpy_kept(logits, temperature, top_k, top_p):
    """Sorted, float64; ties with the last token kept stay, in both cuts."""
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    p /= p.sum()
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        reached = np.nonzero(np.cumsum(p[order]) >= top_p)[0]
        if len(reached):
            p = np.where(p >= p[order[reached[0]]], p, 0)
    return p / p.sum()


@jax.jit
def kept_in_jax(logits, temperature, top_k, top_p):
    return top_k_top_p_mask(_gaps(logits, temperature), top_k, top_p)


def kept(logits, temperature, top_k, top_p):
    rows = len(logits)
    temperature, top_p = (np.full(rows, x, np.float32) for x in (temperature, top_p))
    return np.asarray(kept_in_jax(logits, temperature, np.full(rows, top_k), top_p))


@pytest.mark.parametrize("vocab", [2, 7, 333, 5001])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_kept_set_is_that_of_numpy(vocab, temperature):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(8, vocab)).astype(np.float32) * 3
    logits[1] = np.round(logits[1])  # many exact ties
    logits[2, : vocab // 2] = -np.inf
    logits[3] = 2.5  # all tied
    for top_k in (0, 1, 2, 5, vocab, 10 * vocab):
        for top_p in (1.0, 0.999, 0.95, 0.5, 0.1, 1e-6):
            got = kept(logits, temperature, top_k, top_p)
            for row in range(8):
                # With both cuts off an impossible token (p = 0) is kept, and never
                # drawn.
                mine = got[row] & np.isfinite(logits[row])
                want = numpy_kept(logits[row], temperature, top_k, top_p) > 0
                assert (mine == want).all(), (row, top_k, top_p)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_kept_set_is_that_of_numpy_on_a_full_vocabulary(scale):
    """Tens of thousands of tokens kept, each of some 1e-7: sums must be exact."""
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=(4, 152064)) * scale).astype(np.float32)
    for top_p in (0.999, 0.95):
        exact = float(np.float32(top_p))
        got = kept(logits, 0.6, 0, top_p)
        for row in range(4):
            assert (got[row] == (numpy_kept(logits[row], 0.6, 0, exact) > 0)).all()


@pytest.mark.parametrize("vocab", [2**19 - 1, 2**19, 2**20 + 5])
def test_sums_do_not_overflow_on_a_huge_vocabulary(vocab):
    """4096 for each of 2^19 ids is 2^31."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(3, vocab)).astype(np.float32)
    logits[1] *= 1e-3  # all of nearly the same weight
    logits[2] = 2.5  # all tied
    for top_p in (0.999, 0.5):
        exact = float(np.float32(top_p))
        got = kept(logits, 0.6, 0, top_p)
        for row in range(3):
            assert (got[row] == (numpy_kept(logits[row], 0.6, 0, exact) > 0)).all()


@pytest.mark.cpu
@pytest.mark.parametrize("vocab", [7, 128, 333])
def test_the_kernel_for_tpus_keeps_the_same_tokens(vocab, monkeypatch):
    """To the bit, whatever the options of the rows beside; run by the interpreter."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(6, vocab)).astype(np.float32) * 3
    logits[1] = np.round(logits[1])  # many exact ties
    logits[2, : vocab // 2] = -np.inf
    gaps = _gaps(jnp.asarray(logits), jnp.full(6, 0.6))
    top_k = jnp.array([0, 3, 0, 2 * vocab, 0, 1])
    top_p = jnp.array([0.95, 0.9, 0.999, 0.5, 1.0, 1e-6], jnp.float32)
    want = top_k_top_p_mask(gaps, top_k, top_p)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1])[None], ("data", "tensor"))
    set_everywhere(monkeypatch, "on_tpu", lambda mesh: mesh is not None)
    kernel = jax.jit(lambda *options: top_k_top_p_mask(gaps, *options, mesh))
    with pltpu.force_tpu_interpret_mode(True):
        np.testing.assert_array_equal(kernel(top_k, top_p), want)
        off = jnp.zeros_like(top_k)
        got = kernel(off, top_p)
    np.testing.assert_array_equal(got, top_k_top_p_mask(gaps, off, top_p))


@pytest.mark.parametrize("vocab, draws", [(7, 40), (333, 40), (152064, 12)])
def test_draws_until_a_token_is_kept_are_draws_among_the_kept(vocab, draws):
    """The same tokens, whatever the options of the rows beside."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(8, vocab)).astype(np.float32) * 3
    logits[1] = np.round(logits[1])  # many exact ties
    logits[2, : vocab // 2] = -np.inf
    logits[6] = 2.5  # all tied
    logits[7, :4] = np.log([0.5, 0.3, 0.1, 0.1])  # reaches 0.8 but for rounding
    logits[7, 4:] = -np.inf
    gaps = _gaps(jnp.asarray(logits), jnp.full(8, 0.6).at[7].set(1))
    top_k = jnp.array([0, 3, 0, 2 * vocab, 0, 1, 0, 0])
    top_p = jnp.array([0.3, 0.9, 0.999, 0.5, 1.0, 1e-6, 0.1, 0.8], jnp.float32)
    among_kept = top_k_top_p_mask(gaps, top_k, top_p)
    draw = jax.jit(_draw_until_kept)
    rejected = 0
    for seed in range(draws):
        noisy = jax.random.gumbel(jax.random.key(seed), gaps.shape) - gaps
        want = jnp.argmax(jnp.where(among_kept, noisy, -jnp.inf), axis=-1)
        np.testing.assert_array_equal(draw(noisy, gaps, top_k, top_p), want)
        rejected += int((noisy.argmax(axis=-1) != want).sum())
    assert rejected > 0.75 * draws
    nothing = jnp.full_like(gaps, jnp.nan)
    assert draw(nothing, nothing, top_k, top_p).shape == (8,)  # it ends


@pytest.mark.parametrize(
    "shares, top_p, count",
    [
        ([5, 3, 2], 0.8, 2),
        ([4, 3, 1, 1, 1], 0.7, 2),
        ([6, 4], 0.6, 1),
        ([7, 2, 1], 0.9, 2),
    ],
)
def test_a_share_that_is_top_p_but_for_rounding_reaches_it(shares, top_p, count):
    logits = np.log(np.array([shares], np.float32) / 10)
    assert kept(logits, 1.0, 0, top_p).sum() == count


def test_top_p_keeps_the_token_that_crosses_and_its_ties():
    logits = np.log(np.array([[0.4, 0.3, 0.1, 0.1, 0.1]], np.float32))
    assert kept(logits, 1.0, 0, 0.39).tolist() == [[True, False, False, False, False]]
    assert kept(logits, 1.0, 0, 0.4).tolist() == [[True, False, False, False, False]]
    assert kept(logits, 1.0, 0, 0.41).tolist() == [[True, True, False, False, False]]
    assert kept(logits, 1.0, 0, 0.75).tolist() == [[True] * 5]
    # Top-p counts the mass that top-k left: 0.4 / 0.7 of it is the first token.
    assert kept(logits, 1.0, 2, 0.57).tolist() == [[True, False, False, False, False]]


def draw_many(logits, count, temperature, top_k, top_p, seed=5):
    rows = jnp.arange(count)
    settings = Sampling(
        jnp.full((count,), temperature, jnp.float32),
        jnp.full((count,), top_p, jnp.float32),
        jnp.full((count,), top_k),
        jnp.tile(jnp.array([seed, 0], jnp.uint32), (count, 1)),
        rows,
    )
    keys = token_keys(row_keys_of(settings), jnp.zeros_like(rows))
    return np.asarray(
        sample_token(jnp.tile(jnp.asarray(logits)[None], (count, 1)), keys, settings)
    )


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.6, 0, 0.95), (1.7, 4, 1.0), (0.8, 5, 0.7)],
)
def test_frequencies(temperature, top_k, top_p):
    logits = np.random.default_rng(1).normal(size=11).astype(np.float32)
    want = numpy_kept(logits, temperature, top_k, top_p)
    count = 20000
    drawn = draw_many(logits, count, temperature, top_k, top_p)
    got, want = np.bincount(drawn, minlength=11), want * count
    assert (got[want == 0] == 0).all()
    # Pearson's chi-squared, six standard deviations above its mean.
    chosen = want > 0
    freedom = chosen.sum() - 1
    distance = ((got - want)[chosen] ** 2 / want[chosen]).sum()
    assert distance <= freedom + 6 * np.sqrt(2 * freedom)


def test_greedy_and_tiny_temperature():
    logits = np.array([0.1, 3.0, 2.999, -5.0], np.float32)
    assert (draw_many(logits, 50, 0.0, 0, 1.0) == 1).all()
    assert (draw_many(logits, 50, 1e-30, 0, 0.9) == 1).all()


def test_logprobs_are_of_the_tempered_full_distribution():
    logits = np.random.default_rng(2).normal(size=(5, 77)).astype(np.float32) * 4
    temperature = np.array([1.0, 0.6, 0.0, 2.0, 1e-30], np.float32)
    tokens = np.array([3, 76, 0, 9, int(logits[4].argmax())], np.int32)
    got = np.asarray(
        token_logprobs(
            jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(temperature)
        )
    )
    for row in range(5):
        scaled = logits[row].astype(np.float64) / (temperature[row] or 1.0)
        want = (
            scaled[tokens[row]]
            - scaled.max()
            - np.log(np.exp(scaled - scaled.max()).sum())
        )
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-5)


def test_keys_depend_on_seed_sample_and_index_alone():
    def keys(seeds, samples, index):
        rows = len(seeds)
        seeds = jnp.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], jnp.uint32)
        zeros = jnp.zeros((rows,))
        row_keys = row_keys_of(
            Sampling(zeros, zeros, zeros.astype(jnp.int32), seeds, jnp.array(samples))
        )
        made = token_keys(row_keys, jnp.array(index))
        return [tuple(data) for data in np.asarray(jax.random.key_data(made)).tolist()]

    first = keys([1, 1, 1, 2, 2**32 + 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0])
    assert len(set(first)) == 5
    assert keys([2, 1], [0, 1], [0, 0]) == [first[3], first[1]]
