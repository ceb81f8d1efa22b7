"""Servers and clients of benchmarks/serve.py: starting a server, reading its memory and threads, sending requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

__all__ = ["WORDS", "Body", "Server", "ask", "client", "gauges", "idle", "mixed", "served"]

Body = dict[str, Any]
"""Body of a request."""
WORDS = [
    "The",
    "import",
    "statement",
    "finds",
    "a",
    "module",
    "and",
    "binds",
    "it",
    "to",
    "a",
    "name",
    "in",
    "the",
    "local",
    "scope",
    "of",
    "the",
    "caller",
]
TICK = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Server:
    """A server that runs.

    Attributes:
        url: Its address.
        pid: Its process.
    """

    url: str
    pid: int

    def status(self, field: str) -> int:
        """Return a number of ``/proc/PID/status``, such as ``VmRSS`` (KiB) or ``Threads``."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def memory(self) -> float:
        """Resident memory, MiB."""
        return self.status("VmRSS") / 1024

    @property
    def cpu(self) -> float:
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    @property
    def files(self) -> int:
        """Open files and connections."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@contextlib.contextmanager
def served(run: Path, *options: str) -> Iterator[Server]:
    """Start ``sedd-graph serve`` on a free port, and stop it on exit; it must end with exit code 0."""
    command = [sys.executable, "-m", "sedd_graph", "serve", str(run), "--port", "0", "--timeout", "3600", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in process.stdout or ():
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield Server(found[0], process.pid)
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.wait()}")
    except BaseException:
        process.kill()
        raise
    process.send_signal(signal.SIGTERM)
    if process.wait(timeout=120):
        raise SystemExit(f"the server ended with exit code {process.returncode}")


@contextlib.asynccontextmanager
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a server without limits on time and connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, trust_env=False) as made:
        yield made


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    """Return the counters of ``/metrics`` that have no labels, or one."""
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^sedd_graph_(\S+) (\S+)$", text, re.MULTILINE)}


async def idle(http: httpx.AsyncClient, *, seconds: float = 600) -> bool:
    """Wait until nothing waits and nothing runs; return whether that was the case in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        now = await gauges(http)
        if not now["queue_requests"] and not now["running_rows"]:
            return True
        await asyncio.sleep(0.2)
    return False


async def ask(http: httpx.AsyncClient, body: Body) -> tuple[list[str], float]:
    """Send a completion request, and return the texts of its choices, and its seconds; streams are joined."""
    began, texts = time.perf_counter(), dict[int, str]()
    if not body.get("stream"):
        answer = await http.post("/v1/completions", json=body)
        answer.raise_for_status()
        texts = {choice["index"]: choice["text"] for choice in answer.json()["choices"]}
    else:
        ended = False
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    found = json.loads(line.removeprefix("data: "))
                    if "error" in found:
                        raise httpx.HTTPError(found["error"]["message"])
                    for choice in found["choices"]:
                        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if not ended:
            raise httpx.HTTPError("the stream ended without [DONE]")
    return [texts[index] for index in sorted(texts)], time.perf_counter() - began


def mixed(count: int, settings: Mapping[str, Any], seed: int) -> list[Body]:
    """Return requests of many kinds: lengths, temperatures, steps, streams, drafts, holes, several choices."""
    pick, found = random.Random(seed), list[Body]()
    for number in range(count):
        words = " ".join(pick.sample(WORDS, pick.randint(1, 6)))
        body: Body = {"prompt": words, "max_tokens": pick.randint(1, 32), "seed": number}
        if settings["infilling"] and not settings["block"] and pick.random() < 0.3:
            body = {"prompt": f"{words} [[{pick.randint(1, 16)}]] {pick.choice(WORDS)}", "seed": number}
        if pick.random() < 0.3:
            body["temperature"] = pick.choice([0.5, 0.8])
        if settings["steps"] and pick.random() < 0.5:
            body["steps"] = pick.choice([4, 8, 16])
        if pick.random() < 0.3:
            body |= {"stream": True, "drafts": settings["drafts"] and pick.random() < 0.5}
        if pick.random() < 0.1:
            body["n"] = 3
        found.append(body)
    return found
