"""Weights, keys and values that are stored in fewer bits than they are computed with.

Two forms, each a dict in the place of a kernel [..., I, O] or the embedding [V, D]:

- int8, {"values": int8, "scale": float32}: a value times the scale of its output channel,
  [..., O], or of its row of the embedding, [V]. Symmetric, by the channel's largest
  absolute value, as in LLM.int8() without outliers (arXiv 2208.07339, section 2.1).
- {"values": uint16}: the bits of bfloat16, on a CPU only. XLA there makes a float32 copy
  of every bfloat16 array that it slices, of the cache and the weights of all layers,
  and its bfloat16 products are several times slower than float32 ones.

A product with either widens the kernel a slab at a time (`in_slabs`, on a CPU), for few
rows small enough to stay in the processor's cache; else the compiler widens while it reads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from e1jax.nn.norm import over_last

# Nested dicts of arrays. Under "layers", arrays are stacked on a leading dim L, or there
# is a list with a dict per layer, as nn.cpu.unstack gives it.
Params = dict[str, Any]


LARGEST = 127  # of int8; -128 is not used, so that signs are alike


# Scales of a cache's vectors are stored in rows of so many positions, the width of a TPU's
# registers, so that a scale is written as a key's vector is.
LANES = 128


# Bytes of a widened slab: of a few rows of activations, and of many, for which adding up
# the results of each slab would cost more than its products.
_SLAB_BYTES = {False: 2**23, True: 2**26}


_MANY_ROWS = 64


class Packed(NamedTuple):
    """A kernel in one of the two forms, or one layer of a stack of them."""

    values: jax.Array  # [I, O] ([V, D]), or [L, I, O] with a layer; int8 or uint16
    scale: jax.Array | None  # float32 [O] ([V]) or [L, O]; None for uint16
    layer: jax.Array | None  # [] int32
    in_slabs: bool

    @property
    def stack(self) -> tuple[jax.Array, Any]:
        """The values as a stack, and the index of the kernel in it."""
        if self.layer is None:
            return self.values[None], 0
        return self.values, self.layer


def is_packed(leaf: Any) -> bool:
    """Whether a node of the parameters is an int8 array with its scales."""
    return isinstance(leaf, dict) and "values" in leaf


def split(layers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dicts of stacked parameters, as (arrays, packed kernels), to `join` again.

    The latter stay stacked while a scan goes over the layers: sliced by it, they would be
    copied on a CPU before they are read.
    """
    arrays, packed = {}, {}
    for name, part in layers.items():
        if is_packed(part):
            packed[name] = part
        elif isinstance(part, dict):
            arrays[name], packed[name] = split(part)
        else:
            arrays[name] = part
    return arrays, packed


def join(
    arrays: dict[str, Any],
    packed: dict[str, Any],
    layer: Int[Array, ""] | None,
    in_slabs: bool,
) -> dict[str, Any]:
    """Arrays of one layer, with the kernels of that layer in their places. Packed kernels
    among `arrays` are of one layer too."""
    joined = {}
    for name, part in arrays.items():
        if isinstance(part, dict) and not is_packed(part):
            joined[name] = join(part, packed.get(name, {}), layer, in_slabs)
        else:
            joined[name] = pack(part, in_slabs)
    stacked = {name: part for name, part in packed.items() if is_packed(part)}
    return joined | {n: pack(part, in_slabs, layer) for n, part in stacked.items()}


def pack(
    leaf: Any, in_slabs: bool, layer: Int[Array, ""] | None = None
) -> jax.Array | Packed:
    """A kernel of the parameters, ready for `matmul`; an array is one as it is."""
    if not is_packed(leaf):
        return leaf
    return Packed(leaf["values"], leaf.get("scale"), layer, in_slabs)


def matmul(
    x: Float[Array, "... I"], kernel: jax.Array | Packed, dtype: Any = None
) -> Float[Array, "... O"]:
    """x @ kernel, in `dtype` (None: x's); sums are float32 where it is packed."""
    if not isinstance(kernel, Packed):
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    stack, layer = kernel.stack
    if kernel.in_slabs:
        product = _in_slabs(x, stack, layer)
    else:
        values = dequantize(_one(stack, layer), x.dtype)
        product = jnp.matmul(x, values, preferred_element_type=jnp.float32)
    if kernel.scale is not None:
        scale = kernel.scale if kernel.layer is None else _one(kernel.scale, layer)
        product *= over_last(scale, product)
    return product.astype(dtype or x.dtype)


