"""``eval --samples`` on a run folder: its numbers again by hand from what lies there, its record, its page, what it refuses."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sedd_graph.cli import main as cli
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.engine.hardware import pick_device
from sedd_graph.runs.open import open_run
from sedd_graph.store.arrays import write_samples
from tests.conftest import SMALL
from tests.evaluation.judges import bigram

CPU = ["--device", "cpu"]


def built(folder: Path, text: str = SMALL) -> Path:
    """A run folder with six samples of an untrained network."""
    (folder / "small.yaml").write_text(text)
    where = folder / "run.txt"
    arguments = ["build", str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(where), *CPU]
    assert cli.run(arguments) == 0
    return Path(where.read_text())


def sampled(run: Path, *more: str) -> None:
    assert cli.run(["sample", str(run), "--batch", "6", "--weights", "fresh", *more, *CPU]) == 0


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quality.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = built(tmp_path_factory.mktemp("run"))
    sampled(run)
    return run


def test_with_a_judge(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    tokenizer = load_tokenizer(run)
    law = bigram(tmp_path / "law", tokenizer.decode(range(tokenizer.size)), window=24)
    before = len(records(run)) if (run / "quality.jsonl").exists() else 0
    capsys.readouterr()
    assert cli.run(["eval", str(run), "--samples", "--judge", str(tmp_path / "law"), *CPU]) == 0
    said = capsys.readouterr().out
    *_, record = records(run)
    assert len(records(run)) == before + 1
    texts = np.asarray(zarr.open_array(run / "samples.zarr" / "text", mode="r")[:]).tolist()
    data = open_run(run, device=pick_device("cpu"), compile="off", weights="fresh").data()
    assert isinstance(data, Dataset)
    held = data.heldout
    chosen = np.linspace(0, held.count - 1, 12).astype(int)[::2]
    reference = [tokenizer.decode(row) for row in held.take(chosen, 0).tokens.tolist()]
    for side, rows in (("samples", texts), ("reference", reference)):
        hand = [law.nats([row], 24) for row in rows]
        nats, count, windows = (sum(values) for values in zip(*hand, strict=True))
        assert record[side]["generative_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
        assert record[side]["judge_tokens"] == count
        assert record[side]["judge_windows"] == windows == 12  # 32 letters in windows of 23
        assert record[side]["rows"] == 6
        # a letter is a token of either tokenizer
        assert record[side]["judge_entropy"] == pytest.approx(record[side]["entropy"])
        assert 0 <= record[side]["rep_2"] < record[side]["distinct_2"] < 1
    assert record["judge"]["name"] == "law"
    assert len(record["judge"]["sha256"]) == 64
    protocol = record["protocol"]
    assert protocol["length"] == 32
    assert (protocol["sampling"]["sampler"], protocol["sampling"]["steps"]) == ("ancestral.v1", 8)
    assert {"seed", "weights", "revision"} <= protocol["sampling"].keys()
    perplexity, error = (record["samples"]["generative_perplexity" + end] for end in ("", "_standard_error"))
    assert f"generative perplexity                         {perplexity:.2f} +- {error:.2f}" in said
    assert "windows of 24 tokens, every token counts" in said
    page = (run / "report.html").read_text()
    assert "<h2>Quality of samples</h2>" in page
    assert f"{perplexity:.2f} ± {error:.2f}" in page


def test_without_a_judge(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.run(["eval", str(run), "--samples", str(run / "samples.zarr"), *CPU]) == 0
    *_, record = records(run)
    assert record["judge"] is None
    assert "generative_perplexity" not in record["samples"]
    assert record["samples"]["entropy"] > record["reference"]["entropy"] > 0  # untrained: every letter alike
    said = capsys.readouterr().out
    assert "perplexity" not in said
    data = open_run(run, device=pick_device("cpu"), compile="off", weights="fresh").data()
    assert isinstance(data, Dataset)
    training = data.tokenizer.decode(data.train.take(np.arange(data.train.count), 0).tokens.ravel()).lower()
    known = {"".join(run) for letters, run in itertools.groupby(training, str.isalpha) if letters}
    words = 0
    right = 0
    for text in np.asarray(zarr.open_array(run / "samples.zarr" / "text", mode="r")[:]).tolist():
        groups = ["".join(run) for _, run in itertools.groupby(text.lower(), str.isalpha)]
        inner = [group for group in groups[1:-1] if group[0].isalpha()]
        words, right = words + len(inner), right + sum(word in known for word in inner)
    assert record["samples"]["known_words"] == pytest.approx(right / words)
    assert record["samples"]["known_words"] < record["reference"]["known_words"]
    assert f"words that occur in the training text         {right / words:.4f} +- " in said


def test_samples_are_named_within_the_run_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["eval", str(run), "--samples", "samples.zarr", *CPU]) == 0
    assert records(run)[-1]["store"] == "samples.zarr"
    assert cli.run(["eval", str(run), "--samples", "samples-9.zarr", *CPU]) == 2
    assert capsys.readouterr().err == "samples-9.zarr is not a zarr group of samples\n"


def test_lengths_of_their_own(run: Path) -> None:
    """Held-out rows are as long as the samples, whatever the data says."""
    sampled(run, "--length", "48")
    assert cli.run(["eval", str(run), "--samples", *CPU]) == 0
    *_, record = records(run)
    assert record["store"] == "samples-2.zarr"
    assert [record[side]["characters_per_row"] for side in ("samples", "reference")] == [48, 48]
    (run / "samples-2.zarr").rename(run / "elsewhere.zarr")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "--batches", "2"], "are for the bound"),
        (["--samples", "--draws", "2"], "are for the bound"),
        (["--mauve"], "give --judge FOLDER"),
        (["--judge", "nowhere"], "judge nowhere is neither a folder nor a .gguf file"),
        (["--samples", "nowhere.zarr"], "nowhere.zarr is not a zarr group of samples"),
    ],
)
def test_refusals(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", str(run), *arguments, *CPU]) == 2
    assert message in capsys.readouterr().err


def test_samples_that_are_not_there_or_not_its_own(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = built(tmp_path)
    assert cli.run(["eval", str(run), "--samples", *CPU]) == 2
    assert "holds no samples; draw some: sedd-graph sample" in capsys.readouterr().err
    write_samples(
        run / "samples.zarr",
        {"tokens": np.ones((2, 5), np.int64)},
        text=["a", "b"],
        attributes={"blueprint": "another"},
    )
    assert cli.run(["eval", str(run), "--samples", *CPU]) == 2
    assert "its tokens are those of another blueprint" in capsys.readouterr().err
    assert not (run / "quality.jsonl").exists()


def test_held_out_text_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The samples are judged all the same, and it is said why nothing stands beside them."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 200)
    run = built(tmp_path, SMALL.replace("data: {", "data: {corpus: {op: text, files: [text.txt]}, "))
    sampled(run)
    for change, reason in (
        (lambda: text.write_text("something else " * 500), "has changed"),
        (text.unlink, "text.txt"),
    ):
        change()
        capsys.readouterr()
        assert cli.run(["eval", str(run), "--samples", *CPU]) == 0
        said = capsys.readouterr().out
        assert "warning     no held-out text beside the samples: " in said
        assert reason in said
        *_, record = records(run)
        assert record["reference"] is None
        assert record["protocol"]["reference"] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # faiss, of its own bindings
def test_mauve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    pytest.importorskip("mauve", reason="the extra 'mauve' is not installed")
    import torch

    run = built(tmp_path)
    assert cli.run(["sample", str(run), "--batch", "60", "--weights", "fresh", *CPU]) == 0
    judge = tmp_path / "judge"
    tokenizer = load_tokenizer(run)
    law = bigram(judge, tokenizer.decode(range(tokenizer.size)))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(law.ids), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(judge)
    capsys.readouterr()
    assert cli.run(["eval", str(run), "--judge", str(judge), "--mauve", *CPU]) == 0
    said = capsys.readouterr().out
    assert "MAUVE of 60 samples has a large bias and variance; 1,000 or more are needed" in said
    *_, record = records(run)
    scores = {side: record[side]["mauve"] for side in ("samples", "reference")}
    assert (
        0 < scores["samples"] < scores["reference"] <= 1
    )  # noise is less like held-out text than other held-out text is
    assert record["protocol"]["mauve"] == {"scaling": 5, "seed": 25, "features": "last hidden state"}


def test_the_settings_are_those_that_the_samples_were_drawn_with(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled(run, "--temperature", "0.5", "--set", "top_p=0.75")
    capsys.readouterr()
    assert cli.run(["eval", str(run), "--samples", "samples-2.zarr", *CPU]) == 0
    assert "temperature 0.5, top-p 0.75" in capsys.readouterr().out
    told = records(run)[-1]["protocol"]["sampling"]
    assert (told["temperature"], told["top_p"]) == (0.5, 0.75)
