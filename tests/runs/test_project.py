"""The folder that a run folder records for its data: a project's, or none without being allowed."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import allow_outside
from sedd_graph.runs.check import check
from sedd_graph.runs.graph_files import write_graph
from sedd_graph.runs.open import open_run
from sedd_graph.runs.project import require_project
from tests.conftest import SMALL


def test_a_run_folder_of_others_cannot_name_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, project, other = (tmp_path / name for name in ("here", "project", "other"))
    for folder in (here, project, other):
        folder.mkdir()
    monkeypatch.chdir(here)
    (project / "a.yaml").write_text("# mine\nblueprint: 1\n")
    (other / "a.yaml").write_text("key: value\n")
    for root in (here, here / "gone", project):
        assert require_project(root, tmp_path / "run") == root
    (other / "file").write_text("secret")
    for root in (other, tmp_path, Path("/etc"), Path("/"), Path("/x/.."), tmp_path / "x" / "..", other / "file"):
        with pytest.raises(UserError, match=r"which is no project's folder: .* --allow-outside"):
            require_project(root, tmp_path / "run")
        with allow_outside():
            require_project(root, tmp_path / "run")
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="no project's folder"):
        require_project(Path("/etc"), tmp_path / "run")
    with pytest.raises(UserError, match=r"'a.x00b', which is no path of a folder"):
        require_project(Path("a\0b"), tmp_path / "run")


def test_the_real_path_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert require_project(tmp_path / "x" / "..", tmp_path / "run") == tmp_path
    with allow_outside():
        assert require_project(Path("/x/.."), tmp_path / "run") == Path("/")


def test_a_blueprint_may_start_with_a_byte_order_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a.yaml").write_bytes(codecs.BOM_UTF8 + b"blueprint: 1\n")
    assert require_project(tmp_path, tmp_path / "run") == tmp_path


@pytest.mark.parametrize("ending", ["", "/", "/x/.."])
def test_a_folder_that_the_user_names_is_read_though_the_run_folder_records_it(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, data, run = (tmp_path / name for name in ("here", "data", "run"))
    for folder in (here, data, run):
        folder.mkdir()
    monkeypatch.chdir(here)
    (here / "a.yaml").write_text(SMALL)
    write_graph(run, check(here / "a.yaml"))
    (run / "run.json").write_text(json.dumps({"root": f"{data}{ending}"}))
    with pytest.raises(UserError, match="which is no project's folder"):
        open_run(run, device="cpu").data_root()
    assert open_run(run, device="cpu", root=data).data_root() == data
