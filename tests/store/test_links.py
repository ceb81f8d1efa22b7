"""Links in a run folder of others: nothing outside the run folder is written or deleted through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sedd_graph_registry.training.trackers import TensorBoard, Wandb

from sedd_graph.errors import UserError
from sedd_graph.inputs.confine import allow_outside
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.files import alone
from sedd_graph.store.json_lines import JsonLines
from sedd_graph.training.checkpoint import sweep_checkpoints

TAP = TapSpec("trunk/0/x", 1, "float32", None, 2)


def lines(run: Path) -> None:
    JsonLines(run / "metrics.jsonl").close()


def lock(run: Path) -> None:
    with alone(run, "training"):
        pass


def checkpoints(run: Path) -> None:
    sweep_checkpoints(run / "checkpoints")


def activations(run: Path) -> None:
    Activations(run / "activations.zarr", [TAP], resume_step=0).close()


def tensorboard(run: Path) -> None:
    tracker = TensorBoard(TensorBoard.Config())
    tracker.start(run, "name")
    tracker.close()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("name", "target", "write"),
    [
        ("metrics.jsonl", "notes", lines),
        ("metrics.jsonl", "new", lines),
        (".lock", "notes", lock),
        (".lock", "new", lock),
        ("checkpoints", "folder", checkpoints),
        ("tensorboard", "folder", tensorboard),
        ("activations.zarr", "folder", activations),
        ("activations.zarr/trunk", "folder", activations),
        ("activations.zarr/trunk/0/x/value", "folder", activations),
    ],
)
def test_a_link_out_of_the_run_folder_is_refused_unless_allowed(
    name: str, target: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / name).parent.mkdir(parents=True)
    (other / "folder" / ".step-1.part").mkdir(parents=True)
    (other / "folder" / "0" / "x" / "value").mkdir(parents=True)
    (other / "folder" / "a.partial").write_bytes(b"kept")
    (other / "notes").write_bytes(b"no line, and kept")
    (run / name).symlink_to(other / target)
    before = tree(other)
    with pytest.raises(UserError, match=rf"run/{name} leads to .*/other/{target}, outside the run .* --allow-outside"):
        write(run)
    assert tree(other) == before
    with allow_outside():
        if write is tensorboard:
            pytest.importorskip("tensorboard")
        write(run)


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_wandb_writes_through_no_link(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside the run folder"):
        Wandb(Wandb.Config()).start(tmp_path / "run", "name")


def test_links_within_the_run_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "run" / "records").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("records/metrics.jsonl")
    (tmp_path / "run" / "activations.zarr").symlink_to("records")
    log = JsonLines(tmp_path / "link" / "metrics.jsonl")
    log.append({"step": 1})
    log.close()
    with alone(tmp_path / "link", "training"):
        store = Activations(tmp_path / "link" / "activations.zarr", [TAP])
        store.put("trunk/0/x", 1, np.ones((1, 2), np.float32))
        store.close()
    assert (tmp_path / "run" / "records" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "run" / "records" / "trunk" / "0" / "x" / "value").is_dir()
