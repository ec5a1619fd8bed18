"""Models of any kind, by name or directory: files found, checked and read onto a mesh."""

import contextlib
import dataclasses
import functools
import re
import reprlib
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from e1jax.checkpoint.digests import check_checksums, files_digest
from e1jax.checkpoint.huggingface import (
    INDEX_FILE,
    StoredTensor,
    lazy_arrays,
    open_hf,
    read_config,
)
from e1jax.checkpoint.int8 import as_int8
from e1jax.checkpoint.params import check_saved, open_params, place, quantized
from e1jax.checkpoint.runs import find_params, is_step, saved_checksums
from e1jax.cli.files import OBJECT, TEXT, check_fields, looking_for, read_json
from e1jax.cli.flags import EngineFlags
from e1jax.cli.outputs import digest
from e1jax.config.buckets import (
    copy_file,
    files_below,
    in_bucket,
    open_path,
    temporary_directory,
)
from e1jax.config.checks import UserError, check_choice, shown
from e1jax.config.model import QUANTIZED, ModelConfig
from e1jax.nn.model import abstract_params
from e1jax.nn.quantize import Params
from e1jax.sharding.mesh import make_mesh, note_undivided
from e1jax.tokenizer import FILES, GENERATION, Tokenizer, copy_files

_BUNDLED = Path(__file__).parent.parent / "models"


FORMAT_VERSION = 1  # of the manifest, and with it of the directory

_TENSOR = {"dtype": TEXT, "sha256": TEXT}


_NOTED_BYTES = 10**8  # of a model that is copied from a bucket

