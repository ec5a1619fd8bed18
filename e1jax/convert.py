"""Command: Hugging Face files to an e1jax checkpoint and back; and loading of either.

`load_model` is how every command gets a model: from the bundled ones, a hub id, a
Hugging Face directory, an e1jax checkpoint or a run directory.

A conversion streams. One of our parameters (a stack of all layers) at a time is in
host memory, and everything is written to a sibling of DST that gets its name at the
very end, so that an interrupted conversion leaves nothing at DST.
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

from e1jax.checkpoint import (
    PARAMS,
    LazyArray,
    abstract_on_one,
    check_same,
    check_saved,
    find_params,
    load_array,
    load_params,
    named_shapes,
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
from e1jax.model import Params, abstract_params
from e1jax.quantize import KERNELS, rows_to_int8
from e1jax.sharding import make_mesh
from e1jax.tokenizer import FILES, Tokenizer, read_json

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

    @property
    def params(self) -> Params:
        """The parameters on the mesh, each device reading its own part. They are not
        kept here: whoever trains them would have them in memory twice."""
        saved = find_params(self.path)
        stored = quantized(check_saved(saved[0], self.config)) if saved else None
        if self.quantize != stored:
            return _load_int8(self)
        if saved:
            return load_params(saved[0], self.config, self.mesh, self.dtype)
        return _load_hf(self.path, self.config, self.mesh, self.dtype)


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
    mesh = make_mesh(mesh_text, config)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    # Names, shapes and sizes are checked now; the weights themselves can wait.
    if saved:
        read_manifest(files)
        quantize = quantized(check_saved(saved[0], config)) or quantize
    else:
        hf_tensors(path, config)
    return LoadedModel(model, path, config, tokenizer, mesh, jnp.dtype(dtype), quantize)


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
    """The tokenizer of a model, checked to have no id beyond the model's."""
    tokenizer = Tokenizer.from_dir(path)
    largest = max(tokenizer.backend.get_vocab().values())
    vocab_size = read_config(path).vocab_size
    if largest >= vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'} has the id {largest}, but vocab_size in "
            f"config.json is {vocab_size}; the two are of different models"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        # Opened for each read, because a file that stays open stays mapped, and its
        # pages would count as memory of this process until the end.
        with _open(self.file) as tensors:
            return tensors.get_slice(self.name)[index]


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}); download it again"
        ) from None


