"""Construction of engines from blueprints (with untrained weights) and from run folders (with saved weights)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import pick_device
from sedd_graph.engine.network import CompileMode, Network
from sedd_graph.engine.process import Setup
from sedd_graph.engine.shard_init import ShardInit
from sedd_graph.errors import UserError
from sedd_graph.families.plan import Plan
from sedd_graph.families.table import process_class
from sedd_graph.graph.claims import demoted
from sedd_graph.graph.memory import planned
from sedd_graph.graph.saves import saving
from sedd_graph.runs.check import LOCK, Report, check, digest, lock_text
from sedd_graph.runs.memory_plan import budget_plan
from sedd_graph.runs.project import require_project
from sedd_graph.runs.prove import prove_all, prove_network
from sedd_graph.runs.read_data import read_data
from sedd_graph.runs.run_records import CERTIFICATE, FACTS, read_certificate, read_facts
from sedd_graph.runs.token_cache import FolderCache
from sedd_graph.store.files import write_text
from sedd_graph.store.manifest import MANIFEST, DamagedError, read_manifest, verify_files, write_manifest
from sedd_graph.store.run_folder import require_utf8
from sedd_graph.training.adapters import choose_trained, load_plain
from sedd_graph.training.checkpoint import (
    AVERAGE,
    MODEL,
    file_name,
    files_of,
    latest_checkpoint,
    read_state,
    read_tensors,
)
from sedd_graph.training.checkpoint_reader import stored
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.weights import load_weights

__all__ = [
    "CERTIFICATE",
    "Run",
    "build",
    "check_tokenizer",
    "make_engine",
    "open_run",
    "read_data",
    "verify_run",
    "write_run_manifest",
]

WEIGHTS = file_name(MODEL)
"""File name of the weights of an export or of an import."""


def make_engine(
    report: Report,
    *,
    device: torch.device,
    compile: CompileMode = "auto",
    tokenizer: Tokenizer | None = None,
    part: ShardInit | None = None,
) -> Engine:
    """Construct the engine (network and diffusion process) of a checked blueprint, with untrained weights.

    Args:
        report: Result of checking the blueprint.
        device: Device of the network.
        compile: Scope of ``torch.compile`` (:meth:`sedd_graph.engine.network.Network.compile`).
        tokenizer: Tokenizer of the run, if there is one. Its ``forbidden`` tokens are never generated, and
            ``Engine.save`` writes it beside the weights.
        part: Part of the parameters that this process holds, of a model that will be sharded; None for all.

    Returns:
        The engine.

    Raises:
        UserError: The tokenizer has more tokens than the model.
    """
    files = {LOCK: lock_text(report)}
    pieces, forbidden = None, list[int]()
    if tokenizer is not None:
        files[TOKENIZER], pieces = tokenizer.to_json(), tokenizer.pieces
        forbidden = [*tokenizer.forbidden, *range(tokenizer.size, report.plan.states)]

    def on_save(folder: Path) -> None:
        for name, text in files.items():
            write_text(folder / name, text)
        write_run_manifest(folder)

    network = Network(report.graph, report.registry, device=device, seed=report.train.seed, part=part)
    setup = Setup(registry=report.registry, graph=report.graph, device=device, forbidden=forbidden, pieces=pieces)
    engine = Engine(network, process_class(report.plan.family)(report.plan, setup), on_save=on_save)
    choose_trained(engine.model, report.train, part)
    engine.compile(compile)
    if tokenizer is not None:
        check_tokenizer(engine, tokenizer)
    return engine


def check_tokenizer(engine: Engine, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer of a text model has at most as many tokens as the model.

    Args:
        engine: The engine with the network.
        tokenizer: The tokenizer.

    Raises:
        UserError: The tokenizer has more tokens.
    """
    if (wrong := engine.process.check_tokenizer(tokenizer.size)) is not None:
        raise UserError(wrong)


