"""Command: Hugging Face files to an e1jax checkpoint and back; and loading of either.

`load_model` is how every command gets a model: from the bundled ones, a hub id, a
Hugging Face directory, an e1jax checkpoint or a run directory.

A conversion streams. A few parts of tensors at a time are in host memory, and everything
is written to a sibling of DST that gets its name at the very end, so that an interrupted
conversion leaves nothing at DST.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh
from tqdm import tqdm

from e1jax.attention import rope_frequencies
from e1jax.checkpoint import (
    PARAMS,
    THREADS,
    Index,
    LazyArray,
    as_tree,
    check_same,
    check_saved,
    chunks_of,
    find_params,
    named_shapes,
    open_params,
    place,
    quantized,
    save_params,
)
from e1jax.config import (
    QUANTIZED,
    ModelConfig,
    Parser,
    UserError,
    check_choice,
    run_command,
    stop_signals,
)
from e1jax.hosts import is_first
from e1jax.model import Params, abstract_params
from e1jax.quantize import KERNELS, int8_on_host
from e1jax.sharding import make_mesh, note_undivided
from e1jax.tokenizer import FILES, GENERATION, Tokenizer, copy_files, read_json

# Our parameter: its Hugging Face name ({}: the layer) and whether the weight [out, in]
# of a torch Linear is turned to our [in, out]. Layers are stacked on a new first dim.
TABLE = {
    "embedding": ("model.embed_tokens.weight", False),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", False),
    "layers/attention/q/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "layers/attention/q/bias": ("model.layers.{}.self_attn.q_proj.bias", False),
    "layers/attention/k/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "layers/attention/k/bias": ("model.layers.{}.self_attn.k_proj.bias", False),
    "layers/attention/v/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "layers/attention/v/bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    "layers/attention/o/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", True),
    "layers/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", True),
    "norm/scale": ("model.norm.weight", False),
    "lm_head/kernel": ("lm_head.weight", True),
}

# Names of dtypes as safetensors spells them.
_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

_BUNDLED = Path(__file__).parent / "models"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BLOCK_BYTES = 2**24  # of each of two tensors, compared at a time
_FORMAT_VERSION = 1  # of the manifest, and so of the whole directory


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model whose weights are read when, and each time, `params` is asked for."""

    name: str  # as the user gave it
    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: Any  # of the parameters and of the computation
    quantize: str | None = None  # form of kernels and embedding, see quantize
    # Of a Hugging Face directory, where each tensor is.
    tensors: Mapping[str, "_Tensor"] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> Params:
        """The parameters on the mesh, each device reading its own part. They are not
        kept here: whoever trains them would have them in memory twice."""
        if saved := find_params(self.path):
            arrays = open_params(saved[0], self.config)
        else:
            arrays = _lazy_arrays(self.tensors, self.config)
        if self.quantize and not quantized(arrays):
            arrays = as_int8(arrays)
        return place(arrays, self.config, self.mesh, self.dtype)


def load_model(
    model: str,
    mesh_text: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """A model ready to run.

    `dtype` is "float32" or "bfloat16"; None is float32 on a CPU and bfloat16 elsewhere.
    `quantize` "int8" is for sampling; a checkpoint that is stored so needs no asking.
    Raises UserError for whatever is missing, broken, or of another model.
    """
    if dtype is not None:
        check_choice("dtype", dtype, ("float32", "bfloat16"))
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZED)
    path = resolve(model)
    saved = find_params(path)
    files = saved[1] if saved else path
    config, tokenizer = read_config(files), read_tokenizer(files)
    mesh, tensors = make_mesh(mesh_text, config), {}
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    # Names, shapes and sizes are checked now; the weights themselves can wait.
    if saved:
        read_manifest(files)
        quantize = quantized(check_saved(saved[0], config)) or quantize
    else:
        config, tensors = open_hf(path)
    note_undivided(config, abstract_params(config, mesh, jnp.dtype(dtype), quantize))
    return LoadedModel(
        *(model, path, config, tokenizer, mesh, jnp.dtype(dtype), quantize, tensors)
    )


