"""``export --push`` and ``pull`` against a local stand-in of a model hub, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from tests.runs.exports import SMALL, random_run
from tests.runs.hub_server import Hub

pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")


def command(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``sedd-graph`` with the hub's address and a token of nobody."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_TOKEN": "hf_test"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    program = [sys.executable, "-m", "sedd_graph", *arguments]
    return subprocess.run(program, env=environment, cwd=cache, capture_output=True, text=True)


@pytest.mark.slow
def test_an_export_is_pushed_and_pulled(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", "mdlm-tiny", *SMALL, "params.cond=16")
    with Hub() as hub:
        done = command(hub, tmp_path, "export", str(run.path), "-o", "out", "--push", "me/tiny")
        assert done.returncode == 0, done.stderr
        assert f"pushed      {hub.address}/me/tiny/commit/" in done.stdout
        assert hub.private == {"me/tiny": True}
        files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        hub.repos["me/tiny"].pop(".gitattributes", None)
        assert hub.repos["me/tiny"] == files
        hub.repos["me/tiny"]["pickled.bin"] = b"not downloaded"
        done = command(hub, tmp_path, "pull", "me/tiny", "-o", "back")
        assert done.returncode == 0, done.stderr
        assert "next        sedd-graph sample back" in done.stdout
        assert {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()} == files
        missing = command(hub, tmp_path, "pull", "me/other", "-o", "other")
        assert missing.returncode == 2
        assert "me/other was not read: " in missing.stderr
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_nothing_is_sent_without_the_flag(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", "mdlm-tiny", *SMALL, "params.cond=16")
    with Hub() as hub:
        assert command(hub, tmp_path, "export", str(run.path), "-o", "out").returncode == 0
        assert hub.requests == []


def test_names_of_repositories_are_checked_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(tmp_path), "-o", str(tmp_path / "out"), "--push", "../tiny"]) == 2
    assert "'../tiny' is not a repository of a model hub: give owner/name" in capsys.readouterr().err
    assert cli.run(["pull", "tiny", "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
