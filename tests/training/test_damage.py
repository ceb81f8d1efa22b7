"""Checkpoints that are damaged or forged: refused by name, or left for an older one that is whole."""

import errno
import json
import math
import os
import pkgutil
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd_graph.cli import main as cli
from sedd_graph.errors import EnvironmentFault
from sedd_graph.store.manifest import MANIFEST, DamagedError, entry_of, read_manifest, verify_files
from sedd_graph.training.trainer import Trainer
from tests.conftest import SMALL

CPU = ["--device", "cpu"]
NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints at two, four and six."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "small.yaml").write_text(SMALL.replace("{every: 3}", "{every: 2, keep: 3}"))
    arguments = [str(folder / "small.yaml"), "--runs", str(folder), "--path-to", str(folder / "at"), *CPU]
    assert cli.run(["build", *arguments]) == 0
    run = Path((folder / "at").read_text())
    assert cli.run(["train", str(run), *CPU]) == 0
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004", "step-00000006"]  # fmt: skip
    return run


def cut_back(trained: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the run as after a kill behind step 4, and its newest checkpoint."""
    run = shutil.copytree(trained, folder / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    return run, run / "checkpoints" / "step-00000004"


def ends_as(run: Path, trained: Path) -> None:
    """The run ends with the weights, averages, moments and losses of the unbroken one, to the last bit."""
    for name in NAMES:
        ours, theirs = (r / "checkpoints" / "step-00000006" / name for r in (run, trained))
        assert ours.read_bytes() == theirs.read_bytes()
    losses = [[r["loss"] for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) if "loss" in r] for f in (run, trained)]  # fmt: skip
    assert losses[0] == losses[1]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 16
    path.write_bytes(raw)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a file."""

    def changed(path: Path) -> None:
        found = load_file(path)
        change(found)
        save_file(found, path)

    return changed


def state(**changes: object) -> Callable[[Path], None]:
    return lambda path: (path.write_text(json.dumps({**json.loads(path.read_text()), **changes})), None)[1]


def forge(folder: Path) -> None:
    """Give the files of a checkpoint the hashes that they have now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {p.name: entry_of(p).model_dump() for p in folder.iterdir() if p.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest))


MOMENT = "embed.embed.weight/exp_avg"
DAMAGE: list[tuple[str, Callable[[Path], object], bool, str]] = [
    # file, damage, hashes forged to fit it, message about it
    *((name, flip, False, "its hash differs from manifest.json") for name in NAMES),
    ("ema.safetensors", Path.unlink, False, "ema.safetensors is missing"),
    ("ema.safetensors", Path.unlink, True, "ema.safetensors is missing: train.ema is set"),
    ("model.safetensors", lambda path: shutil.copy(path.parent.parent / "step-00000002" / path.name, path), False, "its hash differs"),
    ("state.json", Path.unlink, False, "state.json is missing"),
    ("state.json", state(step=-5), False, "bytes that were written|its hash differs|bytes, not the"),
    ("state.json", state(step=-5), True, "state.json: step: Input should be greater than or equal to 0"),
    ("state.json", state(step=10**30), True, "state.json: step: "),
    ("state.json", state(step=2), True, "state.json is of step 2: the folder's name says 4"),
    ("state.json", state(seconds=math.nan), True, "state.json: seconds: "),
    ("state.json", state(window={"nats": [1.0], "counted": []}), True, "state.json: window: "),
    ("manifest.json", Path.unlink, False, "manifest.json is missing"),
    ("manifest.json", lambda path: path.write_text("[" * 100_000), False, "manifest.json is not JSON: nested too deeply"),
    ("model.safetensors", tensors(lambda t: t["embed.embed.weight"].fill_(math.nan)), True, "model.safetensors has values that are NaN or infinite: embed.embed.weight"),
    ("ema.safetensors", tensors(lambda t: t["embed.embed.weight"].fill_(math.inf)), True, "ema.safetensors has values that are NaN or infinite: embed.embed.weight"),
    ("ema.safetensors", tensors(lambda t: t.update({"embed.embed.weight": t["embed.embed.weight"].double()})), True, "embed.embed.weight: torch.float64, not torch.float32"),
    ("optimizer.safetensors", tensors(lambda t: t.update({MOMENT: torch.zeros(3)})), True, rf"{MOMENT}: \[3\], not \["),
    ("optimizer.safetensors", tensors(lambda t: t.update({MOMENT: t[MOMENT].half()})), True, f"{MOMENT}: torch.float16, not torch.float32"),
    ("optimizer.safetensors", tensors(lambda t: t.update({"embed.nothing/exp_avg": torch.zeros(3)})), True, "unknown: embed.nothing/exp_avg"),
    ("optimizer.safetensors", tensors(lambda t: t.clear()), True, "missing: embed.embed.weight/exp_avg"),
    ("optimizer.safetensors", tensors(lambda t: t["embed.embed.weight/exp_avg_sq"].fill_(math.nan)), True, "NaN or infinite: embed.embed.weight/exp_avg_sq"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "forged", "said"), DAMAGE, ids=[f"{i}-{c[0]}" for i, c in enumerate(DAMAGE)])  # fmt: skip
def test_a_resume_goes_back_to_a_whole_checkpoint(
    trained: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], forged: bool, said: str
) -> None:
    """By the trainer itself, which reads nothing else of the run: what it restores is the older checkpoint."""
    run, newest = cut_back(trained, tmp_path)
    damage(newest / name)
    if forged:
        forge(newest)
    lines: list[str] = []
    trainer = trainer_of(run, lines.append)
    trainer.resume()
    assert trainer.step == 2
    assert len(lines) == 2
    assert str(newest / name) in lines[0]
    assert re.search(said, lines[0]), lines[0]
    assert lines[0].endswith("step-00000004 is damaged and is now damaged-step-00000004")
    assert lines[1] == "resumed from step-00000002"
    expected = load_file(run / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    state = trainer.optimizers[0].state_dict()["state"][0]
    assert torch.equal(state["exp_avg"], expected[MOMENT])


FAULTS: list[tuple[str, str, Exception, str]] = [
    # file, the function that fails for it, its exception, message
    ("model.safetensors", "sedd_graph.training.checkpoint.load_file", OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
    ("ema.safetensors", "sedd_graph.training.checkpoint.load_file", OSError("Cannot allocate memory (os error 12)"), "Cannot allocate memory"),
    ("optimizer.safetensors", "sedd_graph.training.checkpoint.load_file", SafetensorError("I/O error: Input/output error (os error 5)"), "Input/output error"),
    ("model.safetensors", "sedd_graph.training.checkpoint.load_file", FileNotFoundError("No such file or directory: model"), "opened"),
    ("manifest.json", "pathlib.Path.read_text", OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    ("state.json", "pathlib.Path.read_text", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ("model.safetensors", "pathlib.Path.open", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ("model.safetensors", "pathlib.Path.is_file", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "error", "said"), FAULTS)
def test_a_fault_of_the_machine_sets_no_checkpoint_aside(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    function: str,
    error: Exception,
    said: str,
) -> None:
    run, newest = cut_back(trained, tmp_path)
    lines: list[str] = []
    trainer, original = trainer_of(run, lines.append), pkgutil.resolve_name(function)

    def failing(path: Path, *arguments: Any, **settings: Any) -> object:
        if path == newest / name:
            raise error
        return original(path, *arguments, **settings)

    monkeypatch.setattr(function, failing)
    with pytest.raises(EnvironmentFault, match=f"{newest / name} cannot be .*{said}"):
        trainer.resume()
    assert lines == []
    monkeypatch.undo()
    trainer.resume()
    assert lines == ["resumed from step-00000004"]
    assert trainer.step == 4


def trainer_of(run: Path, say: Callable[[str], None]) -> Trainer:
    from sedd_graph.runs.open import open_run
    from sedd_graph.training.distributed import World

    opened = open_run(run, device="cpu", compile="off", weights="fresh")
    return Trainer(opened.engine, opened.data(), opened.report.train, run, World.single(), say)


def test_a_run_that_falls_back_ends_as_the_unbroken_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, newest = cut_back(trained, tmp_path)
    flip(newest / "ema.safetensors")
    assert cli.run(["sample", str(run), *CPU]) == 2
    assert "ema.safetensors is not the file that was written" in capsys.readouterr().err
    assert cli.run(["train", str(run), "--resume", *CPU]) == 0
    assert "step-00000004 is damaged and is now damaged-step-00000004" in capsys.readouterr().out
    ends_as(run, trained)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "damaged-step-00000004",
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]
    assert cli.run(["sample", str(run), *CPU]) == 0


@pytest.mark.parametrize(
    ("old", "new"), [("lr: 0.0003", "lr: 0.3"), ("steps: 6", "steps: 60"), ("seed: 0", "seed: 10")]
)
def test_a_changed_lock_file_is_refused(
    trained: Path, tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the manifest, by the digest in run.json where there is none, and by the checkpoint where both are forged."""
    run, _ = cut_back(trained, tmp_path)
    lock = run / "blueprint.lock.yaml"
    assert old in lock.read_text()
    lock.write_text(lock.read_text().replace(old, new))
    for remove, said in (
        (None, f"{lock} has "),
        (MANIFEST, f"{lock} is not the one that this run was built with: its digest differs from run.json"),
        ("run.json", f"{lock} has "),
    ):
        if remove is not None:
            (run / remove).unlink()
        capsys.readouterr()
        assert cli.run(["sample", str(run), *CPU]) == 2
        assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("left", ["folder", "file", "old checkpoint"])
def test_final_weights_are_saved_whatever_has_their_name(trained: Path, tmp_path: Path, left: str) -> None:
    run, _ = cut_back(trained, tmp_path)
    final = run / "checkpoints" / "step-00000006"
    if left == "folder":
        final.mkdir()
        (final / "optimizer.safetensors").write_bytes(b"")  # as a kill during pruning left them
    elif left == "file":
        final.write_text("")
    else:
        shutil.copytree(run / "checkpoints" / "step-00000002", final)
    assert cli.run(["train", str(run), "--resume", *CPU]) == 0
    ends_as(run, trained)
    verify_files(final, read_manifest(final).files)


def test_pruning_renames_first_and_leftovers_go_at_the_next_start(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = cut_back(trained, tmp_path)
    left = run / "checkpoints" / ".step-00000001.0123abcd.part"
    left.mkdir()
    (run / ".metrics.jsonl.0123abcd.part").write_text("{")
    monkeypatch.setattr("sedd_graph.store.files.remove", lambda path: None)  # as if killed before each removal
    monkeypatch.setattr("sedd_graph.training.checkpoint_writer.remove", lambda path: None)
    trainer = trainer_of(run, print)
    trainer.resume()
    trainer.step = 5
    trainer.writer._keep = 1
    trainer.save()
    visible = [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")]
    assert visible == ["step-00000005"]
    monkeypatch.undo()
    assert len(list((run / "checkpoints").glob(".step-*.part"))) == 3
    assert cli.run(["train", str(run), "--resume", *CPU]) == 0
    assert not list(run.rglob("*.part"))


def test_a_manifest_names_each_difference(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    entries = {"a": entry_of(tmp_path / "a")}
    verify_files(tmp_path, entries)
    assert entry_of(tmp_path / "a", size=1000) != entries["a"]
    assert entry_of(tmp_path / "a", size=10**9) == entries["a"]
    flip(tmp_path / "a")
    with pytest.raises(DamagedError, match="a is not the file that was written"):
        verify_files(tmp_path, entries)
    os.truncate(tmp_path / "a", 99)
    with pytest.raises(DamagedError, match="a has 99 bytes, not the 1,280,000 that were written"):
        verify_files(tmp_path, entries)
    (tmp_path / "a").unlink()
    with pytest.raises(DamagedError, match="a is missing"):
        verify_files(tmp_path, entries)
    os.mkfifo(tmp_path / "a")
    with pytest.raises(DamagedError, match="a is not a regular file"):
        verify_files(tmp_path, entries)
    with pytest.raises(DamagedError, match="names a file outside its folder"):
        verify_files(tmp_path, {"../a": entries["a"]})


def test_nothing_is_written_over_weights_that_are_not_finite(trained: Path, tmp_path: Path) -> None:
    run, newest = cut_back(trained, tmp_path)
    trainer = trainer_of(run, print)
    trainer.resume()
    trainer.step += 1
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(Exception, match="weights became NaN or infinite by step 5; the last checkpoint is intact"):
        trainer.save()
    verify_files(newest, read_manifest(newest).files)