def resolve(model: str) -> Path:
    """The directory of a model: bundled, local, or downloaded from the hub.

    Raises UserError if there is no such directory or the hub does not give it.
    """
    if model in ("nano", "nano-e1"):
        if not (_BUNDLED / model).is_dir():
            raise UserError(f"the model {model!r} is not in this installation of e1jax")
        return _BUNDLED / model
    try:
        path = Path(model).expanduser()
        if path.is_dir() or (path.name.isdigit() and find_params(path)):
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of that user
        reason = str(getattr(error, "strerror", error)).rstrip(".")
        raise UserError(
            f"the model {reprlib.repr(model)} cannot be looked for: {reason}; "
            "check the path"
        ) from None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise UserError(
            f"the model {model!r} is neither a directory nor a hub id (owner/name); "
            "check the path, or use nano, which is bundled"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                allow_patterns=["config.json", *FILES, "*.safetensors", _INDEX],
            )
        )
    except Exception as error:  # many kinds: no network, no such repository, no right
        reason = str(error).strip().split("\n")[0].strip(" .:")
        raise UserError(
            f"the model {model!r} is not a directory here and cannot be had from the "
            f"hub ({reason}); check the name and the network, or give a local directory"
        ) from None


def read_config(path: Path) -> ModelConfig:
    """Sizes of the model in a directory."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} holds no config.json, so it is not a model directory; give a "
            "Hugging Face directory, an e1jax checkpoint or a run directory"
        )
    return ModelConfig.from_hf(read_json(file), str(file))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model, checked to have no id beyond the model's.

    A response ends at its own EOS and at each that `generation_config.json` or
    `config.json` names. Raises UserError for one that is not an id of the model.
    """
    tokenizer = Tokenizer.from_dir(path)
    largest = max(tokenizer.backend.get_vocab().values())
    vocab_size = read_config(path).vocab_size
    if largest >= vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'} has the id {largest}, but vocab_size in "
            f"config.json is {vocab_size}; the two are of different models"
        )
    named = [
        token
        for name in (GENERATION, "config.json")
        for token in _named_eos_ids(path / name, vocab_size)
    ]
    more = [token for token in dict.fromkeys(named) if token != tokenizer.eos_id]
    return dataclasses.replace(tokenizer, more_eos_ids=tuple(more))


