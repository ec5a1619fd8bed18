"""Command: Hugging Face files to an e1jax checkpoint and back; and loading of either.

`load_model` is how every command gets a model: from the bundled ones, a hub id, a
Hugging Face directory, an e1jax checkpoint or a run directory.

A conversion streams. One of our parameters (a stack of all layers) at a time is in
host memory, and everything is written to a sibling of DST that gets its name at the
very end, so that an interrupted conversion leaves nothing at DST.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from e1jax.checkpoint import check_same, find_params, load_params, named_leaves
from e1jax.config import ModelConfig, UserError
from e1jax.model import Params, abstract_params
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    name: str  # as the user gave it
    config: ModelConfig
    params: Params  # on the mesh
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: Any  # of the parameters and of the computation


def load_model(
    model: str, mesh_text: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """A model ready to run, each device reading its own part of the weights.

    `dtype` is "float32" or "bfloat16"; None is float32 on a CPU and bfloat16 elsewhere.
    Raises UserError for whatever is missing, broken, or of another model.
    """
    path = resolve(model)
    saved = find_params(path)
    files = saved[1] if saved else path
    config, tokenizer = read_model_files(files)
    mesh = make_mesh(mesh_text, config)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if saved:
        params = load_params(saved[0], config, mesh, jnp.dtype(dtype))
    else:
        params = _load_hf(path, config, mesh, jnp.dtype(dtype))
    return LoadedModel(model, config, params, tokenizer, mesh, jnp.dtype(dtype))


def resolve(model: str) -> Path:
    """The directory of a model: bundled, local, or downloaded from the hub.

    Raises UserError if there is no such directory or the hub does not give it.
    """
    path = Path(model).expanduser()
    if model in ("nano", "nano-e1"):
        if not (_BUNDLED / model).is_dir():
            raise UserError(f"the model {model!r} is not in this installation of e1jax")
        return _BUNDLED / model
    if path.is_dir() or (path.name.isdigit() and find_params(path)):
        return path
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


def read_model_files(path: Path) -> tuple[ModelConfig, Tokenizer]:
    """What `config.json` and the tokenizer files of a model say."""
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no config.json, so it is not a model directory; give a "
            "Hugging Face directory, an e1jax checkpoint or a run directory"
        )
    config = ModelConfig.from_hf(
        read_json(path / "config.json"), str(path / "config.json")
    )
    tokenizer = Tokenizer.from_dir(path)
    largest = max(tokenizer.backend.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'} has the id {largest}, and vocab_size in "
            f"config.json is {config.vocab_size}; they are of different models"
        )
    return config, tokenizer


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
        files = [path / name for name in sorted(set(map(str, index.values())))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise UserError(
                f"{path} lacks {', '.join(lost[:5])} of the {len(files)} files that "
                f"{_INDEX} names; download them"
            )
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
        if name not in names[file]:
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
    for name, array in named_leaves(_abstract(config)).items():
        pattern, turned = TABLE[name]
        shape = array.shape[1:] if "{}" in pattern else array.shape
        for hf_name in hf_names(config, name):
            shapes[hf_name] = shape[::-1] if turned else shape
    return shapes


def _abstract(config: ModelConfig) -> Params:
    """Shapes of the parameters, on any one device."""
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    return abstract_params(config, mesh, jnp.float32)


def _load_hf(path: Path, config: ModelConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """Parameters from safetensors files, one parameter at a time in host memory."""
    tensors = hf_tensors(path, config)

    def load(keys, array: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        sources = [tensors[hf_name] for hf_name in hf_names(config, name)]
        loaded = jax.make_array_from_callback(
            array.shape,
            array.sharding,
            lambda index: _read_part(sources, name, index, dtype),
        )
        return loaded.block_until_ready()  # else copies to the device would pile up

    return jax.tree.map_with_path(load, abstract_params(config, mesh, dtype))


def _read_part(
    sources: list[_Tensor], name: str, index: Any, dtype: np.dtype
) -> np.ndarray:
    """A part of our parameter `name`, as `index`, a slice per dim, says."""
    pattern, turned = TABLE[name]

    def read(source: _Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return source.read(index[::-1]).T if turned else source.read(index)

    if "{}" in pattern:
        parts = [read(source, index[1:]) for source in sources[index[0]]]
        return np.stack(parts, dtype=dtype, casting="unsafe")
    return np.ascontiguousarray(read(sources[0], index), dtype=dtype)
