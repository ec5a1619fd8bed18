"""Requests in OpenAI's shape: JSON to SamplingParams, every field checked.

Nothing here knows HTTP or the engine. A mistake in a request is a UserError, which the
server answers with status 400; another status comes as an ApiError.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e1jax.config.checks import UNLIMITED, UserError, check_integer
from e1jax.config.sampling import SamplingParams
from e1jax.config.texts import check_backslashes
from e1jax.sampling.request import Prompt, starts_thinking
from e1jax.tokenizer import Tokenizer

MAX_BODY_BYTES = 10 * 2**20


_MAX_FIELDS = 256
_MAX_SAMPLES = 1024  # of a request: prompts x n
_MAX_N = 128
_MAX_STOPS, _MAX_STOP_LEN = 16, 256


# The fields of a request and, of some, other names that must not differ from it.
_SYNONYMS = {
    "max_completion_tokens": ("max_tokens",),
    "thinking_token_budget": ("thinking_budget", "thinking"),
    "solution_token_budget": ("solution_budget",),
}


# Fields that are given to SamplingParams as they are.
_SAMPLING = (
    *("n", "temperature", "top_p", "top_k"),
    *("end_of_thinking_text", "on_thinking_budget"),
)


_FIELDS = (
    *("model", "messages", "prompt", "seed", "stop", "logprobs", "stream"),
    *("stream_options", "reasoning_effort", *_SAMPLING),
    *(name for names in _SYNONYMS.items() for name in (names[0], *names[1])),
)


# Fields of OpenAI, vLLM and SGLang that are ignored although one of ours is so near.
_NEAR_BUT_MEANT = ("store", "min_tokens", "top_a", "user", "min_p", "tools")


_ROLES = ("system", "developer", "user", "assistant")


class ApiError(Exception):
    """An answer with a status of its own; `code` is OpenAI's, as are the types."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error; a message that quotes a long value is shortened."""
    if len(message) > 600:
        message = f"{message[:400]} ... {message[-150:]}"
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kinds |= {429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kinds.get(status, kind), "param": None}
    return {"error": {**error, "code": code}}


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What the command line says about requests."""

    model: str  # the name that requests call it by
    api_key: str | None = None
    max_waiting: int = 1024
    thinking_budget: int | None = 1024  # of requests that give none
    solution_budget: int | None = 1024
    efforts: Mapping[str, int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """A request whose fields are checked, but not yet whether it fits the model."""

    is_chat: bool
    prompts: Sequence[Any]  # texts, lists of messages or of token ids
    params: SamplingParams  # its budgets are the request's alone
    max_tokens: int | None
    default_solution: bool  # the solution budget is the server's default
    default_thinking: bool
    logprobs: bool
    stream: bool
    include_usage: bool


def parse_request(body: bytes, is_chat: bool, server: ServerSettings) -> ApiRequest:
    """The request in a body of JSON; raises UserError, or ApiError for another model."""
    fields = _read_fields(body)
    fields = {name: value for name, value in fields.items() if value is not None}
    model = fields.get("model", server.model)
    if model != server.model:
        raise ApiError(
            404,
            f"there is no model {model!r} here; use {server.model!r}",
            "model_not_found",
        )
    thinking, no_thinking = _thinking_budget(fields, server)
    solution, no_solution = _budget(
        fields, "solution_token_budget", server.solution_budget
    )
    params = SamplingParams(
        thinking_budget=thinking,
        solution_budget=solution,
        seed=fields["seed"] if "seed" in fields else random_bits(53),
        stop=_stop(fields.get("stop")),
        **{name: fields[name] for name in _SAMPLING if name in fields},
    )
    check_integer("n", params.n, 1, _MAX_N)
    prompts = [_messages(fields)] if is_chat else _prompts(fields)
    if len(prompts) * params.n > _MAX_SAMPLES:
        raise UserError(
            f"{len(prompts)} prompts with n={params.n} are more than {_MAX_SAMPLES} "
            "samples; send several requests"
        )
    options = _typed(fields, "stream_options", dict, "an object", {})
    return ApiRequest(
        is_chat,
        prompts,
        params,
        _max_tokens(fields),
        no_solution,
        no_thinking,
        _logprobs(fields, is_chat),
        _typed(fields, "stream", bool, "true or false", False),
        _typed(options, "include_usage", bool, "true or false", False),
    )


def random_bits(count: int) -> int:
    """A number of so many bits; one of 53, JavaScript reads exactly. The system's own
    random numbers would release Python's lock, and wait for it, at each call."""
    return random.getrandbits(count)


