"""Malformed requests: each gets a JSON error that says what is wrong, and none reaches the sampling thread."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sedd_graph.errors import UserError
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.server import is_loopback, read_keys
from sedd_graph.runs.serve.wire import Completion, Refused, read_completion
from tests.runs.serve.served import client, limited

Served = Callable[[str], ServedModel]
JSON = "application/json"
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, 2**63, -(2**70), "", "x", "\x00", "\ud800", "[[1]]", [], [[]], [None], [True], [1.5], ["a", 1],
    [[1], "a"], [[-1]], {}, {"a": 1}, [[[1]]], "a" * 5000, list(range(5000)), {"0": "("}, {"x": "a"}, ["("], [""], "(" * 100, "a{1000}{1000}",
)  # fmt: skip


def malformed(count: int, seed: int) -> Iterator[tuple[dict[str, str], bytes]]:
    """Headers and bodies of requests of which none can be answered."""
    rng, fields = random.Random(seed), [*Completion.model_fields, "nope", "messages", "stream_options"]
    good = json.dumps({"prompt": "The ", "max_tokens": 4, "n": 1}).encode()
    made = 0
    while made < count:
        kind, headers = rng.randrange(6), {"content-type": JSON}
        if kind == 0:  # no JSON
            body = rng.choice([b"", b"{", b"[", b"\xff\xfe", b"nul", b"{'a': 1}", b"{}x", b'{"n": NaN}', b"[" * 3000])
        elif kind == 1:  # JSON, and no object
            body = json.dumps(rng.choice([None, 3, "a", [], [1], True])).encode()
        elif kind == 2:  # bytes of a good request, changed
            at = rng.randrange(len(good))
            body = good[:at] + bytes([rng.randrange(256)]) + good[at + 1 :]
        elif kind == 3:
            body, headers = good, {"content-type": rng.choice(["text/plain", "", "multipart/form-data", "json"])}
        else:  # fields of the wrong type or value
            chosen = rng.sample(fields, rng.randint(1, 3))
            body = json.dumps({name: rng.choice(WRONG) for name in chosen}).encode()
        if not _good(headers, body):
            made += 1
            yield headers, body


def _good(headers: dict[str, str], body: bytes) -> bool:
    """Whether a request is well-formed after all, so that it may be answered."""
    if headers["content-type"] != JSON:
        return False
    try:
        read_completion(body)
    except Refused:
        return False
    return True


def test_malformed_requests_get_json_errors(served: Served) -> None:
    with client(limited(served("mdlm-tiny"), body=2**16)) as http:
        for headers, body in malformed(400, seed=0):
            answer = http.post("/v1/completions", content=body, headers=headers)
            assert 400 <= answer.status_code < 500, body
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert len(error["message"]) < 2000
        sizes = (b'{"prompt": "' + b"a" * 2**16 + b'"}', (b"x" * 2**12 for _ in range(20)))
        for content in sizes:  # declared, and sent in chunks
            answer = http.post("/v1/completions", content=content, headers={"content-type": JSON})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        metrics = http.get("/metrics").text
        assert 'outcome="refused"} 402' in metrics
        assert "sedd_graph_batch_rows_count 0" in metrics


def test_values_of_the_right_type_are_answered_or_refused_with_a_reason(served: Served) -> None:
    """What the reader of requests lets through never ends in an internal error."""
    rng, asked = random.Random(2), 0
    values: dict[str, list[Any]] = {
        "prompt": ["", "a", "[[3]]", "[[3]] [[0]]", "[[]]", "\x00\ud83d", "é" * 40, [0], [127], [128], [[1], []], ["", "b"], "a" * 64],
        "suffix": ["", "z", "[[1]]"],
        "max_tokens": [1, 16, 63, 64, 2**20],
        "temperature": [0, 1e-300, 1, 100],
        "top_p": [1e-300, 0.5, 1],
        "n": [1, 3],
        "seed": [-(2**63), 2**63 - 1],
        "stop": ["a", ["a", "b"], []],
        "echo": [True],
        "matching": ["", "a*", "(.|\\n)*", ".*b"],
        "forbid": [["a"], [5], [999_999], [""], []],
        "allow": [{"0": "a"}, {"-1": "b"}, {"99": "a"}, {"0": ""}],
        "guidance": [0, 2],
        "sampler": ["confidence", "first_hitting", "remdm"],
    }  # fmt: skip
    with client(served("mdlm-tiny")) as http:
        for _ in range(100):
            body = {name: rng.choice(values[name]) for name in rng.sample(list(values), rng.randint(1, 5))}
            answer = http.post("/v1/completions", content=json.dumps(body).encode(), headers={"content-type": JSON})
            assert answer.status_code in (200, 400), (body, answer.text)
            asked += answer.status_code == 200
        assert asked > 20


def test_who_may_ask(served: Served, tmp_path: Path) -> None:
    with client(served("mdlm-tiny"), hosts=["localhost"], keys=["one", "two"]) as http:

        def status(path: str, **headers: str) -> tuple[int, Any]:
            answer = http.get(path, headers=headers)
            return answer.status_code, answer.json().get("error", {}).get("code")

        assert status("/health") == (200, None)
        assert status("/v1/models") == (401, "invalid_api_key")
        assert status("/v1/models", authorization="Bearer three") == (401, "invalid_api_key")
        assert status("/v1/models", authorization="Basic one") == (401, "invalid_api_key")
        assert status("/v1/models", authorization="Bearer two") == (200, None)
        assert status("/health", host="evil.example") == (403, "wrong_host")
        assert status("/health", host="localhost:8000") == (200, None)
        assert status("/health", origin="http://evil.example") == (403, "wrong_origin")
        assert status("/health", origin="null") == (403, "wrong_origin")
        assert status("/health", origin="http://localhost") == (200, None)
        answer = http.get("/health")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "name")] == [
        True
    ] * 3 + [False] * 3
    (tmp_path / "keys").write_text(" one \n\ntwo\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(UserError, match="has no key"):
        read_keys(tmp_path / "keys")
