"""Nothing is lost or torn: kills, full disks, readers while the run goes on."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from sedd_graph.errors import EnvironmentFault
from sedd_graph.store.arrays import Activations, TapSpec, write_samples
from sedd_graph.store.files import JsonLines, new_run, write_text
from sedd_graph.store.writer import Writer

TAP = TapSpec("trunk/0/x", 1, "float32", None, 2)


def test_the_writer_keeps_order_and_raises_the_faults_of_its_thread() -> None:
    seen: list[int] = []
    with Writer(depth=2) as writer:
        for number in range(50):
            writer.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert seen == list(range(50))
    writer = Writer()

    def full() -> None:
        raise OSError(errno.ENOSPC, "no space")

    writer.put(full)
    with pytest.raises(OSError, match="no space"):
        writer.flush()
    with pytest.raises(OSError, match="no space"):
        writer.close()


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_killed_run_leaves_whole_records(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from sedd_graph.store.arrays import *\n"
        "a = Activations(Path(sys.argv[1]), [TapSpec('trunk/0/x', 1, 'float32', None, 2)])\n"
        "step = 0\n"
        "while True:\n step += 1; a.put('trunk/0/x', step, np.full((4, 3), step, dtype='float32'))\n if step == 40: print('go', flush=True)\n"
    )
    path = tmp_path / "activations.zarr"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    steps = np.asarray(zarr.open_group(str(path), mode="r")["trunk/0/x/step"])
    values = np.asarray(zarr.open_group(str(path), mode="r")["trunk/0/x/value"])[: len(steps)]
    whole = steps[steps > 0]
    assert np.array_equal(whole, np.arange(1, len(whole) + 1))
    assert all((values[i] == s).all() for i, s in enumerate(whole))
    again = Activations(path, [TAP], resume_step=4)
    again.put("trunk/0/x", 5, np.zeros((4, 3)))
    again.close()
    assert np.asarray(zarr.open_group(str(path), mode="r")["trunk/0/x/step"]).tolist() == list(range(1, 6))


def test_samples_are_never_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        write_samples(
            tmp_path / "samples.zarr", np.zeros((2, 3), np.int64), ["a", "\N{SNOWMAN}"], attributes={"seed": 1}
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples-2.zarr", "samples.zarr"]
    group = zarr.open_group(str(tmp_path / "samples.zarr"), mode="r")
    assert list(np.asarray(group["text"])) == ["a", "\N{SNOWMAN}"]


def test_runs_started_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(new_run(tmp_path, "x", "abcdef0123"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    lines = JsonLines(path)
    lines.append({"step": 2})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
