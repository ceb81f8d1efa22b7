"""A shipped blueprint is copied, or built by its name, from any folder."""

import shutil
from pathlib import Path

import pytest

import sedd_graph
from sedd_graph.cli import main as cli
from tests.conftest import BLUEPRINTS, ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_init_lists_what_is_shipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == sorted(path.stem for path in BLUEPRINTS)
    first = next(line for line in lines if line.startswith("first "))
    assert first.endswith("A masked diffusion model of byte pairs, trained on the documentation that CPython carries.")
    assert lines[-1] == "next        sedd-graph init NAME"
    assert listing(folder) == []


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("first", ["blocks/modern.yaml", "first.yaml"]),
        ("sedd-reversible-tiny", ["blocks/dit.yaml", "blocks/reversible.yaml", "sedd-reversible-tiny.yaml"]),
        ("flow-tiny", ["flow-tiny.yaml"]),
    ],
)
def test_init_copies_a_blueprint_that_checks(
    folder: Path, name: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init", name]) == 0
    assert listing(folder) == files
    assert capsys.readouterr().out.endswith(f"next        sedd-graph build {name}.yaml\n")
    for file in files:  # as shipped, without the comment that names a schema which is not here
        assert (ROOT / "blueprints" / file).read_text().removesuffix((folder / file).read_text()).count("\n") <= 1
        assert "schema=" not in (folder / file).read_text()
    assert str(sedd_graph.check(f"{name}.yaml")) == str(sedd_graph.check(ROOT / "blueprints" / f"{name}.yaml"))


def test_init_overwrites_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "sedd-tiny"]) == 0
    assert cli.run(["init", "sedd-uniform-tiny"]) == 0  # with the same blocks
    (folder / "sedd-tiny.yaml").write_text("mine")
    assert cli.run(["init", "sedd-tiny"]) == 2
    assert capsys.readouterr().err == "sedd-tiny.yaml exists already; move it away, or choose another folder\n"
    (folder / "blocks" / "dit.yaml").write_text("mine")
    assert cli.run(["init", "mdlm-tiny"]) == 2
    assert capsys.readouterr().err.startswith("blocks/dit.yaml exists already")
    assert (folder / "sedd-tiny.yaml").read_text() == (folder / "blocks" / "dit.yaml").read_text() == "mine"
    assert not (folder / "mdlm-tiny.yaml").exists()
    assert cli.run(["init", "frist"]) == 2
    said = "no shipped blueprint 'frist' (did you mean 'first'?); `sedd-graph init` lists them\n"
    assert capsys.readouterr().err == said
    assert cli.run(["init", "../first"]) == 2
    assert capsys.readouterr().err.startswith("no shipped blueprint '../first'")


def test_verbs_find_a_shipped_blueprint_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", "first", "--check"]) == 0
    expected = str(sedd_graph.check(ROOT / "blueprints" / "first.yaml"))
    assert capsys.readouterr().out == expected + "\n"
    assert str(sedd_graph.check("first")) == expected
    assert cli.run(["show", "first"]) == 0
    assert "layer x 4" in capsys.readouterr().out
    small = ["params.dim=16", "params.depth=1", "data.length=16", "train.batch=2", "train.steps=2", "train.budget_s=null", "train.evaluate=null"]  # fmt: skip
    assert cli.run(["build", "first", *small, "--device", "cpu", "--compile", "off"]) == 0
    (run,) = (folder / "runs" / "first").iterdir()
    assert (run / "blueprint.yaml").read_text() == (ROOT / "blueprints" / "first.yaml").read_text()
    assert cli.run(["train", "first", *small, "train.compile='off'", "--device", "cpu"]) == 0
    assert len(list((folder / "runs" / "first").iterdir())) == 2
    assert {p.name for p in folder.iterdir()} == {"runs"}


def test_a_file_or_folder_comes_before_a_shipped_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "blueprints" / "flow-tiny.yaml", folder / "first")
    assert cli.run(["show", "first"]) == 0
    assert "layer x 4" not in capsys.readouterr().out
    for words, said in (
        (["build", "frist", "--check"], "frist: neither a file nor a shipped blueprint (did you mean 'first'?)\n"),
        (["show", "frist"], "frist: neither a file nor a shipped blueprint (did you mean 'first'?)\n"),
        (["train", "frist"], "frist: neither a file nor a shipped blueprint (did you mean 'first'?)\n"),
        (["build", "elsewhere/first", "--check"], "elsewhere/first: no such file\n"),
        (["build", "frist.yaml", "--check"], "frist.yaml: no such file\n"),
    ):
        assert cli.run(words) == 2
        assert capsys.readouterr().err == said
