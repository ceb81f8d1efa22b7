"""Copies of a checkpoint's tensors: of one step, made while the next step begins, in memory that is used again."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.store.manifest import read_manifest
from sedd_graph.training import staging
from sedd_graph.training.checkpoint import State, Window, checkpoints
from sedd_graph.training.checkpoint_reader import stored
from sedd_graph.training.checkpoint_writer import CheckpointWriter
from sedd_graph.training.distributed import World
from sedd_graph.training.staging import Shard, Staging, Transfer

CPU = ["--device", "cpu"]


def state(step: int) -> State:
    return State(step=step, seconds=0.0, average_count=0, world=1, window=Window(), train={})


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is copied by the thread, which takes longer than a step."""
    copy = staging._copy_bytes

    def slow(source: Tensor, target: Tensor) -> None:
        time.sleep(0.005)
        copy(source, target)

    monkeypatch.setattr(staging, "_SMALL", 0)
    monkeypatch.setattr(staging, "_copy_bytes", slow)


def test_copies_are_exact_and_of_one_moment(slow_copies: None) -> None:
    """Of all dtypes and layouts; also if the tensors are changed as soon as the wait has ended."""
    tensors = {
        "float": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).T,
        "bfloat16": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    transfer = Staging().begin({"model": tensors}, Shard(0, 1), at_once=("scalar",))
    tensors["scalar"].zero_()
    thread = threading.Thread(target=transfer.copy)
    thread.start()
    assert transfer.wait() is None
    for tensor in tensors.values():
        tensor.zero_()
    thread.join()
    copied = transfer.kinds["model"].tensors
    assert copied.keys() == before.keys()
    for name, tensor in before.items():
        assert copied[name].dtype == tensor.dtype
        assert torch.equal(copied[name], tensor), name
        assert copied[name].is_contiguous()


def test_memory_is_that_of_the_tensors_and_used_again() -> None:
    def begin(tensors: dict[str, Tensor]) -> Transfer:
        transfer = memory.begin({"model": tensors}, Shard(0, 1))
        transfer.copy()
        return transfer

    memory, tensors = Staging(), {f"w{i}": torch.randn(100, 7) for i in range(9)}
    first = begin(tensors).kinds["model"].tensors
    storage = first["w0"].untyped_storage()
    assert {t.untyped_storage().data_ptr() for t in first.values()} == {storage.data_ptr()}
    assert storage.nbytes() <= 1.2 * sum(t.nbytes for t in tensors.values())
    again = begin({name: tensor + 1 for name, tensor in tensors.items()}).kinds["model"].tensors
    assert {name: t.data_ptr() for name, t in again.items()} == {name: t.data_ptr() for name, t in first.items()}
    assert all(torch.equal(again[name], tensor + 1) for name, tensor in tensors.items())
    assert torch.equal(begin({"other": torch.ones(2)}).kinds["model"].tensors["other"], torch.ones(2))


def test_a_forward_pass_that_changes_large_weights_makes_no_checkpoint(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, World.single(), Shard(0, 1), keep=9)
    large, small = torch.zeros(600, 600), torch.zeros(3)
    for step in (1, 2):
        writer.begin({"model": {"large": large, "small": small}}, state(step))
        small.add_(1)
        if step == 2:
            large.add_(1)
        writer.wait_for_copy()
        large.add_(1)
        if step == 1:
            writer.finish()
    with pytest.raises(UserError, match="the forward pass has changed 'large' while a checkpoint was made"):
        writer.finish()
    found = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    tensors = stored(found[0], "model", read_manifest(found[0])).tensors()
    assert torch.equal(tensors["large"], torch.zeros(600, 600))
    assert torch.equal(tensors["small"], torch.zeros(3))


def test_a_checkpoint_is_published_by_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loop does not wait for the disk: it is told when there is nothing left to wait for."""
    release, publish = threading.Event(), CheckpointWriter._publish

    def held(self: CheckpointWriter, *arguments: object) -> None:
        release.wait(60)
        publish(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "_publish", held)
    writer = CheckpointWriter(tmp_path, World.single(), Shard(0, 1), keep=1)
    writer.begin({"model": {"w": torch.ones(3)}}, state(1))
    while writer.writing:
        time.sleep(0.001)
    writer.advance()
    assert writer.writing
    assert writer.pending
    assert checkpoints(tmp_path / "checkpoints") == []
    release.set()
    while writer.writing:
        time.sleep(0.001)
    writer.advance()
    assert not writer.pending
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_checkpoints_during_training_are_those_of_their_steps(
    small: Callable[..., Path], tmp_path: Path, slow_copies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with a checkpoint of each step against one that waits for each: the same files."""
    path = small(("{every: 3}", "{every: 1, keep: 9}"))
    where = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "at"), *CPU]
    assert cli.run(["build", str(path), "--proof", "quick", *where]) == 0
    run = Path((tmp_path / "at").read_text())
    plain = shutil.copytree(run, tmp_path / "plain")
    assert cli.run(["train", str(run), *CPU]) == 0
    monkeypatch.setattr(staging, "_SMALL", 2**20)
    assert cli.run(["train", str(plain), *CPU]) == 0
    found = checkpoints(run / "checkpoints")
    assert [path.name for path in found] == [f"step-0000000{step}" for step in range(1, 7)]
    for path in found:
        other = plain / "checkpoints" / path.name
        assert {p.name for p in path.glob("*.safetensors")} == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}  # fmt: skip
        for file in path.glob("*.safetensors"):
            assert file.read_bytes() == (other / file.name).read_bytes()