def _named_eos_ids(file: Path, vocab_size: int) -> list[int]:
    """The ids under `eos_token_id`, one or a list; none without such a file or key."""
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise UserError(
            f"{file}: eos_token_id={reprlib.repr(value)} must be an id of this model (0 "
            f"to {vocab_size - 1}) or a list of them"
        )
    return ids


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # in the file, in bytes

    def map(self) -> np.ndarray:
        """The tensor where it lies in the file, without a copy.

        Mapped anew each time, because pages that stay mapped would count as memory of
        this process until the end.
        """
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.asarray(mapped)  # plain, which is faster to slice


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes start."""
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


def open_hf(path: Path) -> tuple[ModelConfig, dict[str, _Tensor]]:
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


def _stored_tensors(path: Path) -> dict[str, _Tensor]:
    """Every tensor in the weight files of a Hugging Face directory, by name.

    Raises UserError for a file that is missing, cut off or at odds with the index.
    """
    index = {}
    if (path / _SINGLE).is_file():
        files = [path / _SINGLE]
    elif (path / _INDEX).is_file():
        index = read_json(path / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{path / _INDEX} has no weight_map; download it again")
        shards = sorted(set(map(str, index.values())))
        there = {file.name for file in path.iterdir()}
        lost = [name for name in shards if name not in there]
        if lost:
            raise UserError(
                f"{path} holds no {', '.join(lost[:5])}, of the {len(shards)} files that "
                f"{_INDEX} names; download them into it"
            )
        files = [path / name for name in shards]
    elif any(path.glob("pytorch_model*.bin")):
        raise UserError(
            f"{path} holds its weights as pytorch_model.bin only, which e1jax does not "
            "read; save the model as safetensors with transformers "
            "(save_pretrained) and give that directory"
        )
    else:
        raise UserError(f"{path} holds neither {_SINGLE} nor {_INDEX}, so no weights")

    tensors: dict[str, _Tensor] = {}
    for file in files:
        header, start = _header(file)
        for name in sorted(header):
            if name in tensors:
                raise UserError(
                    f"{file} and {tensors[name].file.name} both hold {name}; "
                    "download the model again"
                )
            shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
            if dtype not in _DTYPES:
                raise UserError(
                    f"{file}: {name} is stored as {dtype}; e1jax reads "
                    f"{', '.join(_DTYPES)}"
                )
            offset = start + header[name]["data_offsets"][0]
            tensors[name] = _Tensor(file, name, shape, _DTYPES[dtype], offset)
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != str(file):
            raise UserError(
                f"{path / _INDEX} says that {name} is in {file}, where it is not; "
                "download both again"
            )
    return tensors


def _check_frequencies(tensor: _Tensor, config: ModelConfig) -> None:
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


def _equal(a: _Tensor, b: _Tensor) -> bool:
    """Whether two tensors of one shape are the same bit for bit, read by blocks of rows."""
    if a.dtype != b.dtype:
        return False
    rows = max(1, _BLOCK_BYTES // (a.shape[1] * a.dtype.itemsize))

    def bits(tensor: _Tensor, start: int) -> np.ndarray:
        return tensor.map()[start : start + rows].view(np.uint8)

    starts = range(0, a.shape[0], rows)
    return all(np.array_equal(bits(a, i), bits(b, i)) for i in starts)


def hf_names(config: ModelConfig, name: str) -> list[str]:
    """The Hugging Face names of what one of our parameters holds, one per layer."""
    pattern, _ = TABLE[name]
    count = config.num_layers if "{}" in pattern else 1
    return [pattern.format(layer) for layer in range(count)]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model in Hugging Face form."""
    shapes = {}
    for name, shape in named_shapes(config).items():
        pattern, turned = TABLE[name]
        shape = shape[1:] if "{}" in pattern else shape
        for hf_name in hf_names(config, name):
            shapes[hf_name] = shape[::-1] if turned else shape
    return shapes


def _lazy_arrays(
    tensors: Mapping[str, _Tensor],
    config: ModelConfig,
    dtype: np.dtype | None = None,
    seen: Callable[[_Tensor], None] = lambda tensor: None,
) -> dict[str, LazyArray]:
    """Our parameters by name, read from Hugging Face tensors and cast to `dtype` (None:
    one that holds whatever is stored).

    `seen` is given each tensor when its first part is read.
    """
    arrays = {}
    for name, shape in named_shapes(config).items():
        sources = [tensors[hf_name] for hf_name in hf_names(config, name)]
        stored = functools.reduce(np.promote_types, [s.dtype for s in sources])
        own = dtype or stored
        read = functools.partial(_read_part, name, sources, own, seen)
        # Whole rows of the tensors as they are stored: those lie side by side.
        parts = list(chunks_of(shape, own))
        across = -2 if TABLE[name][1] else -1
        parts[across] = shape[across]
        arrays[name] = LazyArray(shape, own, tuple(parts), read)
    return arrays


