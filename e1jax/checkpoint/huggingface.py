"""Hugging Face's files of a model: safetensors read in place, and written.

The table of the architecture says which of their tensors is which of our parameters.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from e1jax.checkpoint.lazy import THREADS, Index, LazyArray, chunks_of
from e1jax.checkpoint.params import check_same, named_shapes
from e1jax.cli.files import read_json
from e1jax.config.architectures import Tensor
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.nn.rope import rope_frequencies
from e1jax.sharding.hosts import is_first

# Names of dtypes as safetensors spells them.
_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


_SINGLE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


_BLOCK_BYTES = 2**24  # of each of two tensors, compared at a time


def read_config(path: Path) -> ModelConfig:
    """Sizes of the model in a directory."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} holds no config.json, so it is not a model directory; give a "
            "Hugging Face directory, an e1jax checkpoint or a run directory"
        )
    return ModelConfig.from_hf(read_json(file), str(file))


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # in the file, in bytes

    def map(self) -> np.ndarray:
        """The tensor as mapped from the file, without a copy.

        Mapped anew each time, because pages that stay mapped would count as memory of
        this process until the end.
        """
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.asarray(mapped)  # plain, which is faster to slice


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and the byte offset of its first tensor."""
    try:
        with safetensors.safe_open(file, "numpy"), file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    return header, 8 + size


def open_hf(path: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Sizes of the model in a Hugging Face directory, and its tensors, yet to be read.

    A file may hold an output head although config.json says that the embedding is used
    for it. Equal to the embedding bit for bit, the head is left out; else it is used, as
    transformers does, and the sizes have `tie_word_embeddings` False. Raises UserError
    listing the names of missing, unexpected or misshapen tensors, and for saved RoPE
    frequencies that are not the ones of config.json.
    """
    config, tensors = read_config(path), _stored_tensors(path)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        _check_frequencies(tensors.pop(name), config)
    doubtful = config.tie_word_embeddings and _HEAD in tensors
    if doubtful:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_same(shapes, hf_shapes(config), str(path))
    if doubtful and _equal(tensors[_HEAD], tensors[_EMBEDDING]):
        del tensors[_HEAD]
        config = dataclasses.replace(config, tie_word_embeddings=True)
    elif doubtful and is_first():
        print(
            f"note: {path / 'config.json'} has tie_word_embeddings true, but {_HEAD} is "
            "not the embedding; it is used as the output head",
            file=sys.stderr,
        )
    return config, tensors


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor in the weight files of a Hugging Face directory, by name.

    Raises UserError for a file that is missing, cut off or at odds with the index.
    """
    index = {}
    if (path / _SINGLE).is_file():
        files = [path / _SINGLE]
    elif (path / INDEX_FILE).is_file():
        index = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{path / INDEX_FILE} has no weight_map; download it again")
        shards = sorted(set(map(str, index.values())))
        there = {file.name for file in path.iterdir()}
        lost = [name for name in shards if name not in there]
        if lost:
            raise UserError(
                f"{path} holds no {', '.join(lost[:5])}, of the {len(shards)} files that "
                f"{INDEX_FILE} names; download them into it"
            )
        files = [path / name for name in shards]
    elif any(path.glob("pytorch_model*.bin")):
        raise UserError(
            f"{path} holds its weights as pytorch_model.bin only, which e1jax does not "
            "read; save the model as safetensors with transformers "
            "(save_pretrained) and give that directory"
        )
    else:
        raise UserError(
            f"{path} holds neither {_SINGLE} nor {INDEX_FILE}, so no weights"
        )

    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise UserError(
                    f"{file} and {tensors[name].file.name} both hold {name}; "
                    "download the model again"
                )
            tensors[name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != str(file):
            raise UserError(
                f"{path / INDEX_FILE} says that {name} is in {file}, where it is not; "
                "download both again"
            )
    return tensors


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of the names.

    Raises UserError for a file that is missing or cut off, and for another dtype.
    """
    header, start = _header(file)
    tensors = {}
    for name in sorted(header):
        shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
        if dtype not in _DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {dtype}; e1jax reads {', '.join(_DTYPES)}"
            )
        offset = start + header[name]["data_offsets"][0]
        tensors[name] = StoredTensor(file, name, shape, _DTYPES[dtype], offset)
    return tensors


def _check_frequencies(tensor: StoredTensor, config: ModelConfig) -> None:
    """Refuses RoPE frequencies, which old versions of transformers saved with each layer,
    if they do not follow from config.json; we compute them from it."""
    expected = rope_frequencies(config.head_dim, config.rope_theta)
    # They may have been cast to bfloat16 (8 bits) or float16 (nothing below 6e-8).
    if tensor.shape != expected.shape or not np.allclose(
        tensor.map().astype(np.float32), expected, rtol=2**-8, atol=6e-8
    ):
        raise UserError(
            f"{tensor.file}: {tensor.name} is not what rope_theta={config.rope_theta:g} "
            f"and head_dim={config.head_dim} in config.json give; config.json and the "
            "weights are of different models"
        )


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of one shape are the same bit for bit, read by blocks of rows."""
    if a.dtype != b.dtype:
        return False
    rows = max(1, _BLOCK_BYTES // (a.shape[1] * a.dtype.itemsize))

    def bits(tensor: StoredTensor, start: int) -> np.ndarray:
        return tensor.map()[start : start + rows].view(np.uint8)

    starts = range(0, a.shape[0], rows)
    return all(np.array_equal(bits(a, i), bits(b, i)) for i in starts)


def hf_names(config: ModelConfig, name: str) -> list[str]:
    """The Hugging Face names of the tensors in one of our parameters, one per layer."""
    return config.table.tensors[name].names(config.num_layers)


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model in Hugging Face form."""
    shapes = {}
    for name, shape in named_shapes(config).items():
        tensor = config.table.tensors[name]
        shape = shape[1:] if tensor.stacked else shape
        for hf_name in hf_names(config, name):
            shapes[hf_name] = shape[::-1] if tensor.turned else shape
    return shapes


