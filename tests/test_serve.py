"""The server: answers are the engine's, in OpenAI's shape; mistakes are one sentence."""

import asyncio
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from live_server import DEFAULTS, nano_engine, serving, wait_for

from e1jax import serve
from e1jax.config.checks import UserError
from e1jax.config.sampling import SamplingParams
from e1jax.data.nano import held_out_problems
from e1jax.serving.protocol import MAX_BODY_BYTES, fit_budgets, parse_request
from e1jax.serving.server import Server
from e1jax.serving.worker import EngineThread
from e1jax.tokenizer import THINK_END

PROMPTS = [problem["problem"] for problem in held_out_problems(12)]
# Each with the fields of its request, and what the engine is to be given.
MIXED = [
    ({"thinking_token_budget": 5, "seed": 1}, {"thinking_budget": 5, "seed": 1}),
    (
        {"thinking_budget": 0, "seed": 2**64 - 1},
        {"thinking_budget": 0, "seed": 2**64 - 1},
    ),
    (
        {
            "thinking": {"type": "enabled", "budget_tokens": 9},
            "n": 3,
            "temperature": 1.5,
        },
        {"thinking_budget": 9, "n": 3, "temperature": 1.5},
    ),
    (
        {"thinking": {"type": "disabled"}, "top_k": 5},
        {"thinking_budget": 0, "top_k": 5},
    ),
    (
        {"thinking_token_budget": -1, "solution_token_budget": 3, "top_p": 1},
        {"thinking_budget": None, "solution_budget": 3, "top_p": 1.0},
    ),
    ({"reasoning_effort": "none"}, {"thinking_budget": 0}),
    (
        {"reasoning_effort": "low", "temperature": 0},
        {"thinking_budget": 3, "temperature": 0},
    ),
    (
        {"reasoning_effort": "low", "thinking_token_budget": 7},
        {"thinking_budget": 7},
    ),
    (
        {"thinking_token_budget": 4, "on_thinking_budget": "stop"},
        {"thinking_budget": 4, "on_thinking_budget": "stop"},
    ),
    (
        {"end_of_thinking_text": "c", "thinking_token_budget": 6, "stop": ["7", "}"]},
        {"end_of_thinking_text": "c", "thinking_budget": 6, "stop": ("7", "}")},
    ),
    # Half of 17 tokens for the solution, 1 forced, the rest for thinking.
    ({"max_completion_tokens": 17}, {"thinking_budget": 8, "solution_budget": 8}),
    (
        {"max_tokens": 30, "solution_token_budget": 20, "thinking_token_budget": 2},
        {"thinking_budget": 2, "solution_budget": 20},
    ),
]


def request_fields(number: int) -> dict:
    fields, _ = MIXED[number]
    messages = [{"role": "user", "content": PROMPTS[number]}]
    return {"model": "nano", "messages": messages, "seed": number, **fields}


@pytest.fixture(scope="module")
def live():
    with serving(nano_engine()) as server:
        yield server


@pytest.fixture(scope="module")
def client(live):
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def wanted():
    """The completions of `MIXED`, by an engine of another shape."""
    params = [
        SamplingParams(
            **{"thinking_budget": 24, "solution_budget": 20, "seed": i, **own}
        )
        for i, (_, own) in enumerate(MIXED)
    ]
    return nano_engine(slots=3).generate(PROMPTS[: len(MIXED)], params)


@pytest.fixture(scope="module")
def endless():
    with serving(nano_engine(slots=2, cache_len=4096, endless=True)) as server:
        yield server


def chat(client, status=200, **fields):
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def check_error(answer, status, *words):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message and len(message) < 700 and "\n" not in message
    assert not message.endswith(".") and "Traceback" not in message
    for word in words:
        assert word in message, message


