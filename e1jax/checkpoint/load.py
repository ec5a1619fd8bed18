"""Models of any kind, by name or directory: files found, checked and read onto a mesh."""

import contextlib
import dataclasses
import functools
import re
import reprlib
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from e1jax.checkpoint.adapter import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterOrigin,
    as_adapter,
    check_saved_adapter,
    of_peft,
    of_run,
    read_adapter,
)
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
from e1jax.checkpoint.runs import ORIGIN, find_params, is_step, saved_checksums
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
from e1jax.nn.lora import add_adapter, scaled
from e1jax.nn.model import abstract_adapter, abstract_params
from e1jax.nn.quantize import Params
from e1jax.sharding.mesh import make_mesh, note_undivided
from e1jax.tokenizer import FILES, GENERATION, Tokenizer, copy_files

_BUNDLED = Path(__file__).parent.parent / "models"

# Models that come with the package: docs/nano.md.
BUNDLED = ("nano", "nano-e1", "nano-elastic")


FORMAT_VERSION = 1  # of the manifest, and with it of the directory

_TENSOR = {"dtype": TEXT, "sha256": TEXT}


_NOTED_BYTES = 10**8  # of a model that is copied from a bucket

HUGGING_FACE, CHECKPOINT = "Hugging Face directory", "e1jax checkpoint"
RUN, PEFT = "run directory", "peft directory"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk. Its directories are resolved once, so that everything read here
    is of one step, also where a run goes on meanwhile and finds a better one.

    Sizes, tokenizer and the list of tensors are read when first asked for. Raises UserError for whatever is
    missing, broken, or of another model.
    """

    name: str  # as the user gave it
    path: Path  # the directory of that name, downloaded if need be
    kind: str  # HUGGING_FACE, CHECKPOINT, RUN or PEFT
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
    def adapter(self) -> AdapterOrigin | None:
        """If the weights are an adapter, A and B alone, its settings and its base."""
        if self.kind == PEFT:
            return of_peft(self.weights)
        return of_run(self._run_dir) if self.kind == RUN else None

    @property
    def base_digest(self) -> str | None:
        """Of an adapter: the digest of the weights that it was trained beside, if a run
        recorded it."""
        file = self._run_dir / ORIGIN
        recorded = self.kind == RUN and file.is_file()
        return read_json(file).get("model") if recorded else None

    @property
    def _run_dir(self) -> Path:
        return self.weights.parent.parent.parent

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
            if self.adapter:
                settings = self.adapter.settings
                return check_saved_adapter(self.weights, self.config, settings)
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
        if self.kind == PEFT:
            names = PEFT_CONFIG, PEFT_WEIGHTS
            return files_digest(self.weights / name for name in names)
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
    adapter: ModelFiles | None = None  # beside the weights of `files`

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
        return params if self.adapter is None else self._adapted(params, self.adapter)

    def _adapted(self, params: Params, files: ModelFiles) -> Params:
        """The parameters with the adapter beside them."""
        assert files.adapter is not None
        settings = files.adapter.settings
        shapes = abstract_adapter(self.config, settings, self.mesh, self.dtype)
        with files.reading():
            arrays = read_adapter(files.weights, self.config, settings)
        adapter = as_adapter(arrays, shapes)
        sums = saved_checksums(files.weights) if files.kind == RUN else None
        if sums is not None:
            way_out = "take another step of the run"
            check_checksums(adapter, sums, str(files.weights), way_out)
        adapter = scaled(adapter, settings.scale)
        return add_adapter(
            params, jax.tree.map(lambda x: x.astype(self.dtype), adapter)
        )

    def record(self) -> dict[str, Any]:
        """What decides which model this is, as JSON, for the record of a file made by it."""
        return {
            **_identity(self.files),
            "dtype": str(self.dtype),
            "quantize": self.quantize,
            "adapter": self.adapter and _identity(self.adapter),
        }


def _identity(files: ModelFiles) -> dict[str, Any]:
    local = Path(files.name).exists()
    return {
        "model": str(files.path.resolve()) if local else files.name,
        "step": files.step,
        "weights": files.digest,
    }


def load_model(
    model: str,
    mesh_text: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    state_budgets: bool = True,
    adapter: str | None = None,
    devices: Sequence[Any] | None = None,
) -> LoadedModel:
    """A model ready to run, on the mesh that `mesh_text` names, of all devices or `devices`.

    `dtype` is "float32" or "bfloat16"; None is float32 on a CPU and bfloat16 elsewhere.
    `quantize` "int8" is for sampling; a checkpoint that is stored so needs no asking.
    `adapter` names an adapter to it; a run that trained one, or a peft directory, may be
    named as the model, and is its base with the adapter. A run's tokenizer is taken with it.
    Without `state_budgets`, its tokenizer has no text that states them, whatever the
    checkpoint records. Raises UserError for whatever is missing, broken, or of another model.
    """
    if dtype is not None:
        check_choice("dtype", dtype, ("float32", "bfloat16"))
    if quantize is not None:
        check_choice("quantize", quantize, QUANTIZED)
    files, added = find_with_adapter(model, adapter)
    # First, as a tokenizer of another model explains more than the shapes of tensors.
    tokenizer = (added if added and added.kind == RUN else files).tokenizer
    config = files.config
    if not state_budgets:
        tokenizer = dataclasses.replace(tokenizer, budget_text=None)
    mesh = make_mesh(mesh_text, config, devices)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    tensors = files.tensors  # checked now; the weights themselves can wait
    if added and added.adapter:
        check_saved_adapter(added.weights, config, added.adapter.settings)
        quantize = quantize or added.adapter.settings.quantize
    if files.kind != HUGGING_FACE:
        quantize = quantized(tensors) or quantize
    note_undivided(config, abstract_params(config, mesh, jnp.dtype(dtype), quantize))
    return LoadedModel(
        files, config, tokenizer, mesh, jnp.dtype(dtype), quantize, added
    )


def load_flagged(flags: EngineFlags) -> LoadedModel:
    """The model that a command line names; see `load_model`."""
    return load_model(
        flags.model,
        flags.mesh,
        flags.dtype,
        flags.quantize,
        state_budgets=not flags.no_state_budgets,
        adapter=flags.adapter,
    )


def find_with_adapter(
    model: str, adapter: str | None = None
) -> tuple[ModelFiles, ModelFiles | None]:
    """The files of a model, and of an adapter if it has one: `adapter`, or `model` itself if
    that is an adapter, whose base is then found by the name that it recorded.

    Raises UserError if either is missing or is not what it should be.
    """
    files = find_model(model)
    if adapter is not None:
        if files.adapter:
            raise UserError(
                f"the model {model} is an adapter itself; give one, beside a model"
            )
        added = find_model(adapter, "adapter")
        if not added.adapter:
            raise UserError(
                f"the adapter {adapter} is a model; give it as that, or name an adapter"
            )
        return files, added
    if not files.adapter:
        return files, None
    base = files.adapter.base
    way_out = f"give it, by --model BASE --adapter {model}"
    if not base:
        raise UserError(f"{model} is an adapter, and names no model; {way_out}")
    try:
        found = find_model(base)
    except UserError as error:
        raise UserError(
            f"{model} is an adapter to {base}: {error}; {way_out}"
        ) from None
    if found.adapter:
        raise UserError(f"{model} is an adapter to {base}, which is one too; {way_out}")
    if files.base_digest not in (None, found.digest):
        raise UserError(
            f"{model} is an adapter to {base}, whose weights were others when it was "
            f"trained; {way_out}"
        )
    return found, files


def find_model(model: str, kind: str = "model") -> ModelFiles:
    """The files of a model: bundled, local, in a bucket, or downloaded from the hub; or of an
    adapter, which messages then call it (`kind`).

    Of a checkpoint or run in a bucket, small files are copied here, and arrays are read
    from there when they are needed; a Hugging Face directory is copied in full. Raises
    UserError if there is no such directory or the hub does not give it.
    """
    path = resolve(model, kind)
    with looking_for(kind, model):
        whole = any(path.glob("model*.safetensors"))
        if (path / PEFT_CONFIG).is_file() and not whole:
            local = _copied(path, (PEFT_CONFIG, PEFT_WEIGHTS))
            return ModelFiles(model, path, PEFT, local, local, {})
        saved = find_params(path)
        if saved is None:
            local = _download(path) if in_bucket(path) else path
            return ModelFiles(model, path, HUGGING_FACE, local, local, {})
        weights, directory = saved
        kind = CHECKPOINT if weights.parent == directory else RUN
        if in_bucket(directory):
            local = _copied(directory, ("config.json", "manifest.json"))
            copy_files(directory, local)
            directory = local
    manifest = read_manifest(directory)
    return ModelFiles(model, path, kind, weights, directory, manifest)


def _copied(directory: Path, names: Sequence[str]) -> Path:
    """A local directory with the files of these names; a local one itself."""
    if not in_bucket(directory):
        return directory
    local = temporary_directory(directory)
    for name in names:
        if (directory / name).is_file():
            copy_file(directory / name, local / name)
    return local


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


def resolve(model: str, kind: str = "model") -> Path:
    """The directory of a model: bundled, local, in a bucket, or downloaded from the hub;
    `kind` is what messages call it.

    Raises UserError if there is no such directory or the hub does not give it.
    """
    if model in BUNDLED:
        if not (_BUNDLED / model).is_dir():
            raise UserError(
                f"the model {shown(model)} is not in this installation of e1jax"
            )
        return _BUNDLED / model
    with looking_for(kind, model):
        path = open_path(model).expanduser()
        if path.is_dir() or (is_step(path.name) and find_params(path)):
            return path
    if in_bucket(path):
        raise UserError(
            f"the {kind} {shown(model)} is not in the bucket, or there is no such bucket; "
            "check its address, as by gcloud storage ls"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise UserError(
            f"the {kind} {shown(model)} is neither a directory nor a hub id (owner/name); "
            "check the path"
            + (", or use nano, which is bundled" if kind == "model" else "")
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                allow_patterns=[
                    "config.json",
                    *FILES,
                    "*.safetensors",
                    INDEX_FILE,
                    PEFT_CONFIG,
                ],
            )
        )
    except Exception as error:  # many kinds: no network, no such repository, no right
        reason = str(error).strip().split("\n")[0].strip(" .:")
        raise UserError(
            f"the {kind} {shown(model)} is not a directory here and cannot be had from the "
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
