"""A server in a thread of the tests' process, whose engine they can look at."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator

from fastapi import FastAPI

from e1jax.checkpoint.load import load_model
from e1jax.sampling.engine import Engine
from e1jax.serving.app import make_app
from e1jax.serving.metrics import Metrics
from e1jax.serving.protocol import ServerSettings, parse_efforts
from e1jax.serving.server import Server
from e1jax.serving.worker import EngineThread

DEFAULTS = ServerSettings(
    model="nano", thinking_budget=24, solution_budget=20, efforts=parse_efforts("low=3")
)


@dataclasses.dataclass
class LiveServer:
    url: str
    server: Server
    worker: EngineThread
    app: FastAPI

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def is_idle(self) -> bool:
        return not (
            self.engine.running or self.engine.waiting or self.worker.open_samples
        )


def nano_engine(*, slots: int = 4, cache_len: int = 512, endless: bool = False):
    """The bundled model; `endless`: no token ends a response, so budgets are used up."""
    loaded = load_model("nano", dtype="float32")
    tokenizer = loaded.tokenizer
    if endless:
        tokenizer = dataclasses.replace(tokenizer, eos_id=loaded.config.vocab_size)
    sizes = {"slots": slots, "cache_len": cache_len}
    params = loaded.read_params()
    return Engine(loaded.config, params, tokenizer, loaded.mesh, **sizes)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(
    engine: Engine,
    settings: ServerSettings = DEFAULTS,
    *,
    ready: bool = True,
    read=None,
) -> Iterator[LiveServer]:
    """`read` gives the engine's parameters, by default those that it has."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    metrics = Metrics(engine, settings.model)
    params = engine.params
    worker = EngineThread(engine, read or (lambda: params), metrics)
    app = make_app(worker, settings)
    server = Server(app, worker, grace=10)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        wait_for(lambda: server.started and (not ready or worker.state == "ready"))
        yield LiveServer(url, server, worker, app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not worker.is_alive
