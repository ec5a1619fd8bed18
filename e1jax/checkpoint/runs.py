"""Checkpoints of a run: parameters, optimizer state and position in the data, as one.

A run directory of `sft` or `train` keeps `config.json` and the tokenizer files once,
beside `checkpoints/<step>/params/`.
"""

import json
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from e1jax.checkpoint.digests import check_checksums, checksums
from e1jax.checkpoint.params import PARAMS, explain_orbax, restore_args
from e1jax.cli.files import INTEGER, OBJECT, check_fields, read_json
from e1jax.config.buckets import in_bucket, write_whole
from e1jax.config.checks import UserError, writing
from e1jax.config.training import CheckpointConfig
from e1jax.nn.quantize import Params
from e1jax.sharding.hosts import is_first
from e1jax.sharding.mesh import replicated

CHECKPOINTS, RECORD, BEST = "checkpoints", "record/metadata", "best.json"


# Of a run: digests of what it was begun with, besides its settings.
ORIGIN = "origin.json"


# Orbax's mark of a complete step in a bucket.
COMMIT_SUCCESS_FILE = "commit_success.txt"

CHECKSUMS = "checksums"  # in the record of a step; steps of e1jax 0.1 have none


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
    if is_step(path.name) and path.parent.name == CHECKPOINTS:
        run_dir, step = path.parent.parent, path
    elif is_step(path.name) and (path.parent / CHECKPOINTS).is_dir():
        run_dir, step = path.parent, path.parent / CHECKPOINTS / path.name
    else:
        return None
    if not _is_complete(step):
        steps = ", ".join(map(str, _saved_steps(run_dir))) or "none"
        raise UserError(f"{run_dir} has no step {path.name}; its saved steps: {steps}")
    return step / PARAMS, run_dir


def is_step(name: str) -> bool:
    """Whether a directory of this name can be a step: a number as Orbax writes it."""
    return re.fullmatch("0|[1-9][0-9]{0,17}", name) is not None


def _is_complete(step: Path) -> bool:
    """Whether a step is written. On a disk it gets its name then; in a bucket, which cannot
    rename, Orbax writes a file into it."""
    if in_bucket(step):
        return (step / COMMIT_SUCCESS_FILE).is_file()
    return (step / PARAMS).is_dir()


def saved_checksums(params: Path) -> dict[str, int] | None:
    """The checksums of a step's parameters, by name; None if it was saved without."""
    path = params.parent / RECORD
    if not path.is_file():
        return None
    sums = read_json(path, {CHECKSUMS: OBJECT}, [CHECKSUMS]).get(CHECKSUMS, {})
    return sums.get(PARAMS)


def _saved_steps(run_dir: Path) -> list[int]:
    return sorted(
        int(step.name)
        for step in (run_dir / CHECKPOINTS).glob("*")
        if is_step(step.name) and _is_complete(step)
    )


def _best_step(run_dir: Path) -> int:
    """The step that the run recorded as its best, or the latest."""
    steps = _saved_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no finished checkpoint yet; let the run go on")
    record = run_dir / CHECKPOINTS / BEST
    best = read_json(record, {"step": INTEGER})["step"] if record.exists() else None
    return best if best in steps else steps[-1]


class RunCheckpoints:
    """Checkpoints of a training run: RUN_DIR/checkpoints/STEP/{params,optimizer,record}.

    Writing goes on in the background while training does. A step exists once it is complete:
    a step that a kill interrupted is ignored, and removed.
    With `best`, the name of a metric, the step with its highest value (its lowest, if
    `lower_is_better`) is kept besides the latest ones, and named in `best.json`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        best: str | None = None,
        *,
        lower_is_better: bool = False,
    ):
        policy: Any = ocp.checkpoint_managers.LatestN(config.keep)
        self.sign = sign = -1 if lower_is_better else 1
        value = (
            (lambda metrics: sign * metrics.get(best, -sign * math.inf))
            if best
            else None
        )
        if value:
            highest = ocp.checkpoint_managers.BestN(get_metric_fn=value, n=1)
            policy = ocp.checkpoint_managers.AnyPreservationPolicy([policy, highest])
        self.directory = run_dir.absolute() / CHECKPOINTS
        self.best = best
        # Its threads log the tracebacks of errors that `wait` then raises.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # After such an error, Python warns of writes that were not begun.
        warnings.filterwarnings(
            "ignore", r"coroutine .* was never awaited", RuntimeWarning
        )
        with explain_orbax(f"{self.directory} cannot be read"):
            self.manager = ocp.CheckpointManager(
                str(self.directory),
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
        sums = {"params": checksums(params), "optimizer": checksums(optimizer)}
        args = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(optimizer),
            record=ocp.args.JsonSave({**record, CHECKSUMS: sums}),
        )
        with self._saying_what_is_left():
            self.manager.save(step, args=args, metrics=record.get("metrics", {}))

    def restore(
        self, params: Params, optimizer: Any
    ) -> tuple[int, Params, Any, dict[str, Any]] | None:
        """Step, parameters, optimizer state and record of the latest step; None if none.

        The arguments are abstract: the shape, dtype and sharding of each array.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            params=restore_args(params),
            optimizer=restore_args(optimizer),
            record=ocp.args.JsonRestore(),
        )
        path = self.directory / str(step)
        way_out = "delete it to go on from the step before"
        with explain_orbax(f"{path} is damaged, {way_out}"):
            saved = self.manager.restore(step, args=args)
        record = saved["record"]
        check_fields(record, {CHECKSUMS: OBJECT}, f"{path / RECORD}", [CHECKSUMS])
        for name, expected in record.pop(CHECKSUMS, {}).items():
            check_checksums(saved[name], expected, f"{path / name}", way_out)
        return step, saved["params"], saved["optimizer"], record

    def wait(self) -> None:
        """Returns when everything is on disk. Raises UserError if it cannot be."""
        with self._saying_what_is_left():
            self.manager.wait_until_finished()
        if self.best and is_first():
            self._name_best(self.best)

    def close(self) -> None:
        """Waits for the last step to be written; raises UserError if it was not."""
        self.wait()
        self.manager.close()

    def _saying_what_is_left(self):
        steps = _saved_steps(self.directory.parent)
        left = f"the last step there is {steps[-1]}" if steps else "no step is there"
        return explain_orbax(f"{self.directory} cannot be written, {left}")

    def _name_best(self, metric: str) -> None:
        """Only a complete step can be the best one; of equals it is the latest."""
        damaged = (
            f"{self.directory}: the metrics of a step are damaged, delete that step"
        )
        with explain_orbax(damaged):
            measured = [
                (self.sign * float(metrics[metric]), step)
                for step in self.manager.all_steps()
                if metric in (metrics := self.manager.metrics(step) or {})
            ]
        if measured:
            value, step = max(measured)
            with writing(self.directory / BEST):
                best = json.dumps({"step": step, metric: self.sign * value}) + "\n"
                write_whole(self.directory / BEST, best)


def abstract_state(
    optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> Any:
    """The optimizer's state as shapes: moments are sharded as their parameters are."""

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