def matmul_transposed(
    x: Float[Array, "... D"], embedding: jax.Array | Packed, dtype: Any
) -> Float[Array, "... V"]:
    """x @ embedding.T, in `dtype`: the logits of a model with tied embeddings."""
    if not isinstance(embedding, Packed):
        return jnp.matmul(x, embedding.T, preferred_element_type=dtype)
    values = embedding.values

    def product(start, count):
        slab = jax.lax.dynamic_slice_in_dim(values, start, count)
        slab = jax.lax.optimization_barrier(
            dequantize(slab, x.dtype)
        )  # as in `_in_slabs`
        return jnp.matmul(x, slab.T, preferred_element_type=jnp.float32)

    if embedding.in_slabs:
        count = _slab_rows(len(x), *values.shape)
        whole = len(values) // count * count
        starts = jnp.arange(0, whole, count)
        logits = jax.lax.map(lambda start: product(start, count), starts)
        logits = logits.swapaxes(0, 1).reshape(len(x), whole)
        if whole < len(values):
            rest = product(whole, len(values) - whole)
            logits = jnp.concatenate([logits, rest], axis=1)
    else:
        wide = dequantize(values, x.dtype)
        logits = jnp.matmul(x, wide.T, preferred_element_type=jnp.float32)
    if embedding.scale is not None:
        logits *= over_last(embedding.scale, logits)
    return logits.astype(dtype)


def take_rows(
    embedding: Any, tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """Rows of an embedding of any form."""
    if not is_packed(embedding):
        return embedding[tokens]
    rows = dequantize(embedding["values"][tokens], dtype)
    if "scale" in embedding:
        scale = embedding["scale"][tokens][..., None]
        rows = (rows.astype(jnp.float32) * scale).astype(dtype)
    return rows


def dequantize(values: jax.Array, dtype: Any) -> jax.Array:
    """Stored values as `dtype`, without their scale."""
    if values.dtype != jnp.uint16:
        return values.astype(dtype)
    bits = values.astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def quantize_kv(
    x: Float[Array, "... C"], dtype: Any
) -> tuple[Array, Float[Array, "..."] | None]:
    """Keys or values as they are stored in a cache of `dtype`: the vectors, and of each
    its scale if that is int8."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype), None
    if dtype != jnp.int8:
        return x.astype(dtype), None
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1) / LARGEST
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return values.astype(jnp.int8), scale


def int8_on_host(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Some channels of a kernel as int8, in host memory: values, and scales without
    `axis`, the dim that products sum over."""
    if x.ndim == 3 and len(x) > 1:  # layer by layer, which takes less memory
        values, scales = zip(*(int8_on_host(one[None], axis) for one in x), strict=True)
        return np.concatenate(values), np.concatenate(scales)
    wide = _wide_on_host(x)
    scale = np.abs(wide).max(axis=axis) / np.float32(LARGEST)
    wide /= np.expand_dims(np.where(scale == 0, np.float32(1), scale), axis)
    return np.rint(wide, out=wide).astype(np.int8), scale


def map_kernels(
    function: Callable[[Any, int], Any], params: dict[str, Any]
) -> dict[str, Any]:
    """Parameters with `function(array, axis)` of each kernel, and of the embedding; `axis`
    is the dim that products sum over. Packed ones stay."""
    mapped = {}
    for name, part in params.items():
        if name in KERNELS and not is_packed(part):
            mapped[name] = function(part, KERNELS[name])
        elif isinstance(part, dict) and not is_packed(part):
            mapped[name] = map_kernels(function, part)
        else:
            mapped[name] = part
    return mapped


KERNELS = {"kernel": -2, "embedding": -1}  # and the dim that products sum over


def _in_slabs(x, stack, layer):
    """[N, I] @ stack[layer], float32, some rows of the kernel at a time."""
    _, size, out = stack.shape
    count = _slab_rows(len(x), size, out)

    def product(start, rows):
        slab = jax.lax.dynamic_slice(stack, (layer, start, 0), (1, rows, out))[0]
        part = jax.lax.dynamic_slice(x, (0, start), (len(x), rows))
        # Kept apart: fused into the product, the widening would be done element by
        # element, and for each row of x.
        slab = jax.lax.optimization_barrier(dequantize(slab, x.dtype))
        return jnp.matmul(part, slab, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(
        0,
        size // count,
        lambda i, total: total + product(i * count, count),
        jnp.zeros((len(x), out), jnp.float32),
    )
    whole = size // count * count
    return total if whole == size else total + product(whole, size - whole)


def _slab_rows(num_rows: int, size: int, width: int) -> int:
    """How many of `size` rows of `width` values make a slab: a power of two."""
    fit = _SLAB_BYTES[num_rows > _MANY_ROWS] // (4 * width)
    return min(size, 1 << max(fit, 8).bit_length() - 1)


def _one(stack, layer):
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _wide_on_host(x: np.ndarray) -> np.ndarray:
    """A float32 copy, for bfloat16 several times faster than astype."""
    if x.dtype != jnp.bfloat16:
        return x.astype(np.float32)
    bits = x.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)
