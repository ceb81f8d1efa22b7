"""Subcommand ``train``: train the model of a run folder, then evaluate the model on held-out rows."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.evaluation.bound import Result as Bounds
from sedd_graph.evaluation.bound import numbers
from sedd_graph.runs.check import Report, digest, lock_text
from sedd_graph.runs.distilled import distiller
from sedd_graph.runs.evaluate import evaluate_opened
from sedd_graph.runs.extend import extended
from sedd_graph.runs.open import WEIGHTS, open_run
from sedd_graph.runs.precision import choose_dtype
from sedd_graph.runs.run_records import read_facts
from sedd_graph.runs.summary import flatten
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.changes import add_change
from sedd_graph.store.files import alone
from sedd_graph.store.manifest import MANIFEST, DamagedError, read_manifest, verify_files
from sedd_graph.training.adapters import load_plain
from sedd_graph.training.checkpoint import AVERAGE, MODEL, latest_checkpoint, require_start, step_of
from sedd_graph.training.checkpoint_reader import Stored, stored
from sedd_graph.training.distributed import World, is_broken
from sedd_graph.training.interfaces import Setting
from sedd_graph.training.loop import Result, train
from sedd_graph.training.parallel import compile_mode, shard_init
from sedd_graph.training.trackers import FINAL, Trackers
from sedd_graph.verify.margin import has_codes, margins

__all__ = ["train_run"]


def train_run(
    path: Path,
    *,
    resume: bool | None,
    device: torch.device,
    say: Callable[[str], None],
    corpus: Path | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Result, Bounds | None]:
    """Train the model of a run folder, then evaluate the model on held-out rows.

    Under torchrun, every process calls this function.

    Args:
        path: The run folder.
        resume: True to resume from the newest checkpoint that is whole; None to do so if there is a checkpoint.
        device: Device of this process.
        say: Function that prints a line for the user.
        corpus: Folder to which file names of the data are relative, if it has moved since the run was built.
        overrides: Changes to the ``train`` section with which a run is resumed, such as ``train.steps=3000``
            (:func:`sedd_graph.runs.extend.extended`). They are recorded in ``changes.json``.

    Returns:
        The result of training, and the held-out bound, which is None if a signal stopped training.

    Raises:
        UserError: The run cannot be trained: it has been trained already (without ``resume``), has no checkpoint (with
            ``resume``), its data have changed, or its blueprint has no data or process.
        DivergedError: The loss, the gradient or the weights became NaN or infinite.
    """
    if device.type == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # read at the first allocation; blocks of changing sizes then do not fragment memory
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with contextlib.ExitStack() as stack:
        world = World.from_environment(device)
        stack.callback(world.close)
        newest = latest_checkpoint(path / "checkpoints")
        step = 0 if newest is None else step_of(newest)
        changes, new = extended(path, overrides, step=step)
        run = open_run(
            path,
            overrides=changes,
            device=device,
            compile="off",
            weights="fresh",
            root=corpus,
            part=lambda config: shard_init(config.parallel, world),
        )
        if not (path / "run.json").is_file():
            raise UserError(
                f"{path} is not a whole run folder: there is no run.json in it, so the data that it was built with are "
                "not known; build it again (an export is for sampling and evaluation)"
            )
        _ = (
            run.plan.objective_op
        )  # raises for a graph without a process, before anything is written or a tracker starts
        if resume is None:
            resume = bool(world.first(newest is not None))
        require_start(path, resume=resume)
        start = None if resume else _start(path, world)
        config = run.report.train
        if read_facts(path).teacher is not None:
            if start is not None:  # the first teacher has the weights of the student
                load_plain(run.engine.model, start.tensors(), where=start.where)
            run.engine = distiller(run.engine, run.report)
        run.engine.compile(compile_mode(run.engine, config))
        choose_dtype(run)
        data = run.data()
        if (changed := run.changed(data)) is not None:
            raise UserError(f"{changed}; put the old one back, or build a new run")
        quiet = say if world.rank == 0 else (lambda text: None)
        trackers = None
        if world.rank == 0:
            stack.enter_context(alone(path, "training"))
            if new:
                say(f"changed     {add_change(path, step, list(overrides))}")
            trackers = Trackers(path, run.report.name, config.trackers, _settings(run.report))
            stack.callback(trackers.close)
        taps = [
            TapSpec(name.replace(".", "/"), s.every, s.dtype, s.rows, s.chunk) for name, s, _ in run.report.graph.taps
        ]

        def activations(step: int) -> Activations | None:
            store = path / "activations.zarr"
            queue = run.report.store.queue
            return Activations(store, taps, queue=queue, resume_step=step, say=quiet) if taps else None

        def measure() -> dict[str, float]:
            found = margins(run.engine.network)
            for code, margin in found.items():
                if margin.half is not None and margin.half <= (margin.error or 0.0) < math.inf:
                    quiet(f"warning     {code}: tokens may be decoded wrongly: margin {margin}")
            return {name: value for code, margin in found.items() for name, value in margin.metrics(code).items()}

        try:
            result = train(
                run.engine,
                data,
                config,
                run=path,
                resume=resume,
                world=world,
                trackers=trackers,
                activations=activations,
                decode=run.decode,
                measure=measure if has_codes(run.engine.network) else None,
                start=start,
                say=quiet,
            )
        except RuntimeError as error:
            if world.size == 1 or not is_broken(error):
                raise
            first = str(error).strip().splitlines()[0]
            raise EnvironmentFault(f"another process of this run has ended, or cannot be reached: {first}") from error
        if (newest := latest_checkpoint(path / "checkpoints")) is not None:
            kind = MODEL if config.ema is None else AVERAGE
            run.weights = str((newest / stored(newest, kind, read_manifest(newest)).label).relative_to(path))
        quiet(f"{result.reason} at step {result.step} after {result.seconds:.0f} s of training")
        for warning in run.engine.process.warnings():
            quiet(f"warning     {warning}")
        found = None
        if result.reason in ("done", "budget"):
            found = evaluate_opened(run, data, quiet, world=world)
            if trackers is not None:
                trackers.log(result.step, {FINAL + k: v for k, v in numbers(found).items()})
        world.barrier()
        return result, found


def _start(path: Path, world: World) -> Stored | None:
    """Return the weights from which a run starts, once one process has verified their file; None without such a file.

    Raises:
        DamagedError: The file is not the one that was written when the run was built.
    """
    if not (path / WEIGHTS).is_file():
        return None
    reason = ""
    if world.rank == 0 and (path / MANIFEST).exists() and WEIGHTS in (entries := read_manifest(path).files):
        try:
            verify_files(path, entries, names=[WEIGHTS])
        except DamagedError as error:
            reason = str(error)
    if reason := "".join(world.texts(reason)):
        raise DamagedError(reason)
    return Stored(path, MODEL, (WEIGHTS,))


def _settings(report: Report) -> dict[str, Setting]:
    """Return the settings of a checked blueprint for trackers, with the digest of its lock file."""
    text = lock_text(report)
    values = flatten(read_yaml(text.encode(), name="lock file").data)
    plain = {key: value if isinstance(value, Setting) else json.dumps(value) for key, value in values.items()}
    return {"lock_digest": digest(text), **plain}