@dataclasses.dataclass
class Run:
    """Opened run folder, with its engine and weights.

    Attributes:
        path: The run folder.
        report: Result of checking the run's blueprint.
        engine: Network, with weights, and diffusion process.
        tokenizer: Tokenizer of the run; None for a run without text.
        root: Folder to which file names of the data are relative.
        weights: Path, relative to the run folder, of the file that the weights come from; ``fresh`` for untrained
            weights.
        recorded: True if ``root`` is what the run folder records, which is checked before data are read; False if the
            caller named it.
    """

    path: Path
    report: Report
    engine: Engine
    tokenizer: Tokenizer | None
    root: Path
    weights: str
    recorded: bool = True

    @property
    def plan(self) -> Plan:
        """The diffusion process or flow that the blueprint declares, with its components."""
        return self.report.plan

    @property
    def digest(self) -> str:
        """Hash of the lock file, which identifies the build: 16 hexadecimal digits."""
        return digest((self.path / LOCK).read_text(encoding="utf-8"))

    def data(self) -> Dataset | PointData:
        """Read the data set of the run; its text is tokenised only if the run folder does not hold its tokens.

        Raises:
            UserError: The blueprint has no ``data`` section, or the data cannot be read.
        """
        if "data" not in self.report.loaded.sections:
            raise UserError("this blueprint has no 'data' section")
        try:
            root = self.data_root()
            data = read_data(self.report, root=root, tokenizer=self.tokenizer, cache=FolderCache(self.path))
            if self.changed(data) is not None:  # by the text, or by tokens in the run folder that were altered
                data = read_data(self.report, root=root, tokenizer=self.tokenizer)
            return data
        except UserError as error:
            if self.root.is_dir():
                raise
            raise UserError(
                f"{error}; the folder of the data, {self.root}, does not exist: if it has moved, name it with --corpus"
            ) from None

    def data_root(self) -> Path:
        """Return the real path of :attr:`root`, the folder of the data, if it may be read.

        Raises:
            UserError: The folder is the one that the run folder records, and is not trusted
                (:func:`sedd_graph.runs.project.require_project`).
        """
        return require_project(self.root, self.path) if self.recorded else Path(os.path.realpath(self.root))

    def changed(self, data: Dataset | PointData) -> str | None:
        """Return a message if the data files have changed since the run was built.

        Args:
            data: The data set as it is now.

        Returns:
            The message; None if the data are unchanged, or if the run does not record their hash.
        """
        if read_facts(self.path).corpus in (None, data.fingerprint()):
            return None
        return f"the corpus has changed since {self.path} was built"

    def text_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run. Raises :class:`UserError` if the run folder has no tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"there is no tokenizer in {self.path}: tokens cannot become text, nor text tokens")
        return self.tokenizer

    def decode(self, rows: Tensor) -> list[str]:
        """Return sampled rows as texts for the user, one per row.

        Args:
            rows: Token ids, int64 [b, l], which are decoded, or points of a flow, float32 [b, ...], of which the first
                16 are written as numbers.

        Raises:
            UserError: The rows are tokens, and the run has no tokenizer.
        """
        return self.engine.process.texts(rows, self.tokenizer)


def verify_run(path: Path) -> None:
    """Verify that the files of a run folder that its manifest lists, except the weights, are undamaged.

    They are compared with the sizes and hashes in the manifest, and the lock file with its digest in ``run.json``.

    Args:
        path: A run folder or an export. Without a manifest, only the digest of the lock file is verified.

    Raises:
        DamagedError: A file is missing or is not the one that the run was built with.
    """
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        verify_files(path, {name: entry for name, entry in manifest.files.items() if name != WEIGHTS})
    built = read_facts(path).blueprint
    if built is not None and built != digest((path / LOCK).read_text(encoding="utf-8", errors="replace")):
        raise DamagedError(
            f"{path / LOCK} is not the one that this run was built with: its digest differs from {FACTS}"
        )


def write_run_manifest(path: Path) -> None:
    """Write the manifest of a run folder or export, as the last of its files."""
    names = (LOCK, TOKENIZER, CERTIFICATE, FACTS, WEIGHTS)
    write_manifest(path, [name for name in names if (path / name).is_file()])


