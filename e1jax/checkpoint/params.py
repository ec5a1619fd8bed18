"""Parameters on disk (Orbax): saved, checked by name and shape, and read onto a mesh.

An e1jax checkpoint is a directory with `params/` (Orbax), `config.json`, the tokenizer
files and, if it was converted, `manifest.json`.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from e1jax.checkpoint.lazy import (
    THREADS,
    Index,
    LazyArray,
    broken_checkpoint,
    in_short,
    parts_of,
    registry,
)
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.nn.model import abstract_params
from e1jax.nn.quantize import Params
from e1jax.sharding.mesh import make_mesh

PARAMS = "params"


def save_params(path: Path, params: Params) -> None:
    """Writes parameters, of which any may be a LazyArray, to a new directory.

    Uncompressed: weights are noise to zstd, which would make a checkpoint a fifth
    smaller and several times slower to write.
    """
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=registry()
    )
    with (
        explain_orbax(f"{path} cannot be written"),
        ocp.Checkpointer(handler) as checkpointer,
    ):
        checkpointer.save(str(path.absolute()), args=ocp.args.PyTreeSave(params))


def load_params(path: Path, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Parameters saved at `path`, each device reading its shard; cast to `dtype`.

    Raises UserError if the checkpoint is incomplete or belongs to another model.
    """
    return place(open_params(path, config), config, mesh, dtype)


def open_params(path: Path, config: ModelConfig) -> dict[str, LazyArray]:
    """The parameters saved at `path`, by name ("layers/mlp/up/kernel"), yet to be read.

    Raises UserError if the checkpoint is incomplete or belongs to another model; so does
    reading a missing array.
    """
    item = abstract_on_one(config, quantized(check_saved(path, config)))
    return restore_lazily(path, item)


def restore_lazily(path: Path, item: Params) -> dict[str, LazyArray]:
    """The arrays saved at `path`, of which `item` is the abstract tree, by name, yet to be
    read."""
    lazy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), item)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry())
    with (
        explain_orbax(broken_checkpoint(path)),
        ocp.Checkpointer(handler) as checkpointer,
    ):
        args = ocp.args.PyTreeRestore(item, lazy)
        return named_leaves(checkpointer.restore(str(path.absolute()), args=args))


def place(
    arrays: Mapping[str, LazyArray], config: ModelConfig, mesh: Mesh, dtype: Any
) -> Params:
    """Parameters on the mesh, each device reading its own part, cast to `dtype`.

    Parameters are read in turn, the largest first: beside the loaded ones, host memory
    holds one parameter (a CPU uses that very copy) and the parts of it being read.
    """
    leaves = named_leaves(abstract_params(config, mesh, dtype, quantized(arrays)))
    placed = {}
    for name in sorted(leaves, key=lambda name: leaves[name].size, reverse=True):
        leaf = leaves[name]
        placed[name] = _load(arrays[name], leaf.sharding, leaf.dtype)
    return as_tree(placed, config)


def _load(
    array: LazyArray, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    """An array on its devices, each part of it read once by each process."""
    shards, tasks = {}, []
    for index in sharding.addressable_devices_indices_map(array.shape).values():
        spans = _spans(array.shape, index)
        if spans not in shards:
            shape = [stop - start for start, stop in spans]
            shards[spans] = empty(shape, dtype)
            whole = tuple(slice(*span) for span in spans)
            tasks += [(spans, part) for part in parts_of(array, whole)]

    def read(task: tuple[tuple[tuple[int, int], ...], Index]) -> None:
        spans, part = task
        where = tuple(
            slice(cut.start - start, cut.stop - start)
            for cut, (start, _) in zip(part, spans, strict=True)
        )
        shards[spans][where] = array.read(part)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, tasks))
    loaded = jax.make_array_from_callback(
        array.shape, sharding, lambda index: shards[_spans(array.shape, index)]
    )
    return loaded.block_until_ready()  # else copies to devices would pile up


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """numpy.empty, aligned to 64 bytes: JAX on a CPU uses that memory itself, not a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(dtype).reshape(shape)


def _spans(shape: Sequence[int], index: Any) -> tuple[tuple[int, int], ...]:
    """Start and stop per dim, by which an index can be looked up."""
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )


def check_saved(path: Path, config: ModelConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter saved at `path`, by name.

    Raises UserError if it cannot be read, or is of a model of other sizes.
    """
    saved = read_metadata(path)
    shapes = {name: array.shape for name, array in saved.items()}
    check_same(shapes, named_shapes(config, quantized(saved)), str(path))
    return saved


def read_metadata(path: Path) -> dict[str, Any]:
    """Shape and dtype of every array saved at `path`, by name; UserError if it cannot be
    read."""
    # By the handler: a Checkpointer logs the reason of a failure, and returns None.
    handler = ocp.PyTreeCheckpointHandler()
    with explain_orbax(broken_checkpoint(path)), contextlib.closing(handler):
        return named_leaves(handler.metadata(epath.Path(str(path.absolute()))).tree)


def quantized(saved: Mapping[str, Any]) -> str | None:
    """The form of the weights that `check_saved` found; see quantize."""
    return "int8" if "embedding/values" in saved else None


def abstract_on_one(config: ModelConfig, form: str | None = None) -> Params:
    """Shapes of a model's parameters, for who needs no mesh."""
    return abstract_params(config, on_one_device(config), np.float32, form)


def on_one_device(config: ModelConfig) -> Mesh:
    """A mesh of one device."""
    return make_mesh("data=1,tensor=1", config, jax.devices()[:1])


def named_shapes(
    config: ModelConfig, form: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in the order of the tree."""
    leaves = named_leaves(abstract_on_one(config, form))
    return {name: array.shape for name, array in leaves.items()}


def as_tree(leaves: Mapping[str, Any], config: ModelConfig) -> Params:
    """The tree of parameters whose leaves these are, by name."""
    shapes = abstract_on_one(config, quantized(leaves))
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [leaves[name] for name in named_leaves(shapes)]
    )


def named_leaves(params: Params) -> dict[str, Any]:
    """The leaves by name, the keys joined by slashes: "layers/mlp/up/kernel"."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in leaves
    }


def check_same(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    where: str,
) -> None:
    """Refuses tensors, given by name and shape, that differ from the model's.

    Three errors: missing, unexpected, wrong shape; each lists the names.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    way_out = "config.json and the weights are of different models, or a file is lost"
    if missing:
        raise UserError(f"{where} lacks {_listed(missing)}; {way_out}")
    if unexpected:
        raise UserError(
            f"{where} holds {_listed(unexpected)}, which a model of this config.json "
            f"does not have; {way_out}"
        )
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != tuple(shape)
    ]
    if wrong:
        raise UserError(
            f"{where} has the wrong shape in {_listed(wrong)}; sizes in config.json "
            "must be those of the weights"
        )


@contextlib.contextmanager
def explain_orbax(problem: str) -> Iterator[None]:
    """Whatever Orbax and tensorstore raise, in one sentence that starts with `problem`.

    Their log is off meanwhile: it would print the traceback of the error raised here.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem}: {in_short(error)}") from None
    finally:
        log.setLevel(level)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    """Orbax arguments that restore arrays as `abstract`: shapes, dtypes, shardings."""
    return ocp.args.PyTreeRestore(
        abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
    )
