"""Several processes: replicas and shards see the losses of one process, and checkpoints fit any number of processes."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from sedd_graph.errors import UserError
from sedd_graph.runs.open import open_run
from sedd_graph.store.manifest import MANIFEST, DamagedError, read_manifest
from sedd_graph.training.checkpoint import AVERAGE, MODEL, OPTIMIZER
from sedd_graph.training.checkpoint_reader import Stored, stored
from sedd_graph.training.checkpoint_writer import write_tensors
from sedd_graph.training.config import ParallelConfig
from sedd_graph.training.parallel import sizes
from sedd_graph.training.staging import Copied
from tests.conftest import SMALL
from tests.runs.forked import Forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
CPU = ["--device", "cpu"]
QUICK = ["--proof", "quick", "--compile", "off", *CPU]
SETTINGS = "train={steps: 6, batch: 8, accumulate: 2, warmup: 1, compile: 'off', optimizer: {op: muon, lr: 0.02}, parallel: {shard: null}}"

ADAPTED = "train.adapters=[{op: lora, weights: [trunk.*.mlp], rank: 2}]"


def run_in_fork(folder: Path, *arguments: str) -> None:
    """Run a command in a fork, since a process that has computed cannot be forked (threads of its libraries)."""
    made = Forked(arguments, folder / "log")
    assert made.wait() == 0, made.text()


def build(folder: Path, *changes: str) -> Path:
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    where = ["--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    run_in_fork(folder, "build", str(folder / "small.yaml"), *QUICK, *where, *changes)
    return Path((folder / "at").read_text())


def processes(run: Path, count: int, *arguments: str) -> list[Forked]:
    """Train by several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    command = ["train", str(run), *CPU, *arguments]
    return [Forked(command, run.with_name(f"log{rank}"), {**shared, "RANK": str(rank)}) for rank in range(count)]


def train(run: Path, count: int, *arguments: str) -> None:
    ranks = processes(run, count, *arguments)
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * count, "\n".join(rank.text() for rank in ranks)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def whole(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}"
    return stored(path, kind, read_manifest(path)).tensors()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with checkpoints at three and six steps."""
    run = build(tmp_path_factory.mktemp("one") / "run", SETTINGS)
    run_in_fork(run.parent, "train", str(run), *CPU)
    return run


def cut(run: Path, target: Path) -> Path:
    """A copy of a run as after a kill behind step 3."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    return target


def test_shards_are_one_model(one: Path, tmp_path: Path) -> None:
    """Two processes resume from one; their shards have its losses, and are read whole, by torch too, and by one process."""
    two = cut(one, tmp_path / "two")
    train(two, 2, "--resume", "auto")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    path = two / "checkpoints" / "step-00000006"
    names = {f"{kind}-0000{n}-of-00002.safetensors" for kind in (MODEL, AVERAGE, OPTIMIZER) for n in (1, 2)}
    assert set(read_manifest(path).files) == {*names, "state.json"}
    for kind in (MODEL, AVERAGE, OPTIMIZER):
        ours, theirs = whole(two, 6, kind), whole(one, 6, kind)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    opened = open_run(two, device="cpu", compile="off")
    assert opened.weights == "checkpoints/step-00000006/ema-*-of-00002.safetensors"
    assert all(torch.equal(p, whole(two, 6, AVERAGE)[n]) for n, p in opened.engine.model.named_parameters())
    only = tmp_path / "model"
    only.mkdir()
    for name in sorted(names):
        if name.startswith(MODEL):
            shutil.copy(path / name, only)
    seen = HuggingFaceStorageReader(str(only)).read_metadata().state_dict_metadata
    assert {name: tuple(v.size) for name, v in seen.items()} == {n: tuple(v.shape) for n, v in whole(two, 6, MODEL).items()}  # fmt: skip


@pytest.mark.parametrize(("op", "equal"), [("consistency", 3), ("idlm", 1)])
def test_replicas_train_one_student(op: str, equal: int, one: Path, tmp_path: Path) -> None:
    """Two processes resume a distillation from one, and change its teacher. ``idlm`` has the baseline of a process's own rows."""
    rounds = ["distill.rounds=2"] if op == "consistency" else []
    changes = [f"distill.op={op}", *rounds, "train.steps=4", "train.parallel.shard=1", "train.checkpoint={every: 1, keep: 9}"]  # fmt: skip
    where = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "at"), *CPU]
    run_in_fork(tmp_path, "distill", str(one), *changes, *where)
    run = Path((tmp_path / "at").read_text())
    two = tmp_path / "two"
    shutil.copytree(run, two)
    for step in (2, 3, 4):
        shutil.rmtree(two / "checkpoints" / f"step-{step:08d}")
    train(two, 2, "--resume", "auto")
    whole_run, found = losses(run), losses(two)
    assert len(found) == len(whole_run)
    assert found[: 1 + equal] == pytest.approx(whole_run[: 1 + equal], rel=1e-4)
    last, expected = (load_file(r / "checkpoints/step-00000004/helpers.safetensors") for r in (two, run))
    assert last.keys() == expected.keys()
    for name in expected if op == "consistency" else [name for name in expected if name.startswith("teacher.")]:
        torch.testing.assert_close(last[name], expected[name], rtol=1e-3, atol=1e-5)


