"""Run folders appear whole or not at all: under kills at every write, failing disks and builds at once."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.files import write_text
from sedd_graph.store.run_folder import new_run, write_folder

FILES = ["a", "b", "c"]


def write(folder: Path) -> None:
    for name in FILES:
        write_text(folder / name, name)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_runs_started_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(new_run(tmp_path, "x", "abcdef0123", write))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert sorted(found) == sorted((tmp_path / "x").iterdir())  # and nothing temporary
    assert all(names(run) == FILES for run in found)


KILLED = """
import os, sys
from pathlib import Path
from sedd_graph.store.run_folder import new_run
from sedd_graph.store.files import write_text

def write(folder, count):
    for name in ["a", "b", "c"][:count]:
        write_text(folder / name, name)
    if count < 4:
        os._exit(9)  # as by kill -9: nothing is cleaned up

for count in range(4):
    if (child := os.fork()) == 0:
        new_run(Path(sys.argv[1]), "x", "abcdef0123", lambda folder: write(folder, count))
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(os.name != "posix", reason="fork and folder locks are POSIX")
def test_a_killed_build_leaves_no_run_and_the_next_one_sweeps(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    left = names(tmp_path / "x")
    assert left
    assert all(name.startswith(".") and name.endswith(".part") for name in left)
    (tmp_path / "x" / ".notes.part").mkdir()  # none of ours
    run = new_run(tmp_path, "x", "fedcba9876", write)
    assert names(tmp_path / "x") == [".notes.part", run.name]
    assert names(run) == FILES


def test_a_build_that_is_alive_is_not_swept(tmp_path: Path) -> None:
    outer: list[Path] = []

    def slow(folder: Path) -> None:
        outer.append(new_run(tmp_path, "x", "abcdef0123", write))
        write(folder)

    run = new_run(tmp_path, "x", "abcdef0123", slow)
    assert names(tmp_path / "x") == sorted([run.name, outer[0].name])
    assert names(run) == names(outer[0]) == FILES


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        write_text(folder / "a", "a")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentFault, match="could not be written"):
        new_run(tmp_path, "x", "abcdef0123", full)
    assert names(tmp_path / "x") == []


def test_a_named_folder_must_be_empty(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(target, write)
    assert names(target) == FILES
    with pytest.raises(UserError, match="exists and is not empty"):
        write_folder(target, write)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", write)
    assert names(tmp_path) == ["empty", "out"]
    assert names(tmp_path / "empty") == FILES
