"""Malformed requests to `sedd-graph serve`, of all kinds that HTTP allows, for benchmarks/serve.py."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["malformed"]

Request = dict[str, Any]
GARBAGE = [
    "",
    " ",
    "null",
    "[]",
    '"text"',
    "1",
    "true",
    "{",
    "}",
    '{"prompt": }',
    '{"prompt": "a"',
    "{'prompt': 'a'}",
    "NaN",
    '{"a":1}x',
]
WRONG: dict[str, list[object]] = {
    "model": ["no such model", 1, ["x"], {"a": 1}],
    "prompt": [
        1,
        1.5,
        True,
        {},
        [],
        [1, "a"],
        [None],
        [-1],
        [2**40],
        ["a", 1],
        "a" * 100_000,
        [0] * 5000,
        "a [[99999999]] b",
        "[[0]]",
        "[[1]][[" + "9" * 40 + "]]",
    ],
    "suffix": [1, [], {}],
    "max_tokens": [0, -1, 1.5, "5", 10**9, 10**30, [], True],
    "temperature": [-1, "hot", 1e9, [], {}],
    "top_p": [0, -0.1, 1.1, "x", []],
    "n": [0, -3, 10**6, "2", 1.5],
    "seed": ["x", 1.5, 10**30, []],
    "stream": ["yes", 1, []],
    "stop": [1, [1], ["a"] * 100, "", {}],
    "echo": ["x", 2],
    "steps": [0, -1, 10**9, "8", 1.5],
    "sampler": ["no such sampler", 1, [], "../../etc/passwd"],
    "matching": ["(", "[z-a]", "a{99999}", "*", 1, [], "a" * 5000, "(?<name>x)\\1"],
    "forbid": ["x", [1.5], [[]], [-1], [2**31], {}],
    "allow": [[], {"x": "a"}, {"0": "("}, {"999999": "a"}, {"0": 1}],
    "drafts": ["x", 1],
    "logprobs": [5],
    "logit_bias": [{"5": 100}, "x"],
    "best_of": [7],
    "frequency_penalty": [1.0],
    "presence_penalty": [-1.0],
    "guidance": [-1, "x"],
    "stream_options": [{"include_usage": True}, 1, {"a": 1}],
    "user": [1, "u" * 5000],
}
"""Values that a field must not have, alone."""


def _post(content: bytes, **headers: str) -> Request:
    return {
        "method": "POST",
        "url": "/v1/completions",
        "content": content,
        "headers": {"content-type": "application/json", **headers},
    }


def _field(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    name = pick.choice(list(WRONG))
    body = {"prompt": "a", name: pick.choice(WRONG[name])}
    return _post(json.dumps(body).encode())


def _unknown(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    name = "".join(pick.choice("abcdefghij_-\u00e9\u2603\n\x00<>&\"'") for _ in range(pick.randint(0, 30)))
    return _post(json.dumps({"prompt": "a", f"x{name}": 1}).encode())


def _garbage(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    return _post(pick.choice(GARBAGE).encode())


def _noise(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    return _post(pick.randbytes(pick.randint(1, 300)))


def _cut(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    whole = json.dumps({"prompt": "The [[3]] of it", "max_tokens": 3, "temperature": 0.5, "seed": 3}).encode()
    return _post(whole[: pick.randint(0, len(whole) - 1)])


def _nested(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    depth = pick.choice([10, 1000, 20_000])
    return _post(b'{"prompt": ' + b"[" * depth + b"]" * pick.choice([depth, depth - 1]) + b"}")


def _utf8(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    return _post(b'{"prompt": "' + pick.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\xc3"]) + b'"}')


def _surrogate(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    return _post(b'{"prompt": "a", "sampler": "\\ud800", "seed": "\\udfff"}')


def _large(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    return _post(b'{"prompt": "' + b"a" * (settings["limits"]["body"] + pick.randint(0, 1000)) + b'"}')


def _numbers(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    number = pick.choice(["1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "0x10", "01", "1e-400"])
    field = pick.choice(["max_tokens", "n", "steps"])
    return _post(f'{{"prompt": "a", "{field}": {number}}}'.encode())


def _media(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    kind = pick.choice(
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
    )
    return {**_post(b'{"prompt": "a"}'), "headers": {"content-type": kind}}


def _path(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    path = pick.choice(["/v1/chat/completions", "/v1/", "/v2/completions", "/../../etc/passwd", "/%00", "/v1/models/nobody", "/static/x.js", "/v1/completions/", "/\u2603"])  # fmt: skip
    return {"method": pick.choice(["GET", "POST"]), "url": path}


def _method(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    method, path = pick.choice([("GET", "/v1/completions"), ("DELETE", "/v1/completions"), ("POST", "/health"), ("PUT", "/v1/models"), ("PATCH", "/metrics"), ("BREW", "/")])  # fmt: skip
    return {"method": method, "url": path}


def _host(pick: random.Random, settings: Mapping[str, Any]) -> Request:
    headers = pick.choice([{"host": "evil.example"}, {"origin": "https://evil.example"}])
    return _post(b'{"prompt": "a", "max_tokens": 1}', **headers)


KINDS: list[tuple[int, Callable[[random.Random, Mapping[str, Any]], Request]]] = [
    (40, _field), (8, _unknown), (8, _garbage), (8, _noise), (8, _cut), (3, _nested), (4, _utf8), (3, _surrogate), (1, _large),
    (6, _numbers), (4, _media), (3, _path), (2, _method), (2, _host),
]  # fmt: skip
"""How often each kind occurs, in all about 100 times."""


def malformed(pick: random.Random, settings: Mapping[str, Any]) -> tuple[str, Request]:
    """Return the kind of a malformed request, and the request as arguments of ``httpx.Client.request``.

    Args:
        pick: Random number generator.
        settings: The answer of ``/v1/settings``.
    """
    (make,) = pick.choices([kind for _, kind in KINDS], [share for share, _ in KINDS])
    request = make(pick, settings)
    return f"{make.__name__} {str(request.get('content', request['url']))[:120]}", request