def test_shards_start_with_the_weights_of_one_process(one: Path, tmp_path: Path) -> None:
    """Two processes, neither of which ever holds all weights, have the first losses of one process."""
    two = shutil.copytree(one, tmp_path / "two", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    train(two, 2, "train.steps=2", "--resume", "auto")
    assert losses(two) == pytest.approx(losses(one)[:2], rel=1e-5)


def test_shards_start_from_weights_with_frozen_and_adapted_ones(one: Path, tmp_path: Path) -> None:
    """Two processes read their parts of the weights of step 0, and have the losses of one process."""
    run = build(tmp_path / "run", SETTINGS, "train.steps=2", ADAPTED, "train.freeze=[embed, head]", "--from", str(one))
    two = shutil.copytree(run, tmp_path / "two")
    run_in_fork(run.parent, "train", str(run), *CPU)
    train(two, 2)
    assert losses(two) == pytest.approx(losses(run), rel=1e-5)
    assert losses(run)[0] < losses(one)[0] - 0.01
    ours, theirs, start = whole(two, 2, MODEL), whole(run, 2, MODEL), whole(one, 6, AVERAGE)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours["embed.embed.weight"], start["embed.embed.weight"])
    original = "trunk.0.mlp.up.parametrizations.weight.original"
    assert torch.equal(ours[original], start["trunk.0.mlp.up.weight"])
    assert bool(ours["trunk.0.mlp.up.parametrizations.weight.0.b"].any())


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    """Shards that are missing, overlap, or leave rows out, whatever the hashes say."""

    def write(index: int, start: int, rows: int) -> None:
        part = Copied({"w": torch.arange(start, start + rows).float()[:, None].expand(-1, 3).contiguous()}, {"w": [start, 0]})  # fmt: skip
        write_tensors(part, tmp_path / f"model-0000{index}-of-00002.safetensors", sharded=True)

    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    write(1, 0, 3)
    write(2, 3, 2)
    shards = Stored(tmp_path, MODEL, names)
    assert torch.equal(shards.tensors()["w"], torch.arange(5).float()[:, None].expand(-1, 3))
    target = {"w": torch.zeros(5, 3)}
    shards.read_into(target)
    assert torch.equal(target["w"], shards.tensors()["w"])
    with pytest.raises(DamagedError, match=r"w: \[5, 3\], not \[4, 3\]"):
        shards.read_into({"w": torch.zeros(4, 3)})
    for start, rows in ((4, 1), (2, 3), (1, 2)):
        write(2, start, rows)
        with pytest.raises(
            DamagedError, match=r"model-\*-of-00002.safetensors cannot be read: the shards of w are not"
        ):
            shards.tensors()
    (tmp_path / names[1]).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(DamagedError, match="cannot be read"):
        shards.tensors()
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {names[1]: {"bytes": 1, "xxh3_128": "0" * 32}}}))
    with pytest.raises(DamagedError, match="not all shards of model"):
        stored(tmp_path, MODEL, read_manifest(tmp_path))


@pytest.mark.parametrize(
    ("replicate", "shard", "count", "found"),
    [(None, 1, 4, (4, 1)), (None, None, 4, (1, 4)), (2, None, 4, (2, 2)), (None, 2, 8, (4, 2)), (1, 1, 1, (1, 1)), (2, 2, 2, None), (None, 3, 4, None), (3, None, 2, None), (3, None, 4, None)],
)  # fmt: skip
def test_numbers_of_replicas_and_shards(
    replicate: int | None, shard: int | None, count: int, found: tuple[int, int] | None
) -> None:
    config = ParallelConfig(replicate=replicate, shard=shard)
    if found is not None:
        assert sizes(config, count) == found
    else:
        with pytest.raises(UserError, match=r"replicate \* shard must be the number of processes"):
            sizes(config, count)
