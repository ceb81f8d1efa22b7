"""The bars of `sedd-graph serve`, against servers that it starts: ``python benchmarks/serve.py [ITEM ...]``.

load        concurrent requests of many kinds: none lost, and the time that all but 5 % of them took
neighbours  the same requests alone: the same tokens
kill        clients that close the connection in the midst of an answer: nothing is left of them
cache       prompts with and without the block-causal KV cache: the same answers
speed       a text of 1,024 tokens in blocks, with and without the cache: the ratio of times
malformed   malformed requests: a JSON error each, no crash, memory flat

Two small models are trained for some seconds, unless run folders are given. Times of a machine that others use at the same time
say little, so that CPU seconds of the server are printed, too. Results are appended to benchmarks/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from common import BLUEPRINTS, append_record
from serve_client import WORDS, Body, Server, ask, client, gauges, idle, mixed, served
from serve_malformed import malformed

from sedd_graph.engine.hardware import describe_hardware

ITEMS = ("load", "neighbours", "kill", "cache", "speed", "malformed")


async def load(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send requests at the same time, and then, for ``neighbours``, some of them alone."""
    async with client(server) as http:
        settings = (await http.get("/v1/settings")).json()
        bodies, cpu, began = mixed(arguments.requests, settings, 0), server.cpu, time.perf_counter()
        found = await asyncio.gather(*(ask(http, body) for body in bodies), return_exceptions=True)
        seconds, used = time.perf_counter() - began, server.cpu - cpu
        answered = [answer for answer in found if not isinstance(answer, BaseException)]
        faults = Counter(repr(answer)[:200] for answer in found if isinstance(answer, BaseException))
        whole = sum(len(a[0]) == (b.get("n") or 1) for a, b in zip(found, bodies, strict=True) if isinstance(a, tuple))
        times = sorted(seconds for _, seconds in answered) or [math.nan]
        record: dict[str, Any] = {
            "requests": len(bodies),
            "answered": whole,
            "faults": dict(faults),
            "seconds": seconds,
            "cpu_seconds": used,
            "p50": times[len(times) // 2],
            "p95": times[min(len(times) - 1, math.ceil(0.95 * len(times)) - 1)],
            "left": {name: v for name, v in (await gauges(http)).items() if name in ("queue_requests", "running_rows")},
        }
        record["holds"] = whole == len(bodies) and not any(record["left"].values())
        if "neighbours" in arguments.items:
            texts = {at: answer[0] for at, answer in enumerate(found) if not isinstance(answer, BaseException)}
            some = range(0, len(bodies), max(1, len(bodies) // arguments.alone))
            other = [at for at in some if (await ask(http, bodies[at]))[0] != texts.get(at)]
            record["neighbours"] = {"alone": len(some), "different": other, "holds": not other}
            record["holds"] = record["holds"] and not other
        return record


async def kill(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Close connections in the midst of answers, and compare what the server holds before and after."""
    async with client(server) as http:
        settings = (await http.get("/v1/settings")).json()
        await asyncio.gather(*(ask(http, body) for body in mixed(64, settings, 1)))  # caches fill
        await idle(http)
    pick, host = random.Random(0), server.url.removeprefix("http://")

    async def leave(number: int) -> None:
        """Send a request in full, and close the connection without a word after a while."""
        body = {"max_tokens": 64, "stream": number % 3 > 0, "drafts": settings["drafts"] and number % 3 == 2, "n": 2}
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection(*host.split(":"))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        await asyncio.sleep(pick.choice([0.0, 0.1, 0.5, 2.0]))
        writer.transport.abort()

    async def state(http: httpx.AsyncClient) -> dict[str, float]:
        quiet = await idle(http)
        await asyncio.sleep(1)
        return {"idle": quiet, "threads": server.status("Threads"), "files": server.files, "memory": server.memory}

    async with client(server) as http:
        before = await state(http)
        for _ in range(arguments.rounds):
            await asyncio.gather(*(leave(number) for number in range(arguments.clients)), return_exceptions=True)
        after, now = await state(http), await gauges(http)
        text, seconds = await ask(http, {"max_tokens": 4, "seed": 1})
    grown, clients = after["memory"] - before["memory"], arguments.clients * arguments.rounds
    cancelled = now['requests_total{outcome="cancelled"}']
    same = after["threads"] <= before["threads"] and after["files"] <= before["files"] + 1
    return {
        "clients": clients,
        "before": before,
        "after": after,
        "cancelled": cancelled,
        "next_answer_s": seconds,
        "holds": bool(text) and bool(after["idle"]) and same and grown < 32 and 2 * cancelled >= clients,
    }


async def answers(server: Server, bodies: Sequence[Body], *, at_once: int = 64) -> tuple[list[list[str]], float]:
    """Return the texts of requests, and the server's CPU seconds."""
    gate, cpu = asyncio.Semaphore(at_once), server.cpu
    async with client(server) as http:

        async def one(body: Body) -> list[str]:
            async with gate:
                return (await ask(http, body))[0]

        found = await asyncio.gather(*(one(body) for body in bodies))
    return list(found), server.cpu - cpu


async def cache(run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the answers to short and long prompts with and without the KV cache."""
    pick = random.Random(2)
    short = [
        {"prompt": " ".join(pick.sample(WORDS, pick.randint(1, 3))), "max_tokens": pick.randint(1, 16), "seed": number}
        for number in range(arguments.prompts - arguments.long)
    ]
    long = [{"prompt": " ".join(WORDS), "max_tokens": 256, "seed": number} for number in range(arguments.long)]
    found = []
    for options in ((), ("--no-cache",)):
        with served(run, "--length", "1024", *options) as server:
            texts, cpu = await answers(server, short)
            longer, more = await answers(server, long)
            found.append((texts + longer, cpu, more))
            say(f"  {'without' if options else 'with'} cache: {cpu:.1f} + {more:.1f} CPU seconds")
    other = sum(a != b for a, b in zip(found[0][0], found[1][0], strict=True))
    return {
        "prompts": len(short) + len(long),
        "long": len(long),
        "different": other,
        "cpu_seconds": [cpu for _, cpu, _ in found],
        "cpu_seconds_long": [more for _, _, more in found],
        "holds": not other,
    }


async def speed(run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one text of 1,024 tokens with and without the KV cache."""
    body: Body = {"max_tokens": 1024, "seed": 3}
    found = []
    for options in ((), ("--no-cache",)):
        with served(run, "--length", "1024", *options) as server:
            await answers(server, [{"max_tokens": 32, "seed": 0}])
            began = time.perf_counter()
            (text,), cpu = await answers(server, [body])
            found.append((text, cpu, time.perf_counter() - began))
            say(f"  {'without' if options else 'with'} cache: {cpu:.1f} CPU seconds, {found[-1][2]:.1f} seconds")
    ratio = found[1][1] / found[0][1]
    return {
        "tokens": 1024,
        "cpu_seconds": [cpu for _, cpu, _ in found],
        "seconds": [seconds for _, _, seconds in found],
        "ratio": ratio,
        "same": found[0][0] == found[1][0],
        "holds": ratio >= 5 and found[0][0] == found[1][0],
    }


async def refuse(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send malformed requests, and look at the answers and at the server's memory."""
    pick, wrong, kinds = random.Random(4), list[str](), Counter[int]()
    memory = []
    async with client(server) as http:
        settings = (await http.get("/v1/settings")).json()
        gate = asyncio.Semaphore(32)

        async def one(number: int) -> None:
            name, request = malformed(pick, settings)
            async with gate:
                answer = await http.request(**request)
            kinds[answer.status_code] += 1
            try:
                error = answer.json()["error"]
                good = answer.status_code in range(400, 500) and set(error) == {"message", "type", "param", "code"}
                good = good and isinstance(error["message"], str) and len(error["message"]) in range(1, 4000)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                wrong.append(f"{name}: {answer.status_code} {answer.text[:150]}")

        # the first tenth fills caches
        tenth = max(1, arguments.malformed // 10)
        for start in range(0, arguments.malformed, tenth):
            await asyncio.gather(*(one(n) for n in range(start, min(start + tenth, arguments.malformed))))
            memory.append(server.memory)
        healthy = (await http.get("/health")).status_code == 200
        text, _ = await ask(http, {"max_tokens": 4, "seed": 1})
    grown = memory[-1] - memory[0]
    return {
        "requests": arguments.malformed,
        "statuses": dict(sorted(kinds.items())),
        "wrong": wrong[:20],
        "memory": [round(m, 1) for m in memory],
        "grown": grown,
        "holds": not wrong and healthy and bool(text) and grown < 16,
    }


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def trained(folder: Path, blueprint: str, *overrides: str) -> Path:
    """Train a small model for some seconds, and return its run folder."""
    path = folder / f"{blueprint}.txt"
    command = [sys.executable, "-m", "sedd_graph", "train", str(BLUEPRINTS / f"{blueprint}.yaml"), *overrides]
    where = ["--runs", str(folder / "runs"), "--path-to", str(path), "--device", "cpu", "--ignore-memory"]
    subprocess.run([*command, *where], check=True, stdout=subprocess.DEVNULL)
    return Path(path.read_text(encoding="utf-8").strip())


def main() -> int:
    """Run the items that are named, or all, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", choices=[*ITEMS, []], default=[], help="items (default: all)")
    parser.add_argument("--run", type=Path, help="run folder of a masked diffusion model (default: one is trained)")
    parser.add_argument("--blocks", type=Path, help="run folder of a block diffusion model (default: one is trained)")
    parser.add_argument("--requests", type=int, default=200, help="load: requests at a time (default: 200)")
    parser.add_argument(
        "--alone", type=int, default=40, help="neighbours: requests that are repeated alone (default: 40)"
    )
    parser.add_argument("--clients", type=int, default=50, help="kill: clients at a time (default: 50)")
    parser.add_argument("--rounds", type=int, default=4, help="kill: rounds (default: 4)")
    parser.add_argument("--prompts", type=int, default=1000, help="cache: prompts (default: 1,000)")
    parser.add_argument("--long", type=int, default=8, help="cache: of them with 256 new tokens (default: 8)")
    parser.add_argument("--malformed", type=int, default=10_000, help="malformed: requests (default: 10,000)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the models (default: 60)")
    arguments = parser.parse_args()
    arguments.items = arguments.items or list(ITEMS)
    held = True
    with tempfile.TemporaryDirectory() as scratch:
        folder, steps = Path(scratch), f"train.steps={arguments.steps}"

        def run_of(blocks: bool) -> Path:
            given: Path | None = arguments.blocks if blocks else arguments.run
            if given is not None:
                return given
            say(f"training a small {'block diffusion' if blocks else 'masked diffusion'} model")
            name, own = ("bd3lm-tiny", ["objective.block=16"]) if blocks else ("mdlm-tiny", ["sample.steps=16"])
            made = trained(folder, name, steps, "train.batch=8", "train.warmup=5", *own)
            setattr(arguments, "blocks" if blocks else "run", made)
            return made

        def with_server(item: Callable[[Server, argparse.Namespace], Awaitable[Body]]) -> Body:
            with served(run_of(blocks=False)) as server:
                return asyncio.run(item(server, arguments))  # type: ignore[arg-type]  # an async function

        runs: dict[str, Callable[[], Body]] = {
            "load": lambda: with_server(load),
            "kill": lambda: with_server(kill),
            "cache": lambda: asyncio.run(cache(run_of(blocks=True), arguments)),
            "speed": lambda: asyncio.run(speed(run_of(blocks=True), arguments)),
            "malformed": lambda: with_server(refuse),
        }
        wanted = [
            name for name in runs if name in arguments.items or (name == "load" and "neighbours" in arguments.items)
        ]
        for name in wanted:
            record = runs[name]()
            held = held and record["holds"]
            say(f"{name}: {'holds' if record['holds'] else 'DOES NOT HOLD'}\n  {json.dumps(record)}")
            append_record("serve", {"item": name, **record, "hardware": describe_hardware(torch.device("cpu"))})
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
