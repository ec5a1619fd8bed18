"""Low-rank adapters beside the kernels of linear layers (LoRA, arXiv 2106.09685).

The product of a layer, x @ W, becomes x @ W + alpha / r * (x @ A) @ B. W is frozen, and may
be int8 (QLoRA, arXiv 2305.14314, has 4 bits); A [I, r] and B [r, O] are trained, and are all
that a checkpoint holds. B is 0 at first, so that training begins with the model itself.

An adapter is never added to W, neither to train nor to sample: bfloat16 has 8 bits, so an
update that is small beside W would round to nothing.

Two forms of the parameters:

- an adapter on its own: {"attention": {"q": {"a": [L, I, r], "b": [L, r, O]}}, ...};
- with the model: `add_adapter` puts {"a", "b"} as "adapter" beside each kernel, and with
  scaled B, so that the model knows nothing of alpha.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from e1jax.nn.quantize import Packed, Params

# The part of a block that each linear layer is in.
PARTS: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


class Adapted(NamedTuple):
    """A kernel and the adapter beside it, as `Linear` takes them."""

    kernel: jax.Array | Packed  # [I, O]
    a: jax.Array  # [I, r]
    b: jax.Array  # [r, O], scaled by alpha / r


def scaled(adapter: Params, scale: float) -> Params:
    """The adapter with B times alpha / r, as `add_adapter` takes it."""
    return {
        part: {
            name: {"a": pair["a"], "b": pair["b"] * scale}
            for name, pair in linears.items()
        }
        for part, linears in adapter.items()
    }


def add_adapter(params: Params, adapter: Params) -> Params:
    """The parameters of a model with an adapter, whose B is scaled. The leaves of both may
    be anything, as shardings, in place of arrays."""
    layers = dict(params["layers"])
    for part, linears in adapter.items():
        beside = {
            name: layers[part][name] | {"adapter": pair}
            for name, pair in linears.items()
        }
        layers[part] = layers[part] | beside
    return params | {"layers": layers}


def attach_adapters(weights: Params) -> Params:
    """The weights of a layer with each kernel that has an adapter as `Adapted`."""
    attached: dict[str, Any] = {
        name: attach_adapters(part) if isinstance(part, dict) else part
        for name, part in weights.items()
    }
    if pair := attached.pop("adapter", None):
        attached["kernel"] = Adapted(attached["kernel"], pair["a"], pair["b"])
    return attached


def adapted_product(
    product: Callable[..., jax.Array], x: jax.Array, kernel: Any
) -> jax.Array:
    """`product(x, kernel)`, and the adapter's product added if the kernel has one."""
    if not isinstance(kernel, Adapted):
        return product(x, kernel)
    return product(x, kernel.kernel) + product(product(x, kernel.a), kernel.b)
