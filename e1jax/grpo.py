"""The maths of GRPO (arXiv 2402.03300), as Elastic Reasoning trains with it
(arXiv 2505.05315): advantages, loss, and log-probabilities of responses.

Pure functions. B are responses, N prompts with G responses each, R response positions,
T positions of prompt and response together. What counts of a response is told by masks
made from lengths, never by comparing token ids: end-of-sequence and padding may be the
same id.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from e1jax.attention import Groups
from e1jax.config import ModelConfig, UserError
from e1jax.model import Params, Whole, forward, unembed
from e1jax.sharding import on_tpu

# Tokens whose logits exist at a time: 152,064 of float32 for each of 512 are 311 MB. With
# fewer, a TPU spends its time on the gradient of the output matrix, which it reads and
# writes once per chunk.
CHUNK_TOKENS = 512

Metrics = dict[str, Array]


def group_advantages(rewards: Float[Any, "N G"]) -> Float[Array, "N G"]:
    """(reward - mean) / (std + 1e-6) among the G responses to each prompt.

    The standard deviation is the unbiased one. Raises UserError for fewer than two
    responses, which have nothing to be compared with. Equal rewards give exactly 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise UserError(
            f"rewards of shape {list(rewards.shape)} are no groups; give [N, G] with 2 "
            "or more responses a prompt"
        )
    # A rounded mean of equal rewards is off by about the 1e-6 below; that of zeros is 0.
    rewards -= rewards[:, :1]
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)


