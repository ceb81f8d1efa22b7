"""``infill --prompts``: answers follow from the seed and the prompt alone, and go to JSON lines and zarr in order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.runs.open import open_run
from sedd_graph.runs.prompts import PromptLine, fill_in, read_prompts
from tests.runs.folders import placed

TINY = ("params.dim=16", "params.depth=1", "params.heads=2")
STEPS = "sample.steps=5"
TEXTS = ["The [[14]] statement.", "a [[3]] b [[2]]", "def [[7]]:", "or [[7]]: ", "The [[14]] statement."]


def lines(texts: list[str]) -> list[PromptLine]:
    return [PromptLine(id=number, text=text) for number, text in enumerate(texts)]


def answers(run: Any, texts: list[str], **more: Any) -> list[dict[str, Any]]:
    _, path = fill_in(run, lines(texts), seed=3, **more)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["mdlm-tiny", "sedd-uniform-tiny", "bd3lm-tiny"])
def test_an_answer_depends_on_its_prompt_and_the_seed_alone(tmp_path: Path, name: str) -> None:
    blocks = name == "bd3lm-tiny"  # text in blocks is written from the left, by a sampler without a number of steps
    changes = () if blocks else (STEPS,)
    run = open_run(placed(tmp_path, name, *TINY, "params.cond=16", *changes), device="cpu", compile="off")
    texts = [text.partition("]]")[0] + "]]" for text in TEXTS] if blocks else TEXTS
    found = answers(run, texts, samples=2)
    assert [(f["id"], f["sample"]) for f in found] == [(i, k) for i in range(len(texts)) for k in range(2)]
    wrote = [(f["text"], f["filled"]) for f in found]
    assert wrote[0] == wrote[-2]  # the same prompt
    assert wrote[0] != wrote[1]
    alone = [answers(run, [text], samples=2)[k] for text in texts[:3] for k in range(2)]
    assert [(f["text"], f["filled"]) for f in alone] == wrote[:6]
    turned = answers(run, texts[::-1], rows=1)
    assert [f["text"] for f in turned][::-1] == [text for text, _ in wrote[::2]]


def test_answers_keep_the_given_text_and_are_stored_in_order(tmp_path: Path) -> None:
    run = open_run(placed(tmp_path, "mdlm-tiny", *TINY, "params.cond=16", STEPS), device="cpu", compile="off")
    where, path = fill_in(run, lines(TEXTS), seed=3)
    assert (where.name, path.name) == ("infilled.zarr", "infilled.jsonl")
    group = zarr.open_group(str(where), mode="r")
    for row, (text, line) in enumerate(zip(TEXTS, path.read_text(encoding="utf-8").splitlines(), strict=True)):
        made = json.loads(line)
        for part in made["filled"]:
            start, _, rest = text.partition("[[")
            text = start + part + rest.partition("]]")[2]
        assert made["text"] == text
        assert str(np.asarray(group["text"])[row]) == text
        count = int(np.asarray(group["lengths"])[row])
        tokens = np.asarray(group["tokens"])[row]
        assert run.text_tokenizer().decode(tokens[:count].tolist()) == text
    assert dict(group.attrs)["prompts"] == len(TEXTS)
    assert fill_in(run, lines(TEXTS), seed=3)[1].read_text() == path.read_text()
    with pytest.raises(UserError, match="exists already"):
        fill_in(run, lines(TEXTS), output=path)
    with pytest.raises(UserError, match="prompt 1: infill: nothing is free"):
        fill_in(run, lines(["a [[2]]", "no hole [[0]]"]))


def test_models_without_noise_by_row_fill_in_one_by_one(tmp_path: Path) -> None:
    folder = placed(tmp_path, "did-tiny", *TINY, "params.cond=16", STEPS)
    run = open_run(folder, device="cpu", compile="off")
    texts = ["The [[]] of [[]].", "a [[]]"]
    found = answers(run, texts)
    assert found[1]["text"] == answers(run, texts[1:])[0]["text"]
    assert found[0]["text"].startswith("The ")
    assert found[0]["text"].endswith(".")


def test_files_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one [[2]]\r\n\n two [[3]]\n", encoding="utf-8")
    assert [(p.id, p.text) for p in read_prompts(path)] == [(0, "one [[2]]"), (1, " two [[3]]")]
    json_lines = tmp_path / "p.jsonl"
    json_lines.write_text('{"id": "a", "prefix": "x", "length": 9}\n{"text": "[[1]]"}\n', encoding="utf-8")
    assert [(p.id, p.prefix, p.text, p.length) for p in read_prompts(json_lines)] == [
        ("a", "x", None, 9),
        (1, None, "[[1]]", None),
    ]
    for content, said in (
        ('{"text": 3}', "line 1: text"),
        ('\n{"txt": "a"}', "line 2: txt"),
        ("{", "line 1"),
        ('{"text": "a", "length": 0}', "line 1: length"),
        ("", "has no prompt"),
    ):
        json_lines.write_text(content)
        with pytest.raises(UserError, match=said):
            read_prompts(json_lines)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = placed(tmp_path, "mdlm-tiny", *TINY, "params.cond=16", STEPS)
    file = tmp_path / "p.txt"
    file.write_text("The [[5]] is\n")
    out = tmp_path / "o.jsonl"
    arguments = ["infill", str(run), "--device", "cpu", "--prompts", str(file)]
    assert cli.run([*arguments, "--batch", "3", "-o", str(out), "--sampler", "confidence", "--set", "top_p=0.9"]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3
    assert dict(zarr.open_group(str(run / "infilled.zarr"), mode="r").attrs)["sampler"] == "confidence.v1"
    capsys.readouterr()
    for extra, said in (
        (["--text", "a [[1]]"], "leave --text out"),
        (["--trajectory"], "leave --trajectory out"),
        (["--sampler", "nonsense"], "unknown op 'nonsense'"),
        (["--set", "nope=1"], "unknown key"),
        (["--temperature", "-1"], "temperature"),
        (["-o", str(out)], "exists already"),
    ):
        assert cli.run([*arguments, *extra]) != 0
        assert said in capsys.readouterr().err
    assert cli.run(["infill", str(run), "--text", "a [[1]]", "-o", str(out)]) != 0
    assert "-o is for the answers" in capsys.readouterr().err
    assert cli.run(["sample", str(run), "--tape", str(tmp_path / "t"), "--temperature", "0.5", "--device", "cpu"]) != 0
    assert "a tape is of the run folder's own sampler" in capsys.readouterr().err
    assert cli.run(["sample", str(run), "--watch", "--device", "cpu"]) != 0
    assert "--watch shows drafts on a terminal" in capsys.readouterr().err


def test_another_sampler_keeps_the_keys_that_it_has(tmp_path: Path) -> None:
    from sedd_graph.runs.sample_section import sample_overrides

    run = placed(tmp_path, "mdlm-tiny", *TINY, "sample={op: ancestral, steps: 7, top_p: 0.8}")
    made = open_run(run, overrides=sample_overrides(run, "remdm", ["temperature=0.5"]), device="cpu", compile="off")
    config = made.engine.process.sampler.config
    assert (config.steps, config.top_p, config.temperature) == (7, 0.8, 0.5)
    made = open_run(run, overrides=sample_overrides(run, "first_hitting", []), device="cpu", compile="off")
    assert made.engine.process.steps is None  # it has no key steps
    assert made.engine.process.sampler.config.top_p == 0.8
