"""The folder that a run folder records for its data: a project's, or none without being allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import allow_outside
from sedd_graph.runs.project import require_project


def test_a_run_folder_of_others_cannot_name_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, project, other = (tmp_path / name for name in ("here", "project", "other"))
    for folder in (here, project, other):
        folder.mkdir()
    monkeypatch.chdir(here)
    (project / "a.yaml").write_text("# mine\nblueprint: 1\n")
    (other / "a.yaml").write_text("key: value\n")
    for root in (here, here / "gone", project):
        require_project(root, tmp_path / "run")
    for root in (other, tmp_path, Path("/etc"), Path("/")):
        with pytest.raises(UserError, match=r"which is no project's folder: .* --allow-outside"):
            require_project(root, tmp_path / "run")
        with allow_outside():
            require_project(root, tmp_path / "run")
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="no project's folder"):
        require_project(Path("/etc"), tmp_path / "run")
