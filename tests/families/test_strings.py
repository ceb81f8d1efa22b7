"""From a blueprint to text of any length: build, train, evaluate, sample and fill in, from the command line."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zarr

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.diffusion.batch import Batch
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.samples import TextWithHoles
from sedd_graph.errors import BlueprintError, UserError
from tests.conftest import ROOT

SMALL = ["params.dim=16", "params.heads=2", "params.cond=8", "params.depth=1", "train.compile=off", "data.length=24"]


def made(name: str, *overrides: str) -> Engine:
    engine = sedd_graph.build(ROOT / "blueprints" / f"{name}.yaml", [*SMALL, *overrides], device="cpu", compile="off")
    assert isinstance(engine, Engine)
    return engine


@pytest.mark.parametrize("name", ["did-tiny", "indel-tiny", pytest.param("flexmdm-tiny", marks=pytest.mark.slow)])
def test_the_whole_road(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train.steps=3", "train.batch=4", "train.warmup=1", "train.evaluate=null"]
    blueprint = str(ROOT / "blueprints" / f"{name}.yaml")
    text = tmp_path / "text.txt"
    text.write_text("a line\nanother one, longer\n\n  and a third\n" * 12)
    corpus = ["data.corpus.op=text", f"data.corpus.files=[{text}]"]
    assert cli.run(["train", blueprint, "--runs", str(tmp_path), *SMALL, *train, *corpus, "--allow-outside"]) == 0
    (run,) = (tmp_path / name).iterdir()
    told = capsys.readouterr().out
    assert "strings.law" in told
    assert "held-out bound" in told
    assert cli.run(["eval", str(run), "--draws", "2", "--allow-outside"]) == 0
    assert cli.run(["sample", str(run), "--batch", "3", "--length", "9", "--steps", "4"]) == 0
    group: Any = zarr.open_group(str(run / "samples.zarr"), mode="r")
    lengths = group["lengths"][:]
    assert lengths.max() <= 9
    assert [len(t) for t in group["text"][:]] == lengths.tolist()
    assert group.attrs["cut"] >= 0
    capsys.readouterr()
    assert cli.run(["infill", str(run), "--text", "a [[]] line", "--batch", "2", "--steps", "4"]) == 0
    shown = capsys.readouterr()
    assert "heuristic" in shown.err
    rows = [line for line in shown.out.splitlines() if line.startswith("a ")]
    assert len(rows) == 2
    assert all(row.endswith(" line") for row in rows)
    group = zarr.open_group(str(run / "infilled.zarr"), mode="r")
    for text, length, given in zip(group["text"][:], group["lengths"][:], group["given"][:], strict=True):
        assert given.tolist()[:length] == [True] * 2 + [False] * (length - 7) + [True] * 5
        assert not given[length:].any()
        assert "".join(itertools.compress(text, given)) == "a  line"
    assert cli.run(["infill", str(run), "--text", "a [[3]] line"]) == 2
    assert "[[]]" in capsys.readouterr().err


def test_the_road_of_edit_flows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train.steps=3", "train.batch=4", "train.warmup=1", "train.evaluate=null"]
    text = tmp_path / "text.txt"
    text.write_text("a line\nanother one, longer\n\n  and a third\n" * 12)
    corpus = ["data.corpus.op=text", f"data.corpus.files=[{text}]"]
    blueprint = str(ROOT / "blueprints" / "editflow-tiny.yaml")
    assert cli.run(["train", blueprint, "--runs", str(tmp_path), *SMALL, *train, *corpus, "--allow-outside"]) == 0
    (run,) = (tmp_path / "editflow-tiny").iterdir()
    told = capsys.readouterr().out
    assert "strings.transport" in told
    assert "held-out loose bound" in told
    assert "Compare it with bounds of the same process alone" in told
    assert "the same process alone" in json.loads((run / "evaluation.json").read_text())["caveat"]
    assert "the same process alone" in (run / "report.html").read_text()
    assert cli.run(["sample", str(run), "--batch", "3", "--length", "9", "--steps", "4"]) == 0
    group: Any = zarr.open_group(str(run / "samples.zarr"), mode="r")
    assert group["lengths"][:].max() <= 9
    capsys.readouterr()
    assert cli.run(["infill", str(run), "--text", "a [[]] line", "--steps", "4"]) == 2
    refused = capsys.readouterr().err
    assert "'edit_flow' cannot hold text fixed" in refused
    assert "heuristic" not in refused


def test_with_empty_noise_given_tokens_stay() -> None:
    engine = made("did-tiny", "process.op=edit_flow", "objective={op: edit_flow_loss}")
    rows = engine.sample(4, 8, steps=3, prompt=torch.tensor([[5, -1, 7]]), seed=1)
    for row in rows.tolist():
        kept = [i for i in row if i != 128]
        assert (kept[0], kept[-1]) == (5, 7)
    assert engine.process.caveat is None


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *itertools.product(["did-tiny", "indel-tiny"], ["string_tau", "string_thinning"]),
        *itertools.product(["flexmdm-tiny"], ["flexmdm_tau", "flexmdm_thinning"]),
    ],
)
def test_given_tokens_stay_and_lengths_are_bounded(name: str, sampler: str) -> None:
    engine = made(name, f"sample={{op: {sampler}}}")
    steps = 3 if sampler.endswith("_tau") else None
    prompt = torch.tensor([[5, 6, -1, 7]])
    rows = engine.sample(6, 8, steps=steps, prompt=prompt, seed=1)
    assert torch.equal(rows, engine.sample(6, 8, steps=steps, prompt=prompt, seed=1))
    for row in rows.tolist():
        kept = [i for i in row if i != engine.process.kernel.start]
        assert kept[:2] == [5, 6]
        assert kept[-1] == 7
        assert len(kept) <= 8
    if steps:  # one edit at a time, an untrained network writes until there is no room
        assert len({len([i for i in row if i < 128]) for row in engine.sample(40, 8, steps=steps, seed=2).tolist()}) > 1


def test_one_length_is_kept() -> None:
    engine = made("did-tiny", "objective={op: dice}", "sample={op: string_first_hitting}", "data.rows=stream")
    rows = engine.sample(5, 11, seed=0)
    assert rows.shape == (5, 11)
    assert int(rows.max()) < engine.process.kernel.data_tokens
    assert engine.process.sampler.evaluations == 5 * 11


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_one_length_is_kept_by_few_steps(steps: int) -> None:
    """A step inserts at most one token in each gap: what it leaves out is inserted one at a time."""
    engine = made("did-tiny", "objective={op: dice}", "sample={op: string_tau}", "data.rows=stream")
    rows = engine.sample(5, 11, steps=steps, seed=0)
    assert rows.shape == (5, 11)
    assert int(rows.max()) < engine.process.kernel.data_tokens


def test_a_length_of_0_is_not_taken_for_none() -> None:
    engine = made("did-tiny")
    text = TextWithHoles(prefix="a", length=0)
    letters: Any = SimpleNamespace(encode=lambda part: torch.tensor([ord(c) for c in part]), forbidden=())
    prompt = engine.process.prompt(text, letters, length=9, prompts_trained=False, observed="")
    assert prompt.length == 0
    with pytest.raises(UserError, match="at least 1, not 2 and 0"):
        engine.sample(2, prompt.length, prompt=prompt.tokens, seed=0)


def test_padding_changes_nothing() -> None:
    engine = made("did-tiny")
    tokens = torch.randint(1, 50, (3, 12))
    real = (torch.arange(12) < 7).expand(3, 12)
    short = engine.bound_rows(Batch.of(tokens[:, :7]), seed=3)
    padded = engine.bound_rows(Batch(torch.where(real, tokens, 127), real, real, real), seed=3)
    other = engine.bound_rows(Batch(torch.where(real, tokens, 3), real, real, real), seed=3)
    assert torch.equal(padded, other)
    assert padded.shape == short.shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective={op: dice}"], "strings of one known length"),
        (["process.op=absorb"], "'dise' is of kind string_objective, but must be of kind objective"),
        (["process={op: indel, mean_length: 2, schedule: {op: loglinear}}"], "log_delete"),
        (["sample={op: string_first_hitting}"], "needs an objective for strings of one known length"),
        (["inputs={tokens: int b l, sigma: float b, attend: bool b l, t: float b}"], "input 't' is never read"),
    ],
)
def test_mistakes_are_sentences(overrides: list[str], message: str) -> None:
    with pytest.raises(BlueprintError, match="(?s).*" + message.replace("(", r"\(")):
        made("did-tiny", *overrides)


def test_what_the_engine_cannot_take_is_said() -> None:
    engine = made("indel-tiny")
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    real = torch.ones(2, 4, dtype=torch.bool)
    spared = real.clone()
    spared[:, 0] = False
    with pytest.raises(UserError, match="spares"):
        engine.loss(Batch(tokens, real, spared, spared))
    hole = real.clone()
    hole[:, 1] = False
    with pytest.raises(UserError, match="behind the text"):
        engine.loss(Batch(tokens, hole, hole, hole))
    with pytest.raises(UserError, match="nothing is free"):
        engine.sample(1, 2, prompt=torch.tensor([[1, 2, -1]]))