def _read_part(
    name: str,
    sources: Sequence[_Tensor],
    dtype: np.dtype,
    seen: Callable[[_Tensor], None],
    part: Index,
) -> np.ndarray:
    """A part of our parameter `name`, whose layers are `sources`."""
    pattern, turned = TABLE[name]
    layers, inner = (part[0], part[1:]) if "{}" in pattern else (slice(0, 1), part)
    arrays = []
    for source in sources[layers]:
        if all(span.start == 0 for span in inner):
            seen(source)
        array = source.map()[inner[::-1] if turned else inner]
        # A copy in any case: what stays mapped counts as memory of this process.
        array = array.astype(dtype, copy=not turned)
        arrays.append(turn(array) if turned else array)
    if "{}" not in pattern:
        return arrays[0]
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def as_int8(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Parameters by name, with kernels and embedding as int8; see quantize."""
    packed = {}
    for name, array in arrays.items():
        axis = KERNELS.get(name.rpartition("/")[2])
        if axis is None:
            packed[name] = array
            continue
        parts, sizes = list(array.parts), list(array.shape)
        parts[axis] = sizes[axis]
        values = functools.partial(_int8_values, array, axis)
        packed[f"{name}/values"] = LazyArray(
            array.shape, np.dtype(np.int8), tuple(parts), values
        )
        del parts[axis], sizes[axis]
        scale = functools.partial(_int8_scale, array, axis)
        packed[f"{name}/scale"] = LazyArray(
            tuple(sizes), np.dtype(np.float32), tuple(parts), scale
        )
    return packed


def _int8_values(array: LazyArray, axis: int, part: Index) -> np.ndarray:
    """A part of the values; a channel is read whole, as its scale needs all of it."""
    whole = list(part)
    whole[axis] = slice(0, array.shape[axis])
    cut = [slice(None)] * len(whole)
    cut[axis] = part[axis]
    return int8_on_host(array.read(tuple(whole)), axis)[0][tuple(cut)]


def _int8_scale(array: LazyArray, axis: int, part: Index) -> np.ndarray:
    whole = list(part)
    whole.insert(len(array.shape) + axis, slice(0, array.shape[axis]))
    return int8_on_host(array.read(tuple(whole)), axis)[1]


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


def from_hf(
    source: str, dst: Path, dtype: str | None = None, quantize: str | None = None
) -> None:
    """Writes an e1jax checkpoint of a Hugging Face model at `dst`.

    `dtype` None keeps the stored one; `quantize` "int8" is for sampling only. The manifest
    holds, per tensor of the source, its shape, dtype and the sha256 of its bytes as they
    were stored there.
    """
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZED)
    with _new_directory(dst) as new:
        path = resolve(source)
        if find_params(path):
            raise UserError(
                f"{path} is an e1jax checkpoint already; nothing to convert"
            )
        read_tokenizer(path)
        config, tensors = open_hf(path)
        stored = sorted({str(tensor.dtype) for tensor in tensors.values()})
        if dtype is None and len(stored) > 1:
            raise UserError(
                f"{path} stores its tensors as {' and '.join(stored)}; "
                "choose with --dtype"
            )
        dtype = dtype or stored[0]
        manifest = {
            "format_version": _FORMAT_VERSION,
            "source": source,
            "revision": path.name if path.parent.name == "snapshots" else None,
            "dtype": dtype,
            "quantize": quantize,
        }
        described = {}
        total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
        with _progress(total) as note:

            def seen(tensor: _Tensor) -> None:
                mine: dict[str, Any] = {}
                if described.setdefault(tensor.name, mine) is not mine:
                    return  # int8 reads a tensor for its values and for its scale
                data = tensor.map().view(np.uint8).data
                mine["shape"] = list(tensor.shape)
                mine["dtype"] = str(tensor.dtype)
                mine["sha256"] = hashlib.sha256(data).hexdigest()
                note(data.nbytes)

            arrays = _lazy_arrays(tensors, config, jnp.dtype(dtype), seen)
            if quantize:  # of what is stored, not of what that is cast to
                packed = as_int8(_lazy_arrays(tensors, config, None, seen))
                arrays = {name: arrays.get(name, packed[name]) for name in packed}
            save_params(new / PARAMS, as_tree(arrays, config))
        manifest["tensors"] = {name: described[name] for name in tensors}
        _copy_files(path, new, dtype, config)
        _write_json(new / "manifest.json", manifest)


def to_hf(source: str, dst: Path) -> None:
    """Writes a Hugging Face directory of an e1jax checkpoint or a run at `dst`.

    Raises UserError if a tensor is not the one of the manifest, bit for bit.
    """
    with _new_directory(dst) as new:
        path = resolve(source)
        saved = find_params(path)
        if not saved:
            raise UserError(
                f"{path} is not an e1jax checkpoint or a run directory; "
                "a Hugging Face directory needs no conversion"
            )
        params_dir, files_dir = saved
        config, tokenizer = read_config(files_dir), read_tokenizer(files_dir)
        arrays = open_params(params_dir, config)
        if quantized(arrays):
            raise UserError(
                f"{path} has its weights as int8, which a Hugging Face directory cannot "
                "hold; convert the model that it was made from"
            )
        dtype = jnp.dtype(arrays["embedding"].dtype)
        tensors = read_manifest(files_dir).get("tensors", {})
        # Of a tensor that was cast, the manifest knows what it was cast from.
        kept = {name: t for name, t in tensors.items() if t["dtype"] == str(dtype)}

        sizes = {
            name: math.prod(shape) * dtype.itemsize
            for name, shape in hf_shapes(config).items()
        }
        with _progress(sum(sizes.values())) as note:

            def written(name: str, sha256: str) -> None:
                if name in kept and kept[name]["sha256"] != sha256:
                    raise UserError(
                        f"{params_dir} is damaged: {name} is not what its manifest.json "
                        "says, by the sha256; convert the model again"
                    )
                note(sizes[name])

            write_hf_weights(new, config, dtype, arrays, written)
        _copy_files(files_dir, new, str(dtype), config)
        _name_eos_ids(new / GENERATION, tokenizer)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an e1jax checkpoint; empty if it has none, as a run has.

    Raises UserError for one of another version of the format.
    """
    file = path / "manifest.json"
    if not file.is_file():
        return {}
    manifest = read_json(file)
    version = manifest.get("format_version")
    if version != _FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {version!r}, and this e1jax reads "
            f"{_FORMAT_VERSION}; convert the model again, or install a newer e1jax"
        )
    return manifest


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
    The library's own writer wants a whole file in memory, twice.
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
        _write_json(path / _INDEX, index)


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
    """Writes what our parameter `name` holds, each tensor into its file at its offset."""
    array = _by_layer(name, array)

    def write(layer: int, hf_name: str) -> None:
        file, offset = places[hf_name]
        digest = hashlib.sha256()
        with file.open("r+b") as out:
            out.seek(offset)
            for block in _hf_blocks(name, array, layer):
                data = block.view(np.uint8).data
                digest.update(data)
                out.write(data)
        written(hf_name, digest.hexdigest())

    names = hf_names(config, name)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(len(names)), names))


