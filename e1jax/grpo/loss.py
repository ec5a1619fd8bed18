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
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from e1jax.config.checks import UserError, check_choice
from e1jax.config.training import LossConfig

Metrics = dict[str, Array]


_LARGEST = np.finfo(np.float32).max


def group_advantages(
    rewards: Float[Any, "N G"], *, scale: bool = True
) -> Float[Array, "N G"]:
    """Advantage of each response over the mean of the G responses to its prompt.

    With `scale`, it is divided by their standard deviation: see `scaled_advantages`,
    else `centred_advantages`. Raises UserError for fewer than two responses, which have
    nothing to be compared with. Equal rewards give exactly 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise UserError(
            f"rewards of shape {list(rewards.shape)} are no groups; give [N, G] with 2 "
            "or more responses a prompt"
        )
    # The mean of equal rewards is rounded by as much as the 1e-6 in the quotient; the
    # mean of zeros is exactly 0.
    return ADVANTAGES[scale](rewards - rewards[:, :1])


def scaled_advantages(rewards: Float[Array, "N G"]) -> Float[Array, "N G"]:
    """(r - mean) / (std + 1e-6): GRPO, arXiv 2402.03300, section 4.1.2.

    The standard deviation is the unbiased one, as in the reference code of Elastic
    Reasoning.
    """
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    return centred_advantages(rewards) / (std + 1e-6)


def centred_advantages(rewards: Float[Array, "N G"]) -> Float[Array, "N G"]:
    """r - mean: Dr. GRPO, arXiv 2503.20783, section 3.2. The division by the standard
    deviation would weigh prompts more that are nearly always right or nearly never."""
    return rewards - rewards.mean(axis=1, keepdims=True)


# By `scale` of group_advantages.
ADVANTAGES: dict[bool, Callable[[Float[Array, "N G"]], Float[Array, "N G"]]] = {
    True: scaled_advantages,
    False: centred_advantages,
}


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

    (PPO, arXiv 1707.06347, equation 7; no dual clip). `clip` names another surrogate of
    SURROGATES: "none", "cispo" or "gspo".
    With `max_ratio`, a larger ratio counts, and is differentiated, as that multiple of
    the policy gradient: truncated importance sampling, for `old_logprobs` of a
    sampler that computes a little otherwise. The divergence is k3,
    exp(ref - logprobs) - (ref - logprobs) - 1, not clamped
    (http://joschu.net/blog/kl-approx.html).

    `loss_mask` (bool, or 1 and 0) says which tokens count; where it does not, the other
    arrays may hold anything, even NaN.
    aggregate="token" is the mean over all tokens that count, "sequence" the mean over
    responses of each one's mean; a response without a token that counts is left out.
    "constant" is the sum over the tokens that count, divided by B * R.

    Metrics, means of the same kind: kl (0 without reference), clip_fraction (share of
    tokens whose clipped term is the one that counts), ratio. Raises UserError if
    `ref_logprobs` is None though kl_coef is not 0, or for a setting that LossConfig
    refuses.
    """
    options: dict[str, Any] = {"clip": clip, "aggregate": aggregate, "kl_coef": kl_coef}
    if max_ratio is not None:
        options |= {"old_logprobs": "sampler", "max_ratio": max_ratio}
    config = LossConfig(clip_low=clip_low, clip_high=clip_high, **options)
    loss, metrics = configured_loss(
        config, logprobs, old_logprobs, ref_logprobs, advantages, loss_mask
    )
    return loss * loss_scale(loss_mask, aggregate, loss_mask.shape[1]), metrics


