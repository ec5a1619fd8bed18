"""What is kept on disk: parameters, the state of a run (by Orbax), completions.

An e1jax checkpoint is a directory with `params/` (Orbax), `config.json`, the tokenizer
files and, if it was converted, `manifest.json`. A run directory of `sft` or `train`
keeps `config.json` and the tokenizer files once, beside
`checkpoints/<step>/params/`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh
from tqdm import tqdm

from e1jax.config import (
    CheckpointConfig,
    ModelConfig,
    UserError,
    stop_signals,
    writing,
)
from e1jax.hosts import is_first
from e1jax.model import Params, abstract_params
from e1jax.sharding import make_mesh, replicated
from e1jax.tokenizer import read_json

PARAMS = "params"
CHECKPOINTS = "checkpoints"

# A chunk is what one device reads at least, so it is small: a chip of a large mesh shall
# read little besides its own shard.
_CHUNK_BYTES = 5 * 10**6
_PARTS_IN_FLIGHT = 16  # being written: else they would pile up in memory
THREADS = min(8, max(2, os.cpu_count() or 1))

Index = tuple[slice, ...]  # a part of an array: start and stop per dim


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read part by part, when its turn comes."""

    shape: tuple[int, ...]
    dtype: Any
    parts: tuple[int, ...]  # the shape of what is best read at once
    read: Callable[[Index], np.ndarray]


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes a LazyArray part by part, and restores whatever was saved as one."""

    async def serialize(self, values: Sequence[Any], infos, args=None):
        tasks = []
        for value, info in zip(values, infos, strict=True):
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=bool(info.is_ocdbt_checkpoint),
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=0,
            )
            spec["metadata"]["chunks"] = chunks_of(value.shape, value.dtype)
            store = await tensorstore.open(spec, create=True, context=info.ts_context)
            whole = tuple(slice(0, size) for size in value.shape)
            tasks += [(store, value, part) for part in parts_of(value, whole)]
        room = threading.Semaphore(_PARTS_IN_FLIGHT)

        def write(task: tuple[Any, LazyArray, Index]) -> Any:
            store, value, part = task
            room.acquire()
            try:
                array = value.read(part)
                written = store[part].write(
                    array, can_reference_source_data_indefinitely=True
                )
            except BaseException:
                room.release()
                raise
            written.add_done_callback(lambda _: room.release())
            return written

        try:
            # Reading, hashing and copying leave Python's lock alone, as writing does.
            with ThreadPoolExecutor(THREADS) as pool:
                for written in pool.map(write, tasks):
                    written.result()
        finally:  # what is still being written would outlive its directory's removal
            for _ in range(_PARTS_IN_FLIGHT):
                room.acquire()
        return []

    async def deserialize(self, infos, args=None):
        arrays = []
        for info in infos:
            spec = ocp.type_handlers.get_json_tspec_read(
                info, use_ocdbt=bool(info.is_ocdbt_checkpoint)
            )
            store: Any = await tensorstore.open(spec, context=info.ts_context)
            parts = store.chunk_layout.read_chunk.shape
            read = functools.partial(_read, store, str(info.parent_dir))
            dtype = store.dtype.numpy_dtype
            arrays.append(LazyArray(store.shape, dtype, parts, read))
        return arrays


def _read(store: tensorstore.TensorStore, path: str, part: Index) -> np.ndarray:
    try:
        return store[part].read().result()
    except Exception as error:
        raise UserError(f"{_broken(path)}: {_in_short(error)}") from None


def chunks_of(shape: Sequence[int], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of the chunks that an array is written in: all of it if it is small, else
    a layer, halved until it is small enough."""
    chunks = list(shape)
    if len(shape) == 3 and math.prod(shape) * dtype.itemsize > _CHUNK_BYTES:
        chunks[0] = 1
    # On a mesh, kernels of layers are cut along both dims, so these are halved in turns;
    # of the rest only the vocabulary is cut, the longer dim.
    full = shape if len(shape) == 3 else [1] * len(shape)
    while math.prod(chunks) * dtype.itemsize > _CHUNK_BYTES:
        dims = [dim for dim, size in enumerate(chunks) if size > 1]
        dim = max(dims, key=lambda dim: (chunks[dim] / full[dim], dim))
        chunks[dim] = -(-chunks[dim] // 2)
    return tuple(chunks)


def parts_of(array: LazyArray, index: Index) -> Iterator[Index]:
    """What is to be read for `index`, cut where the parts of the array end."""
    cuts = []
    for span, step in zip(index, array.parts, strict=True):
        inner = range((span.start // step + 1) * step, span.stop, step)
        pairs = itertools.pairwise([span.start, *inner, span.stop])
        cuts.append([slice(*pair) for pair in pairs])
    return itertools.product(*cuts)


def _registry() -> ocp.type_handlers.TypeHandlerRegistry:
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (LazyArray, _LazyHandler())
    )


def save_params(path: Path, params: Params) -> None:
    """Writes parameters, of which any may be a LazyArray, to a new directory.

    Uncompressed: weights are noise to zstd, which would make a checkpoint a fifth
    smaller and several times slower to write.
    """
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=_registry()
    )
    with _orbax(f"{path} cannot be written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(params))


def load_params(path: Path, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Parameters saved at `path`, each device reading its shard; cast to `dtype`.

    Raises UserError if the checkpoint is not whole or is that of another model.
    """
    return place(open_params(path, config), config, mesh, dtype)


def open_params(path: Path, config: ModelConfig) -> dict[str, LazyArray]:
    """The parameters saved at `path`, by name ("layers/mlp/up/kernel"), yet to be read.

    Raises UserError if the checkpoint is not whole or is that of another model; so does
    reading what is missing.
    """
    item = abstract_on_one(config, quantized(check_saved(path, config)))
    lazy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), item)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_registry())
    with _orbax(_broken(path)), ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeRestore(item, lazy)
        return named_leaves(checkpointer.restore(path.absolute(), args=args))


def place(
    arrays: Mapping[str, LazyArray], config: ModelConfig, mesh: Mesh, dtype: Any
) -> Params:
    """Parameters on the mesh, each device reading its own part, cast to `dtype`.

    One after the other, the largest first: beside what is loaded, host memory holds one
    parameter, which a CPU takes as it is, and the parts of it that are being read.
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
    handler = ocp.PyTreeCheckpointHandler()
    with _orbax(_broken(path)), ocp.Checkpointer(handler) as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
    if metadata is None:
        raise UserError(f"{_broken(path)}: its metadata is missing")
    saved = named_leaves(metadata.tree)
    shapes = {name: array.shape for name, array in saved.items()}
    check_same(shapes, named_shapes(config, quantized(saved)), str(path))
    return saved


def quantized(saved: Mapping[str, Any]) -> str | None:
    """The form of the weights that `check_saved` found; see quantize."""
    return "int8" if "embedding/values" in saved else None


def abstract_on_one(config: ModelConfig, form: str | None = None) -> Params:
    """Shapes of a model's parameters, for who needs no mesh."""
    mesh = make_mesh("data=1,tensor=1", config, jax.devices()[:1])
    return abstract_params(config, mesh, np.float32, form)


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
    run: RUN_DIR/checkpoints/STEP or RUN_DIR/STEP. None if it is none of them; so is a
    Hugging Face directory, whatever subdirectories it has.
    """
    # By their names: training leaves other files behind, as training_args.bin.
    if any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return None
    if (path / "config.json").is_file():
        if (path / CHECKPOINTS).is_dir():
            return path / CHECKPOINTS / str(_best_step(path)) / PARAMS, path
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


def _broken(path: Path | str) -> str:
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
        raise UserError(f"{problem}: {_in_short(error)}") from None
    finally:
        log.setLevel(level)


def _in_short(error: Exception) -> str:
    reason = " ".join(str(error).split())
    if len(reason) > 300:  # tensorstore ends with the cause
        reason = f"{reason[:150]} ... {reason[-150:]}"
    return reason


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# The state of a run.


class RunCheckpoints:
    """Checkpoints of a training run: RUN_DIR/checkpoints/STEP/{params,optimizer,record}.

    Writing goes on in the background while training does. A step exists once it is whole:
    one that was being written when the run was killed is ignored, and removed.
    With `best`, the name of a metric, the step with its highest value is kept besides the
    latest ones, and named in `best.json`.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, best: str | None = None
    ):
        policy: Any = ocp.checkpoint_managers.LatestN(config.keep)
        value = (lambda metrics: metrics.get(best, -math.inf)) if best else None
        if value:
            highest = ocp.checkpoint_managers.BestN(get_metric_fn=value, n=1)
            policy = ocp.checkpoint_managers.AnyPreservationPolicy([policy, highest])
        self.directory = run_dir.absolute() / CHECKPOINTS
        self.best = best
        # Its threads log the tracebacks of errors that `wait` then raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=value,  # or Orbax does not write the metrics
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self, step: int, params: Params, optimizer: Any, record: dict[str, Any]
    ) -> None:
        """Starts to write a step. `record` is JSON: whatever else the run goes on from.

        The arrays are copied before this returns, so they may be donated. With `best`,
        `record["metrics"]` holds that metric if it was measured at this step.
        """
        self.wait()
        args = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(optimizer),
            record=ocp.args.JsonSave(record),
        )
        with self._saying_what_is_left():
            self.manager.save(step, args=args, metrics=record.get("metrics", {}))

    def restore(
        self, params: Params, optimizer: Any
    ) -> tuple[int, Params, Any, dict[str, Any]] | None:
        """Step, parameters, optimizer state and record of the latest step; None if none.

        The arguments are abstract: shapes, dtypes and where each array shall lie.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            params=_restore_args(params),
            optimizer=_restore_args(optimizer),
            record=ocp.args.JsonRestore(),
        )
        with _orbax(f"{self.directory / str(step)} is damaged, delete it to go on"):
            saved = self.manager.restore(step, args=args)
        return step, saved["params"], saved["optimizer"], saved["record"]

    def wait(self) -> None:
        """Returns when everything is on disk. Raises UserError if it cannot be."""
        with self._saying_what_is_left():
            self.manager.wait_until_finished()
        if self.best and is_first():
            self._name_best(self.best)

    def close(self) -> None:
        self.wait()
        self.manager.close()

    def _saying_what_is_left(self):
        steps = _saved_steps(self.directory.parent)
        left = f"the last step there is {steps[-1]}" if steps else "no step is there"
        return _orbax(f"{self.directory} cannot be written, {left}")

    def _name_best(self, metric: str) -> None:
        """Only a step that is whole can be the best one; of equals it is the latest."""
        measured = [
            (metrics[metric], step)
            for step in self.manager.all_steps()
            if metric in (metrics := self.manager.metrics(step) or {})
        ]
        if measured:
            value, step = max(measured)
            new = self.directory / "best.json.new"
            new.write_text(json.dumps({"step": step, metric: value}) + "\n")
            new.replace(self.directory / "best.json")


def abstract_state(
    optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> Any:
    """The optimizer's state as shapes: moments lie where their parameters do."""

    def like(array, param):
        if isinstance(array, optax.MaskedNode):  # in the state of the other optimizer
            return array
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=param.sharding)

    def whole(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated(mesh))

    return optax.tree_utils.tree_map_params(
        optimizer,
        like,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=whole,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


class MetricsLog:
    """RUN_DIR/metrics.jsonl, one object a step, and progress on stderr.

    The same numbers go to RUN_DIR/tensorboard and, if `wandb` names a project, to
    Weights & Biases. A step is written when the next one is added: its numbers are read
    from the device while that computes. Lines beyond `step`, where the run goes on from,
    are dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        steps: int,
        headline: Sequence[str],
        wandb: str | None = None,
    ):
        # Slow to load, and `sample` needs none of it.
        from tensorboardX import SummaryWriter

        self.wandb = _wandb_run(wandb, run_dir) if wandb else None
        self.path = path = run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        new = run_dir / "metrics.jsonl.new"
        with writing(run_dir):
            new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            new.replace(path)
            # Drawn anew: a kill loses what TensorBoard has not written yet.
            shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
            self.board = SummaryWriter(str(run_dir / "tensorboard"))
        for line in kept:
            self._draw(json.loads(line))
        self.headline = headline
        self.waiting: dict[str, Any] | None = None
        self.clock = time.perf_counter()
        self.bar = tqdm(initial=step, total=steps, disable=not sys.stderr.isatty())

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes a step's metrics, which may still be on the device."""
        self.flush()
        now = time.perf_counter()
        self.waiting = {"step": step, **metrics, "seconds": round(now - self.clock, 4)}
        self.clock = now

    def flush(self, more: Mapping[str, float] | None = None) -> None:
        """Writes the step that was added last, with more metrics of it.

        Raises UserError if one of them is not a finite number: training has failed.
        """
        if self.waiting is None:
            return
        line = {key: np.asarray(v).item() for key, v in self.waiting.items()}
        line |= more or {}
        self.waiting = None
        check_finite(line["step"], line)
        # Opened for each line: a mounted bucket gets what was written when it is closed.
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = self._draw(line)
        if self.wandb:
            self.wandb.log(values, step=line["step"])
        self._show(line)

    def _draw(self, line: dict[str, Any]) -> dict[str, Any]:
        """Hands a line to TensorBoard; its numbers without the step."""
        values = {key: value for key, value in line.items() if key != "step"}
        for key, value in values.items():
            self.board.add_scalar(key, value, line["step"])
        return values

    def _show(self, line: dict[str, Any]) -> None:
        shown = ", ".join(f"{key} {line[key]:.4g}" for key in self.headline)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        step, steps = line["step"], self.bar.total
        if self.bar.disable and (step % max(1, steps // 20) == 0 or step == 1):
            print(f"step {step}/{steps}: {shown}", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, of which `flush` has told
            self.board.close()
        if self.wandb:
            self.wandb.finish()
        self.bar.close()


class NoLog:
    """In place of a MetricsLog, for a process that leaves it to another."""

    def add(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def flush(self, more: Mapping[str, float] | None = None) -> None: ...
    def close(self) -> None: ...


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises UserError if a metric is not a finite number: training has failed."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: {name} is {value}; lower the learning rate and take "
                "another --run-dir"
            )


def import_wandb(project: str) -> Any:
    """The package wandb; raises UserError if it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an optional package)
    except ImportError:
        raise UserError(
            f"wandb: {project} needs the package wandb; pip install wandb, or leave it out"
        ) from None
    return wandb


def _wandb_run(project: str, run_dir: Path) -> Any:
    """A run of Weights & Biases that goes on where the run directory's earlier one did."""
    wandb = import_wandb(project)
    # Not the directory's name: a run made anew under it would be taken for the old one,
    # whose steps cannot be written again.
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    key, name = file.read_text(), run_dir.absolute().name
    try:
        return wandb.init(
            project=project, id=key, name=name, dir=run_dir, resume="allow"
        )
    except Exception as error:  # many kinds: no login, no network, no right
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"wandb: {project} cannot be written ({reason}); log in, or leave it out"
        ) from None


def _step(line: str) -> float:
    """The step of a line of metrics; infinite if a kill has cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
    )


# The output of a command that samples.


def digest(value: Any) -> str:
    """Names a JSON value: equal ones, and hardly others, have the same digest."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Progress:
    """Progress of sampling on stderr. Called with the new tokens after each chunk.

    That is where Ctrl-C stops. Elsewhere it could come in the middle of JAX, which may
    lose it.
    """

    bar: tqdm
    signals: list[int]
    start: float

    def __init__(self, total: int, kept_in: Path | None):
        self.total, self.kept_in = total, kept_in
        self.completions = self.tokens = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While it is entered; it begins when the weights are there."""
        unit = "completion"
        self.bar = tqdm(total=self.total, unit=unit, file=sys.stderr, disable=None)
        self.start = time.monotonic()
        try:
            with self.bar, stop_signals() as self.signals:
                yield
        except KeyboardInterrupt:
            way_on = f", kept in {self.kept_in}; run the same command again to go on"
            raise KeyboardInterrupt(
                f"after {self.completions} of {self.total} completions"
                f"{way_on if self.kept_in else ''}"
            ) from None

    def __call__(self, new_tokens: int) -> None:
        self.tokens += new_tokens
        self.bar.set_postfix_str(self._speed())
        if self.signals:
            raise KeyboardInterrupt

    def step(self) -> None:
        """One more completion is done."""
        self.completions += 1
        self.bar.update()

    def summary(self) -> str:
        return f"{self.total} completion{'s' * (self.total > 1)}, {self._speed()}"

    def _speed(self) -> str:
        seconds = time.monotonic() - self.start
        speed = self.tokens / seconds
        return f"{self.tokens} tokens in {seconds:.1f} s ({speed:.0f} tokens/s)"


class JsonlOutput:
    """A file of completions, one JSON object a line: appended to as they finish, and read
    when the command is run again.

    Beside it lies FILE.settings.json, which says how it was made, so that a run with
    other settings is refused and not mixed in. Nothing is written before the context is
    entered.

    `requests` holds a digest of each request by its id. `entry` gives the key and the
    value under which `done` keeps a record; it raises KeyError or TypeError for what is
    none. Raises UserError for a file that cannot be written, or that is not ours.
    """

    def __init__(
        self,
        path: Path,
        requests: Mapping[str | int, str],
        entry: Callable[[dict[str, Any]], tuple[Any, Any]],
    ):
        self.path = path
        with self._reading():
            if path.exists() and not path.is_file():
                raise UserError(f"--output {path} is not a regular file; give one")
            self.sidecar = path.with_name(path.name + ".settings.json")
            content = path.read_bytes() if path.exists() else b""
            ours = self.sidecar.exists()
        self.made_how: dict[str, Any] = {}
        self.requests = {json.dumps(key): value for key, value in requests.items()}
        if content and not ours:
            raise UserError(
                f"{path} has content but no {self.sidecar.name} beside it, so it was "
                "not made by this command; choose another --output"
            )
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"--output {path}: {path.parent} is no writable directory")
        self.done, self.size = self._whole_lines(content, entry)
        self.size_read = len(content)
        self.file: TextIO | None = None

    def compare(self, settings: dict[str, Any]) -> None:
        """Refuses settings or requests that differ from those of the earlier run."""
        self.made_how = {"settings": settings, "requests": self.requests}
        if not self.size:
            return
        try:
            old = json.loads(self.sidecar.read_text(encoding="utf-8"))
            before, requests = old["settings"], old["requests"]
            names = [n for n, v in settings.items() if before.get(n) != v]
            changed = [n for n, v in self.requests.items() if requests.get(n, v) != v]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.sidecar} is not readable; choose another --output"
            ) from None
        if names:
            there = ", ".join(f"{n}={before.get(n)!r}" for n in names)
            here = ", ".join(f"{n}={settings[n]!r}" for n in names)
            raise UserError(
                f"{self.path} was made with {there}, and this run has {here}; use the "
                "same settings or another --output"
            )
        if changed:
            raise UserError(
                f"{self.path} was made with another prompt or other parameters for id "
                f"{changed[0]}; choose another --output"
            )
        self.made_how["requests"] = {**requests, **self.requests}

    def __enter__(self) -> "JsonlOutput":
        part = self.sidecar.with_name(self.sidecar.name + ".part")
        with self._writing():
            self.file = self.path.open("a", encoding="utf-8")
            self._lock(self.file)
            if os.fstat(self.file.fileno()).st_size != self.size_read:
                raise UserError(
                    f"another run has written {self.path} meanwhile; run the same "
                    "command again"
                )
            # A run that was killed while writing leaves half a line: written again.
            self.file.truncate(self.size)
            part.write_text(json.dumps(self.made_how, indent=1) + "\n")
            os.replace(part, self.sidecar)
        return self

    def __exit__(self, *error: object) -> None:
        assert self.file is not None
        self.file.close()

    def append(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        with self._writing():
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def _lock(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing {self.path}; let it end or choose another "
                "--output"
            ) from None

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output {self.path} cannot be read: {reason}") from None

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"--output {self.path} cannot be written: {reason}; choose another one"
            ) from None

    def _whole_lines(
        self, content: bytes, entry: Callable[[dict[str, Any]], tuple[Any, Any]]
    ) -> tuple[dict[Any, Any], int]:
        """What is there, and the bytes up to the end of the last whole line."""
        done, size = {}, content.rfind(b"\n") + 1
        for number, line in enumerate(content[:size].splitlines(), 1):
            try:
                key, value = entry(json.loads(line))
                done[key] = value
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{self.path} line {number} is not a completion of this command; "
                    "choose another --output"
                ) from None
        return done, size