def hf_tensors(path: Path, config: ModelConfig) -> dict[str, _Tensor]:
    """The tensors of a Hugging Face directory, checked to be those of the model.

    Raises UserError listing the names of missing, unexpected or misshapen tensors.
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

    tensors, names = {}, {}
    for file in files:
        with _open(file) as opened:
            names[file.name] = set(opened.keys())
            for name in sorted(names[file.name]):
                part = opened.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                # Buffers of old files, and a copy of the embedding: nothing to load.
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if dtype not in _DTYPES:
                    raise UserError(
                        f"{file}: {name} is stored as {dtype}; e1jax reads "
                        f"{', '.join(_DTYPES)}"
                    )
                tensors[name] = _Tensor(file, name, shape, _DTYPES[dtype])
    for name, file in index.items():
        if name not in names[str(file)]:
            raise UserError(
                f"{path / _INDEX} says that {name} is in {file}, where it is not; "
                "download both again"
            )
    check_same(
        {name: tensor.shape for name, tensor in tensors.items()},
        hf_shapes(config),
        str(path),
    )
    return tensors


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


def _load_hf(path: Path, config: ModelConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """Parameters from safetensors files, one parameter at a time in host memory."""
    tensors = hf_tensors(path, config)

    def load(keys, array: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        sources = [tensors[hf_name] for hf_name in hf_names(config, name)]
        loaded = jax.make_array_from_callback(
            array.shape,
            array.sharding,
            lambda index: _read_part(name, sources, array.shape, index, dtype),
        )
        return loaded.block_until_ready()  # else copies to the device would pile up

    return jax.tree.map_with_path(load, abstract_params(config, mesh, dtype))


def _read_part(
    name: str,
    sources: Sequence[_Tensor],
    shape: tuple[int, ...],
    index: Any,
    dtype: np.dtype,
    seen: Callable[[_Tensor, np.ndarray], None] = lambda source, array: None,
) -> np.ndarray:
    """A part of our parameter `name`, as `index`, a slice per dim, says.

    `seen` is given each source that was read, as it is stored.
    """
    pattern, turned = TABLE[name]
    stacked = "{}" in pattern
    if not stacked:
        shape, index = (1, *shape), (slice(None), *index)
    sizes = [len(range(size)[part]) for size, part in zip(shape, index, strict=True)]
    part = np.empty(sizes, dtype)

    def read(layer: int, source: _Tensor) -> None:
        array = source.read(index[:0:-1] if turned else index[1:])
        seen(source, array)
        _copy(array.T if turned else array, part[layer])

    # Two threads, because reading, hashing and copying leave Python's lock alone.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(sizes[0]), sources[index[0]]))
    return part if stacked else part[0]


def _load_int8(loaded: LoadedModel) -> Params:
    """Parameters with kernels and embedding as int8, one at a time in host memory as it
    is stored, the largest first."""
    tensors, saved = {}, find_params(loaded.path)
    if not saved:
        tensors = hf_tensors(loaded.path, loaded.config)
    shapes = named_shapes(loaded.config)

    def channels(name: str) -> Callable[[int], np.ndarray]:
        if saved:
            array = load_array(saved[0], name)
            array = array if "{}" in TABLE[name][0] else array[None]
            return lambda layer: array[layer].T if TABLE[name][1] else array[layer]
        names = hf_names(loaded.config, name)
        return lambda layer: tensors[names[layer]].read()

    def put(array: np.ndarray, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        make = jax.make_array_from_callback
        wide = array.astype(abstract.dtype, copy=False)
        return make(array.shape, abstract.sharding, lambda index: wide[index])

    abstract = abstract_params(loaded.config, loaded.mesh, loaded.dtype, "int8")
    loads: dict[str, Any] = {}
    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        parts = _as_int8(name, shapes[name], channels(name))
        place = functools.reduce(dict.__getitem__, name.split("/"), abstract)
        loads[name] = jax.block_until_ready(jax.tree.map(put, parts, place))
    return jax.tree.map_with_path(
        lambda keys, _: loads[jax.tree_util.keystr(keys, simple=True, separator="/")],
        abstract_on_one(loaded.config),
    )


def _as_int8(
    name: str, shape: tuple[int, ...], channels: Callable[[int], np.ndarray]
) -> Any:
    """Our parameter `name` as int8, in host memory; the array itself if it is neither a
    kernel nor the embedding. `channels(layer)` gives [O, I], as a torch Linear has it."""
    pattern, turned = TABLE[name]
    layers = shape[0] if "{}" in pattern else 1
    if name.rpartition("/")[2] not in KERNELS:
        array = np.stack([channels(layer) for layer in range(layers)])
        return array.reshape(shape)
    values = np.empty((layers, *shape[-2:]), np.int8)
    scale = np.empty((layers, shape[-1] if turned else shape[-2]), np.float32)

    def fill(layer: int) -> None:
        rows = channels(layer)
        for start in range(0, len(rows), 64):  # which stay in the processor's cache
            part = slice(start, start + 64)
            small, scale[layer, part] = rows_to_int8(rows[part])
            if turned:
                values[layer, :, part] = small.T
            else:
                values[layer, part] = small

    with ThreadPoolExecutor(2) as pool:  # NumPy leaves Python's lock alone
        list(pool.map(fill, range(layers)))
    if "{}" not in pattern:
        values, scale = values[0], scale[0]
    return {"values": values, "scale": scale}


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, several times faster where source is a transpose.

    In strips of 64 columns, which stay in the processor's cache until they are used.
    """
    for start in range(0, source.shape[-1], 64):
        target[..., start : start + 64] = source[..., start : start + 64]