def _by_layer(name: str, array: LazyArray) -> LazyArray:
    """Our parameter `name`, in host memory if to read one layer were to read them all."""
    if "{}" not in TABLE[name][0] or array.parts[0] == 1:
        return array
    whole = array.read(tuple(slice(0, size) for size in array.shape))
    return dataclasses.replace(array, read=whole.__getitem__)


def _hf_blocks(name: str, array: LazyArray, layer: int) -> Iterator[np.ndarray]:
    """The Hugging Face tensor of a layer of our parameter `name`, by blocks of rows."""
    pattern, turned = TABLE[name]
    stacked = "{}" in pattern
    rows = len(array.shape) - 1 if turned else int(stacked)  # the dim that holds them
    index = [slice(0, size) for size in array.shape]
    if stacked:
        index[0] = slice(layer, layer + 1)
    for start in range(0, array.shape[rows], array.parts[rows]):
        index[rows] = slice(start, min(start + array.parts[rows], array.shape[rows]))
        block = array.read(tuple(index))
        block = block[0] if stacked else block
        yield turn(block) if turned else np.ascontiguousarray(block)


def _name_eos_ids(file: Path, tokenizer: Tokenizer) -> None:
    """Completes a generation_config.json that does not say where a response ends."""
    there = read_json(file) if file.is_file() else {}
    if there.get("eos_token_id") not in (None, []):
        return
    if there.get("_from_model_config"):  # transformers would make it again, without ids
        there = {}
    bos = tokenizer.special_tokens.get("bos_token")
    bos_id = tokenizer.backend.token_to_id(bos) if bos else None
    eos_ids = list(tokenizer.eos_ids) if tokenizer.more_eos_ids else tokenizer.eos_id
    _write_json(file, {"bos_token_id": bos_id, **there, "eos_token_id": eos_ids})


