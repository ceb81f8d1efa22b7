"""Tapes of run folders: text to noise and back in another process, edits, and refusals of every other model or tape."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from sedd_graph.cli.main import run as command
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.stage import Stage
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.edit import Span, edit_run, replace_in, span_in
from sedd_graph.runs.invert import invert_run, restore_run
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.restore import restored_texts
from sedd_graph.runs.sample import sample_run
from sedd_graph.runs.tape import parts_of
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import Tape, _digest, read_tape, write_tape
from tests.conftest import SMALL

TEXTS = ["The cat sat on the mat.", "", "def f(x):", "A cat, a hat and a cat.", "return None"]
ALTERED = int(os.environ.get("SEDD_GRAPH_TAPES", "1000"))
"""Number of altered tapes of the slow test."""


def built(folder: Path, text: str, *overrides: str) -> Path:
    (folder / "b.yaml").write_text(text)
    name = text if text.endswith("tiny") else str(folder / "b.yaml")
    made = ["build", name, "--proof", "quick", "--device", "cpu", "--compile", "off", "--runs", str(folder / "runs"), "--path-to", str(folder / "at"), *overrides]  # fmt: skip
    assert command(made) == 0
    return Path((folder / "at").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return opened(built(tmp_path_factory.mktemp("tapes"), SMALL))


def opened(path: Path, **more: Any) -> Run:
    return open_run(path, device="cpu", compile="off", **more)


@pytest.fixture(scope="module")
def tape(run: Run) -> Path:
    said: list[str] = []
    path = invert_run(run, TEXTS, batch=2, say=said.append)
    assert path == run.path / "tape.zarr"
    assert "5 texts" in said[0]
    assert not said[1:]  # the sampler draws every token itself
    return path


def decoded(run: Run, tokens: list[list[int]]) -> list[str]:
    return [run.text_tokenizer().decode(row) for row in tokens]


def test_a_tape_leads_back_to_its_texts_in_this_and_another_process(run: Run, tape: Path, tmp_path: Path) -> None:
    assert decoded(run, restore_run(run, read_tape(tape), where=tape)) == TEXTS
    out = tmp_path / "text.txt"
    code = (
        f"from sedd_graph.cli.main import main; main(['restore', {str(tape)!r}, '--device', 'cpu', '-o', {str(out)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().decode() == "\n".join(TEXTS)


def test_the_format_is_as_documented(tape: Path) -> None:
    found = read_tape(tape)
    arrays = found.arrays
    assert arrays["lengths"].tolist() == [len(t) for t in TEXTS]
    assert (arrays["start"] == 128).all()  # the mask
    assert found.facts.mask == 128
    assert {len(arrays[n]) for n in ("call", "row", "place", "state", "value")} == {len(arrays["call"])}
    assert json.loads(found.facts.parts["sampler"])["op"] == "ancestral.v1"
    # 8 steps, the initial and the final rows, of each part
    assert len(arrays["marks"]) == 11 * len(parts_of(arrays["lengths"], 2))
    parts = parts_of(arrays["lengths"], 2)
    assert sorted(i for part in parts for i in part.rows) == [0, 2, 3, 4]
    assert [len(parts_of(np.asarray([3, 3, 3, 0]), 2)), parts_of(np.asarray([3, 3, 3, 0]), 2)[1].rows] == [2, (2,)]


def test_verbs_print_what_they_did_and_do_not_overwrite(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, cpu = tmp_path / "own.zarr", ["--device", "cpu"]
    assert command(["invert", str(run.path), "--text", "a cat", "-o", str(where), *cpu]) == 0
    assert "verified by a replay" in capsys.readouterr().out
    assert command(["invert", str(run.path), "--text", "a cat", "-o", str(where), *cpu]) == 2
    assert "exists already" in capsys.readouterr().err
    assert command(["restore", str(where), *cpu]) == 2  # beside no run folder
    assert "--run" in capsys.readouterr().err
    assert command(["restore", str(where), "--run", str(run.path), *cpu]) == 0
    assert capsys.readouterr().out == "a cat\n"
    assert command(["edit", str(run.path), str(where), "--replace", "cat=dog", *cpu]) == 0
    assert "of 2 other tokens kept" in capsys.readouterr().out
    assert command(["edit", str(run.path), str(where), "--replace", "cow=dog", *cpu]) == 2
    assert "in no text" in capsys.readouterr().err
    assert command(["edit", str(run.path), str(where), "--span", "9", "dog", *cpu]) == 2
    assert "A:B" in capsys.readouterr().err
    assert command(["invert", str(run.path), "--text", "\u0416", *cpu]) == 2
    assert "was not trained on" in capsys.readouterr().err
    assert command(["restore", str(run.path), *cpu]) == 2
    assert "not a tape" in capsys.readouterr().err


def refused(run: Run, tape: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        restore_run(run, read_tape(tape), where=tape)


def test_another_model_is_refused_by_name(run: Run, tape: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["sample.steps=9"], "written with the sampler"),
        (["sample.temperature=0.9"], "written with the sampler"),
        (["process.schedule={op: cosine}"], "written with the schedule"),
    ):
        refused(opened(run.path, overrides=overrides), tape, message)
    refused(opened(built(tmp_path, SMALL, "params.dim=32")), tape, "the weights of")
    other = opened(run.path)
    with torch.no_grad():
        next(other.engine.model.parameters()).view(-1)[0] += 1e-6
    refused(other, tape, "the weights of")
    half = opened(run.path)
    half.engine.model.bfloat16()
    refused(half, tape, "the dtype of the weights")


def test_other_rows_on_the_way_are_refused(run: Run, tape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose logits differ: the first step with other rows is named, and what differs."""
    plain, random_ = run.engine.network.begin, torch.Generator().manual_seed(0)
    off = 5 * torch.randn(999, generator=random_)  # the logits of the untrained network are all equal

    def begin(*a: Any, **k: Any) -> Stage:
        stage = plain(*a, **k)

        def finish(values: Sequence[torch.Tensor], groups: Groups) -> dict[str, torch.Tensor]:
            found = stage.finish(values, groups)
            return {n: (v + off[: v.shape[-1]]).log_softmax(-1) for n, v in found.items()}

        return dataclasses.replace(stage, finish=finish)

    monkeypatch.setattr(run.engine.network, "begin", begin)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(DamagedError, match=r"rows \d+ of the run differ.*threads \d+ \(here 77\)"):
        restore_run(run, read_tape(tape), where=tape)