def test_answers_are_the_engine_s(live, wanted):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    for number, samples in enumerate(wanted):
        fields = request_fields(number)
        answer = client.chat.completions.create(
            **{k: fields[k] for k in ("model", "messages")},
            logprobs=True,
            extra_body=fields,
        )
        assert [choice.index for choice in answer.choices] == [*range(len(samples))]
        for choice, want in zip(answer.choices, samples, strict=True):
            entries = choice.logprobs.content
            assert [entry.token_id for entry in entries] == want.token_ids
            assert [entry.forced for entry in entries] == want.forced
            logprobs = [entry.logprob for entry in entries]
            assert logprobs == pytest.approx(want.logprobs, abs=1e-4)
            assert choice.message.content == want.solution
            assert choice.message.reasoning == want.thinking
            assert choice.message.reasoning_content == want.thinking
            ends = {"stop": "stop", "solution_budget": "length", "length": "length"}
            assert choice.finish_reason == ends[want.finish_reason]
            assert choice.thinking_end == want.thinking_end
            assert choice.forced_tokens == sum(want.forced)
        usage = answer.usage
        assert usage.prompt_tokens == len(samples[0].prompt_ids)
        assert usage.completion_tokens == sum(len(c.token_ids) for c in samples)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        thinking = usage.completion_tokens_details.reasoning_tokens
        assert thinking == sum(c.thinking_tokens for c in samples)
        assert usage.prompt_tokens_details.cached_tokens >= 0
        assert answer.seed == fields["seed"] and answer.model == "nano"


async def joined_stream(client, fields):
    """What the chunks of a stream give when they are joined, by choice."""
    stream = await client.chat.completions.create(
        **{k: fields[k] for k in ("model", "messages")},
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        extra_body=fields,
    )
    choices, usage = {}, None
    async for chunk in stream:
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            keys = ("reasoning", "reasoning_content", "content")
            got = choices.setdefault(
                choice.index, {"ids": [], "forced": [], **dict.fromkeys(keys, "")}
            )
            assert "finish_reason" not in got, "nothing comes after the end"
            for key in keys:
                got[key] += getattr(choice.delta, key, None) or ""
            for entry in choice.logprobs.content if choice.logprobs else []:
                got["ids"].append(entry.token_id)
                got["forced"].append(entry.forced)
            if choice.finish_reason:
                for key in ("finish_reason", "thinking_end", "forced_tokens"):
                    got[key] = getattr(choice, key)
    return choices, usage


def test_streams_joined_are_the_answer_of_many_clients_at_once(live, wanted):
    async def all_clients():
        client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any")
        fields = [request_fields(number) for number in range(len(MIXED))]
        return await asyncio.gather(*(joined_stream(client, f) for f in fields))

    for (choices, usage), samples in zip(
        asyncio.run(all_clients()), wanted, strict=True
    ):
        assert sorted(choices) == [*range(len(samples))]
        for index, want in enumerate(samples):
            assert choices[index] == {
                "ids": want.token_ids,
                "forced": want.forced,
                "reasoning": want.thinking,
                "reasoning_content": want.thinking,
                "content": want.solution,
                "finish_reason": "stop" if want.finish_reason == "stop" else "length",
                "thinking_end": want.thinking_end,
                "forced_tokens": sum(want.forced),
            }
        assert usage.completion_tokens == sum(len(c.token_ids) for c in samples)
    wait_for(lambda: live.is_idle)