def policy_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"] | None,
    advantages: Float[Array, " B"],
    loss_mask: Shaped[Array, "B R"],
    *,
    clip: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float | None = None,
    kl_coef: float = 0.001,
    aggregate: str = "token",
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate plus `kl_coef` times the divergence from the reference policy.

    With ratio = exp(logprobs - old_logprobs) and advantage A, a token adds

        max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))

    (PPO, arXiv 1707.06347, equation 7; no dual clip), or -A * ratio for clip="none".
    With `max_ratio`, a larger ratio counts, and is differentiated, as that multiple of
    the policy gradient: truncated importance sampling, for `old_logprobs` that are those
    of a sampler which computes a little otherwise. The divergence is k3,
    exp(ref - logprobs) - (ref - logprobs) - 1, not clamped
    (http://joschu.net/blog/kl-approx.html).

    `loss_mask` (bool, or 1 and 0) says which tokens count; where it does not, the other
    arrays may hold anything, even NaN.
    aggregate="token" is the mean over all tokens that count, "sequence" the mean over
    responses of each one's mean; a response without a token that counts is left out.

    Metrics, means of the same kind: kl (0 without reference), clip_fraction (share of
    tokens whose clipped term is the one that counts), ratio. Raises UserError if
    `ref_logprobs` is None though kl_coef is not 0, or for an unknown `clip` or
    `aggregate`.
    """
    if ref_logprobs is None and kl_coef:
        raise UserError(
            f"kl_coef={kl_coef} needs ref_logprobs; give them, or kl_coef=0"
        )
    if clip not in ("ppo", "none"):
        raise UserError(f"clip must be ppo or none, not {clip!r}")
    mask = loss_mask > 0
    weights = token_weights(mask, aggregate)

    def mean(values):
        return (values * weights).sum()

    def difference(a, b):
        return jnp.where(mask, a - b, 0.0)

    gap = difference(logprobs, old_logprobs)
    if max_ratio is not None:  # the value is cut off, the gradient is not
        gap += jax.lax.stop_gradient(jnp.minimum(gap, jnp.log(max_ratio)) - gap)
    ratio = jnp.exp(gap)
    plain = -advantages[:, None] * ratio
    clipped = -advantages[:, None] * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    if clip == "none":
        clipped = plain
    cut = clipped > plain  # no maximum, which where they are equal halves the gradient
    loss = mean(jnp.where(cut, clipped, plain))
    kl = jnp.float32(0)
    if ref_logprobs is not None:
        gap = difference(ref_logprobs, logprobs)
        kl = mean(jnp.expm1(gap) - gap)
        loss += kl_coef * kl
    return loss, {"kl": kl, "clip_fraction": mean(cut), "ratio": mean(ratio)}


def token_weights(mask: Shaped[Array, "B R"], aggregate: str) -> Float[Array, "B R"]:
    """How much each token counts in a mean; they sum to 1, or to 0 without any token."""
    if aggregate not in ("token", "sequence"):
        raise UserError(f"aggregate must be token or sequence, not {aggregate!r}")
    weights = (mask > 0).astype(jnp.float32)
    if aggregate == "sequence":
        weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    # A sum of whole rows is their number, up to rounding; below 1 there is none.
    return weights / jnp.maximum(weights.sum(), 1)


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
    whole: Whole = lambda part, name: part,
    entropy_grad: bool = False,
    samples: int = 1,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-probability of each response token under the policy, and the policy's entropy.

    `tokens` are prompt and response, one after the other, then padding; R is
    `response_len`, and T at least the longest prompt plus R. Both results are of
    softmax(logits / temperature), in nats, float32, and mean nothing at padding. Prompt
    positions go through the model but not through its head. `mesh`, `remat` and `whole`
    are those of model.forward. `samples` rows in turn have the same prompt: it goes
    through the model once with them, where the rows are whole groups, and not on TPUs.
    """

    def of_response(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, response_len)

    targets = jax.vmap(of_response)(tokens, prompt_len)
    compute = functools.partial(
        forward, config, params, mesh=mesh, remat=remat, whole=whole
    )
    # The token at a position is predicted from the position before it.
    whole_groups = samples > 1 and len(tokens) % samples == 0
    if whole_groups and response_len > 1 and not on_tpu(mesh):
        hidden = _hidden_of_groups(compute, tokens, targets, prompt_len, samples)
    else:
        inputs = tokens[:, :-1]  # the last position predicts none of them
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        hidden, _ = compute(inputs, positions)
        hidden = jax.vmap(of_response)(hidden, prompt_len - 1)
    name = "embedding" if config.tie_word_embeddings else "lm_head"
    params = {name: whole(params[name], name)}  # for all chunks at once
    return chunked_logprobs(
        config, params, hidden, targets, temperature, entropy_grad=entropy_grad
    )


def _hidden_of_groups(
    compute: Callable[..., tuple[jax.Array, Any]],
    tokens: Int[Array, "B T"],
    responses: Int[Array, "B R"],
    prompt_len: Int[Array, " B"],
    samples: int,
) -> Float[Array, "B R D"]:
    """Hidden states from which the tokens of responses are predicted, `samples` of which
    in turn follow the same prompt."""
    groups = Groups(
        prompt_len[::samples], samples, tokens.shape[1] - responses.shape[1]
    )
    prompts, inputs = tokens[::samples, : groups.longest_prompt], responses[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    following = prompt_len[:, None] + jnp.arange(inputs.shape[1])[None]
    inputs, positions = (
        groups.join((a[..., None], b[..., None]))[..., 0]
        for a, b in ((prompts, inputs), (positions, following))
    )
    hidden, _ = compute(inputs, positions, groups=groups)
    of_prompts, of_responses = groups.split(hidden)
    last = of_prompts[jnp.arange(len(of_prompts)), groups.prompt_len - 1]
    first = jnp.repeat(last, samples, axis=0)[:, None]
    return jnp.concatenate([first, of_responses], axis=1)


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

    The logits of `chunk_len` positions of each row (None: of about CHUNK_TOKENS tokens)
    exist at a time, forward and backward (they are computed again), never [B, R, V]. Rows
    are not mixed, so they may be split over devices. The entropy has a gradient, which
    costs time, only with `entropy_grad`.
    """
    batch, length = targets.shape
    if chunk_len is None:  # chunks of one size, so that none is mostly padding
        chunk_len = -(-length // max(1, round(batch * length / CHUNK_TOKENS)))
    chunk_len = min(chunk_len, length)
    num_chunks = -(-length // chunk_len)
    padding = num_chunks * chunk_len - length

    def split(x):  # [B, R, ...] to [chunks, B, chunk_len, ...]
        x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, num_chunks, chunk_len, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    @jax.checkpoint
    def step(carry, chunk):
        hidden, targets = chunk
        logits = unembed(config, params, hidden) / temperature
        # Not a gather, for which the logits of a vocabulary that lies over several
        # devices would be sent around.
        is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        chosen = jnp.where(is_target, logits, 0.0).sum(axis=-1)
        log_mass = jax.nn.logsumexp(logits, axis=-1)
        entropy = _entropy(logits if entropy_grad else jax.lax.stop_gradient(logits))
        return carry, (chosen - log_mass, entropy)

    _, (logprobs, entropy) = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return join(logprobs), join(entropy)


def _entropy(logits: Float[Array, "B R V"]) -> Float[Array, "B R"]:
    # Not log_mass - sum(probs * logits), which loses digits where logits are large.
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