def configured_loss(
    config: LossConfig,
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"] | None,
    advantages: Float[Array, " B"] | Float[Array, "B R"],
    loss_mask: Shaped[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """`policy_loss` with its settings in one value, before `loss_scale`; entropy is not
    part of it. Tokens may have advantages of their own."""
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

    logprobs = jnp.where(mask, logprobs, 0.0)
    gap = difference(logprobs, old_logprobs)
    if config.clip == "gspo":
        gap = response_gap(gap, mask)
    if config.old_logprobs == "sampler":  # the value is cut off, the gradient is not
        largest = jnp.log(config.max_ratio)
        gap += jax.lax.stop_gradient(jnp.minimum(gap, largest) - gap)
    ratio = _exp(gap)
    advantages = advantages.reshape(len(advantages), -1)
    losses, cut = SURROGATES[config.clip](config, ratio, advantages, logprobs)
    # Without an advantage there is no term, not even where the ratio is infinite.
    loss = mean(jnp.where(advantages == 0, 0.0, losses))
    kl = jnp.float32(0)
    if ref_logprobs is not None:
        gap = difference(ref_logprobs, logprobs)
        kl = mean(jnp.expm1(gap) - gap)
        loss += config.kl_coef * kl
    ratio = jnp.minimum(ratio, _LARGEST)  # a metric must be finite
    return loss, {"kl": kl, "clip_fraction": mean(cut), "ratio": mean(ratio)}


def _exp(gap: Float[Array, "B R"]) -> Float[Array, "B R"]:
    """exp(gap), whose gradient is 0 where it is infinite: a term that the clip or an
    advantage of 0 cuts off would have the gradient 0 * infinity, which is NaN."""
    overflows = jnp.exp(gap) == jnp.inf
    return jnp.where(overflows, jnp.inf, jnp.exp(jnp.where(overflows, 0.0, gap)))


def response_gap(
    gap: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """The mean of log-ratios over a response, for each of its tokens: its exponential is
    the ratio of GSPO, arXiv 2507.18071, equation 7."""
    counts = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.where(mask, gap.sum(axis=1, keepdims=True) / counts, 0.0)


Surrogate = Callable[
    [LossConfig, Float[Array, "B R"], Float[Array, "B _R"], Float[Array, "B R"]],
    tuple[Float[Array, "B R"], Bool[Array, "B R"]],
]


def clipped_surrogate(config, ratio, advantages, logprobs):
    """PPO, arXiv 1707.06347, equation 7: no gain beyond the bounds of the ratio."""
    plain = -advantages * ratio
    bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    clipped = -advantages * bounded
    cut = clipped > plain  # no maximum, which where they are equal halves the gradient
    return jnp.where(cut, clipped, plain), cut


def plain_surrogate(config, ratio, advantages, logprobs):
    """Without a clip, as the reference code of Elastic Reasoning computes it."""
    return -advantages * ratio, jnp.zeros_like(ratio, bool)


def clipped_weight_surrogate(config, ratio, advantages, logprobs):
    """CISPO, arXiv 2506.13585, equations 4 and 5: the clipped ratio is the weight of a
    token's log-probability, and is not differentiated, so that no token is left out."""
    weight = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    weight = jax.lax.stop_gradient(weight)
    return -advantages * weight * logprobs, weight != ratio


# By `loss.clip`: (config, ratio, advantages, logprobs) -> each token's loss, and whether
# it was cut. GSPO (arXiv 2507.18071, equation 5) is the clipped surrogate of one ratio for
# all tokens of a response: see `response_gap`.
SURROGATES: dict[str, Surrogate] = {
    "ppo": clipped_surrogate,
    "none": plain_surrogate,
    "cispo": clipped_weight_surrogate,
    "gspo": clipped_surrogate,
}


def token_weights(mask: Shaped[Array, "B R"], aggregate: str) -> Float[Array, "B R"]:
    """How much each token counts in a mean; they sum to 1, or to 0 without any token.

    Raises UserError for an unknown `aggregate`.
    """
    check_choice("aggregate", aggregate, tuple(AGGREGATES))
    weights = AGGREGATES[aggregate]((mask > 0).astype(jnp.float32))
    # The weights of a complete row sum to 1, up to rounding; below 1 there is no row.
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
    "constant": each_token,  # with a factor of its own, see `loss_scale`
}


def loss_scale(
    mask: Shaped[Array, "... R"], aggregate: str, longest: int
) -> Float[Array, ""]:
    """The factor of a mean with `token_weights` that makes it the loss: 1, but for
    "constant" the number of tokens that count, divided by responses times `longest`, the
    tokens of the longest response that can come (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    if aggregate != "constant":
        return jnp.float32(1)
    responses = mask.size // mask.shape[-1]
    return (mask > 0).sum() / jnp.float32(responses * longest)
