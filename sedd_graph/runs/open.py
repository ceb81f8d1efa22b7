"""Run folders and engines: a blueprint with fresh weights, or a run folder with its newest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.data.config import DataConfig
from sedd_graph.data.points import PointData, open_points
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import pick_device
from sedd_graph.engine.network import CompileMode, Network
from sedd_graph.errors import UserError
from sedd_graph.families.plan import Plan
from sedd_graph.families.points_plan import PointsPlan
from sedd_graph.families.table import make_process
from sedd_graph.graph.claims import demoted
from sedd_graph.runs.check import LOCK, Report, check, digest, lock_text
from sedd_graph.store.files import read_json, write_text
from sedd_graph.training.checkpoint import latest_checkpoint, load_weights

__all__ = ["CERTIFICATE", "Run", "build", "check_tokenizer", "make_engine", "open_run", "read_data"]

CERTIFICATE = "certificate.json"
"""The file of a run folder that holds every check."""
MODEL = "model.safetensors"


def make_engine(
    report: Report,
    *,
    device: torch.device,
    compile: CompileMode = "auto",
    forbidden: Sequence[int] = (),
    pieces: Callable[[], Sequence[bytes | None]] | None = None,
    companions: Mapping[str, str] | None = None,
) -> Engine:
    """Make an engine with fresh weights. ``companions`` are further files that ``Engine.save`` writes beside the weights."""
    files = {LOCK: lock_text(report), **(companions or {})}

    def on_save(folder: Path) -> None:
        for name, text in files.items():
            write_text(folder / name, text)

    network = Network(report.graph, report.registry, device=device, seed=report.train.seed)
    process = make_process(
        report.plan, report.graph, report.registry, device=device, forbidden=forbidden, pieces=pieces
    )
    engine = Engine(network, process, on_save=on_save)
    engine.compile(compile)
    return engine


def read_data(report: Report, *, root: Path, tokenizer: Tokenizer | None = None) -> Dataset | PointData:
    """Read the data that the blueprint declares. Names of files start from ``root``. Raises :class:`UserError`."""
    if isinstance(report.data, DataConfig):
        return open_data(report.data, root=root, tokenizer=tokenizer)
    if not isinstance(report.plan, PointsPlan):
        raise UserError("data.points is for flows")
    return open_points(report.data, root=root, shape=report.plan.shape)


def check_tokenizer(engine: Engine, tokenizer: Tokenizer) -> None:
    """Raises :class:`UserError` where the graph is not built for the tokenizer's tokens."""
    if (wrong := engine.process.check_tokenizer(tokenizer.size)) is not None:
        raise UserError(wrong)


@dataclasses.dataclass
class Run:
    """An opened run folder. ``weights`` names the file that the weights come from."""

    path: Path
    report: Report
    engine: Engine
    tokenizer: Tokenizer | None
    root: Path
    weights: str

    @property
    def plan(self) -> Plan:
        """The declared process. Raises :class:`UserError` where the blueprint is only a graph."""
        if self.report.plan is None:
            raise UserError("this blueprint is a graph without a process: add process, objective and sample")
        return self.report.plan

    @property
    def digest(self) -> str:
        """The digest of the lock file."""
        return digest((self.path / LOCK).read_text(encoding="utf-8"))

    def data(self) -> Dataset | PointData:
        """Read the data again as it was at build time. Raises :class:`UserError`."""
        if "data" not in self.report.loaded.sections:
            raise UserError("this blueprint has no 'data' section")
        return read_data(self.report, root=self.root, tokenizer=self.tokenizer)

    def changed(self, data: Dataset | PointData) -> str | None:
        """A sentence where ``data`` is not the corpus that the run was built with; None where it is, or none is on record."""
        known = (None, data.fingerprint())
        return (
            f"the corpus has changed since {self.path} was built"
            if _facts(self.path).get("corpus") not in known
            else None
        )

    def decode(self, rows: Tensor) -> list[str]:
        """Samples as text."""
        return self.engine.process.texts(rows, self.tokenizer)


def _facts(path: Path) -> dict[str, Any]:
    """The content of run.json."""
    found = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    return found if isinstance(found, dict) else {}


def open_run(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device | None = None,
    compile: CompileMode = "auto",
    weights: str = "newest",
) -> Run:
    """Open a run folder with its newest weights: a checkpoint's average, its model, or ``model.safetensors``.

    Args:
        path: the run folder.
        overrides: changes to the blueprint, such as ``sample.steps=64``.
        device: picked by hardware where it is not given.
        weights: ``newest``, ``model`` (the checkpoint's own rather than averaged weights) or ``fresh``.

    Raises:
        UserError: for a folder that is no run folder, or weights that cannot be read.
    """
    path, where = Path(path), pick_device(device)
    if not (path / LOCK).is_file():
        raise UserError(f"{path} is not a run folder: there is no {LOCK} in it")
    report = check(path / LOCK, overrides)
    found = read_json(path / CERTIFICATE) if (path / CERTIFICATE).is_file() else {}
    if isinstance(found, dict) and isinstance(paths := found.get("checkpointed"), list):
        report = dataclasses.replace(report, graph=demoted(report.graph, paths))
    tokenizer = load_tokenizer(path) if (path / TOKENIZER).is_file() else None
    forbidden = list(tokenizer.forbidden) if tokenizer is not None else []
    if tokenizer is not None and report.plan is not None:
        forbidden += range(tokenizer.size, report.plan.states)
    engine = make_engine(
        report,
        device=where,
        compile=compile,
        forbidden=forbidden,
        pieces=tokenizer.pieces if tokenizer else None,
        companions={TOKENIZER: tokenizer.to_json()} if tokenizer else {},
    )
    if tokenizer is not None:
        check_tokenizer(engine, tokenizer)
    root = _facts(path).get("root")
    used = "fresh" if weights == "fresh" else _load(engine, path, averaged=weights == "newest")
    return Run(path, report, engine, tokenizer, Path(root) if isinstance(root, str) else path, used)


def _load(engine: Engine, path: Path, *, averaged: bool) -> str:
    """Load the newest weights; returns the name of their file, ``fresh`` where there is none."""
    checkpoint = latest_checkpoint(path / "checkpoints")
    file = path / MODEL
    if checkpoint is not None:
        average = checkpoint / "ema.safetensors"
        file = average if averaged and average.is_file() else checkpoint / MODEL
    elif not file.is_file():
        return "fresh"
    try:
        load_weights(engine.model, load_file(file), where=str(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return str(file.relative_to(path))


def build(
    path_or_run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | torch.device | None = None,
    compile: CompileMode = "auto",
) -> Engine:
    """Make an engine from a blueprint (fresh weights), or open a run folder (its newest weights, averaged if it has them).

    ``device`` is picked by hardware where it is not given. Raises :class:`sedd_graph.errors.SeddGraphError`.
    """
    place, where = Path(path_or_run_dir), pick_device(device)
    if not place.is_dir():
        return make_engine(check(place, overrides), device=where, compile=compile)
    return open_run(place, overrides=overrides, device=where, compile=compile).engine
