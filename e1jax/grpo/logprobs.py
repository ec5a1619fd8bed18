"""Log-probabilities of responses, in chunks, so that logits of all positions never exist."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from e1jax.config.model import ModelConfig
from e1jax.nn.attention import SharedPrompts
from e1jax.nn.chunks import map_logits, target_logprobs
from e1jax.nn.model import GatherParams, forward
from e1jax.nn.quantize import Params


class Solutions(NamedTuple):
    """Rows of thoughts, each followed by rows of solutions to it: the prompt of such a row
    is the thought's, then the first tokens of the thought, then `</think>`."""

    count: int  # to each thought
    longest_cut: int  # most tokens of its thought that one sees
    longest: int  # most tokens of one


def response_logprobs(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    prompt_len: Int[Array, " B"],
    response_len: int,
    temperature: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    remat: bool = False,
    gather_params: GatherParams = lambda part, name: part,
    entropy_grad: bool = False,
    samples: int = 1,
    solutions: Solutions | None = None,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-probability of each response token under the policy, and the policy's entropy.

    `tokens` are prompt and response, one after the other, then padding; R is
    `response_len`, and T at least the longest prompt plus R. Both results are of
    softmax(logits / temperature), in nats, float32, and mean nothing at padding. Prompt
    positions go through the model but not through its head. `mesh`, `remat` and
    `gather_params` go to model.forward. Each `samples` consecutive rows have the same
    prompt, which goes through the model once, unless B is not a multiple of `samples`. With
    `solutions`, these are thoughts, which go through the model once too, unless B is not a
    multiple of the rows of one.
    """

    def of_response(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, response_len)

    targets = jax.vmap(of_response)(tokens, prompt_len)
    compute = functools.partial(
        forward, config, params, mesh=mesh, remat=remat, gather_params=gather_params
    )
    # The token at a position is predicted from the position before it.
    if solutions is not None and shares_prompts(
        len(tokens), 1 + solutions.count, response_len
    ):
        parts = _hidden_of_thoughts(
            compute, tokens, targets, prompt_len, samples, solutions
        )
    elif solutions is None and shares_prompts(len(tokens), samples, response_len):
        hidden = _hidden_of_groups(compute, tokens, targets, prompt_len, samples)
        parts = [(hidden, targets)]
    else:
        inputs = tokens[:, :-1]  # the last position predicts none of them
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        hidden, _ = compute(inputs, positions)
        parts = [(jax.vmap(of_response)(hidden, prompt_len - 1), targets)]
    name = "embedding" if config.tie_word_embeddings else "lm_head"
    params = {name: gather_params(params[name], name)}  # for all chunks at once
    results = [
        chunked_logprobs(config, params, *part, temperature, entropy_grad=entropy_grad)
        for part in parts
    ]
    return results[0] if len(results) == 1 else _by_thought(results, response_len)


def shares_prompts(rows: int, samples: int, response_len: int) -> bool:
    """Whether so many rows on a device go through the model with each prompt once. A
    response of one token is predicted from the prompt alone."""
    return samples > 1 and rows % samples == 0 and response_len > 1


def _hidden_of_groups(
    compute: Callable[..., tuple[jax.Array, Any]],
    tokens: Int[Array, "B T"],
    responses: Int[Array, "B R"],
    prompt_len: Int[Array, " B"],
    samples: int,
) -> Float[Array, "B R D"]:
    """Hidden states from which the tokens of responses are predicted, `samples` of which
    in turn follow the same prompt."""
    shared = SharedPrompts(
        prompt_len[::samples], samples, tokens.shape[1] - responses.shape[1]
    )
    prompts, inputs = tokens[::samples, : shared.longest_prompt], responses[:, :-1]
    starts = jnp.zeros(len(prompts), jnp.int32), prompt_len
    return _after_prompts(*_states_of(compute, shared, (prompts, inputs), starts))


def _hidden_of_thoughts(
    compute: Callable[..., tuple[jax.Array, Any]],
    tokens: Int[Array, "B T"],
    responses: Int[Array, "B R"],
    prompt_len: Int[Array, " B"],
    samples: int,
    solutions: Solutions,
) -> list[tuple[Float[Array, "_B _R D"], Int[Array, "_B _R"]]]:
    """Hidden states from which the tokens of thoughts are predicted, and of their
    solutions, both with these tokens; see `Solutions`. `samples` thoughts in turn follow
    the same prompt, if all of a prompt are there."""
    rows = 1 + solutions.count
    if len(tokens) % (rows * samples):
        samples = 1
    longest_prompt = tokens.shape[1] - responses.shape[1] - solutions.longest_cut - 1
    thought_len = min(solutions.longest_cut, responses.shape[1] - 1)
    solution_len = min(solutions.longest, responses.shape[1])

    def of_solutions(x):
        return x.reshape(-1, rows, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:])

    of_thoughts, following = prompt_len[::rows], of_solutions(prompt_len)
    shared = SharedPrompts(
        of_thoughts[::samples],
        samples,
        longest_prompt,
        seen=following - 1 - jnp.repeat(of_thoughts, solutions.count),
        longest_response=thought_len,
    )
    prompts = tokens[:: rows * samples, :longest_prompt]
    thoughts = responses[::rows, : thought_len + 1]
    answers = of_solutions(responses)[:, :solution_len]
    ends = jnp.take_along_axis(of_solutions(tokens), following[:, None] - 1, axis=1)
    inputs = prompts, thoughts[:, :-1], jnp.concatenate([ends, answers[:, :-1]], axis=1)
    starts = jnp.zeros(len(prompts), jnp.int32), of_thoughts, following - 1
    *before, of_answers = _states_of(compute, shared, inputs, starts)
    return [(_after_prompts(*before), thoughts), (of_answers, answers)]


def _states_of(
    compute: Callable[..., tuple[jax.Array, Any]],
    shared: SharedPrompts,
    inputs: Sequence[Int[Array, "_B _T"]],
    starts: Sequence[Int[Array, " _B"]],
) -> Sequence[jax.Array]:
    """Hidden states of the parts of `shared`: of the last token of each prompt [N, D], and
    of all tokens of the others [B, T, D]. Rows begin at the positions `starts`."""
    positions = [
        start[:, None] + jnp.arange(tokens.shape[1])[None]
        for tokens, start in zip(inputs, starts, strict=True)
    ]
    tokens, positions = (
        shared.join([part[..., None] for part in parts])[..., 0]
        for parts in (inputs, positions)
    )
    hidden, _ = compute(tokens, positions, shared=shared)
    of_prompts, *others = shared.split(hidden)
    last = of_prompts[jnp.arange(len(of_prompts)), shared.prompt_len - 1]
    return last, *others


def _after_prompts(
    last: Float[Array, "N D"], following: Float[Array, "B _R D"]
) -> Float[Array, "B R D"]:
    """States of responses behind the one of their prompt's last token, which predicts the
    first token."""
    first = jnp.repeat(last, len(following) // len(last), axis=0)[:, None]
    return jnp.concatenate([first, following], axis=1)


def _by_thought(
    parts: Sequence[tuple[jax.Array, jax.Array]], response_len: int
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Values of the tokens of thoughts and of solutions as rows, see `Solutions`."""

    def rows(of_thoughts, of_solutions):
        num = len(of_thoughts)
        padded = [
            jnp.pad(x, ((0, 0), (0, response_len - x.shape[1]))).reshape(
                num, -1, response_len
            )
            for x in (of_thoughts, of_solutions)
        ]
        return jnp.concatenate(padded, axis=1).reshape(-1, response_len)

    logprobs, entropy = zip(*parts, strict=True)
    return rows(*logprobs), rows(*entropy)


def chunked_logprobs(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    temperature: Float[Array, ""],
    *,
    chunk_len: int | None = None,
    entropy_grad: bool = False,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-softmax of the logits / temperature at the targets, and the entropy there.

    The logits of `chunk_len` positions of each row exist at a time: see
    `nn.chunks.map_logits`. The entropy has a gradient, which costs time, only with
    `entropy_grad`.
    """

    def of_chunk(logits, targets):
        logits = logits / temperature
        logprobs = target_logprobs(logits, targets)
        entropy = _entropy(logits if entropy_grad else jax.lax.stop_gradient(logits))
        return logprobs, entropy

    logprobs, entropy = map_logits(
        of_chunk, config, params, hidden, targets, chunk_len=chunk_len
    )
    return logprobs, entropy


def _entropy(logits: Float[Array, "B R V"]) -> Float[Array, "B R"]:
    # Not log_mass - sum(probs * logits), which loses digits where logits are large.
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
