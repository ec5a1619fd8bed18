"""Checkpoints on disk, by Orbax: parameters alone, and the state of a run.

An e1jax checkpoint is a directory with `params/` (Orbax), `config.json`, the tokenizer
files and, if it was converted, `manifest.json`. A run directory of `sft` or `train`
keeps `config.json` and the tokenizer files once, beside
`checkpoints/<step>/params/`.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from e1jax.config import ModelConfig, UserError
from e1jax.model import Params, abstract_params
from e1jax.sharding import make_mesh
from e1jax.tokenizer import read_json

PARAMS = "params"
CHECKPOINTS = "checkpoints"

# A chunk is what one device reads at least. Large enough for a disk or a bucket, small
# enough that a chip of a large mesh reads little besides its own shard.
_CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read when its turn to be written comes, and dropped after."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes one array after the other, so that one at a time is in memory."""

    async def serialize(self, values: Sequence[Any], infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            for write in await super().serialize([value.read()], [info], [arg]):
                write.result()
        return []


def save_params(path: Path, params: Params) -> None:
    """Writes parameters, of which any may be a LazyArray, to a new directory.

    Uncompressed: weights are noise to zstd, which would make a checkpoint a fifth
    smaller and several times slower to write.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (LazyArray, _LazyHandler(deepcopy_host_arrays=False)),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=registry
    )
    save_args = jax.tree.map(
        lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params
    )
    with _orbax(f"{path} cannot be written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            path.absolute(), args=ocp.args.PyTreeSave(params, save_args=save_args)
        )


def load_params(path: Path, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Parameters saved at `path`, each device reading its shard; cast to `dtype`.

    Raises UserError if the checkpoint is not whole or is that of another model.
    """
    check_saved(path, config)
    abstract = abstract_params(config, mesh, dtype)
    restore_args = jax.tree.map(
        lambda array: ocp.ArrayRestoreArgs(
            sharding=array.sharding, global_shape=array.shape, dtype=array.dtype
        ),
        abstract,
    )
    return _restore(path, ocp.args.PyTreeRestore(abstract, restore_args=restore_args))


def load_array(path: Path, name: str) -> np.ndarray:
    """One parameter of a checkpoint ("layers/mlp/up/kernel"), in host memory."""
    item: Any = 0
    restore_args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    keys = name.split("/")
    for key in reversed(keys):
        item, restore_args = {key: item}, {key: restore_args}
    array = _restore(
        path, ocp.args.PyTreeRestore(item, restore_args, partial_restore=True)
    )
    for key in keys:
        array = array[key]
    return array


def check_saved(path: Path, config: ModelConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter saved at `path`, by name.

    Raises UserError if it cannot be read, or is of a model of other sizes.
    """
    handler = ocp.PyTreeCheckpointHandler()
    with _orbax(_broken(path)), ocp.Checkpointer(handler) as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
    if metadata is None:
        raise UserError(f"{_broken(path)}: its metadata is missing")
    saved = named_leaves(metadata.tree)
    shapes = {name: array.shape for name, array in saved.items()}
    check_same(shapes, named_shapes(config), str(path))
    return saved


def abstract_on_one(config: ModelConfig) -> Params:
    """Shapes of a model's parameters, for who needs no mesh."""
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    return abstract_params(config, mesh, np.float32)


def named_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in the order of the tree."""
    leaves = named_leaves(abstract_on_one(config))
    return {name: array.shape for name, array in leaves.items()}


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
    """Refuses tensors, given by name and shape, that are not those of the model.

    Three errors: missing, unexpected, wrong shape; each lists the names.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    way_out = "config.json and the weights are of different models, or a file is lost"
    if missing:
        raise UserError(f"{where} lacks {_listed(missing)}; {way_out}")
    if unexpected:
        raise UserError(
            f"{where} holds {_listed(unexpected)}, which a Qwen2 model of this "
            f"config.json does not have; {way_out}"
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


def find_params(path: Path) -> tuple[Path, Path] | None:
    """Where a checkpoint keeps its parameters, and where its config and tokenizer.

    `path` is an e1jax checkpoint, a run directory (its best step), or one step of a
    run: RUN_DIR/checkpoints/STEP or RUN_DIR/STEP. None if it is none of them.
    """
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS / str(_best_step(path)) / PARAMS, path
    if (path / "config.json").is_file():
        return (path / PARAMS, path) if (path / PARAMS).is_dir() else None
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        run_dir, step = path.parent.parent, path
    elif path.name.isdigit() and (path.parent / CHECKPOINTS).is_dir():
        run_dir, step = path.parent, path.parent / CHECKPOINTS / path.name
    else:
        return None
    if not (step / PARAMS).is_dir():
        steps = ", ".join(map(str, _saved_steps(run_dir))) or "none"
        raise UserError(f"{run_dir} has no step {path.name}; its saved steps: {steps}")
    return step / PARAMS, run_dir


def _saved_steps(run_dir: Path) -> list[int]:
    return sorted(
        int(step.name)
        for step in (run_dir / CHECKPOINTS).iterdir()
        if step.name.isdigit() and (step / PARAMS).is_dir()
    )


def _best_step(run_dir: Path) -> int:
    """The step that the run recorded as its best, or the latest."""
    steps = _saved_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no finished checkpoint yet; let the run go on")
    record = run_dir / CHECKPOINTS / "best.json"
    best = read_json(record).get("step") if record.is_file() else None
    return best if best in steps else steps[-1]


def _restore(path: Path, args: Any) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    with _orbax(_broken(path)), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path.absolute(), args=args)


def _broken(path: Path) -> str:
    return f"{path} is not a whole Orbax checkpoint, convert or save it again"


@contextlib.contextmanager
def _orbax(problem: str) -> Iterator[None]:
    """Whatever Orbax and tensorstore raise, in one sentence that starts with `problem`.

    Meanwhile their log is off: it holds the traceback of what is then raised.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if len(reason) > 300:  # tensorstore ends with the cause
            reason = f"{reason[:150]} ... {reason[-150:]}"
        raise UserError(f"{problem}: {reason}") from None
    finally:
        log.setLevel(level)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
