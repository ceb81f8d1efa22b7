"""Run folders appear whole or not at all: under kills at every write, failing disks and builds at once."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sedd_graph.blueprint.lock import LOCK
from sedd_graph.data.tokenizer import FILE
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store import manifest
from sedd_graph.store.files import write_text
from sedd_graph.store.manifest import MANIFEST
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
from sedd_graph.store.manifest import MANIFEST
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


def test_an_empty_folder_that_cannot_be_replaced_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "mount", "real", "locked/in"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    write_folder(Path("."), write)
    assert names(Path.cwd()) == FILES  # the folder that this process is in, not one in its place
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", write)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == FILES
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    write_folder(tmp_path / "dangling", write)
    assert names(tmp_path / "new") == FILES
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mount")
    kept = (tmp_path / "mount").stat().st_ino
    write_folder(tmp_path / "mount", write)
    assert names(tmp_path / "mount") == FILES
    assert (tmp_path / "mount").stat().st_ino == kept
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    kept = (tmp_path / "locked" / "in").stat().st_ino
    write_folder(tmp_path / "locked" / "in", write)
    assert names(tmp_path / "locked" / "in") == FILES
    assert (tmp_path / "locked" / "in").stat().st_ino == kept
    for taken in (Path("."), tmp_path / "link", tmp_path / "mount"):
        with pytest.raises(UserError, match="exists and is not empty"):
            write_folder(taken, write)
    with pytest.raises(UserError, match="a exists and is not a folder"):
        write_folder(Path("a"), write)


def test_a_folder_that_could_not_be_filled_is_left_empty_and_its_manifest_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(folder: Path) -> None:
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentFault, match="could not be written"):
        write_folder(Path("."), full)
    assert names(tmp_path) == []
    moved: list[str] = []
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        moved.append(target.name)
        if len(moved) == 5:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    def whole(folder: Path) -> None:
        write(folder)
        write_text(folder / MANIFEST, "{}")
        write_text(folder / "z", "z")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EnvironmentFault, match="could not be written"):
        write_folder(Path("."), whole)
    assert moved[4] == MANIFEST
    assert names(tmp_path) == []
    (tmp_path / ".run.0123abcd.part").mkdir()  # of a process that was killed
    write_folder(Path("."), whole)
    assert names(tmp_path) == sorted([*FILES, MANIFEST, "z"])


def test_the_files_that_weights_depend_on_are_those_that_are_written() -> None:
    assert manifest.BUILT == (LOCK, FILE)