def open_run(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device | None = None,
    compile: CompileMode = "auto",
    weights: str = "newest",
    root: Path | None = None,
    save: Sequence[str] = (),
    part: Callable[[TrainConfig], ShardInit | None] = lambda config: None,
) -> Run:
    """Open a run folder, by default with its newest weights.

    Args:
        path: The run folder.
        overrides: Changes to the blueprint as ``key=value``, such as ``sample.steps=64``.
        device: Device of the network; None selects the fastest device of the machine.
        compile: Scope of ``torch.compile`` (:meth:`sedd_graph.engine.network.Network.compile`).
        weights: ``newest``: the averaged weights of the newest checkpoint if it has an average, else its trained
            weights; without checkpoints, ``model.safetensors``; without either, untrained weights. ``model``: as
            ``newest``, but never the averaged weights of a checkpoint. ``fresh``: untrained weights.
        root: Folder to which file names of the data are relative; None for the one that the run was built with.
        save: Paths of ports whose activations the graph saves (:func:`sedd_graph.graph.saves.saving`); empty: those of the
            blueprint.
        part: Function that returns which part of the parameters this process holds, for untrained weights
            (``weights="fresh"``) of a model that will be sharded; None for all.

    Returns:
        The opened run folder, with its engine.

    Raises:
        UserError: ``path`` is not a run folder, or its files are damaged (:class:`DamagedError`).
    """
    path, where = Path(path), pick_device(device)
    require_utf8(path)
    if not (path / LOCK).is_file():
        raise UserError(f"{path} is not a run folder: there is no {LOCK} in it")
    verify_run(path)
    report = check(path / LOCK, overrides)
    found = read_certificate(path)
    graph = planned(demoted(report.graph, found.checkpointed), found.modes)
    report = dataclasses.replace(report, graph=saving(graph, save) if save else graph)
    tokenizer = load_tokenizer(path) if (path / TOKENIZER).exists() else None
    engine = make_engine(report, device=where, compile=compile, tokenizer=tokenizer, part=part(report.train))
    built = read_facts(path).root if root is None else None
    recorded = built is not None
    root = Path(built) if built is not None else root or path
    used = "fresh" if weights == "fresh" else _load(engine, path, averaged=weights == "newest")
    return Run(path, report, engine, tokenizer, root, used, recorded)


def _load(engine: Engine, path: Path, *, averaged: bool) -> str:
    """Load the newest weights; return the name of their file, or ``fresh`` where there is none."""
    while (checkpoint := latest_checkpoint(path / "checkpoints")) is not None:
        try:
            return _load_checkpoint(engine, path, checkpoint, averaged=averaged)
        except DamagedError as error:
            if checkpoint.exists():  # else training has removed it since, and there is a newer one
                goes_back = f"`sedd-graph train {path} --resume` goes back to the newest checkpoint that is whole"
                raise DamagedError(f"{error}; {goes_back}") from None
    file = path / WEIGHTS
    if not file.is_file():
        return "fresh"
    if (path / MANIFEST).exists() and WEIGHTS in (entries := read_manifest(path).files):
        verify_files(path, entries, names=[WEIGHTS])
    load_plain(engine.model, read_tensors(file), where=str(file))
    return WEIGHTS


def _load_checkpoint(engine: Engine, path: Path, checkpoint: Path, *, averaged: bool) -> str:
    """Load the weights of a checkpoint; return the name of their file."""
    kind = AVERAGE if averaged and files_of(read_manifest(checkpoint), AVERAGE, checkpoint) else MODEL
    _, manifest = read_state(checkpoint, kinds=[kind])
    found = stored(checkpoint, kind, manifest)
    load_weights(engine.model, found.tensors(), where=found.where)
    return str((checkpoint / found.label).relative_to(path))


def build(
    path_or_run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | torch.device | None = None,
    compile: CompileMode = "auto",
    prove: bool = False,
) -> Engine:
    """Return the engine (network and diffusion process) of a blueprint or of a run folder.

    Args:
        path_or_run_dir: A blueprint file or the name of a blueprint shipped with the package, for untrained weights; or
            a run folder, for its newest weights (averaged if the run averages them).
        overrides: Changes to the blueprint as ``key=value``, such as ``params.dim=64``.
        device: Device of the network, such as ``cpu`` or ``cuda``; None selects the fastest device of the machine.
        compile: Scope of ``torch.compile`` (:meth:`sedd_graph.engine.network.Network.compile`).
        prove: Verify the process, the inverses and the network as ``sedd-graph build`` does, within seconds. The
            results are in :attr:`Engine.checks`. A block with ``on_failure: checkpoint`` whose inverse fails a check is
            checkpointed.

    Returns:
        The engine, which trains, evaluates and samples. For a blueprint with a memory budget, its blocks are measured
        first, within a minute or so.

    Raises:
        SeddGraphError: The blueprint is not valid, a check fails, or the run folder cannot be read.
    """
    place, where = Path(path_or_run_dir), pick_device(device)
    run = open_run(place, overrides=overrides, device=where, compile=compile) if place.is_dir() else None
    report = check(place, overrides) if run is None else run.report
    checks: list[Check] = []
    if prove:
        checks, demotions = prove_all(report, device=where, proof="full", say=lambda text: None)
        report = dataclasses.replace(report, graph=demoted(report.graph, demotions))
    if run is None:
        plan = budget_plan(report, device=where, compiled=compile != "off", say=lambda text: None)
        report = report if plan is None else dataclasses.replace(report, graph=planned(report.graph, plan.modes))
    engine = make_engine(report, device=where, compile=compile) if run is None else run.engine
    if prove:
        engine.checks = (*checks, *prove_network(engine))
    return engine
