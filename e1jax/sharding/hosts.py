"""Several processes, one per host, as one run: how they start, agree and end.

Each samples on its own devices, without waiting for the others; an update takes in the
devices of all. On the host's side, only the responses of a step and a few numbers pass
between them. With one process, all functions return their arguments.
"""

import collections
import contextlib
import ctypes
import faulthandler
import json
import math
import os
import re
import reprlib
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from e1jax.cli.command import sentence_of
from e1jax.config.checks import UserError
from e1jax.config.model import ModelConfig
from e1jax.config.training import HostsConfig
from e1jax.sharding.mesh import make_mesh, parse_mesh
from e1jax.sharding.runtime import COMPILER_OPTIONS

# After so long without a sign of life, a process is given up by the others. JAX's own
# default is 100.
HEARTBEAT_SECONDS = 30


# Processes wait so long for the others to start.
JOIN_SECONDS = 300


# Errors of the collectives between CPUs, and of barriers, when another process is gone.
_LOST = r"heartbeat|Gloo.*(closed|reset|refused|[Bb]roken pipe|[Tt]imed? ?out)"


_GO_ON = "start all of them again, in any number, to go on from the last checkpoint"
_NOT_FOUND = "the other processes of the run are not found"
_START_ALL = (
    "start all of them within five minutes, with the same --coordinator, an address of the "
    "first one's host, and the same --processes"
)
_AS_IT_DOES = (
    ", as it does when another of the run has stopped; the lines above say why; if that "
    f"is so, {_GO_ON}"
)


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """While it is entered, this process is one of a run's, if there are several.

    To be entered before JAX looks for devices. Processes find each other by `config`,
    or without it where JAX knows the environment (TPU pods, Slurm, Open MPI). If one
    fails, it exits at once, with its error; the others end within HEARTBEAT_SECONDS,
    with a sentence and exit code 1.
    """
    with _watching_for_abort(f"error: {_NOT_FOUND}; {_START_ALL}", 2):
        several = _join(config)
    if not several:
        yield
        return
    with _watching_for_abort(f"error: JAX has aborted this process{_AS_IT_DOES}", 1):
        try:
            _check_even()
            yield
        except (KeyboardInterrupt, SystemExit):
            jax.distributed.shutdown()  # all of them stop at the same step
            raise
        except Exception as error:
            if re.search(_LOST, str(error), re.DOTALL):
                _leave(f"error: another process of this run has stopped; {_GO_ON}", 1)
            if sentence := sentence_of(error):
                _leave(f"error: {sentence}", 2)
            _leave(traceback.format_exc(), 1)
        jax.distributed.shutdown()


