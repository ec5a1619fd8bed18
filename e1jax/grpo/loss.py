"""The maths of GRPO (arXiv 2402.03300), as Elastic Reasoning trains with it
(arXiv 2505.05315): advantages, loss, and weights of tokens.

Pure functions. B are responses, N prompts with G responses each, R response positions.
Masks made from lengths say which tokens of a response count, never a comparison of token
ids: end-of-sequence and padding may be the same id.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from e1jax.config.checks import UserError, check_choice
from e1jax.config.training import LossConfig

Metrics = dict[str, Array]


_MOST_NATS = 88.0  # whose exp is a float32


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
    # The mean of equal rewards is rounded by as much as the 1e-6 below; the mean of
    # zeros is exactly 0.
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
    `ref_logprobs` is None though kl_coef is not 0, or for a setting that LossConfig
    refuses.
    """
    options: dict[str, Any] = {"clip": clip, "aggregate": aggregate, "kl_coef": kl_coef}
    if max_ratio is not None:
        options |= {"old_logprobs": "sampler", "max_ratio": max_ratio}
    config = LossConfig(clip_low=clip_low, clip_high=clip_high, **options)
    return configured_loss(
        config, logprobs, old_logprobs, ref_logprobs, advantages, loss_mask
    )


def configured_loss(
    config: LossConfig,
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"] | None,
    advantages: Float[Array, " B"],
    loss_mask: Shaped[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """`policy_loss` with its settings in one value; entropy is not part of it."""
    if ref_logprobs is None and config.kl_coef:
        raise UserError(
            f"kl_coef={config.kl_coef} needs ref_logprobs; give them, or kl_coef=0"
        )
    mask = loss_mask > 0
    weights = token_weights(mask, config.aggregate)

    def mean(values):
        return (values * weights).sum()

    def difference(a, b):
        return jnp.where(mask, a - b, 0.0)

    # A term without an advantage is 0, and not the NaN of 0 * infinity where exp overflows.
    infinite = (advantages == 0)[:, None] & (logprobs - old_logprobs > _MOST_NATS)
    gap = jnp.where(infinite, 0.0, difference(logprobs, old_logprobs))
    if config.old_logprobs == "sampler":  # the value is cut off, the gradient is not
        largest = jnp.log(config.max_ratio)
        gap += jax.lax.stop_gradient(jnp.minimum(gap, largest) - gap)
    ratio = jnp.exp(gap)
    losses, cut = SURROGATES[config.clip](config, ratio, advantages[:, None])
    loss = mean(losses)
    kl = jnp.float32(0)
    if ref_logprobs is not None:
        gap = difference(ref_logprobs, logprobs)
        kl = mean(jnp.expm1(gap) - gap)
        loss += config.kl_coef * kl
    return loss, {"kl": kl, "clip_fraction": mean(cut), "ratio": mean(ratio)}


Surrogate = Callable[
    [LossConfig, Float[Array, "B R"], Float[Array, "B 1"]],
    tuple[Float[Array, "B R"], Bool[Array, "B R"]],
]


def clipped_surrogate(config, ratio, advantages):
    """PPO, arXiv 1707.06347, equation 7: no gain beyond the bounds of the ratio."""
    plain = -advantages * ratio
    bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    clipped = -advantages * bounded
    cut = clipped > plain  # no maximum, which where they are equal halves the gradient
    return jnp.where(cut, clipped, plain), cut


def plain_surrogate(config, ratio, advantages):
    """Without a clip, as the reference code of Elastic Reasoning computes it."""
    return -advantages * ratio, jnp.zeros_like(ratio, bool)


# By `loss.clip`: (config, ratio, advantages) -> each token's loss, and whether it was cut.
SURROGATES: dict[str, Surrogate] = {
    "ppo": clipped_surrogate,
    "none": plain_surrogate,
}


def token_weights(mask: Shaped[Array, "B R"], aggregate: str) -> Float[Array, "B R"]:
    """How much each token counts in a mean; they sum to 1, or to 0 without any token.

    Raises UserError for an unknown `aggregate`.
    """
    check_choice("aggregate", aggregate, tuple(AGGREGATES))
    weights = AGGREGATES[aggregate]((mask > 0).astype(jnp.float32))
    # A sum of whole rows is their number, up to rounding; below 1 there is none.
    return weights / jnp.maximum(weights.sum(), 1)


def each_token(mask: Float[Array, "B R"]) -> Float[Array, "B R"]:
    """Tokens count alike: DAPO, arXiv 2503.14476, equation 8."""
    return mask


def each_response(mask: Float[Array, "B R"]) -> Float[Array, "B R"]:
    """Responses count alike, long or short: GRPO, arXiv 2402.03300, equation 3."""
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


# By `loss.aggregate`: mask of 1 and 0 -> weights of tokens, up to a common factor.
AGGREGATES: dict[str, Callable[[Float[Array, "B R"]], Float[Array, "B R"]]] = {
    "token": each_token,
    "sequence": each_response,
}
