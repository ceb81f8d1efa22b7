"""``sedd-graph import``: a next step that works, and weights of the wrong kind refused with the right word."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.runs.import_weights import import_weights
from tests.conftest import PARITY


def weights(file: str) -> dict[str, torch.Tensor]:
    """The network of a reference file, under the names of the released code."""
    found = load_file(PARITY / f"{file}.safetensors")
    return {k.removeprefix("weights."): v for k, v in found.items() if k.startswith("weights.")}


@pytest.mark.parametrize("tokenizer", [False, True])
def test_the_next_step_works(tmp_path: Path, tokenizer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights("mdlm_subs"), tmp_path / "model.safetensors")
    own = json.dumps({"kind": "characters", "alphabet": "abcdefghijklmnopqrstuvwxy", "size": 27})
    if tokenizer:
        (tmp_path / "tokenizer.json").write_text(own)
    run = tmp_path / "run"
    assert cli.run(["import", "mdlm", str(tmp_path), "-o", str(run)]) == 0
    said = capsys.readouterr().out
    assert (run / "tokenizer.json").is_file() == tokenizer
    if not tokenizer:
        assert said.endswith(
            f"next        copy the tokenizer of the weights, a tokenizer.json (released weights have GPT-2's), "
            f"into {run}, then sedd-graph sample {run}\n"
        )
        (run / "tokenizer.json").write_text(own)
    (command,) = re.findall(r"sedd-graph (sample .*)\n", said)
    assert cli.run([*command.split(), "--device", "cpu", "--length", "8", "--steps", "2"]) == 0


@pytest.mark.parametrize(
    ("said", "file", "found", "names"),
    [
        ("mdlm", "sedd_absorb", "sedd", "do not begin with 'backbone.'"),
        ("mdlm", "sedd_uniform", "sedd", "do not begin with 'backbone.'"),
        ("sedd", "mdlm_subs", "mdlm", "begin with 'backbone.'"),
    ],
)
def test_weights_of_the_other_kind_are_refused(
    tmp_path: Path, said: str, file: str, found: str, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights(file), path)
    assert cli.run(["import", said, str(path), "--kernel", "absorb", "-o", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"{path} holds {found.upper()} weights, not {said.upper()} weights: its tensor names {names}; "
        f"say `sedd-graph import {found}`\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_backbone_may_be_a_container(tmp_path: Path) -> None:
    """Names may begin with "backbone." or lie in a mapping of that name, under other containers and prefixes."""
    plain = {k.removeprefix("backbone."): v for k, v in weights("mdlm_subs").items()}
    for number, data in enumerate(
        (
            {"state_dict": weights("mdlm_subs")},
            {"backbone": plain, "step": 3},
            {"model": {f"module.backbone.{k}": v for k, v in plain.items()}},
        )
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(data, path)
        assert import_weights("mdlm", path).weights.keys() == import_weights("mdlm", tmp_path / "0.pth").weights.keys()
        with pytest.raises(UserError, match="holds MDLM weights, not SEDD weights"):
            import_weights("sedd", path, kernel="absorb")


def test_an_output_folder_that_is_not_empty_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(PARITY / "mdlm_subs.safetensors", tmp_path / "w.safetensors")
    assert cli.run(["import", "mdlm", str(tmp_path / "w.safetensors"), "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path} exists and is not empty\n"
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_output_folder_may_be_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(weights("mdlm_subs"), tmp_path / "w.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.run(["import", "mdlm", str(tmp_path / "w.safetensors"), "-o", "."]) == 0
    assert (Path.cwd() / "manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "w.safetensors"]


def test_duo_predicts_clean_tokens_under_uniform_noise(tmp_path: Path) -> None:
    """The network is that of SEDD: differences of log-probabilities are those of the public code's log-scores."""
    reference = load_file(PARITY / "sedd_uniform.safetensors")
    save_file({f"backbone.{k}": v for k, v in weights("sedd_uniform").items()}, tmp_path / "model.safetensors")
    assert cli.run(["import", "duo", str(tmp_path), "-o", str(tmp_path / "run")]) == 0
    engine = sedd_graph.build(tmp_path / "run", device="cpu", compile="off")
    engine.model.eval()
    with torch.no_grad():
        found = engine.model(tokens=reference["xt"], sigma=reference["sigma"])["log_x0"]
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(found.shape[:2]))
    expected = reference["log_score"]
    other = torch.nn.functional.one_hot(reference["xt"], found.shape[-1]) == 0
    gap = (found - expected).masked_select(other).view(*found.shape[:2], -1)
    assert float((gap - gap[..., :1]).abs().max()) < 1e-4
