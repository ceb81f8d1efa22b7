"""The server as a process of its own: an independent client, clients that are killed, and signals."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.server import Server
from tests.runs.serve.test_fuzz import malformed

KEY = "a-key"


class Process:
    """A running server."""

    def __init__(self, run: Path, *options: str) -> None:
        command = [sys.executable, "-m", "sedd_graph", "serve", str(run), "--port", "0", "--device", "cpu", *options]
        self.child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.child.stdout is not None
        line = next(line for line in self.child.stdout if line.startswith("serving"))
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found is not None
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"sedd_graph_{name} "))

    def until(self, done: Callable[[], bool]) -> None:
        last = time.monotonic() + 60
        while not done():
            assert time.monotonic() < last
            time.sleep(0.02)

    def memory(self) -> int:
        """Resident memory, bytes."""
        text = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024

    def send(self, body: dict[str, Any]) -> socket.socket:
        """Send a completion request and leave its answer unread."""
        content = json.dumps(body).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        )
        return sock


@contextlib.contextmanager
def serving(run: Path, *options: str) -> Iterator[Process]:
    process = Process(run, *options)
    try:
        yield process
    finally:
        process.http.close()
        process.child.kill()
        process.child.wait()
        assert process.child.stdout is not None
        process.child.stdout.close()


@pytest.fixture(scope="module")
def run(served: Callable[[str], ServedModel]) -> Path:
    return served("mdlm-tiny").run.path


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Process]:
    (run.parent / "keys").write_text(f"another\n{KEY}\n")
    with serving(
        run, "--api-key-file", str(run.parent / "keys"), "--name", "tiny", "--length", "64", "--grace", "60"
    ) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as found:
        yield found


def test_the_client_of_openai(server: Process, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.completions.create(model="tiny", prompt=["The ", "A"], max_tokens=9, n=2, seed=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert all(len(choice.text) == 9 and choice.finish_reason == "length" for choice in whole.choices)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 36)
    texts = dict.fromkeys(range(4), "")
    stream = client.completions.create(
        model="tiny", prompt=["The ", "A"], max_tokens=9, n=2, seed=3, stream=True, extra_body={"drafts": True}
    )
    drafts = 0
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            drafts += "draft" in (choice.model_extra or {})
    assert [texts[i] for i in range(4)] == [choice.text for choice in whole.choices]
    assert drafts >= 4
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")
    with (
        pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other,
    ):
        other.models.list()
    with pytest.raises(openai.APIError, match="no text of 17 tokens"):
        list(client.completions.create(model="tiny", prompt="b", stream=True, extra_body={"matching": "a*"}))
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_many_clients_at_once_get_their_own_answers(server: Process, client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        found = client.completions.create(model="tiny", prompt=f"{number} ", max_tokens=5 + number % 3, seed=number)
        return found.choices[0].text

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert [ask(number) for number in (0, 7, 31)] == [together[number] for number in (0, 7, 31)]
    assert all(len(text) == 5 + number % 3 for number, text in enumerate(together))


def test_killed_clients_leave_nothing_behind(server: Process, client: openai.OpenAI) -> None:
    long = {"prompt": "The ", "max_tokens": 60, "steps": 4096}
    before = server.metric('requests_total{outcome="cancelled"}')
    sockets = [server.send({**long, "stream": stream, "drafts": stream}) for stream in (True, False) * 4]
    other = [server.send({**long, "steps": 4000}) for _ in range(4)]  # these wait
    server.until(lambda: server.metric("running_rows") > 0 and server.metric("queue_requests") > 0)
    assert sockets[0].recv(1000)
    for number, sock in enumerate([*sockets, *other]):
        if number % 2:  # as a process that is killed with unread data
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    server.until(lambda: server.metric("running_rows") == 0 == server.metric("queue_requests"))
    server.until(lambda: server.metric('requests_total{outcome="cancelled"}') == before + 12)
    assert len(client.completions.create(model="tiny", prompt="a", max_tokens=3).choices[0].text) == 3


def test_a_client_that_does_not_read_holds_nobody_up(server: Process, client: openai.OpenAI) -> None:
    sock = server.send({"prompt": "The ", "max_tokens": 60, "steps": 800, "n": 8, "stream": True, "drafts": True})
    server.until(lambda: server.metric("running_rows") > 0)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=3).choices[0].text
    server.until(lambda: server.metric("running_rows") == 0)
    sock.close()


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_malformed_requests(server: Process) -> None:
    requests = list(malformed(10_000, seed=1))
    sizes = []
    for number, (headers, body) in enumerate(requests):
        if number in (2_000, 9_999):  # allocators have warmed up
            sizes.append(server.memory())
        answer = server.http.post("/v1/completions", content=body, headers=headers)
        assert 400 <= answer.status_code < 500
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert sizes[1] - sizes[0] < 8 * 2**20


def test_a_stop_ends_when_it_should() -> None:
    """After the last answer, after the time of grace, or at a second signal."""

    async def ticks(*, signals: int, grace: float, open_: int) -> tuple[bool, list[str]]:
        said = list[str]()
        worker = types.SimpleNamespace(stop=lambda: said.append("stopped"))
        service: Any = types.SimpleNamespace(stopping=False, open=open_, worker=worker)
        service.refuse = lambda: setattr(service, "stopping", True)
        server = Server(uvicorn.Config(service), service, grace, said.append)
        assert not await server.on_tick(1)
        for number in [signal.SIGTERM] * signals:
            server.handle_exit(number, None)
        ended = await server.on_tick(2)
        assert service.stopping == (signals > 0)
        return ended, said

    assert asyncio.run(ticks(signals=0, grace=9, open_=0)) == (False, [])
    for signals, grace, open_, ends in ((1, 9, 0, True), (1, 9, 2, False), (2, 9, 2, True), (1, -1, 2, True)):
        ended, said = asyncio.run(ticks(signals=signals, grace=grace, open_=open_))
        assert (ended, said[1:]) == (ends, ["stopped"] * ends)
        assert f"{open_} requests are answered first" in said[0]


def test_a_signal_answers_what_was_accepted_and_refuses_the_rest(server: Process) -> None:
    """The last test of this file, since it ends the server that the others share."""
    with ThreadPoolExecutor(2) as pool:
        body = {"prompt": "The ", "max_tokens": 60, "steps": 600, "seed": 1}
        whole = pool.submit(server.http.post, "/v1/completions", json=body)
        stream = pool.submit(server.http.post, "/v1/completions", json={**body, "stream": True})
        server.until(lambda: server.metric("running_rows") + server.metric("queue_requests") == 2)
        with httpx.Client(base_url=server.url, headers=server.http.headers) as late:
            server.child.send_signal(signal.SIGTERM)
            server.until(lambda: late.get("/health").json() == {"status": "stopping"})
            refused = late.post("/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        text = whole.result().json()["choices"][0]["text"]
        assert len(text) == 60
        assert stream.result().text.endswith("data: [DONE]\n\n")
    assert server.child.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