def fit_budgets(
    request: ApiRequest, prompt_ids: Sequence[int], tokenizer: Tokenizer, cache_len: int
) -> SamplingParams:
    """Budgets under which thinking, forced tokens and solution together are at most
    max_completion_tokens; without it, the budgets of the request.

    The solution has the budget that was given, by default at most half of the tokens,
    and thinking the rest. A response that starts in the solution has all tokens for it.
    Raises UserError if there is no room for one token of the solution behind the forced
    ones.
    """
    params, most = request.params, request.max_tokens
    if most is None:
        return params
    solution = params.solution_budget
    if not starts_thinking(prompt_ids, tokenizer):
        solution = most if request.default_solution else _least(solution, most)
        return dataclasses.replace(params, solution_budget=solution)
    forces = params.on_thinking_budget == "force"
    forced = 1 + len(tokenizer.encode(params.end_of_thinking_text)) if forces else 0
    if most < forced + 1:
        raise UserError(
            f"max_completion_tokens={most} has no room for {forced} forced "
            f"token{'s' * (forced > 1)} and 1 of the solution; give {forced + 1} or more"
        )
    if request.default_solution or solution is None:
        room = min(most, cache_len - len(prompt_ids))
        solution = _least(solution, max(1, room // 2))
    solution = min(solution, most - forced)
    thinking = None if request.default_thinking else params.thinking_budget
    thinking = _least(thinking, most - forced - solution)
    return dataclasses.replace(
        params, thinking_budget=thinking, solution_budget=solution
    )


def encode_prompt(
    prompt: Any,
    tokenizer: Tokenizer,
    encode: Callable[[Prompt], list[int]],
    max_chars: int,
) -> list[int]:
    """Token ids: of messages in the chat template, of a text as it is; `encode` is the
    engine's. Raises UserError, at once, for a text above `max_chars`, which could not
    fit."""
    if isinstance(prompt, str):
        _check_length(len(prompt), max_chars)
        check_backslashes(prompt, "prompt")
        return encode(tokenizer.encode(prompt))
    if isinstance(prompt[0], dict):
        # A template may leave out a part of earlier answers.
        kept = (m["content"] for m in prompt if m["role"] != "assistant")
        _check_length(sum(map(len, kept)), max_chars)
    return encode(prompt)


def longest_prompt(tokenizer: Tokenizer, cache_len: int) -> int:
    """Characters above which no text fits into `cache_len` tokens. To tokenise 10 MB takes
    tens of seconds."""
    return cache_len * max(map(len, tokenizer.backend.get_vocab()))


def _check_length(chars: int, max_chars: int) -> None:
    if chars > max_chars:
        raise UserError(
            f"a prompt of {chars} characters does not fit the cache, whatever its tokens "
            "are; shorten it"
        )


def parse_efforts(text: str) -> dict[str, int | None]:
    """The budgets of --effort: "low=512,high=none"; raises UserError."""
    efforts: dict[str, int | None] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        is_number = value.isascii() and value.isdigit()
        if not name or not (is_number or value == "none"):
            raise UserError(
                f"--effort must be like low=512,medium=1024,high=none, not {text!r}"
            )
        efforts[name] = int(value) if is_number else None
        SamplingParams(thinking_budget=efforts[name])
    return efforts


def _least(budget: int | None, most: int) -> int:
    return most if budget is None else min(budget, most)


def _read_fields(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"the body is not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        raise UserError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"the body is a JSON {type(fields).__name__}, not an object")
    if len(fields) > _MAX_FIELDS:
        raise UserError(f"the body has {len(fields)} fields; {_MAX_FIELDS} are allowed")
    for name in fields.keys() - {*_FIELDS, *_NEAR_BUT_MEANT}:
        near = next((known for known in _FIELDS if _is_near(name, known)), None)
        if near:
            raise UserError(f"unknown field {name!r}; did you mean {near!r}?")
    return fields


def _is_near(name: str, known: str) -> bool:
    """Whether at most two letters are to be changed, added or left out."""
    if abs(len(name) - len(known)) > 2:
        return False
    row = list(range(len(known) + 1))
    for index, letter in enumerate(name, 1):
        last, row = row, [index]
        for j, other in enumerate(known, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
    return row[-1] <= 2


def _typed(
    fields: dict[str, Any], name: str, kind: type, rule: str, default: Any = None
) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {rule}, not {value!r}")
    return value


def _given(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The field and its synonyms, as far as they are there; refused if they differ."""
    given = {key: fields[key] for key in (name, *_SYNONYMS[name]) if key in fields}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        said = " and ".join(f"{key}={value!r}" for key, value in given.items())
        raise UserError(f"{said} are different; give one of them")
    return given


def _budget(
    fields: dict[str, Any], name: str, default: int | None
) -> tuple[int | None, bool]:
    """A budget, None if it is unlimited; and whether it is the default."""
    given = _given(fields, name)
    for key, value in given.items():
        check_integer(key, value, -1, UNLIMITED - 1)
        return (None if value == -1 else int(value)), False
    return default, True


def _thinking_budget(
    fields: dict[str, Any], server: ServerSettings
) -> tuple[int | None, bool]:
    """The budget by number or, without any, by effort; and whether it is the default."""
    fields = dict(fields)
    switch = _typed(fields, "thinking", dict, "an object", {})
    fields.pop("thinking", None)
    kind, tokens = switch.get("type"), switch.get("budget_tokens")
    if switch and kind not in ("enabled", "disabled"):
        raise UserError(f"thinking.type must be enabled or disabled, not {kind!r}")
    if kind == "disabled":
        if tokens not in (None, 0):
            raise UserError(
                f"thinking is disabled and has budget_tokens={tokens!r}; leave one out"
            )
        tokens = 0
    if tokens is not None:
        check_integer("thinking.budget_tokens", tokens, -1, UNLIMITED - 1)
        fields["thinking"] = tokens
    effort = fields.get("reasoning_effort")
    efforts = {"none": 0, **server.efforts}
    if effort is not None and (not isinstance(effort, str) or effort not in efforts):
        raise UserError(
            f"reasoning_effort must be one of {', '.join(efforts)}, not {effort!r}"
        )
    budget, is_default = _budget(
        fields, "thinking_token_budget", server.thinking_budget
    )
    return (efforts[effort], False) if is_default and effort else (budget, is_default)


def _max_tokens(fields: dict[str, Any]) -> int | None:
    for key, value in _given(fields, "max_completion_tokens").items():
        check_integer(key, value, 1, UNLIMITED - 1)
        return int(value)
    return None


def _logprobs(fields: dict[str, Any], is_chat: bool) -> bool:
    if is_chat:
        return _typed(fields, "logprobs", bool, "true or false", False)
    # Of old, the number of alternatives; 0 and more give the tokens' own.
    value = fields.get("logprobs", False)
    if not isinstance(value, bool):
        check_integer("logprobs", value, 0, 20)
    return value is not False


def _stop(value: Any) -> Any:
    texts = value if isinstance(value, list) else [] if value is None else [value]
    for text in texts:
        if isinstance(text, str) and len(text) > _MAX_STOP_LEN:
            raise UserError(f"a text of stop is longer than {_MAX_STOP_LEN} characters")
    if len(texts) > _MAX_STOPS:
        raise UserError(f"stop has {len(texts)} texts; {_MAX_STOPS} are allowed")
    return value


def _messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    if "prompt" in fields:
        raise UserError("prompt is for /v1/completions; a chat has messages")
    messages = _typed(fields, "messages", list, "a list of messages", [])
    if not messages:
        raise UserError("messages is missing or empty; give a list of messages")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, str]:
    at = f"messages[{index}]"
    if not isinstance(message, dict):
        raise UserError(
            f"{at} must be an object with role and content, not {message!r}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise UserError(f"{at}.role must be one of {', '.join(_ROLES)}, not {role!r}")
    if isinstance(content, list):
        content = "".join(_text_of_part(f"{at}.content", part) for part in content)
    if not isinstance(content, str):
        raise UserError(f"{at}.content must be a text, not {content!r}")
    # OpenAI's newer name of the system; chat templates know the older.
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_of_part(where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type") != "text":
        raise UserError(f"{where} must hold parts of type text alone, not {part!r}")
    return text


def _prompts(fields: dict[str, Any]) -> list[Any]:
    """The prompts of a completion: one, or a list of texts or of lists of token ids."""
    if "messages" in fields:
        raise UserError("messages is for /v1/chat/completions; a completion has prompt")
    prompt = fields.get("prompt")
    is_list = isinstance(prompt, list)
    if is_list and prompt and all(isinstance(item, str | list) for item in prompt):
        prompts = prompt
    else:
        prompts = [prompt]
    for item in prompts:
        is_ids = isinstance(item, list) and all(type(token) is int for token in item)
        if not isinstance(item, str) and not is_ids:
            raise UserError(
                f"prompt must be a text or a list of token ids, not {item!r}"
            )
        if not item:
            raise UserError("prompt is empty; a response needs a token to start from")
    return prompts
