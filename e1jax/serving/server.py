"""Uvicorn with an end of our own: it goes on listening, and refuses, until all is done."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from e1jax.nn.quantize import Params
from e1jax.sampling.engine import Engine
from e1jax.serving.app import make_app
from e1jax.serving.metrics import Metrics
from e1jax.serving.protocol import ApiError, ServerSettings
from e1jax.serving.worker import ENDING, FAILED, LOADING, READY, EngineThread

# For answers to go out whose samples are done; a client that does not read them is cut.
_SENDING_SECONDS = 5


class Server(uvicorn.Server):
    """Serves an application. At the first SIGTERM or Ctrl-C, running requests have `grace`
    seconds to finish. Tells on stderr how the engine is."""

    def __init__(self, app: FastAPI, worker: EngineThread, grace: float):
        config = uvicorn.Config(
            app,
            log_config=None,  # uvicorn's own would close the streams of other handlers
            log_level="warning",
            timeout_graceful_shutdown=_SENDING_SECONDS,
        )
        super().__init__(config)
        self.worker, self.grace = worker, grace
        self.deadline: float | None = None
        self.told = LOADING

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end; a second signal is the end, at once."""
        if self.deadline is not None:
            print("ended by a second signal", file=sys.stderr, flush=True)
            os._exit(130 if sig == signal.SIGINT else 143)
        self.deadline = time.monotonic() + self.grace
        if self.worker.state != FAILED:
            self.worker.state = ENDING

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        worker = self.worker
        if worker.state != self.told:
            self._tell(worker.state)
            self.told = worker.state
        if self.deadline is not None:
            is_late = time.monotonic() >= self.deadline
            if is_late and worker.open_samples:
                said = f"{worker.open_samples} samples were cut after --grace-seconds"
                print(said, file=sys.stderr, flush=True)
                worker.fail(ApiError(503, "the server is ending"))
            self.should_exit |= worker.open_samples == 0
        return await super().on_tick(counter)

    def _tell(self, state: str) -> None:
        said = {
            READY: "ready",
            ENDING: f"ending: {self.worker.open_samples} samples may finish",
            FAILED: "the engine failed; requests are refused from now on",
        }
        if state == FAILED and not self.worker.is_loaded:
            self.should_exit = True  # and the error is raised
            return
        if state == FAILED:
            traceback.print_exception(self.worker.error)
        print(said[state], file=sys.stderr, flush=True)


def run_server(
    engine: Engine,
    read_params: Callable[[], Params],
    settings: ServerSettings,
    listening: socket.socket,
    grace: float,
) -> None:
    """Serves on a socket until a signal; `grace` as in `Server`. Raises what
    `read_params` raises."""
    worker = EngineThread(engine, read_params, Metrics(engine, settings.model))
    server = Server(make_app(worker, settings), worker, grace)
    server.run(sockets=[listening])
    if server.deadline is None and worker.error is not None:
        raise worker.error
    if worker.is_alive:
        # Not sys.exit: taking JAX down while a device still computes can crash.
        sys.stderr.flush()
        os._exit(0)
