"""The server under load; minutes each, so they are marked slow."""

import asyncio
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from live_server import DEFAULTS, nano_engine, serving, wait_for
from test_serve import LONG, PROMPTS, joined_stream

from e1jax.config.sampling import SamplingParams

pytestmark = pytest.mark.slow


def test_64_streaming_clients_get_the_engine_s_tokens():
    rng = random.Random(0)
    requests = [
        {
            "thinking_token_budget": rng.choice([0, 1, 7, 20, 50, -1]),
            "solution_token_budget": rng.choice([1, 5, 30]),
            "temperature": rng.choice([0, 0.6, 1, 2]),
            "top_p": rng.choice([0.5, 0.95, 1]),
            "top_k": rng.choice([0, 3]),
            "n": rng.choice([1, 1, 2, 3]),
            "seed": rng.randrange(2**64),
        }
        for _ in range(256)
    ]
    prompts = [rng.choice(PROMPTS) for _ in requests]
    with serving(nano_engine(slots=8)) as live:

        async def client(number):
            answers = []
            async with openai.AsyncOpenAI(
                base_url=f"{live.url}/v1", api_key="any", max_retries=0
            ) as client:
                for index in range(number, len(requests), 64):
                    messages = [{"role": "user", "content": prompts[index]}]
                    fields = {"model": "nano", "messages": messages, **requests[index]}
                    answers.append((index, await joined_stream(client, fields)))
                    await asyncio.sleep(rng.random() / 50)
            return answers

        async def all_clients():
            return await asyncio.gather(*map(client, range(64)))

        answers = dict(itertools.chain.from_iterable(asyncio.run(all_clients())))
        wait_for(lambda: live.is_idle)
    params = [
        SamplingParams(
            **{k: v for k, v in request.items() if "budget" not in k},
            thinking_budget=None if (t := request["thinking_token_budget"]) < 0 else t,
            solution_budget=request["solution_token_budget"],
        )
        for request in requests
    ]
    wanted = nano_engine(slots=5).generate(prompts, params)
    assert sorted(answers) == [*range(len(requests))]
    for index, samples in enumerate(wanted):
        choices, usage = answers[index]
        got = [(choices[j]["ids"], choices[j]["content"]) for j in sorted(choices)]
        assert got == [(c.token_ids, c.solution) for c in samples]
        assert usage.completion_tokens == sum(len(c.token_ids) for c in samples)


def resident_bytes():
    """Of this process, now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_10_000_short_requests_are_all_answered_and_leave_nothing_behind():
    count, memory, answers = 10_000, {}, {}
    with serving(nano_engine(slots=16, cache_len=128)) as live:

        async def worker(client, numbers):
            for number in numbers:
                body = {
                    "messages": [{"role": "user", "content": PROMPTS[number % 12]}],
                    "max_completion_tokens": 6 + number % 9,
                    "seed": number,
                    "stream": number % 2 == 0,
                }
                answer = await client.post("/v1/chat/completions", json=body)
                answers[number] = (answer.status_code, answer.text)
                if len(answers) % 1000 == 0:
                    memory[len(answers)] = resident_bytes()

        async def all_workers():
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(
                base_url=live.url, timeout=300, limits=limits
            ) as client:
                numbers = iter(range(count))
                await asyncio.gather(*(worker(client, numbers) for _ in range(64)))

        asyncio.run(all_workers())
        wait_for(lambda: live.is_idle)
        assert live.engine._scheduler.free == [*range(16)]
        assert not live.worker._live
    assert len(answers) == count
    contents = []
    for number, (status, text) in answers.items():
        assert status == 200, text
        if number % 2:
            contents.append(json.loads(text)["choices"][0]["message"]["content"])
        else:
            assert text.endswith("data: [DONE]\n\n")
            lines = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
            deltas = [line["choices"][0]["delta"] for line in lines]
            contents.append("".join(delta.get("content", "") for delta in deltas))
    empty = sum(not content for content in contents)
    # The text of the answers themselves is some kilobytes each.
    texts = sum(sys.getsizeof(text) for _, text in answers.values())
    grown = memory[10_000] - memory[3000]
    print(
        f"empty {empty}, memory grew by {grown >> 20} MiB, of which "
        f"{texts * 7 // 10 >> 20} MiB are answers that the test keeps"
    )
    assert empty == 0
    assert grown - texts * 0.7 < 30 * 2**20


CLIENT = """
import json, socket, sys
host, port, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
head = f"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
connections = []
for _ in range(4):
    connections.append(socket.create_connection((host, port)))
    connections[-1].sendall(head.encode() + body)
print("sent", flush=True)
while True:
    connections[0].recv(100)
"""


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_are_killed_free_their_slots(stream):
    engine = nano_engine(slots=4, cache_len=4096, endless=True)
    with serving(engine, DEFAULTS) as live:
        host, port = live.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "1", "stream": stream, **LONG})
        for _ in range(5):
            clients = [
                subprocess.Popen(
                    [sys.executable, "-c", CLIENT, host, port, body],
                    stdout=subprocess.PIPE,
                )
                for _ in range(4)
            ]
            wait_for(lambda: live.worker.open_samples == 16 and engine.running == 4)
            for client in clients:
                os.kill(client.pid, signal.SIGKILL)
                client.wait()
                client.stdout.close()
            wait_for(lambda: live.is_idle, seconds=5)
        answer = httpx.post(
            f"{live.url}/v1/completions",
            json={"prompt": "1", "max_tokens": 4},
            timeout=60,
        )
        assert answer.json()["usage"]["completion_tokens"] == 4