def test_texts_and_token_ids_are_completed(live, client):
    engine = nano_engine(slots=2)
    ids = [engine.tokenizer.encode(text) for text in ("12a+3b*2?", "x")]
    params = SamplingParams(thinking_budget=6, solution_budget=4, seed=3, n=2)
    want = [c for samples in engine.generate(ids, params) for c in samples]
    body = {"thinking_token_budget": 6, "solution_token_budget": 4, "seed": 3, "n": 2}
    body |= {"logprobs": 0}
    for prompt in (["12a+3b*2?", "x"], ids):
        answer = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
        assert [c["text"] for c in answer["choices"]] == [c.text for c in want]
        got = [choice["logprobs"]["token_ids"] for choice in answer["choices"]]
        assert got == [c.token_ids for c in want]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    for prompt in ("12a+3b*2?", ids[0]):
        answer = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
        assert [c["text"] for c in answer["choices"]] == [c.text for c in want[:2]]
    stream = client.post(
        "/v1/completions", json={**body, "prompt": "x", "stream": True}
    )
    *chunks, last = stream.text.removeprefix("data: ").split("\n\ndata: ")
    texts = ["", ""]
    for choice in (json.loads(chunk)["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["text"]
    assert texts == [c.text for c in want[2:]] and last == "[DONE]\n\n"


def test_a_conversation_that_goes_on_counts_its_cached_tokens(client):
    prompt = list(range(10, 60))
    body = {"prompt": prompt, "max_tokens": 20, "seed": 1, "logprobs": 0}
    for _ in range(2):
        first = client.post("/v1/completions", json=body).json()
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}
    ids = first["choices"][0]["logprobs"]["token_ids"]
    body |= {"prompt": [*prompt, *ids, 11, 12], "stream": True}
    body["stream_options"] = {"include_usage": True}
    chunks = client.post("/v1/completions", json=body).text.split("\n\n")
    usage = json.loads(chunks[-3].removeprefix("data: "))["usage"]
    kept = (len(prompt) + len(ids) - 1) // 16 * 16
    assert usage["prompt_tokens_details"] == {"cached_tokens": kept}


def test_a_prompt_that_closed_thinking_is_answered_at_once(client):
    body = {"prompt": f"5{THINK_END}", "max_tokens": 4, "seed": 1}
    answer = client.post("/v1/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["forced_tokens"] == 0 and choice["thinking_end"] is None
    assert answer["usage"]["completion_tokens"] <= 4


def test_the_readme_s_requests(live, client, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [body] = re.findall(r"curl .*? -d '(.*?)'", readme, re.S)
    [choice] = chat(client, **json.loads(body))["choices"]
    said = {**choice, **choice["message"]}
    for key in ("content", "reasoning", "thinking_end", "forced_tokens"):
        assert f'"{key}": {json.dumps(said[key])}' in readme
    [code] = re.findall(r"```python\n(from openai.*?)```", readme, re.S)
    exec(code.replace("http://127.0.0.1:8000", live.url), {})
    assert capsys.readouterr().out.count("\\boxed{") == 1


def test_without_a_seed_answers_differ_and_say_how_to_have_them_again(client):
    first, second = (chat(client, temperature=1.5) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = chat(client, temperature=1.5, seed=first["seed"])
    assert again["choices"] == first["choices"]


def test_messages_of_parts_and_of_a_developer(client):
    parts = [
        {"type": "text", "text": PROMPTS[0][:3]},
        {"type": "text", "text": PROMPTS[0][3:]},
    ]
    plain, whole = (
        chat(client, messages=[{"role": "user", "content": content}], seed=4)
        for content in (PROMPTS[0], parts)
    )
    assert plain["choices"] == whole["choices"]
    system, developer = (
        chat(
            client,
            messages=[{"role": role, "content": "s"}, {"role": "user", "content": "1"}],
            seed=4,
        )
        for role in ("system", "developer")
    )
    assert system["usage"] == developer["usage"]
    assert system["choices"] == developer["choices"]


USER = [{"role": "user", "content": "1a+1?"}]
# The body, the status, and words of the message.
BAD_CHATS = [
    (b"", 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"[]", 400, "a JSON list"),
    (b"null", 400, "NoneType"),
    (b'{"n": NaN}', 400, "NaN is not a number of JSON"),
    (b'{"temperature": Infinity}', 400, "Infinity"),
    (b"[" * 200_000, 400, "not JSON"),
    (b'{"a": ' * 100_000, 400, "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b'{"messages": "\xff\xfe"}', 400, "not UTF-8"),
    (b"\xef\xbb\xbf{}", 400, "not JSON"),
    (json.dumps({f"field{i}": 0 for i in range(300)}).encode(), 400, "300 fields"),
    ({}, 400, "messages is missing"),
    ({"messages": []}, 400, "messages is missing"),
    ({"messages": "hi"}, 400, "messages must be a list"),
    ({"messages": [7]}, 400, "messages[0] must be an object"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "type text",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode"),
    ({"messages": [{"role": "user", "content": "$\frac{1}{2}$"}]}, 400, "form feed"),
    ({"messages": USER, "prompt": "x"}, 400, "/v1/completions"),
    (
        {"messages": [{"role": "user", "content": "1" * 600}]},
        400,
        "does not fit cache_len",
    ),
    ({"model": "gpt-4o", "messages": USER}, 404, "no model 'gpt-4o'"),
    ({"model": 7, "messages": USER}, 404, "no model 7"),
    ({"messages": USER, "n": 0}, 400, "n must be a whole number"),
    ({"messages": USER, "n": 10**9}, 400, "n must be"),
    ({"messages": USER, "n": 129}, 400, "from 1 to 128"),
    ({"messages": USER, "n": 1.5}, 400, "n must be"),
    ({"messages": USER, "n": True}, 400, "n must be"),
    ({"messages": USER, "seed": -1}, 400, "seed must be"),
    ({"messages": USER, "seed": 2**64}, 400, "seed must be"),
    ({"messages": USER, "seed": "1"}, 400, "seed must be"),
    ({"messages": USER, "temperature": -0.5}, 400, "temperature must be"),
    ({"messages": USER, "temperature": "hot"}, 400, "temperature must be"),
    ({"messages": USER, "temperature": 10**400}, 400, "temperature must be"),
    ({"messages": USER, "top_p": 0}, 400, "top_p must be"),
    ({"messages": USER, "top_p": 1.01}, 400, "top_p must be"),
    ({"messages": USER, "top_k": -1}, 400, "top_k must be"),
    ({"messages": USER, "stop": 3}, 400, "stop must be"),
    ({"messages": USER, "stop": [""]}, 400, "stop must be"),
    ({"messages": USER, "stop": ["a"] * 17}, 400, "17 texts"),
    ({"messages": USER, "stop": "a" * 257}, 400, "longer than 256"),
    ({"messages": USER, "logprobs": 3}, 400, "logprobs must be true or false"),
    ({"messages": USER, "stream": "yes"}, 400, "stream must be true or false"),
    ({"messages": USER, "stream_options": []}, 400, "stream_options must be"),
    ({"messages": USER, "stream_options": {"include_usage": 1}}, 400, "include_usage"),
    ({"messages": USER, "max_tokens": 0}, 400, "max_tokens must be"),
    ({"messages": USER, "max_completion_tokens": 1}, 400, "give 2 or more"),
    (
        {"messages": USER, "max_tokens": 9, "max_completion_tokens": 8},
        400,
        "are different",
    ),
    (
        {"messages": USER, "thinking_token_budget": -2},
        400,
        "thinking_token_budget must be",
    ),
    (
        {"messages": USER, "thinking_token_budget": 2.0},
        400,
        "thinking_token_budget must be",
    ),
    ({"messages": USER, "thinking_budget": 2**31}, 400, "thinking_budget must be"),
    (
        {"messages": USER, "thinking_token_budget": 2, "thinking_budget": 3},
        400,
        "are different",
    ),
    (
        {"messages": USER, "thinking_budget": 2, "thinking": {"type": "disabled"}},
        400,
        "thinking_budget=2 and thinking=0 are different",
    ),
    ({"messages": USER, "thinking": True}, 400, "thinking must be an object"),
    ({"messages": USER, "thinking": {"type": "auto"}}, 400, "thinking.type"),
    ({"messages": USER, "thinking": {"budget_tokens": 1}}, 400, "thinking.type"),
    (
        {"messages": USER, "thinking": {"type": "disabled", "budget_tokens": 9}},
        400,
        "thinking is disabled and has budget_tokens=9",
    ),
    (
        {"messages": USER, "solution_token_budget": "8"},
        400,
        "solution_token_budget must be",
    ),
    (
        {"messages": USER, "solution_token_budget": 600},
        400,
        "does not fit cache_len=512",
    ),
    ({"messages": USER, "reasoning_effort": "huge"}, 400, "one of none, low"),
    ({"messages": USER, "reasoning_effort": ["low"]}, 400, "one of none, low"),
    ({"messages": USER, "on_thinking_budget": "ask"}, 400, "force or stop"),
    ({"messages": USER, "end_of_thinking_text": 5}, 400, "must be a string"),
    ({"messages": USER, "end_of_thinking_text": "</think>"}, 400, "leave it out"),
    ({"messages": USER, "end_of_thinking_text": "a" * 600}, 400, "does not fit"),
    ({"messages": USER, "model": "x" * 10**6}, 404, "no model 'xxx"),
    (
        {"messages": USER, "thinking_tokn_budget": 5},
        400,
        "mean 'thinking_token_budget'",
    ),
    ({"messages": USER, "Temperature": 1}, 400, "did you mean 'temperature'"),
    ({"messages": USER, "max_tokenss": 1}, 400, "did you mean 'max_tokens'"),
    ({"message": USER}, 400, "did you mean 'messages'"),
]
BAD_COMPLETIONS = [
    ({}, 400, "prompt must be a text"),
    ({"prompt": ""}, 400, "prompt is empty"),
    ({"prompt": []}, 400, "prompt is empty"),
    ({"prompt": [[]]}, 400, "prompt is empty"),
    ({"prompt": [1, "a"]}, 400, "prompt must be a text or a list of token ids"),
    ({"prompt": [1.5]}, 400, "prompt must be"),
    ({"prompt": [True]}, 400, "prompt must be"),
    ({"prompt": [-1]}, 400, "-1 is not a token id"),
    ({"prompt": [10**30]}, 400, "is not a token id"),
    ({"prompt": ["a"] * 1025}, 400, "more than 1024 samples"),
    # The second does not fit, so the first is not begun.
    ({"prompt": ["a", "b" * 600]}, 400, "does not fit"),
    ({"prompt": "a", "messages": USER}, 400, "/v1/chat/completions"),
    ({"prompt": "a", "logprobs": "5"}, 400, "logprobs must be"),
    ({"prompt": {"text": "a"}}, 400, "prompt must be"),
]


def test_bad_bodies_are_one_sentence_and_the_server_goes_on(live, client, wanted):
    cases = [("/v1/chat/completions", *case) for case in BAD_CHATS]
    cases += [("/v1/completions", *case) for case in BAD_COMPLETIONS]
    assert len(cases) >= 40
    for path, body, status, words in cases:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        check_error(client.post(path, content=body), status, words)
    assert live.is_idle
    body = {**request_fields(0), "stream": False, "logprobs": True}
    [choice] = chat(client, **body)["choices"]
    ids = [entry["token_id"] for entry in choice["logprobs"]["content"]]
    assert ids == wanted[0][0].token_ids


def test_fields_of_other_servers_are_ignored(client):
    others = {"store": True, "user": "me", "min_p": 0.1, "min_tokens": 1, "tools": []}
    others |= {"frequency_penalty": 0, "logit_bias": {}, "metadata": {}, "top_a": 1}
    others |= {
        "repetition_penalty": 1,
        "response_format": {"type": "text"},
        "best_of": 1,
    }
    others |= {"parallel_tool_calls": False, "top_logprobs": 2, "service_tier": "auto"}
    chat(client, seed=None, stop=None, n=None, max_tokens=None, **others)


def test_bodies_above_the_limit_are_refused_unread(live, client):
    host, port = live.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        length = f"Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n"
        connection.sendall((head + length).encode())  # and no byte of the body
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def chunks():
        for _ in range(11):
            yield b" " * 2**20

    check_error(client.post("/v1/completions", content=chunks()), 413, "10 MiB")
    just = b'{"prompt": "' + b"1" * (MAX_BODY_BYTES - 14) + b'"}'
    assert len(just) == MAX_BODY_BYTES
    check_error(client.post("/v1/completions", content=just), 400, "does not fit")


@pytest.mark.parametrize("path", ["/nothing", "/v1/chat/completions"])
def test_other_paths_and_methods_are_errors_of_the_same_shape(client, path):
    check_error(client.get(path), 404 if path == "/nothing" else 405, path)


def test_models_health_and_page(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("nano", "model")
    assert model["max_model_len"] == 512
    assert client.get("/health").status_code == 200
    assert "<!doctype html>" in client.get("/").text


def read_generated(live):
    text = live.worker.metrics.exposition().decode()
    name = r'vllm:generation_tokens_total\{model_name="nano"\} '
    return float(re.search(name + r"(\S+)", text)[1])


def read_metrics(client):
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_was_done(live, client):
    wait_for(lambda: live.is_idle)
    before = read_metrics(client)
    answer = chat(client, thinking_token_budget=4, solution_token_budget=2, n=3, seed=0)
    wait_for(lambda: live.is_idle)
    after = read_metrics(client)

    def grown(name, **labels):
        labels["model_name"] = "nano"
        words = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        name = f"{name}{{{words}}}"
        return after[name] - before.get(name, 0)

    usage = answer["usage"]
    assert grown("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("vllm:generation_tokens_total") == usage["completion_tokens"]
    ends = [choice["thinking_end"] for choice in answer["choices"]]
    assert ends.count("budget") == 3
    assert grown("e1jax:thinking_end_total", end="budget") == 3
    assert grown("vllm:request_success_total", finished_reason="length") == 3
    assert grown("vllm:request_success_total", finished_reason="abort") == 0
    assert grown("vllm:e2e_request_latency_seconds_count") == 3
    assert grown("vllm:time_to_first_token_seconds_count") == 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f'vllm:{name}{{model_name="nano"}}'] == 0
    assert any(name.startswith("vllm:inter_token_latency_seconds_") for name in after)


@given(
    most=st.integers(1, 60),
    thinking=st.none() | st.integers(-1, 70),
    solution=st.none() | st.integers(-1, 70),
    text=st.sampled_from(["", "time"]),
    mode=st.sampled_from(["force", "stop"]),
    thinks=st.booleans(),
)
def test_max_completion_tokens_bounds_all(most, thinking, solution, text, mode, thinks):
    tokenizer = nano_tokenizer()
    body = {
        "messages": USER,
        "max_completion_tokens": most,
        "thinking_token_budget": thinking,
        "solution_token_budget": solution,
        "end_of_thinking_text": text,
        "on_thinking_budget": mode,
    }
    request = parse_request(json.dumps(body).encode(), True, DEFAULTS)
    prompt_ids = [5] if thinks else [tokenizer.think_end_id]
    forced = 1 + len(text) if thinks and mode == "force" else 0
    if most < forced + 1:
        with pytest.raises(UserError, match=f"give {forced + 1} or more"):
            fit_budgets(request, prompt_ids, tokenizer, 512)
        return
    params = fit_budgets(request, prompt_ids, tokenizer, 512)
    t, s = params.thinking_budget, params.solution_budget
    if not thinks:
        assert s == (most if solution in (None, -1) else min(solution, most))
        return
    assert t + forced + s <= most
    if solution is None:
        assert 1 <= s <= max(1, most // 2) and s <= DEFAULTS.solution_budget
    elif solution >= 0:
        assert s == min(solution, most - forced)
    rest = most - forced - s
    assert t == (rest if thinking in (None, -1) else min(thinking, rest))


def nano_tokenizer(cache=[]):  # noqa: B006
    if not cache:
        cache.append(nano_engine(slots=1).tokenizer)
    return cache[0]


LONG = {"thinking_token_budget": 2000, "solution_token_budget": 1900}


def start_stream(live, **fields):
    """A raw connection that asks for a stream, once the first tokens are there."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    body = json.dumps({"prompt": "1", "stream": True, **LONG, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(endless, stream):
    before = read_generated(endless)
    connections = [start_stream(endless, stream=stream, n=2) for _ in range(3)]
    wait_for(lambda: endless.worker.open_samples == 6 and endless.engine.running == 2)
    steps = []
    step = endless.engine.step
    endless.engine.step = lambda: steps.append(None) or step()
    try:
        for connection in connections:
            connection.close()
        wait_for(lambda: endless.worker.open_samples == 0)
        aborted = len(steps)
        wait_for(lambda: endless.is_idle)
    finally:
        endless.engine.step = step
    assert len(steps) <= aborted + 2  # the step that was running, and the next
    tokens = 6 * LONG["solution_token_budget"]  # thinking may end by itself
    assert read_generated(endless) - before < tokens / 2, (
        "they were not answered to the end"
    )
    aborts = 'vllm:request_success_total{finished_reason="abort",model_name="nano"}'
    with httpx.Client(base_url=endless.url) as client:
        wait_for(lambda: read_metrics(client)[aborts] >= 6)
    # And the server takes the next request.
    answer = httpx.post(
        f"{endless.url}/v1/completions",
        json={"prompt": "1", "thinking_token_budget": 1, "solution_token_budget": 1},
        timeout=30,
    )
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_too_many_that_wait_are_refused():
    settings = dataclasses.replace(DEFAULTS, max_waiting=1)
    engine = nano_engine(slots=2, cache_len=4096, endless=True)
    with serving(engine, settings) as live:
        connections = [start_stream(live) for _ in range(3)]
        wait_for(lambda: live.worker.open_samples == 3)
        with httpx.Client(base_url=live.url, timeout=30) as client:
            answer = client.post("/v1/completions", json={"prompt": "1"})
            check_error(answer, 429, "the limit of 1 waiting samples")
            connections.pop().close()
            wait_for(lambda: live.worker.open_samples == 2)
            body = {"prompt": "1", "max_tokens": 2}
            thread = threading.Thread(
                target=client.post, args=["/v1/completions"], kwargs={"json": body}
            )
            thread.start()
            wait_for(lambda: live.worker.open_samples == 3)
            for connection in connections:
                connection.close()
            thread.join(30)
        wait_for(lambda: live.is_idle)


def test_a_key_is_asked_for():
    settings = dataclasses.replace(DEFAULTS, api_key="sécret")
    with (
        serving(nano_engine(), settings) as live,
        httpx.Client(base_url=live.url, timeout=30) as client,
    ):
        wrong = [{}, {"authorization": "Bearer no"}, {"authorization": "secret"}]
        for headers in wrong:
            for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions")]:
                answer = client.request(method, path, headers=headers)
                check_error(answer, 401, "API key")
        headers = {b"authorization": "Bearer sécret".encode()}
        assert client.get("/v1/models", headers=headers).status_code == 200
        for path in ("/health", "/metrics", "/"):
            assert client.get(path).status_code == 200


def listens(client) -> bool:
    try:
        client.get("/health")
    except httpx.ConnectError:
        return False
    return True


def test_health_while_loading_and_after_a_failure(capsys):
    engine = nano_engine(slots=2, cache_len=4096, endless=True)
    params, may_load = engine.params, threading.Event()

    def read():
        may_load.wait(30)
        return params

    with (
        serving(engine, ready=False, read=read) as live,
        httpx.Client(base_url=live.url, timeout=30) as client,
    ):
        wait_for(lambda: listens(client))
        assert client.get("/health").status_code == 503
        check_error(client.post("/v1/completions"), 503, "being loaded")
        may_load.set()
        wait_for(lambda: client.get("/health").status_code == 200)
        stream = start_stream(live)
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                client.post("/v1/completions", json={"prompt": "1", **LONG})
            )
        )
        waiting.start()
        wait_for(lambda: engine.running == 2)
        engine.step = lambda: (_ for _ in ()).throw(
            RuntimeError("the device\n is gone")
        )
        waiting.join(30)
        check_error(answers[0], 500, "the engine failed: the device is gone")
        said = b""
        while part := stream.recv(10**6):
            said += part
            if b'"error"' in said:
                break
        assert b"the device is gone" in said and b"[DONE]" not in said
        assert client.get("/health").status_code == 503
        check_error(client.post("/v1/completions"), 503, "the engine failed")
        stream.close()
        wait_for(lambda: live.server.told == "failed")
    assert "RuntimeError: the device\n is gone" in capsys.readouterr().err


def test_a_failure_right_after_the_start_is_no_failed_start(capsys):
    """The engine fails before the server has printed "ready": the server stays up."""
    worker = EngineThread(nano_engine(slots=1), lambda: None, metrics=None)
    worker.is_loaded, worker.state = True, "failed"
    worker.error = RuntimeError("the device is gone")
    server = Server(FastAPI(), worker, grace=1.0)
    server.should_exit = False
    assert server.told == "loading" and not asyncio.run(server.on_tick(1))
    assert server.told == "failed" and not server.should_exit
    err = capsys.readouterr().err
    assert "RuntimeError: the device is gone" in err and "refused from now on" in err


@pytest.fixture
def process(tmp_path):
    """The command itself: its process and the address that it says."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "e1jax.serve", "--model", "nano", "--port", "0"),
            *("--slots", "2", "--thinking-budget", "40", "--solution-budget", "30"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
    ) as process:
        lines = iter(process.stderr.readline, "")
        said = next(line for line in lines if "is served at" in line)
        assert "from this machine alone, unless --host says otherwise" in said
        url = said.split(" at ")[1].split()[0]
        next(line for line in lines if line == "ready\n")
        yield process, url
        process.kill()


def test_sigterm_lets_running_requests_finish(process):
    process, url = process
    client = httpx.Client(base_url=url, timeout=60)
    count, answers = 40, []

    def ask(number):
        body = {"prompt": PROMPTS[number % 12], "seed": number, "temperature": 1}
        body["stream"] = number % 2 == 0
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

    threads = [threading.Thread(target=ask, args=[n]) for n in range(count)]
    for thread in threads:
        thread.start()
    name = 'vllm:prompt_tokens_total{model_name="nano"}'
    tokens = sum(len(PROMPTS[number % 12]) for number in range(count))
    wait_for(lambda: read_metrics(client)[name] == tokens)
    process.send_signal(signal.SIGTERM)
    statuses = []
    for _ in itertools.count():
        try:
            refused = client.post("/v1/completions", json={"prompt": "1", "seed": 0})
        except httpx.TransportError:
            break  # it has ended
        statuses.append(refused.status_code)
        time.sleep(0.02)
    for thread in threads:
        thread.join(60)
    assert process.wait(30) == 0
    assert [answer.status_code for answer in answers] == [200] * count
    for answer in answers:
        if answer.headers["content-type"] == "application/json":
            [choice] = answer.json()["choices"]
            assert choice["text"]
        else:
            *_, last, done, end = answer.text.split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            [choice] = json.loads(last.removeprefix("data: "))["choices"]
        assert choice["finish_reason"] in ("stop", "length")
    assert 503 in statuses and set(statuses[statuses.index(503) :]) == {503}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model"),
        (["--model", "nano", "--port", "70000"], "--port must be"),
        (["--model", "nano", "--effort", "low"], "--effort must be like"),
        (["--model", "nano", "--effort", "low=-1"], "--effort must be like"),
        (["--model", "nano", "--max-waiting", "-1"], "--max-waiting must be"),
        (["--model", "nano", "--grace-seconds", "nan"], "--grace-seconds must be"),
        (["--model", "nano", "--cache-len", "64"], "leaves no room for a prompt"),
        (["--model", "nano", "--host", "256.0.0.1"], "cannot be listened on"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_mistakes_of_the_command(refusal, flags, words):
    assert words in refusal(serve.main, ["serve", *flags])


def test_a_port_in_use(refusal, live):
    port = live.url.rsplit(":", 1)[1]
    said = refusal(serve.main, ["serve", "--model", "nano", "--port", port])
    assert "cannot be listened on: Address already in use" in said
