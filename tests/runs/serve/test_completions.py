"""Completions in OpenAI's format: what is written, where it ends, what is streamed, and what is refused."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from sedd_graph.runs.prompts import PromptLine, fill_in
from sedd_graph.runs.serve.model import ServedModel
from tests.runs.serve.served import client, events, limited, model_of

Served = Callable[[str], ServedModel]
MODELS = ("mdlm-tiny", "sedd-uniform-tiny", "bd3lm-tiny", "did-tiny")


@pytest.fixture(scope="module", params=MODELS)
def each(request: pytest.FixtureRequest, served: Served) -> Iterator[tuple[TestClient, ServedModel]]:
    with client(served(request.param)) as found:
        yield found, served(request.param)


@pytest.fixture(scope="module")
def masked(served: Served) -> Iterator[TestClient]:
    with client(served("mdlm-tiny")) as found:
        yield found


@pytest.fixture(scope="module")
def blocks(served: Served) -> Iterator[TestClient]:
    with client(served("bd3lm-tiny")) as found:
        yield found


def ask(http: TestClient, status: int = 200, **body: Any) -> Any:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def told(http: TestClient, status: int, **body: Any) -> tuple[str, Any, Any]:
    """The message, the field and the code of an error."""
    error = ask(http, status, **body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"], error["param"], error["code"]


def test_answers_are_those_of_infill_prompts_with_the_same_seed(each: tuple[TestClient, ServedModel]) -> None:
    http, model = each
    hole = "[[]]" if model.process.chooses_lengths else "[[9]]"
    _, path = fill_in(
        model.run, [PromptLine(text="The " + hole, length=13 if hole == "[[]]" else None)], samples=3, seed=5
    )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = ask(http, prompt="The ", max_tokens=9, n=3, seed=5)
    assert [c["text"] for c in found["choices"]] == [line["filled"][0] for line in lines]
    assert [c["filled"] for c in found["choices"]] == [line["filled"] for line in lines]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]
    counts = [len(c["text"]) for c in found["choices"]]  # a token is a character
    assert found["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": sum(counts),
        "total_tokens": 4 + sum(counts),
    }
    for choice, count in zip(found["choices"], counts, strict=True):
        assert choice["finish_reason"] == ("stop" if count < 9 else "length")
    whole = ask(http, prompt="The " + hole, max_tokens=9, n=3, seed=5)
    assert [c["text"] for c in whole["choices"]] == [line["text"] for line in lines]
    assert found["object"] == "text_completion"
    assert (found["model"], found["seed"]) == ("tiny", 5)


def test_a_stream_writes_what_the_answer_says(each: tuple[TestClient, ServedModel]) -> None:
    http, _ = each
    body: dict[str, Any] = {"prompt": ["The ", "A"], "max_tokens": 12, "n": 2, "seed": 1}
    whole = ask(http, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for drafts in (False, True):
        answer = http.post("/v1/completions", json={**body, **options, "drafts": drafts})
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = events(answer.text)
        assert found[-1]["usage"] == whole["usage"]
        assert found[-1]["choices"] == []
        texts, ends, rows = dict.fromkeys(range(4), ""), dict[int, str](), dict[int, list[str | None]]()
        for chunk in found[:-1]:
            (choice,) = chunk["choices"]
            at = choice["index"]
            assert at not in ends
            if "draft" in choice:
                before = rows.get(at, [])
                assert choice["changed"] == [
                    i for i, text in enumerate(choice["draft"]) if i >= len(before) or before[i] != text
                ]
                rows[at] = choice["draft"]
            texts[at] += choice["text"]
            if choice["finish_reason"]:
                ends[at] = choice["finish_reason"]
        assert [texts[i] for i in range(4)] == [c["text"] for c in whole["choices"]]
        assert [ends[i] for i in range(4)] == [c["finish_reason"] for c in whole["choices"]]
        if drafts:  # the last draft is the row itself
            prompts = ["The ", "The ", "A", "A"]
            assert ["".join(map(str, rows[i])) for i in range(4)] == [
                p + c["text"] for p, c in zip(prompts, whole["choices"], strict=True)
            ]
        else:
            assert not rows


def test_text_in_blocks_is_streamed_by_the_block(blocks: TestClient) -> None:
    body = {"prompt": "The", "max_tokens": 17, "seed": 1, "stream": True}
    found = events(blocks.post("/v1/completions", json=body).text)
    sizes = [len(chunk["choices"][0]["text"]) for chunk in found]
    # blocks have four tokens, and the prompt three; a client that reads slowly gets several at once
    assert sum(sizes) == 17
    assert all((3 + sum(sizes[: i + 1])) % 4 == 0 for i in range(len(sizes)))
    assert len(sizes) > 1


def test_a_stop_sequence_ends_the_text(blocks: TestClient, masked: TestClient) -> None:
    for http in (masked, blocks):
        body: dict[str, Any] = {"prompt": "The ", "max_tokens": 40, "seed": 3}
        text = ask(http, **body)["choices"][0]["text"]
        stop, unused = text[9:12], "\x00"
        cut = ask(http, **body, stop=[unused, stop])["choices"][0]
        assert cut["text"] == text[: text.index(stop)]
        assert cut["finish_reason"] == "stop"
        found = events(http.post("/v1/completions", json={**body, "stream": True, "stop": stop}).text)
        assert "".join(c["choices"][0]["text"] for c in found) == cut["text"]
        assert found[-1]["choices"][0]["finish_reason"] == "stop"
    # text in blocks is not written after its end
    before = _metric(blocks, "network_evaluations_total")
    ask(blocks, **body, stop=text[:1])
    assert _metric(blocks, "network_evaluations_total") == before  # the batch was left before its result was counted


def _metric(http: TestClient, name: str) -> int:
    lines = http.get("/metrics").text.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"sedd_graph_{name} "))


def test_prompts_of_every_form(masked: TestClient, served: Served) -> None:
    model = served("mdlm-tiny")
    ids = [int(i) for i in model.tokenizer.encode("The ")]
    told = ask(masked, prompt="The ", max_tokens=5, seed=1)["choices"][0]["text"]
    assert ask(masked, prompt=ids, max_tokens=5, seed=1)["choices"][0]["text"] == told
    assert ask(masked, prompt=[ids, ids[:1]], max_tokens=5, seed=1)["choices"][0]["text"] == told
    assert ask(masked, prompt=ids, max_tokens=5, seed=1, echo=True)["choices"][0]["text"] == "The " + told
    assert len(ask(masked, seed=1)["choices"][0]["text"]) == 16  # nothing is given
    middle = ask(masked, prompt="The ", suffix=" end", max_tokens=5, seed=1)
    assert middle["usage"]["prompt_tokens"] == 8
    text = middle["choices"][0]["text"]
    assert len(text) == 5
    again = ask(masked, prompt="The ", suffix=" end", max_tokens=5, seed=1, echo=True)
    assert again["choices"][0]["text"] == f"The {text} end"
    assert ask(masked, prompt="The [[5]] end", seed=1)["choices"][0]["text"] == f"The {text} end"
    literal = ask(masked, prompt="a[[1]]", suffix="", max_tokens=2, seed=1, echo=True)["choices"][0]["text"]
    assert literal.startswith("a[[1]]")
    two = ask(masked, prompt="a [[2]] b [[3]]", seed=1)["choices"][0]
    assert [len(part) for part in two["filled"]] == [2, 3]
    assert two["text"] == f"a {two['filled'][0]} b {two['filled'][1]}"


def test_settings_and_conditions_reach_the_sampler(masked: TestClient, served: Served) -> None:
    cold = [ask(masked, prompt="The ", max_tokens=8, temperature=0, steps=8, seed=s) for s in (1, 2)]
    warm = [ask(masked, prompt="The ", max_tokens=8, steps=8, seed=s) for s in (1, 2)]
    assert warm[0]["choices"][0]["text"] != warm[1]["choices"][0]["text"]
    model = served("mdlm-tiny")
    tokens = model.tokenizer.encode(cold[0]["choices"][0]["text"])
    assert len(tokens) == 8
    text = ask(masked, prompt="The ", max_tokens=8, matching="The [a-z]{4}[0-9]{4}", seed=1)["choices"][0]["text"]
    assert text[:4].isalpha()
    assert text[4:].isdigit()
    text = ask(masked, max_tokens=30, forbid=["e", "a", 0], seed=1)["choices"][0]["text"]
    assert not set("ea") & set(text)
    text = ask(masked, max_tokens=4, allow={"0": "[A-Z]", "-1": "[0-9]"}, seed=1)["choices"][0]["text"]
    assert text[0].isupper()
    assert text[-1].isdigit()
    other = ask(masked, prompt="The ", max_tokens=8, sampler="first_hitting", seed=1)
    run = model.runs["first_hitting"]
    assert run.engine.process.steps is None
    assert len(other["choices"][0]["text"]) == 8
    assert run.engine.network is model.run.engine.network


def test_what_is_refused_says_why(masked: TestClient) -> None:
    for status, body, message, param, code in (
        (400, {"prompt": 3}, "prompt: Input should be a valid string", "prompt", None),
        (400, {"promt": "a"}, "unknown field 'promt' (did you mean 'prompt'?)", "promt", "unknown_field"),
        (400, {"n": "3"}, "n: Input should be a valid integer", "n", None),
        (400, {"n": True}, "n: ", "n", None),
        (400, {"n": 129}, "more than the 128 choices", "n", None),
        (400, {"prompt": ["a"] * 65, "n": 2}, "more than the 128 choices", "n", None),
        (400, {"prompt": []}, "prompt: ", "prompt", None),
        (400, {"prompt": [[999]]}, "there is no token 999", "prompt", None),
        (400, {"prompt": [1, "a"]}, "prompt: ", "prompt", None),
        (400, {"max_tokens": 0}, "max_tokens: ", "max_tokens", None),
        (400, {"max_tokens": 65}, "more than the 64 of a row", "prompt", "context_length_exceeded"),
        (400, {"prompt": "a" * 9999}, "more than 64 tokens", "prompt", "context_length_exceeded"),
        (400, {"prompt": "[[70]]"}, "more than the 64 of a row", "prompt", "context_length_exceeded"),
        (400, {"prompt": "[[7]]", "max_tokens": 6}, "the holes have 7 tokens", "max_tokens", None),
        (400, {"prompt": "[[7]]", "stop": "a"}, "stop cuts", "stop", None),
        (400, {"prompt": "[[0]]"}, "nothing is free", "prompt", None),
        (400, {"temperature": -1}, "temperature: ", "temperature", None),
        (400, {"top_p": 0}, "top_p: ", "top_p", None),
        (400, {"steps": 5000}, "steps may be up to 4,096", "steps", None),
        (400, {"sampler": "confidenc"}, "did you mean 'confidence'?", "sampler", None),
        (400, {"sampler": "first_hitting", "steps": 3}, "takes no number of steps", "steps", None),
        (400, {"matching": "(a"}, "matching: ", "matching", None),
        (400, {"prompt": "b", "matching": "a*"}, "no text of 17 tokens matches", None, None),
        (400, {"allow": {"x": "a"}}, "positions must be integers", "allow", None),
        (400, {"logprobs": 3}, "logprobs is not supported", "logprobs", "unsupported"),
        (400, {"best_of": 3}, "best_of is not supported", "best_of", "unsupported"),
        (400, {"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty", "unsupported"),
        (400, {"drafts": True}, "drafts needs stream", "drafts", None),
        (404, {"model": "gpt-5"}, "there is no model 'gpt-5'; this server has 'tiny'", "model", "model_not_found"),
    ):
        said, field, why = told(masked, status, **body)
        assert message in said, body
        assert (field, why) == (param, code), body
    neutral: dict[str, Any] = {
        "logprobs": None,
        "best_of": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
    }
    ask(masked, prompt="a", model="tiny", user="u", **neutral)


def test_a_failing_stream_ends_with_an_error(masked: TestClient) -> None:
    answer = masked.post("/v1/completions", json={"prompt": "b", "matching": "a*", "stream": True})
    assert answer.status_code == 200
    assert json.loads(answer.text.removeprefix("data: "))["error"]["message"].startswith("no text of 17 tokens")


def test_strings_choose_lengths(served: Served) -> None:
    with client(served("did-tiny")) as http:
        assert "chooses lengths itself" in told(http, 400, matching="a")[0]
        assert "write [[]] for a hole" in told(http, 400, prompt="a [[3]]")[0]
        assert http.get("/v1/settings").json()["hole"] == "[[]]"
        ask(http, max_tokens=5, temperature=1, top_p=1)  # what clients send without being asked
        assert told(http, 400, temperature=0.5)[1] == "temperature"


def test_the_other_endpoints(masked: TestClient) -> None:
    assert masked.get("/health").json() == {"status": "ready"}
    (found,) = masked.get("/v1/models").json()["data"]
    assert (found["id"], found["object"]) == ("tiny", "model")
    assert masked.get("/v1/models/tiny").json()["id"] == "tiny"
    assert masked.get("/v1/models/other").status_code == 404
    assert masked.get("/").status_code == 200
    settings = masked.get("/v1/settings").json()
    assert settings["sampler"] == "ancestral"
    assert settings["samplers"][0] == {"name": "ancestral", "steps": 4, "temperature": 1.0, "top_p": 1.0}
    assert {"confidence", "first_hitting"} < {s["name"] for s in settings["samplers"]}
    assert settings["hole"] == "[[N]]"
    assert settings["infilling_exact"]
    for name in ("matching", "forbid", "allow", "drafts", "infilling"):
        assert settings[name] is True
    text = masked.get("/metrics").text
    assert 'sedd_graph_requests_total{outcome="ok"}' in text
    values = [float(line.split()[-1]) for line in text.splitlines() if not line.startswith("#")]
    assert all(np.isfinite(values))
    for method, path, status, code in (
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
    ):
        answer = masked.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_text_without_a_cache_is_the_same(served: Served) -> None:
    cached = served("bd3lm-tiny")
    plain = ServedModel(cached.run, name="tiny", limits=cached.limits, kv_cache=False)
    body: dict[str, Any] = {"prompt": ["The ", "", "A b"], "max_tokens": 40, "n": 4, "seed": 1}
    with client(cached) as http, client(plain) as bare:
        one, two = (ask(h, **body) for h in (http, bare))
    assert [c["text"] for c in one["choices"]] == [c["text"] for c in two["choices"]]


def test_a_request_ends_when_its_time_is_over(served: Served) -> None:
    with client(limited(served("mdlm-tiny"), timeout=0.3)) as http:
        body = {
            "prompt": "The ",
            "max_tokens": 60,
            "steps": 4000,
            "sampler": "remdm",
        }  # evaluates the network in each step
        assert told(http, 504, **body)[2] == "timeout"
        answer = http.post("/v1/completions", json={**body, "stream": True})
        assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "timeout"
        assert 'outcome="timeout"} 2' in http.get("/metrics").text
        started = time.monotonic()
        while _metric(http, "running_rows"):  # the batch is left at its next step
            assert time.monotonic() < started + 30
            time.sleep(0.01)


def test_particles_are_not_shown(tmp_path: Path) -> None:
    """Most of the rows that are drawn for them are not returned, so that none is streamed before the choice is made."""
    sampler = "sample={op: first_hitting, particles: 3, forbid: [e]}"
    with client(model_of(tmp_path / "run", "bd3lm-tiny", sampler)) as http:
        body: dict[str, Any] = {"prompt": ["The ", "A"], "max_tokens": 20, "seed": 1}
        whole = [c["text"] for c in ask(http, **body)["choices"]]
        assert not any("e" in text for text in whole)
        found = events(http.post("/v1/completions", json={**body, "stream": True}).text)
        assert [c["choices"][0]["text"] for c in sorted(found, key=lambda c: c["choices"][0]["index"])] == whole
        assert "with particles there are no drafts" in told(http, 400, **body, stream=True, drafts=True)[0]