def lazy_arrays(
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    dtype: np.dtype | None = None,
    seen: Callable[[StoredTensor], None] = lambda tensor: None,
) -> dict[str, LazyArray]:
    """Our parameters by name, read from Hugging Face tensors and cast to `dtype` (None:
    one that holds whatever is stored).

    `seen` is given each tensor when its first part is read.
    """
    arrays = {}
    for name, shape in named_shapes(config).items():
        tensor = config.table.tensors[name]
        sources = [tensors[hf_name] for hf_name in hf_names(config, name)]
        stored = functools.reduce(np.promote_types, [s.dtype for s in sources])
        own = dtype or stored
        read = functools.partial(_read_part, tensor, sources, own, seen)
        # Full rows of the stored tensors, because the bytes of a row are contiguous in
        # the file.
        parts = list(chunks_of(shape, own))
        across = -2 if tensor.turned else -1
        parts[across] = shape[across]
        arrays[name] = LazyArray(shape, own, tuple(parts), read)
    return arrays


def _read_part(
    tensor: Tensor,
    sources: Sequence[StoredTensor],
    dtype: np.dtype,
    seen: Callable[[StoredTensor], None],
    part: Index,
) -> np.ndarray:
    """A part of the parameter that `tensor` describes, whose layers are `sources`."""
    turned, stacked = tensor.turned, tensor.stacked
    layers, inner = (part[0], part[1:]) if stacked else (slice(0, 1), part)
    arrays = []
    for source in sources[layers]:
        if all(span.start == 0 for span in inner):
            seen(source)
        array = source.map()[inner[::-1] if turned else inner]
        # A copy in any case: mapped pages count as memory of this process.
        array = array.astype(dtype, copy=not turned)
        arrays.append(turn(array) if turned else array)
    if not stacked:
        return arrays[0]
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def turn(array: np.ndarray) -> np.ndarray:
    """A transposed copy, several times faster than numpy makes it.

    In strips as wide as a cache line, or two, each first copied to where it stays in the
    processor's cache; and as integers, which numpy copies faster than bfloat16.
    """
    bits = array.view(f"u{array.itemsize}")
    turned = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), 32):
        turned[:, start : start + 32] = np.array(bits[start : start + 32]).T
    return turned.view(array.dtype)


def write_hf_weights(
    path: Path,
    config: ModelConfig,
    dtype: np.dtype,
    arrays: Mapping[str, LazyArray],
    written: Callable[[str, str], None] = lambda name, sha256: None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors files at `path` of our parameters, given by name.

    `written` is called with the Hugging Face name and the sha256 of each tensor.
    The writer of the safetensors library would hold each file in memory twice.
    """
    shapes = hf_shapes(config)
    shards: list[dict[str, int]] = [{}]  # of each file, the tensors and their bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    places, weight_map = {}, {}
    for number, shard in enumerate(shards, 1):
        one = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = path / (one if len(shards) > 1 else _SINGLE)
        offsets = _write_header(file, dtype, {name: shapes[name] for name in shard})
        places |= {name: (file, offset) for name, offset in offsets.items()}
        weight_map |= dict.fromkeys(shard, file.name)
    for name, array in arrays.items():
        _write_tensors(name, array, config, places, written)
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path / INDEX_FILE, index)


def _write_header(
    file: Path, dtype: np.dtype, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Begins a safetensors file; where in it each tensor is to be written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind = next(key for key in _DTYPES if _DTYPES[key] == dtype)
    end, starts = 0, {}
    for name, shape in shapes.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _write_tensors(
    name: str,
    array: LazyArray,
    config: ModelConfig,
    places: Mapping[str, tuple[Path, int]],
    written: Callable[[str, str], None],
) -> None:
    """Writes the tensors of our parameter `name`, each into its file at its offset."""
    tensor = config.table.tensors[name]
    array = _by_layer(tensor, array)

    def write(layer: int, hf_name: str) -> None:
        file, offset = places[hf_name]
        digest = hashlib.sha256()
        with file.open("r+b") as out:
            out.seek(offset)
            for block in _hf_blocks(tensor, array, layer):
                data = block.view(np.uint8).data
                digest.update(data)
                out.write(data)
        written(hf_name, digest.hexdigest())

    names = hf_names(config, name)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(len(names)), names))


def _by_layer(tensor: Tensor, array: LazyArray) -> LazyArray:
    """Our parameter, in host memory if to read one layer were to read them all."""
    if not tensor.stacked or array.parts[0] == 1:
        return array
    whole = array.read(tuple(slice(0, size) for size in array.shape))
    return dataclasses.replace(array, read=whole.__getitem__)


def _hf_blocks(tensor: Tensor, array: LazyArray, layer: int) -> Iterator[np.ndarray]:
    """The Hugging Face tensor of a layer of our parameter, by blocks of rows."""
    turned, stacked = tensor.turned, tensor.stacked
    rows = len(array.shape) - 1 if turned else int(stacked)  # the dim that holds them
    index = [slice(0, size) for size in array.shape]
    if stacked:
        index[0] = slice(layer, layer + 1)
    for start in range(0, array.shape[rows], array.parts[rows]):
        index[rows] = slice(start, min(start + array.parts[rows], array.shape[rows]))
        block = array.read(tuple(index))
        block = block[0] if stacked else block
        yield turn(block) if turned else np.ascontiguousarray(block)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a value as indented JSON in UTF-8; OSError where it cannot."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