def altered(tape: Path, target: Path, random_: random.Random, *, sealed: bool) -> str:
    """A copy of a tape with one changed entry; ``sealed``: with hashes as if it had been written so."""
    found = read_tape(tape)
    arrays = {name: data.copy() for name, data in found.arrays.items()}
    name = random_.choice(sorted(n for n in arrays if arrays[n].size))
    flat = arrays[name].reshape(-1)
    at = random_.randrange(len(flat))
    flat[at] = flat[at] + random_.choice([1, -1, 7]) if flat.dtype != np.uint8 else flat[at] ^ 1
    if sealed:
        write_tape(target, Tape(facts=found.facts, arrays=arrays), numbers=False)
    else:
        shutil.copytree(tape, target)
        zarr.open_array(str(target / name), mode="r+")[...] = arrays[name]
    return name


@pytest.mark.parametrize("count", [12, pytest.param(ALTERED, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_altered_tapes_are_refused_or_still_exact(run: Run, tape: Path, tmp_path: Path, count: int) -> None:
    """One entry changed: by the hash; and, where someone writes the hash anew, by the rows on the way."""
    random_, exact = random.Random(count), 0
    for number in range(count):
        target = tmp_path / f"{number}.zarr"
        altered(tape, target, random_, sealed=number % 2 == 1)
        try:
            texts = decoded(run, restore_run(run, read_tape(target), where=target))
        except UserError:
            continue
        assert number % 2 == 1  # the hash refuses every change
        assert texts == TEXTS
        exact += 1
    assert exact < count / 2


def test_damaged_and_wrong_files_are_refused(run: Run, tape: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.zarr"
    shutil.copytree(tape, target)
    meta = json.loads((target / "zarr.json").read_text())
    meta["attributes"]["tape"]["seed"] = 5
    (target / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(DamagedError, match="not the file that was written"):
        read_tape(target)
    found = read_tape(tape)
    for name, value, message in (
        ("lengths", np.asarray([2**40], dtype=np.int64), "lengths is not"),
        ("start", np.zeros(3, dtype=np.int32), "do not fit"),
        ("place", np.full_like(found.arrays["place"], 10**6), "at no position"),
        ("state", found.arrays["state"].astype(np.int64), "is int64"),
    ):
        forged = tmp_path / f"{name}.zarr"
        write_tape(forged, Tape(facts=found.facts, arrays={**found.arrays, name: value}), numbers=False)
        with pytest.raises(DamagedError, match=message):
            read_tape(forged)
    bad = found.facts.model_copy(update={"batch": 0})
    forged = write_tape(tmp_path / "facts.zarr", Tape(facts=bad, arrays=found.arrays), numbers=False)
    with pytest.raises(DamagedError, match=r"tape\.batch"):
        read_tape(forged)
    assert len(_digest(found.facts, found.arrays)) == 64


def texts_of(path: Path) -> list[str]:
    return [str(t) for t in zarr.open_group(str(path), mode="r")["text"][...]]  # type: ignore[index]  # an array


def test_edits_keep_the_rest_and_strength_0_everything(run: Run, tape: Path) -> None:
    found = read_tape(tape)
    stored = edit_run(run, found, replace_in("cat", "horse"), where=tape, strength=0.0)
    assert texts_of(stored) == [TEXTS[0], TEXTS[3]]
    said: list[str] = []
    stored = edit_run(run, found, replace_in("cat", "horse"), where=tape, strength=0.05, say=said.append)
    first, second = texts_of(stored)
    assert first[4:9] == "horse"
    assert len(first) == len(TEXTS[0]) + 2
    assert second[2:7] == "horse"
    assert second[-6:-1] == "horse"
    assert said[0].startswith("--- 1:")
    assert "of 20 other tokens kept" in said[0]
    group = zarr.open_group(str(stored), mode="r")
    road, edited = np.asarray(group["original"]), np.asarray(group["edited"])
    assert decoded(run, [road[-1].tolist()]) == [TEXTS[0]]
    assert decoded(run, [edited[-1].tolist()]) == [first]
    assert (road[0] == 128).all()
    shared = road[-1][[0, 1, 2, 3]], edited[-1][[0, 1, 2, 3]]
    assert (shared[0] == shared[1]).mean() >= 0.5  # an untrained network, near the noise of the tape
    anew = texts_of(edit_run(run, found, None, where=tape, row=2, strength=1.0))
    assert len(anew[0]) == len(TEXTS[2])
    assert anew[0] != TEXTS[2]
    one = texts_of(edit_run(run, found, span_in(0, 3, "class"), where=tape, row=2, strength=0.05))
    assert one[0].startswith("class")


def test_edits_that_make_no_sense_are_refused(run: Run, tape: Path) -> None:
    found = read_tape(tape)
    for edits, more, message in (
        (replace_in("zebra", "x"), {}, "in no text"),
        (span_in(0, 99, "x"), {"row": 0}, "no part of the text"),
        (replace_in(TEXTS[4], ""), {}, "nothing would be left"),
        (replace_in("cat", "\u0416"), {}, "not trained on"),
        (None, {"strength": 1.5}, "from 0 to 1"),
        (None, {"row": 9}, "--line"),
        (None, {"row": 1}, "no text"),
    ):
        with pytest.raises(UserError, match=message):
            edit_run(run, found, edits, where=tape, **more)
    assert replace_in("a", "b")("banana") == (Span(1, 2, "b"), Span(3, 4, "b"), Span(5, 6, "b"))


@pytest.mark.parametrize("name", [pytest.param("editflow-tiny", marks=pytest.mark.slow), "flow-tiny"])
def test_samples_of_strings_and_flows_are_repeated_and_their_texts_have_no_tape(name: str, tmp_path: Path) -> None:
    path = built(tmp_path, name)
    made = opened(path)
    length = 12 if made.engine.process.text else None
    request = SampleRequest(batch=3, length=length, seed=5)
    tape = tmp_path / "samples.zarr"
    said: list[str] = []
    sample_run(made, request, tape=tape, say=said.append)
    again = restored_texts(opened(path), read_tape(tape), where=tape)
    assert [line.split("\n", 1)[1] for line in said[:3]] == again
    facts = dataclasses.replace(read_tape(tape), facts=read_tape(tape).facts.model_copy(update={"seed": 6}))
    other = write_tape(tmp_path / "other.zarr", facts, numbers=False)
    with pytest.raises(DamagedError, match="cannot be repeated"):
        restored_texts(opened(path), read_tape(other), where=other)
    with pytest.raises(UserError, match=r"invert: .*sample --tape"):
        invert_run(made, ["abc"])