HUGGING_FACE, CHECKPOINT = "Hugging Face directory", "e1jax checkpoint"
RUN = "run directory"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk. Its directories are resolved once, so that everything read here
    is of one step, also where a run goes on meanwhile and finds a better one.

    Sizes, tokenizer and the list of tensors are read when first asked for. Raises UserError for whatever is
    missing, broken, or of another model.
    """

    name: str  # as the user gave it
    path: Path  # the directory of that name, downloaded if need be
    kind: str  # HUGGING_FACE, CHECKPOINT or RUN
    weights: Path  # directory of safetensors, or of parameters written by Orbax
    directory: Path  # of config.json, tokenizer and manifest: local, also of a bucket
    manifest: Mapping[str, Any]  # see `read_manifest`

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Sizes of the model; its output head as the tensors have it, see `open_hf`."""
        if self.kind == HUGGING_FACE:
            return self._hugging_face[0]
        return read_config(self.directory)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, checked against the sizes; see `read_tokenizer`."""
        return read_tokenizer(self.directory)

    @functools.cached_property
    def tensors(self) -> Mapping[str, Any]:
        """Each stored tensor's shape and dtype, checked against the config: StoredTensor
        by its Hugging Face name, or the abstract array by its own."""
        if self.kind == HUGGING_FACE:
            return self._hugging_face[1]
        with self.reading():
            return check_saved(self.weights, self.config)

    @functools.cached_property
    def _hugging_face(self) -> tuple[ModelConfig, dict[str, StoredTensor]]:
        return open_hf(self.weights)

    @property
    def step(self) -> int | None:
        """The step of a run that this is; None for any other model."""
        return int(self.weights.parent.name) if self.kind == RUN else None

    @functools.cached_property
    def digest(self) -> str:
        """Names the weights: 16 hexadecimal digits.

        Made of checksums where they were recorded, by `convert` in the manifest (a
        SHA-256 of each tensor) and by a run in each step; else of the files, see
        `files_digest`.
        """
        if "tensors" in self.manifest:
            named = {name: t["sha256"] for name, t in self.manifest["tensors"].items()}
            forms = [self.manifest.get(name) for name in ("dtype", "quantize")]
            return digest([named, *forms])
        if self.kind == RUN and (sums := saved_checksums(self.weights)):
            return digest(sums)
        if self.kind == HUGGING_FACE:
            return files_digest(sorted({t.file for t in self.tensors.values()}))
        if in_bucket(self.weights):
            return digest(
                [(n, f["md5Hash"]) for n, f in files_below(self.weights).items()]
            )
        return files_digest(sorted(f for f in self.weights.rglob("*") if f.is_file()))

    def lazy_arrays(self) -> Mapping[str, Any]:
        """Arrays by their names in e1jax, which are read when they are sliced."""
        if self.kind == HUGGING_FACE:
            return lazy_arrays(self.tensors, self.config)
        with self.reading():
            return open_params(self.weights, self.config)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around reads of the weights: an error because a run that goes on has deleted
        this step, for a better or a later one, says so."""
        try:
            yield
        except (UserError, OSError):
            if self.kind != RUN or self.weights.is_dir():
                raise
            raise UserError(
                f"{self.weights.parent} was deleted before it was read, by the run that "
                "goes on; run the same command again, or name another step"
            ) from None


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, but for its weights: `read_params` reads them."""

    files: ModelFiles
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: Any  # of the parameters and of the computation
    quantize: str | None = None  # form of kernels and embedding, see quantize

    _params: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False)

    def read_params(self) -> Params:
        """The parameters, read from disk onto the mesh, each device its own part: 15 GB
        for 7B in bfloat16.

        Read again while the arrays are alive, and were not donated, they are the same
        arrays. They are not kept alive here, or a trained model would be in memory twice.
        """
        if self._params:
            tree, references = self._params
            arrays = [reference() for reference in references]
            if all(array is not None and not array.is_deleted() for array in arrays):
                return jax.tree.unflatten(tree, arrays)
        params = self._read()
        arrays, tree = jax.tree.flatten(params)
        self._params[:] = tree, [weakref.ref(array) for array in arrays]
        return params

    def _read(self) -> Params:
        arrays = self.files.lazy_arrays()
        as_saved = all(array.dtype == self.dtype for array in arrays.values())
        if self.quantize and not quantized(arrays):
            arrays, as_saved = as_int8(arrays), False
        with self.files.reading():
            params = place(arrays, self.config, self.mesh, self.dtype)
        if as_saved and self.files.kind == RUN:
            sums = saved_checksums(self.files.weights)
            if sums is not None:
                path, way_out = str(self.files.weights), "take another step of the run"
                check_checksums(params, sums, path, way_out)
        return params

    def record(self) -> dict[str, Any]:
        """What decides which model this is, as JSON, for the record of a file made by it."""
        local = Path(self.files.name).exists()
        return {
            "model": str(self.files.path.resolve()) if local else self.files.name,
            "step": self.files.step,
            "weights": self.files.digest,
            "dtype": str(self.dtype),
            "quantize": self.quantize,
        }


def load_model(
    model: str,
    mesh_text: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    state_budgets: bool = True,
) -> LoadedModel:
    """A model ready to run.

    `dtype` is "float32" or "bfloat16"; None is float32 on a CPU and bfloat16 elsewhere.
    `quantize` "int8" is for sampling; a checkpoint that is stored so needs no asking.
    Without `state_budgets`, its tokenizer has no text that states them, whatever the
    checkpoint records. Raises UserError for whatever is missing, broken, or of another model.
    """
    if dtype is not None:
        check_choice("dtype", dtype, ("float32", "bfloat16"))
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZED)
    files = find_model(model)
    tokenizer, config = files.tokenizer, files.config
    if not state_budgets:
        tokenizer = dataclasses.replace(tokenizer, budget_text=None)
    mesh = make_mesh(mesh_text, config)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    tensors = files.tensors  # checked now; the weights themselves can wait
    if files.kind != HUGGING_FACE:
        quantize = quantized(tensors) or quantize
    note_undivided(config, abstract_params(config, mesh, jnp.dtype(dtype), quantize))
    return LoadedModel(files, config, tokenizer, mesh, jnp.dtype(dtype), quantize)


def load_flagged(flags: EngineFlags) -> LoadedModel:
    """The model that a command line names; see `load_model`."""
    return load_model(
        flags.model,
        flags.mesh,
        flags.dtype,
        flags.quantize,
        state_budgets=not flags.no_state_budgets,
    )


def find_model(model: str) -> ModelFiles:
    """The files of a model: bundled, local, in a bucket, or downloaded from the hub.

    Of a checkpoint or run in a bucket, small files are copied here, and arrays are read
    from there when they are needed; a Hugging Face directory is copied in full. Raises
    UserError if there is no such directory or the hub does not give it.
    """
    path = resolve(model)
    with looking_for("model", model):
        saved = find_params(path)
        if saved is None:
            local = _download(path) if in_bucket(path) else path
            return ModelFiles(model, path, HUGGING_FACE, local, local, {})
        weights, directory = saved
        kind = CHECKPOINT if weights.parent == directory else RUN
        if in_bucket(directory):
            local = temporary_directory(directory)
            for name in ("config.json", "manifest.json"):
                if (directory / name).is_file():
                    copy_file(directory / name, local / name)
            copy_files(directory, local)
            directory = local
    manifest = read_manifest(directory)
    return ModelFiles(model, path, kind, weights, directory, manifest)


def _download(path: Path) -> Path:
    """A copy, deleted at the end, of a Hugging Face directory in a bucket."""
    files = {name: file for name, file in files_below(path).items() if "/" not in name}
    wanted = [name for name in files if name.endswith((".json", ".safetensors"))]
    if "config.json" not in files:  # no model, of which `read_config` tells
        wanted = []
    size = sum(files[name]["size"] for name in wanted)
    local = temporary_directory(path)
    if size > _NOTED_BYTES:
        print(
            f"note: {path} is copied to {local} first, {size / 1e9:.1f} GB; a model that "
            "e1jax.convert from-hf made is read where it is",
            file=sys.stderr,
        )
    for name in wanted:
        copy_file(path / name, local / name)
    copy_files(path, local)
    return local


def resolve(model: str) -> Path:
    """The directory of a model: bundled, local, in a bucket, or downloaded from the hub.

    Raises UserError if there is no such directory or the hub does not give it.
    """
    if model in ("nano", "nano-e1"):
        if not (_BUNDLED / model).is_dir():
            raise UserError(
                f"the model {shown(model)} is not in this installation of e1jax"
            )
        return _BUNDLED / model
    with looking_for("model", model):
        path = open_path(model).expanduser()
        if path.is_dir() or (is_step(path.name) and find_params(path)):
            return path
    if in_bucket(path):
        raise UserError(
            f"the model {shown(model)} is not in the bucket, or there is no such bucket; "
            "check its address, as by gcloud storage ls"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise UserError(
            f"the model {shown(model)} is neither a directory nor a hub id (owner/name); "
            "check the path, or use nano, which is bundled"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                allow_patterns=["config.json", *FILES, "*.safetensors", INDEX_FILE],
            )
        )
    except Exception as error:  # many kinds: no network, no such repository, no right
        reason = str(error).strip().split("\n")[0].strip(" .:")
        raise UserError(
            f"the model {shown(model)} is not a directory here and cannot be had from the "
            f"hub ({reason}); check the name and the network, or give a local directory"
        ) from None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model, checked to have no id beyond the model's.

    A response ends at its own EOS and at each that `generation_config.json` or
    `config.json` names. Raises UserError for one that is not an id of the model.
    """
    vocab_size = read_config(path).vocab_size
    tokenizer = Tokenizer.from_dir(path)
    largest = max(tokenizer.backend.get_vocab().values())
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an e1jax checkpoint; empty if it has none, as a run has.

    Raises UserError for one of another version of the format.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    manifest = read_json(file)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {shown(version)}, and this e1jax reads "
            f"{FORMAT_VERSION}; convert the model again, or install a newer e1jax"
        )
    check_fields(manifest, {"tensors": OBJECT}, str(file), ["tensors"])
    for name, tensor in manifest.get("tensors", {}).items():
        check_fields(tensor, _TENSOR, f"{file}: {name}")
    return manifest