def _join(config: HostsConfig) -> bool:
    if config.coordinator and config.process == 0:
        _check_port(config.coordinator)
    elif config.coordinator:
        _await_coordinator(config.coordinator)
    # JAX's would take SIGTERM, which is for `stop_signals`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with warnings.catch_warnings():
            # That JAX knows clusters of Kubernetes better with jax[k8s]: TPUs need it not.
            warnings.filterwarnings("ignore", message="(?s).*jax\\[k8s\\]")
            jax.distributed.initialize(
                config.coordinator,
                config.processes,
                config.process,
                initialization_timeout=JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        if "coordinator_address" in str(error):
            return False  # nothing says that there are several
        raise UserError(
            f"the processes of the run are not known ({error}); give --coordinator, "
            "--processes and --process"
        ) from None
    except RuntimeError as error:
        if config.coordinator is None and "before any JAX calls" in str(error):
            return False  # called by a program that uses JAX already
        reason = " ".join(str(error).split())
        raise UserError(f"{_NOT_FOUND} ({reason}); {_START_ALL}") from None
    return True


def _check_port(coordinator: str) -> None:
    """Refuses a port that is taken; JAX, which is to listen there, may crash on one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(coordinator.rpartition(":")[2])))
        except OSError as error:
            raise UserError(
                f"--coordinator {coordinator}: this process, the first one, cannot listen "
                f"there ({error.strerror}); give a port of this host that is free"
            ) from None


def _await_coordinator(coordinator: str) -> None:
    """Waits until the first process listens; JAX would abort if nobody ever does."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                reason = f"{coordinator}: {error.strerror or error}"
                raise UserError(f"{_NOT_FOUND} ({reason}); {_START_ALL}") from None
            time.sleep(1)


def _check_even() -> None:
    """Refuses hosts of different sizes, as each takes an equal share of the work."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        sizes = ", ".join(f"{n} in process {i}" for i, n in sorted(counts.items()))
        raise UserError(
            f"the processes of the run have different numbers of devices ({sizes}); give "
            "all of them as many"
        )


def _leave(message: str, code: int) -> None:
    """Exits without JAX's shutdown, which waits for the others: they wait for us."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():
        # JAX ends the others as soon as this one is gone; they may have to say the same.
        time.sleep(2)
    os._exit(code)


@contextlib.contextmanager
def _watching_for_abort(sentence: str, code: int) -> Iterator[None]:
    """JAX ends a process by abort(), in a thread of its own, when another is gone or does
    not come: then the sentence is printed, and the process exits with the code.

    No Python runs in the handler of SIGABRT, which could wait for the interpreter's lock
    for ever. faulthandler writes to a pipe, libc's sleep() holds the aborting thread for
    as many seconds as the signal's number, 6, and a thread here reads the pipe. Where it
    cannot run, the process ends by the signal after these seconds.
    """
    read, write = os.pipe()
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    faulthandler.enable(write)  # its handler calls the one of before, sleep

    def watch() -> None:
        said = b""
        while b"Aborted" not in said:
            more = os.read(read, 2**16)
            if not more:  # the run has ended
                return
            said += more
        os.write(2, f"{sentence}\n".encode())
        os._exit(code)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        faulthandler.disable()
        libc.signal(signal.SIGABRT, None)
        os.close(write)
        watcher.join()
        os.close(read)


def is_first() -> bool:
    """Whether this process writes files and prints for the run: process 0 does."""
    return jax.process_index() == 0


def process_allgather(numbers: Any) -> np.ndarray:
    """The numbers [...] of every process, [P, ...] float64. Waits for all of them."""
    array = np.array(numbers, np.float64)
    bits = array.reshape(-1).view(np.uint32)  # JAX would make them float32
    every = np.ascontiguousarray(multihost_utils.process_allgather(bits))
    return every.view(np.float64).reshape(jax.process_count(), *array.shape)


def any_process(flag: Any) -> bool:
    """Whether it is true in any process. Waits for all of them."""
    return bool(process_allgather(bool(flag)).any())


def allgather_texts(text: str) -> list[str]:
    """The text of every process. Waits for all of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(len(data)).astype(int)
    padded = np.zeros(1 + sizes.max(), np.uint8)
    padded[: len(data)] = data
    every = multihost_utils.process_allgather(padded)
    rows = zip(every, sizes, strict=True)
    return [bytes(row[:size]).decode() for row, size in rows]


def call_in_first(do: Callable[[], None]) -> None:
    """Calls a function in the first process, while the others wait. An error that is the
    user's is raised in all of them, as a UserError."""
    problem = ""
    if is_first():
        try:
            do()
        except (UserError, OSError) as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            problem = sentence
    problem, *_ = allgather_texts(problem)
    if problem:
        raise UserError(problem)


def check_agreement(values: Mapping[str, Any]) -> None:
    """Refuses, in every process, values (JSON) that the processes of a run do not share."""
    first, *others = map(json.loads, allgather_texts(json.dumps(values)))
    differences = []
    for number, other in enumerate(others, 1):
        differences += [
            f"{name} ({reprlib.repr(first.get(name))} in process 0, "
            f"{reprlib.repr(other.get(name))} in process {number})"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"the processes of the run differ in {', '.join(differences[:5])}{more}; "
            "start all of them with the same code, settings, model and data"
        )


def allgather_rows(rows: Any, group: int) -> Any:
    """Arrays with the rows of every process, in the order of the stream of prompts.

    Each process has as many, `group` of them a prompt, and of the prompts in turn: the
    p-th, the (P + p)-th, ...
    """
    count = jax.process_count()
    if count == 1:
        return rows

    def in_order(x):  # [P, rows, ...]
        x = x.reshape(count, -1, group, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])

    return jax.tree.map(in_order, multihost_utils.process_allgather(rows))


