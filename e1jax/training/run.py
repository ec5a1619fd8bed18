"""A training run: its directory, its state, and its steps up to the end or a signal."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from e1jax.checkpoint.metrics import MetricsLog, NoLog
from e1jax.checkpoint.runs import RunCheckpoints
from e1jax.cli.command import stop_signals
from e1jax.cli.files import read_json
from e1jax.config.checks import writing
from e1jax.config.training import GRPOConfig, SFTConfig
from e1jax.nn.quantize import Params
from e1jax.sharding.hosts import any_process, is_first
from e1jax.sharding.runtime import COMPILER_OPTIONS
from e1jax.tokenizer import INSTRUCTION_KEY

if TYPE_CHECKING:
    import grain


def write_model_files(
    run_dir: Path,
    config: Mapping[str, Any],
    instruction: str,
    write_tokenizer: Callable[[Path], Any],
) -> None:
    """Makes a run directory a model: writes `config.json` and the tokenizer files.

    `config` is in the format of Hugging Face. The instruction that prompts end with is
    recorded with the tokenizer, beside the chat template, so that it goes wherever the
    model is converted to.
    """
    with writing(run_dir):
        write_tokenizer(run_dir)
        tokenizer = read_json(run_dir / "tokenizer_config.json")
        for name, value in (
            ("tokenizer_config.json", {**tokenizer, INSTRUCTION_KEY: instruction}),
            ("config.json", config),
        ):
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
            new = run_dir / f"{name}.new"
            new.write_text(text, encoding="utf-8")
            new.replace(run_dir / name)  # atomic, wherever the run is killed


def restore_or_init(
    checkpoints: RunCheckpoints,
    optimizer: optax.GradientTransformation,
    shapes: tuple[Params, Any],
    init_params: Callable[[], Params],
    batches: "grain.DatasetIterator",
) -> tuple[int, Params, Any]:
    """Step, parameters and optimizer state of the latest checkpoint, else of a new run.

    `shapes` are abstract parameters and optimizer state, with shardings. The iterator
    `batches` is set to where the checkpoint left it. A new run has step 0.
    """
    restored = checkpoints.restore(*shapes)
    if restored:
        step, params, state, record = restored
        batches.set_state(record["data"])
        return step, params, state
    params = init_params()
    init = jax.jit(
        optimizer.init,
        out_shardings=jax.tree.map(lambda s: s.sharding, shapes[1]),
        compiler_options=COMPILER_OPTIONS,
    )
    return 0, params, init(params)


@dataclasses.dataclass
class Run:
    """A run between two of its steps; see `running`."""

    config: SFTConfig | GRPOConfig
    checkpoints: RunCheckpoints
    log: MetricsLog | NoLog
    signals: list[int]  # each of them asks the run to stop
    step: int  # the last one that is done
    saved: int  # the last one with a checkpoint
    stopped: bool = False

    def goes_on(self) -> bool:
        """Whether to take another step: some are left, and no process got a signal."""
        self.stopped = any_process(self.signals)
        return not self.stopped and self.step < self.config.steps

    def is_due(self, every: int) -> bool:
        """Whether work that is done every so many steps, and at the end, is due."""
        return self.step % every == 0 or self.step == self.config.steps

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Another step is done. Its metrics may still be on the device."""
        self.step += 1
        self.log.add(self.step, metrics)

    def save(
        self, params: Params, state: Any, data: Any, metrics: Mapping[str, float]
    ) -> None:
        """Logs metrics that were measured after the step, and saves a checkpoint.

        `data` is the position in the data from which the next step goes on.
        """
        self.log.flush(metrics)
        record = {"seed": self.config.seed, "data": data, "metrics": metrics}
        self.checkpoints.save(self.step, params, state, record)
        self.saved = self.step


@contextlib.contextmanager
def running(
    run_dir: Path,
    config: SFTConfig | GRPOConfig,
    checkpoints: RunCheckpoints,
    step: int,
    *,
    headline: Sequence[str],
    next_command: str,
    wandb: str | None = None,
) -> Iterator[Run]:
    """The run from `step` on, for a loop over `goes_on` and `add`.

    The first process logs; see MetricsLog for `headline` and `wandb`. Afterwards all
    checkpoints are on disk, and the first process prints how the run has ended, with the
    command for its model. Raises KeyboardInterrupt then if Ctrl-C came.
    """
    log: MetricsLog | NoLog = NoLog()
    if is_first():
        log = MetricsLog(run_dir, step, config.steps, headline, wandb)
    with closing(checkpoints), closing(log), stop_signals() as signals:
        run = Run(config, checkpoints, log, signals, step, saved=step)
        yield run
    done = f"after step {run.step}, saved"
    if run.step == 0:
        done = "before the first step was done"
    if is_first():
        stop = f"stopped {done}; repeat the command to go on"
        end = f"{run_dir} is trained; {next_command} --model {run_dir}"
        print(stop if run.stopped else end)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