def from_hf(source: str, dst: Path, dtype: str | None = None) -> None:
    """Writes an e1jax checkpoint of a Hugging Face model at `dst`.

    `dtype` None keeps the stored one. The manifest holds, per tensor of the source, its
    shape, dtype and the sha256 of its bytes as they were stored there.
    """
    with _new_directory(dst) as new:
        path = resolve(source)
        if find_params(path):
            raise UserError(
                f"{path} is an e1jax checkpoint already; nothing to convert"
            )
        config, _ = read_config(path), read_tokenizer(path)
        tensors = hf_tensors(path, config)
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
            "tensors": {},
        }

        with _progress(tensors) as note:

            def seen(tensor: _Tensor, array: np.ndarray) -> None:
                manifest["tensors"][tensor.name] = _described(array)
                note(array.nbytes)

            def lazy(keys, array: jax.ShapeDtypeStruct) -> LazyArray:
                name = jax.tree_util.keystr(keys, simple=True, separator="/")
                sources = [tensors[hf_name] for hf_name in hf_names(config, name)]
                index = (slice(None),) * array.ndim
                part = (name, sources, array.shape, index, jnp.dtype(dtype), seen)
                return LazyArray(
                    array.shape, jnp.dtype(dtype), lambda: _read_part(*part)
                )

            params = jax.tree.map_with_path(lazy, abstract_on_one(config))
            save_params(new / PARAMS, params)
        _copy_files(path, new, dtype)
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
        arrays = check_saved(params_dir, config)
        dtype = jnp.dtype(arrays["embedding"].dtype)
        tensors = read_manifest(files_dir).get("tensors", {})
        # Of a tensor that was cast, the manifest knows what it was cast from.
        kept = {name: t for name, t in tensors.items() if t["dtype"] == str(dtype)}

        def check(name: str, array: np.ndarray) -> None:
            if name in kept and kept[name] != _described(array):
                raise UserError(
                    f"{params_dir} is damaged: {name} is not what its manifest.json "
                    "says, by the sha256; convert the model again"
                )

        with _progress(arrays) as note:

            def read(name: str) -> np.ndarray:
                array = load_array(params_dir, name)
                note(array.nbytes)
                return array

            write_hf_weights(new, config, dtype, read, check)
        _copy_files(files_dir, new, str(dtype))
        bos = tokenizer.special_tokens.get("bos_token")
        ids = {
            "bos_token_id": tokenizer.backend.token_to_id(bos) if bos else None,
            "eos_token_id": tokenizer.eos_id,
        }
        _write_json(new / "generation_config.json", ids)


def _described(array: np.ndarray) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "sha256": hashlib.sha256(array.view(np.uint8).data).hexdigest(),
    }


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
    read: Callable[[str], np.ndarray],
    check: Callable[[str, np.ndarray], None] = lambda name, array: None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors files at `path`, from `read(name)`, our parameter of that name.

    `check` is given each tensor by its Hugging Face name before it is written.
    One tensor after the other, each parameter read once: the library's own writer
    wants a whole file in memory, twice.
    """
    shapes = hf_shapes(config)
    shards: list[dict[str, int]] = [{}]  # of each file, the tensors and their bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    arrays = _hf_arrays(config, read)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        one = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = path / (one if len(shards) > 1 else _SINGLE)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in shard.items():
            header[name] = {
                "dtype": next(key for key in _DTYPES if _DTYPES[key] == dtype),
                "shape": list(shapes[name]),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in shard:
                array = next(arrays)
                assert array.shape == shapes[name], (name, array.shape)
                check(name, array)
                out.write(array.view(np.uint8).data)
        weight_map |= dict.fromkeys(shard, file.name)
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / _INDEX, index)


def _hf_arrays(
    config: ModelConfig, read: Callable[[str], np.ndarray]
) -> Iterator[np.ndarray]:
    """The tensors of a model in the order of `hf_shapes`."""
    for name in named_shapes(config):
        pattern, turned = TABLE[name]
        array = read(name)
        for part in array if "{}" in pattern else [array]:
            if turned:
                part, source = np.empty(part.shape[::-1], part.dtype), part.T
                _copy(source, part)
            yield part


def _copy_files(src: Path, dst: Path, dtype: str) -> None:
    """Copies the tokenizer, and config.json with the dtype of the new weights."""
    for name in FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
    config = read_json(src / "config.json")
    # transformers 5 writes dtype, and still reads torch_dtype, the name of 4.
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
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
def _progress(tensors: Mapping[str, Any]) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes of each tensor that was read.

    It shows them on a terminal, and is where Ctrl-C stops: elsewhere it could come in the
    middle of Orbax, which then complains at length.
    """
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
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
    config = read_config(files)
    tensors = check_saved(saved[0], config) if saved else hf_tensors(path, config)
    origin = read_manifest(files) if saved else {}
    rows: dict[str, tuple[int, Any]] = {}  # one per kind of tensor: count, any of them
    for name, tensor in tensors.items():
        name = re.sub(r"\.\d+\.", ".*.", name)
        rows[name] = (rows[name][0] + 1 if name in rows else 1, tensor)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
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
    if args.command == "from-hf":
        from_hf(args.src, args.dst, args.dtype)
    elif args.command == "to-hf":
        to_hf(args.src, args.dst)
    else:
        print(inspect(args.src))


if __name__ == "__main__":
    run_command(main)