def divided_devices(
    rollout_mesh: str | None,
) -> tuple[list[Any], list[Any]]:
    """The devices of all processes that learn, and the devices of this one that sample:
    all, or with a `rollout_mesh` the last ones of each process, which do not learn.

    Raises UserError if none would be left to learn.
    """
    if rollout_mesh is None:
        return jax.devices(), jax.local_devices()
    count = math.prod(parse_mesh(rollout_mesh).values())
    per_process = jax.local_device_count()
    if count >= per_process:
        raise UserError(
            f"rollout_mesh {rollout_mesh} takes {count} devices of each host, which has "
            f"{per_process}; leave one or more to the updates"
        )
    ids = [
        sorted(d.id for d in jax.devices() if d.process_index == p)
        for p in range(jax.process_count())
    ]
    sampling = {i for own in ids for i in own[-count:]}
    learning = [d for d in jax.devices() if d.id not in sampling]
    return learning, [d for d in jax.local_devices() if d.id in sampling]


def local_mesh(config: ModelConfig, mesh: Mesh) -> Mesh:
    """The mesh to sample on: this process's devices out of `mesh`, which spans all
    processes, in the shape that suits the model."""
    return make_mesh(None, config, devices_by_process(mesh)[jax.process_index()])


def devices_by_process(mesh: Mesh) -> np.ndarray:
    """The devices of a mesh [processes, devices of each], in the order of their ids: the
    mesh itself may go through the torus of TPUs across hosts."""
    devices = sorted(mesh.devices.flat, key=lambda d: (d.process_index, d.id))
    return np.array(devices).reshape(len({d.process_index for d in devices}), -1)


def by_process(x: NamedSharding) -> NamedSharding:
    """The same layout with the mesh's devices in the order of `devices_by_process`."""
    assert isinstance(x.mesh, Mesh)
    devices = devices_by_process(x.mesh).reshape(x.mesh.axis_sizes)
    ordered = Mesh(devices, x.mesh.axis_names, axis_types=x.mesh.axis_types)
    return NamedSharding(ordered, x.spec)


def make_local_copy(mesh: Mesh, local: Any) -> Callable[[Any], Any]:
    """params -> the same on the local mesh, with the dtypes that `local` (abstract) has:
    the same arrays if they are so already, else copies.

    The devices send each other the missing shards; nothing goes through the host. Every
    process calls it at the same time.
    """
    copy = make_copy_to_all(mesh, local)

    def own_part(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        parts = [shard.data for shard in x.addressable_shards]
        assert like.sharding is not None
        return jax.make_array_from_single_device_arrays(x.shape, like.sharding, parts)

    def to_local(params: Any) -> Any:
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(local), strict=True)
        if all(x.dtype == y.dtype and x.sharding == y.sharding for x, y in pairs):
            return params
        # One program has one order of devices; arrays in that order stay.
        orders = jax.tree.map(lambda x: by_process(x.sharding), params)
        return jax.tree.map(own_part, copy(jax.device_put(params, orders)), local)

    return to_local


def make_copy_to_all(mesh: Mesh, local: Any):
    """One jitted program, params laid out `by_process` -> the same on every host's local
    mesh, with the dtypes that `local` (abstract) has and divided as it is."""
    own: Mesh = jax.tree.leaves(local)[0].sharding.mesh
    # One local mesh after the other: an array that is replicated over `hosts` is, on each,
    # divided as its own mesh says.
    every = Mesh(
        devices_by_process(mesh).reshape(-1, *own.devices.shape),
        ("hosts", *own.axis_names),
        axis_types=(AxisType.Auto,) * (1 + len(own.axis_names)),
    )

    def copy(params: Any) -> Any:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), params, local)

    return jax.jit(
        copy,
        out_shardings=jax.tree.map(
            lambda x: NamedSharding(every, x.sharding.spec), local
        ),
        compiler_options=COMPILER_OPTIONS,
    )
