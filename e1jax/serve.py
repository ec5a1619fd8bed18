"""`python -m e1jax.serve`: budgeted sampling over HTTP, for any number of clients.

Steps: parse flags, find the model and check it, open the port, and serve; weights are read
and programs compiled meanwhile, and /health says 503 until that is done.
"""

import dataclasses
import os
import socket
import sys
from typing import Any

from e1jax.checkpoint.load import load_flagged
from e1jax.cli.command import run_command
from e1jax.cli.flags import EngineFlags, flag, read_flags
from e1jax.config.checks import UserError, check_integer, check_number
from e1jax.config.sampling import SamplingParams
from e1jax.sampling.engine import Engine
from e1jax.serving.protocol import ServerSettings, parse_efforts
from e1jax.sharding.runtime import use_compilation_cache

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeFlags(EngineFlags):
    """Serves a model over HTTP, as OpenAI's API does, with budgets per request.

    http://HOST:PORT/ is a page to try it. SIGTERM or Ctrl-C: running requests finish, new
    ones are refused; a second one ends it at once.
    """

    host: str = flag("ADDRESS", "127.0.0.1")
    """Address to listen on; 0.0.0.0 is every network of the machine."""
    port: int = 8000
    """Port to listen on; 0 is any free one."""
    served_model_name: str | None = flag("NAME", None)
    """Name by which requests call the model (default: as in --model)."""
    api_key: str | None = flag("KEY", None)
    """Key that requests must have (default: $E1JAX_API_KEY, else none)."""
    max_waiting: int = 1024
    """Samples that may wait for a slot; then requests are refused with status 429."""
    thinking_budget: int | None = 1024
    """Thinking budget of requests that give none."""
    solution_budget: int | None = 1024
    """Solution budget of requests that give none."""
    effort: str = flag("NAME=TOKENS,...", "low=512,medium=1024,high=4096")
    """Thinking budgets of the values of reasoning_effort; none is always 0."""
    grace_seconds: float = 30.0
    """Seconds that running requests have to finish at SIGTERM."""
    slots: int = 16
    """Rows sampled at a time."""


def main() -> None:
    """`python -m e1jax.serve`."""
    args = read_flags(ServeFlags, sys.argv[1:], "python -m e1jax.serve")
    settings = _settings(args)
    try:
        # Imported here, because it needs the extra `serve`.
        from e1jax.serving.server import run_server
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; install what serving needs: "
            "pip install 'e1jax[serve]'"
        ) from None
    loaded = load_flagged(args)
    engine = Engine.without_weights(
        loaded,
        cache_len=args.cache_len,
        slots=args.slots,
        kv_dtype=args.kv_dtype,
    )
    if (args.solution_budget or 0) + 2 > engine.cache_len:
        raise UserError(
            f"--solution-budget {args.solution_budget} leaves no room for a prompt in "
            f"cache_len={engine.cache_len}; lower it, or raise --cache-len"
        )
    listening = _listen(args.host, args.port)
    use_compilation_cache()
    _say_where(args, settings, listening.getsockname()[1])
    run_server(engine, loaded.read_params, settings, listening, args.grace_seconds)


def _settings(args: ServeFlags) -> ServerSettings:
    check_integer("--port", args.port, 0, 65535)
    check_integer("--max-waiting", args.max_waiting, 0)
    check_number(
        "--grace-seconds", args.grace_seconds, "of 0 or more", lambda v: v >= 0
    )
    budgets: dict[str, Any] = {
        "thinking_budget": args.thinking_budget,
        "solution_budget": args.solution_budget,
    }
    SamplingParams(**budgets)  # checks them
    return ServerSettings(
        model=args.served_model_name or args.model,
        api_key=args.api_key or os.environ.get("E1JAX_API_KEY") or None,
        max_waiting=args.max_waiting,
        efforts=parse_efforts(args.effort),
        **budgets,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened on: "
            f"{error.strerror or error}"
        ) from None


def _say_where(args: ServeFlags, settings: ServerSettings, port: int) -> None:
    host = f"[{args.host}]" if ":" in args.host else args.host
    if args.host in _LOOPBACK:
        who = "from this machine alone, unless --host says otherwise"
    elif settings.api_key:
        who = "with the API key"
    else:
        who = "by anyone who reaches it, as there is no --api-key"
    print(
        f"{settings.model} is served at http://{host}:{port} ({who})",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    run_command(main)
