"""A training run: its directory, its state, and its steps up to the end or a signal."""

import contextlib
import dataclasses
import json
import reprlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from e1jax.checkpoint.huggingface import read_config
from e1jax.checkpoint.load import LoadedModel, load_model
from e1jax.checkpoint.metrics import MetricsLog, NoLog
from e1jax.checkpoint.runs import ORIGIN, RunCheckpoints
from e1jax.cli.command import stop_signals
from e1jax.cli.files import read_json
from e1jax.cli.locks import owning
from e1jax.cli.outputs import digest
from e1jax.config.buckets import in_bucket, temporary_directory, write_whole
from e1jax.config.checks import UserError, writing
from e1jax.config.finetuning import FineTuningConfig
from e1jax.config.load import flatten, record_config
from e1jax.config.training import GRPOConfig, SFTConfig
from e1jax.nn.quantize import Params
from e1jax.sharding.fsdp import default_mesh
from e1jax.sharding.hosts import (
    any_process,
    call_in_first,
    check_agreement,
    is_first,
)
from e1jax.sharding.runtime import COMPILER_OPTIONS
from e1jax.tokenizer import (
    BUDGET_TEXT_KEY,
    INSTRUCTION_KEY,
    copy_files,
    upload_model,
)

if TYPE_CHECKING:
    import grain


def load_trainable(
    config: FineTuningConfig | GRPOConfig, devices: Sequence[Any] | None = None
) -> LoadedModel:
    """The model that training begins with, on the mesh of the updates, by default all
    devices (or `devices`) on `data`.

    Parameters are loaded in `update.param_dtype`; those beside which an adapter is trained,
    in the dtype of the computation. Raises UserError for a model that is an adapter itself,
    and for int8 weights unless an adapter is trained beside them.
    """
    model, adapter, dtype = config.model, config.adapter, config.update.param_dtype
    if adapter.rank:
        dtype = computed_in(config).name
    devices = jax.devices() if devices is None else devices
    mesh = config.mesh or default_mesh(len(devices))
    loaded = load_model(model, mesh, dtype, adapter.quantize, devices=devices)
    if loaded.adapter:
        raise UserError(
            f"{model} is an adapter, which training cannot begin with; merge it first: "
            f"python -m e1jax.convert to-hf {model} DST"
        )
    if loaded.quantize and not adapter.rank:
        raise UserError(
            f"{model} has its weights as int8, which cannot be trained; train an adapter "
            "beside them (adapter.rank), or the model that it was made from"
        )
    return loaded


def computed_in(config: FineTuningConfig | GRPOConfig) -> Any:
    """The dtype of the computation, and of the parameters that an engine samples from."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(config.dtype or ("float32" if on_cpu else "bfloat16"))


@contextlib.contextmanager
def owning_run(run_dir: Path) -> Iterator[None]:
    """Makes a run directory; while the context is entered, no other run writes there.

    The first process of several owns it for all. Raises UserError, in all of them, if
    another run owns it or it cannot be made.
    """
    with contextlib.ExitStack() as stack:

        def own() -> None:
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(owning(run_dir, inside=True))

        call_in_first(own)
        yield


def record_origin(origin: Mapping[str, Any], run_dir: Path) -> None:
    """Writes ORIGIN, what a run was begun with besides its settings: digests, by
    the names of the settings. In a run that was begun earlier, refuses any change.

    A run that lacks one, as those begun by e1jax 0.1 do, gets it now.
    """
    path = run_dir / ORIGIN
    then = read_json(path) if path.exists() else {}
    changes = [
        f"{name} ({then[name]!r} there, {value!r} now)"
        for name, value in origin.items()
        if then.get(name, value) != value
    ]
    if changes:
        raise UserError(
            f"{run_dir} was begun with other content of {', '.join(changes)}; bring that "
            "back, or take another --run-dir"
        )
    if {**then, **origin} != then:
        with writing(run_dir):
            write_whole(path, json.dumps({**then, **origin}, indent=2) + "\n")


def check_processes(
    config: SFTConfig | FineTuningConfig | GRPOConfig,
    run_dir: Path,
    origin: Mapping[str, Any],
) -> None:
    """Refuses, in all processes of a run, ones with other settings, content or code."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    code = {"the code of e1jax": code_digest(), "the version of jax": jax.__version__}
    place = {"--run-dir": str(run_dir)}
    check_agreement({**dict(flatten(settings)), **place, **origin, **code})


def code_digest() -> str:
    """Names the source code of this package."""
    package = Path(__file__).parent.parent
    sources = sorted(package.rglob("*.py"))
    texts = [(str(p.relative_to(package)), p.read_text("utf-8")) for p in sources]
    return digest(texts)


def write_model_files(
    run_dir: Path,
    config: Mapping[str, Any],
    instruction: str,
    budget_text: str | None,
    write_tokenizer: Callable[[Path], Any],
) -> Path:
    """Makes a run directory a model: writes `config.json` and the tokenizer files.

    `config` is in the format of Hugging Face. The instruction that prompts end with, and
    the text that states their budgets, if any does, are recorded with the tokenizer,
    beside the chat template, so that they go wherever the model is converted to. Gives the
    local directory of the files, which is `run_dir` unless that is in a bucket.
    """
    local = temporary_directory(run_dir) if in_bucket(run_dir) else run_dir
    with writing(run_dir):
        write_tokenizer(local)
        tokenizer = read_json(local / "tokenizer_config.json")
        tokenizer |= {INSTRUCTION_KEY: instruction, BUDGET_TEXT_KEY: budget_text}
        if budget_text is None:
            del tokenizer[BUDGET_TEXT_KEY]
        for name, value in (
            ("tokenizer_config.json", tokenizer),
            ("config.json", config),
        ):
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
            write_whole(local / name, text)
        if in_bucket(run_dir):
            upload_model(local, run_dir)
    return local


