"""The application: routes, who may use them, and answers that follow a request's events.

A request goes through these steps: its body is read, up to 10 MiB; in a thread, parsed and
its prompts tokenised (`protocol`); added to the engine (`worker.EngineThread.submit`); and
its events, as the steps give them, become an answer (`answers`). All of that ends when the
client goes away.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.serving.answers import AnswerShape, server_sent
from e1jax.serving.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    ApiRequest,
    ServerSettings,
    encode_prompt,
    error_body,
    fit_budgets,
    parse_request,
)
from e1jax.serving.worker import READY, EngineThread, Live

_LARGE_BODY_BYTES = 2**14


_PAGE = files("e1jax.serving").joinpath("page.html").read_text(encoding="utf-8")


def make_app(worker: EngineThread, settings: ServerSettings) -> FastAPI:
    """The application of a worker, which starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # No generated documentation: its pages are loaded from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app)
    created = int(time.time())

    async def chat(request: Request) -> Response:
        return await _answer(request, True, worker, settings)

    async def complete(request: Request) -> Response:
        return await _answer(request, False, worker, settings)

    # As plain routes, which skip FastAPI's parsing of a request: ours is by `protocol`.
    app.add_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_route("/v1/completions", complete, methods=["POST"])

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _check_key(request, settings)
        model = {"id": settings.model, "object": "model", "created": created}
        model |= {"owned_by": "e1jax", "max_model_len": worker.engine.cache_len}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        status = 200 if worker.state == READY else 503
        return _json({"status": worker.state}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        content = worker.metrics.exposition()
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE)

    return app


async def _answer(
    request: Request, is_chat: bool, worker: EngineThread, settings: ServerSettings
) -> Response:
    _check_key(request, settings)
    worker.check_open(settings.max_waiting)
    body = await _read_body(request)
    work = functools.partial(_prepare, body, is_chat, worker, settings)
    # A large body takes long to parse and tokenise, and others' tokens should not wait. A
    # small one takes less than the way into a thread and back.
    is_large = len(body) > _LARGE_BODY_BYTES
    wanted, prompts = await asyncio.to_thread(work) if is_large else work()
    worker.check_open(settings.max_waiting)
    live = worker.submit(prompts)
    shape = AnswerShape(
        is_chat,
        wanted.logprobs,
        settings.model,
        wanted.params.seed,
        worker.engine.tokenizer,
    )
    return LiveAnswer(worker, live, shape, wanted, len(prompts))


def _prepare(
    body: bytes, is_chat: bool, worker: EngineThread, settings: ServerSettings
) -> tuple[ApiRequest, list[tuple[list[int], SamplingParams]]]:
    """The request, and each prompt's token ids and parameters."""
    wanted = parse_request(body, is_chat, settings)
    engine = worker.engine
    prompts = []
    states = engine.tokenizer.budget_text is not None
    for prompt in wanted.prompts:

        def encoded(params: SamplingParams, prompt: Any = prompt) -> list[int]:
            encode = functools.partial(engine.encode, params=params)
            most = worker.max_prompt_chars
            return encode_prompt(prompt, engine.tokenizer, encode, most)

        prompt_ids = encoded(wanted.params)
        params = fit_budgets(wanted, prompt_ids, engine.tokenizer, engine.cache_len)
        if states and params != wanted.params:
            prompt_ids = encoded(params)  # which states the budgets that fit
        prompts.append((prompt_ids, params))
    return wanted, prompts


class LiveAnswer(Response):
    """Sends what a request gives, whole or streamed. If the client goes away, or anything
    else ends this, the request ends too."""

    def __init__(
        self,
        worker: EngineThread,
        live: Live,
        shape: AnswerShape,
        wanted: ApiRequest,
        prompts: int,
    ):
        super().__init__()
        self.worker, self.live, self.shape = worker, live, shape
        self.wanted, self.prompts = wanted, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = self._stream if self.wanted.stream else self._whole
        tasks = [
            asyncio.create_task(work)
            for work in (sending(scope, receive, send), _disconnected(receive))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self.worker.metrics.note_abort(self.live.left)
            self.worker.abort(self.live)
            for task in tasks:
                task.cancel()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for _ in self.live.steps():
                pass
        except ApiError as error:
            await _error(error)(scope, receive, send)
            return
        content = self.shape.whole(
            self.live.completions, self.prompts, self.live.cached_tokens
        )
        await Response(content, media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part, more in self._parts():
            body = {"type": "http.response.body", "body": part, "more_body": more}
            await send(body)

    async def _parts(self) -> AsyncIterator[tuple[bytes, bool]]:
        """Server-sent events, all of a step at once, and whether more will come: what ends
        the answer goes with the last step, as each call of `send` is a system call."""
        started: set[int] = set()
        try:
            async for step, more in self.live.steps():
                chunks = []
                for index, event in step:
                    if index not in started:
                        started.add(index)
                        chunks.append(self.shape.start(index))
                    chunks.append(self.shape.chunk(index, event))
                part = b"".join(server_sent(chunk) for chunk in chunks if chunk)
                yield (part, True) if more else (part + self._end(), False)
        except ApiError as error:
            yield server_sent(error_body(error.status, str(error), error.code)), False

    def _end(self) -> bytes:
        """The last events of an answer."""
        done = server_sent("[DONE]")
        if not self.wanted.include_usage:
            return done
        live = self.live
        usage = live.completions, self.prompts, live.cached_tokens
        return server_sent(self.shape.usage_chunk(*usage)) + done


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    """The body; raises ApiError, before reading more, for one above MAX_BODY_BYTES."""
    error = ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise error
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise error
    return bytes(body)


def _check_key(request: Request, settings: ServerSettings) -> None:
    if settings.api_key is None:
        return
    given = request.headers.get("authorization", "").encode("latin-1")
    if not hmac.compare_digest(given, f"Bearer {settings.api_key}".encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong; send the header Authorization: Bearer KEY",
            "invalid_api_key",
        )


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _error(error: ApiError) -> Response:
    return _json(error_body(error.status, str(error), error.code), error.status)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is OpenAI's JSON."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return _error(ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        return _error(ApiError(error.status_code, said))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        traceback.print_exception(error, file=sys.stderr)
        return _error(ApiError(500, "a fault of the server, which its log describes"))