def _copy_files(src: Path, dst: Path, dtype: str, sizes: ModelConfig) -> None:
    """Copies the files beside the weights; config.json gets the dtype of the new ones,
    and loses a tie that they do not have."""
    copy_files(src, dst)
    config = read_json(src / "config.json")
    # transformers 5 writes dtype, and still reads torch_dtype, the name of 4.
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = sizes.tie_word_embeddings
    _write_json(dst / "config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _new_directory(dst: Path) -> Iterator[Path]:
    """A directory beside `dst` to write in, which becomes `dst` if all goes well.

    Else nothing is left. A link at `dst` is followed. That `dst` can be written is known
    before anything else is done.
    """
    target = Path(os.path.realpath(dst))
    partial = target.parent / f".{target.name}.partial"
    made = [parent for parent in target.parents if not os.path.lexists(parent)]
    try:
        if os.path.lexists(target) and not (
            target.is_dir() and not any(target.iterdir())
        ):
            raise UserError(f"{dst} exists already; remove it or give another name")
        # What a conversion that was killed has left.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{dst} cannot be written: {error.strerror or error}; nothing was written"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                parent.rmdir()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes of each tensor of `total` bytes in all.

    It shows them on a terminal, and is where Ctrl-C stops: elsewhere it could come in the
    middle of Orbax, which then complains at length.
    """
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, stop_signals() as signals:

        def note(num_bytes: int) -> None:
            bar.update(num_bytes)
            if signals:
                raise KeyboardInterrupt("(nothing was written)")

        yield note


def inspect(model: str) -> str:
    """What a model directory of any kind holds, as text."""
    path = resolve(model)
    saved = find_params(path)
    files = saved[1] if saved else path
    if saved:
        config, origin = read_config(files), read_manifest(files)
        tensors = check_saved(saved[0], config)
    else:
        origin, (config, tensors) = {}, open_hf(path)
    rows: dict[str, tuple[int, Any]] = {}  # one per kind of tensor: count, any of them
    for name, tensor in tensors.items():
        name = re.sub(r"\.\d+\.", ".*.", name)
        rows[name] = (rows[name][0] + 1 if name in rows else 1, tensor)
    parameters = sum(map(math.prod, named_shapes(config).values()))  # not scales
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    kind = "Hugging Face directory"
    if saved:
        kind = "e1jax checkpoint" if saved[0].parent == files else "run directory"
    facts = {
        "path": saved[0] if saved else path,
        "kind": kind,
        "source": origin.get("source"),
        "revision": origin.get("revision"),
        "parameters": f"{parameters:,}",
        "dtype": ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()})),
        "weights": f"{size / 1e9:.3f} GB",
        **dataclasses.asdict(config),
    }
    lines = [f"{key:24}{value}" for key, value in facts.items() if value is not None]
    lines.append("")
    for name, (count, tensor) in rows.items():
        times = f"{count} x " if count > 1 else ""
        lines.append(f"{name:48}{times}{list(tensor.shape)} {tensor.dtype}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m e1jax.convert",
        description="Convert weights between Hugging Face files and e1jax checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "from-hf", help="Hugging Face files to an e1jax checkpoint"
    )
    command.add_argument("src", metavar="SRC", help="hub id or directory")
    command.add_argument("dst", metavar="DST", type=Path, help="new directory to write")
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16"],
        help="number format of the written weights (default: as stored in SRC)",
    )
    command.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="of the weights, with a scale per output channel: half the size of "
        "bfloat16, for sampling only (default: none)",
    )
    command = commands.add_parser(
        "to-hf", help="e1jax checkpoint to a directory that transformers loads"
    )
    command.add_argument(
        "src",
        metavar="SRC",
        help="e1jax checkpoint, run directory (its best step) or RUN_DIR/STEP",
    )
    command.add_argument("dst", metavar="DST", type=Path, help="new directory to write")
    command = commands.add_parser("inspect", help="show what a model directory holds")
    command.add_argument("src", metavar="DIR", help="model directory of any kind")
    args = parser.parse_args(argv)
    # A conversion needs no accelerator, and must not take one from who uses it.
    jax.config.update("jax_platforms", "cpu")
    if args.command == "inspect":
        print(inspect(args.src))
        return
    if args.command == "from-hf":
        from_hf(args.src, args.dst, args.dtype, args.quantize)
    else:
        to_hf(args.src, args.dst)
    print(f"{args.dst} is written; python -m e1jax.sample --model {args.dst}")


if __name__ == "__main__":
    run_command(main)