def prepare_run(
    config: FineTuningConfig | GRPOConfig,
    loaded: LoadedModel,
    instruction: str,
    run_dir: Path,
    origin: Mapping[str, Any],
) -> None:
    """Makes the run directory a model: settings, sizes and tokenizer.

    The first process writes, and the others wait for it. Raises UserError, in all of
    them, for a run that was begun otherwise, and in a process that does not see the first
    one's files.
    """
    call_in_first(lambda: _write_run(config, loaded, instruction, run_dir, origin))
    if not (run_dir / "config.yaml").exists():
        raise UserError(
            f"{run_dir} was made by the first process, and this one does not see it; "
            "take a --run-dir on a file system that all hosts share"
        )


def _write_run(
    config: FineTuningConfig | GRPOConfig,
    loaded: LoadedModel,
    instruction: str,
    run_dir: Path,
    origin: Mapping[str, Any],
) -> None:
    """Writes the files of `prepare_run`; refuses a run that was begun otherwise."""
    record_config(config, run_dir)
    if (run_dir / "config.json").exists() and read_config(run_dir) != loaded.config:
        raise UserError(
            f"{run_dir} was begun with a model of other sizes than {config.model} has "
            "now; bring that model back, or take another --run-dir"
        )
    record_origin(origin, run_dir)
    source = loaded.files.directory
    ids = ("bos_token_id", "eos_token_id")
    named = {k: v for k, v in read_json(source / "config.json").items() if k in ids}
    write_model_files(
        run_dir,
        loaded.config.to_hf(config.update.param_dtype) | named,
        instruction,
        loaded.tokenizer.budget_text,
        write_tokenizer=lambda directory: copy_files(source, directory),
    )


def restore_or_init(
    checkpoints: RunCheckpoints,
    init_state: Callable[[Params], Any],
    shapes: tuple[Params, Any],
    init_params: Callable[[], Params],
    batches: "grain.DatasetIterator",
) -> tuple[int, Params, Any]:
    """Step, parameters and training state of the latest checkpoint, else of a new run.

    `shapes` are abstract parameters and state, with shardings. The iterator `batches` is
    set to where the checkpoint left it. A new run has step 0.
    """
    restored = checkpoints.restore(*shapes)
    if restored:
        step, params, state, record = restored
        position = record.get("data")
        if position is None or not _alike(position, batches.get_state()):
            raise UserError(
                f"{checkpoints.directory / str(step)} is damaged: its position in the "
                f"data is {reprlib.repr(position)}; delete it to go on from the step "
                "before"
            )
        batches.set_state(position)
        return step, params, state
    params = init_params()
    init = jax.jit(
        init_state,
        out_shardings=jax.tree.map(lambda s: s.sharding, shapes[1]),
        compiler_options=COMPILER_OPTIONS,
    )
    return 0, params, init(params)


def _alike(value: Any, other: Any) -> bool:
    """Whether JSON values have the same keys and types, and no number below 0."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(
            _alike(value[key], other[key]) for key in value
        )
    return type(value) is type(other) and (type(value) is not int or value >= 0)


@dataclasses.dataclass
class Run:
    """A run between two of its steps; see `running`."""

    config: SFTConfig | FineTuningConfig | GRPOConfig
    checkpoints: RunCheckpoints
    log: MetricsLog | NoLog
    signals: list[int]  # each of them asks the run to stop
    steps: int  # of the complete run
    step: int  # the last one that is done
    saved: int  # the last one with a checkpoint
    stopped: bool = False

    def goes_on(self) -> bool:
        """Whether to take another step: some are left, and no process got a signal."""
        self.stopped = any_process(self.signals)
        return not self.stopped and self.step < self.steps

    def is_due(self, every: int) -> bool:
        """Whether work that is done every so many steps, and at the end, is due."""
        return self.step % every == 0 or self.step == self.steps

    def add(self, metrics: Mapping[str, Any], tokens: int | None = None) -> None:
        """Another step is done, of so many `tokens`, if they are to be logged per second.
        Its metrics may still be on the device."""
        self.step += 1
        self.log.add(self.step, metrics, tokens)

    def save(
        self, params: Params, state: Any, data: Any, metrics: Mapping[str, float]
    ) -> None:
        """Logs metrics that were measured after the step, and saves a checkpoint.

        `data` is the position in the data from which the next step goes on.
        """
        self.log.flush(metrics)
        self.log.push()  # first, so that no step that is resumed from lacks its line
        record = {"seed": self.config.seed, "data": data, "metrics": metrics}
        self.checkpoints.save(self.step, params, state, record)
        self.saved = self.step


@contextlib.contextmanager
def running(
    run_dir: Path,
    config: SFTConfig | FineTuningConfig | GRPOConfig,
    checkpoints: RunCheckpoints,
    step: int,
    steps: int,
    *,
    headline: Sequence[str],
    next_command: str,
    wandb: str | None = None,
) -> Iterator[Run]:
    """The run of `steps` steps from `step` on, for a loop over `goes_on` and `add`.

    The first process logs; see MetricsLog for `headline` and `wandb`. Afterwards all
    checkpoints are on disk, and the first process prints how the run has ended, with the
    command for its model. Raises KeyboardInterrupt then if Ctrl-C came.
    """
    log: MetricsLog | NoLog = NoLog()
    if is_first():
        log = MetricsLog(run_dir, step, steps, headline, wandb)
    with closing(checkpoints), closing(log), stop_signals() as signals:
        run = Run(config, checkpoints, log, signals, steps, step, saved=step)
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
