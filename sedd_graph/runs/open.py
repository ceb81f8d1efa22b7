"""Run folders as the verbs see them once they are built: trained, sampled, filled in, evaluated and reported on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.strings.sampler import StringSampler
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.engine.engine import CompileMode, Engine
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.errors import UserError
from sedd_graph.evaluation.bound import Evaluation, Likelihood, evaluate, numbers
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.points import FlowEngine
from sedd_graph.families.strings import StringEngine
from sedd_graph.graph.claims import demoted
from sedd_graph.runs.build import CERTIFICATE, Say, check_tokenizer, read_data, revision
from sedd_graph.runs.check import LOCK, Report, check, digest, make_engine
from sedd_graph.store.arrays import Activations, TapSpec, document_lengths, write_points, write_samples
from sedd_graph.store.files import alone, read_json, write_json
from sedd_graph.training.checkpoint import latest_checkpoint, load_weights, start_point
from sedd_graph.training.distributed import World
from sedd_graph.training.loop import Result, train
from sedd_graph.training.trackers import FINAL, Trackers

__all__ = ["Run", "evaluate_run", "open_run", "sample_points", "sample_run", "train_run"]

MODEL = "model.safetensors"


@dataclasses.dataclass
class Run:
    """A run folder, opened."""

    path: Path
    report: Report
    engine: Engine
    tokenizer: Tokenizer | None
    root: Path
    weights: str

    def plan(self) -> ProcessPlan:
        """The noise process. Raises :class:`UserError` where the blueprint is a graph alone."""
        if self.report.plan is None:
            raise UserError("this blueprint is a graph without a process: add process, objective and sample")
        return self.report.plan

    @property
    def objective(self) -> str:
        """The name of what is minimised. Raises :class:`UserError` where the blueprint is a graph alone."""
        return self.report.flow.contract.op if self.report.flow else self.plan().objective.contract.op

    def data(self) -> Dataset | PointData:
        """What is learned from, read again as it was at build time. Raises :class:`UserError`."""
        if "data" not in self.report.loaded.sections:
            raise UserError("this blueprint has no 'data' section")
        return read_data(self.report, root=self.root, tokenizer=self.tokenizer)

    def changed(self, data: Dataset | PointData) -> str | None:
        """A sentence where ``data`` is not the corpus that the run was built with; None where it is, or none is on record."""
        facts = read_json(self.path / "run.json") if (self.path / "run.json").is_file() else {}
        corpus = facts.get("corpus") if isinstance(facts, dict) else None
        return (
            f"the corpus has changed since {self.path} was built" if corpus not in (None, data.fingerprint()) else None
        )

    def decode(self, rows: Tensor) -> list[str]:
        """Token rows as text."""
        if self.tokenizer is None:
            raise UserError(f"there is no {TOKENIZER} in {self.path}: tokens cannot become text")
        if isinstance(self.engine, StringEngine):
            start = self.engine.edits.kernel.start
            return [self.tokenizer.decode([i for i in row if i != start]) for row in rows.tolist()]
        return [self.tokenizer.decode(row) for row in rows.tolist()]


def open_run(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    device: torch.device,
    compile: CompileMode = "auto",
    weights: str = "newest",
) -> Run:
    """Open a run folder with its newest weights: a checkpoint's average, its model, or ``model.safetensors``.

    ``weights``: ``newest``, ``model`` (the checkpoint's own rather than averaged weights) or ``fresh``.
    """
    if not (path / LOCK).is_file():
        raise UserError(f"{path} is not a run folder: there is no {LOCK} in it")
    report = check(path / LOCK, overrides)
    found = read_json(path / CERTIFICATE) if (path / CERTIFICATE).is_file() else {}
    if isinstance(found, dict) and isinstance(paths := found.get("checkpointed"), list):
        report = dataclasses.replace(report, graph=demoted(report.graph, paths))
    tokenizer = load_tokenizer(path) if (path / TOKENIZER).is_file() else None
    if tokenizer is not None:
        check_tokenizer(report, tokenizer)
    companions = {TOKENIZER: tokenizer.to_json()} if tokenizer else {}
    forbidden = list(tokenizer.forbidden) if tokenizer else []
    if tokenizer is not None and report.plan is not None:
        forbidden += range(tokenizer.size, report.plan.states)
    engine = make_engine(
        report,
        device=device,
        compile=compile,
        forbidden=forbidden,
        pieces=tokenizer.pieces if tokenizer else None,
        companions=companions,
    )
    facts = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    root = Path(facts["root"]) if isinstance(facts, dict) and isinstance(facts.get("root"), str) else path
    used = "fresh"
    if weights != "fresh":
        checkpoint = latest_checkpoint(path / "checkpoints")
        if checkpoint is not None:
            file = checkpoint / "ema.safetensors"
            file = file if file.is_file() and weights == "newest" else checkpoint / MODEL
        else:
            file = path / MODEL
        if checkpoint is not None or file.is_file():
            try:
                load_weights(engine.model, load_file(file), where=str(file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None
            used = str(file.relative_to(path))
    return Run(path, report, engine, tokenizer, root, used)


def train_run(
    path: Path, *, resume: bool, device: torch.device, say: Say
) -> tuple[Result, Evaluation | Likelihood | None]:
    """Train a run folder and evaluate it at the end. Under torchrun, every process calls this."""
    with contextlib.ExitStack() as stack:
        world = World.from_environment(device)
        stack.callback(world.close)
        run = open_run(path, device=device, compile="off", weights="fresh")
        _ = (
            run.objective
        )  # what cannot be trained, or gone on with, is said before anything is written or a tracker starts
        start_point(path, resume=resume)
        config = run.report.train
        run.engine.compile(config.compile)
        data = run.data()
        if (changed := run.changed(data)) is not None:
            raise UserError(f"{changed}; put the old one back, or build a new run")
        quiet = say if world.rank == 0 else (lambda text: None)
        trackers = None
        if world.rank == 0:
            stack.enter_context(alone(path, "training"))
            trackers = Trackers(path, run.report.name, config.trackers)
            stack.callback(trackers.close)
        taps = [
            TapSpec(name.replace(".", "/"), s.every, s.dtype, s.rows, s.chunk) for name, s, _ in run.report.graph.taps
        ]

        def activations(step: int) -> Activations | None:
            store = path / "activations.zarr"
            return Activations(store, taps, queue=run.report.store.queue, resume_step=step) if taps else None

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
            say=quiet,
        )
        quiet(f"{result.reason} at step {result.step} after {result.seconds:.0f} s of training")
        if isinstance(run.engine, StringEngine) and run.engine.cut:
            quiet(f"warning     {run.engine.cut:,} tokens of noisy strings found no room: raise objective.room")
        found = None
        if trackers is not None and result.reason in ("done", "budget"):
            found = _evaluate(run, data, say)
            trackers.log(result.step, {FINAL + k: v for k, v in numbers(found).items()})
        world.barrier()
        return result, found


def _evaluate(
    run: Run, data: Dataset | PointData, say: Say, *, batches: int | None = None, draws: int | None = None
) -> Evaluation | Likelihood:
    config = run.report.train
    draws = draws or (config.evaluate.draws if config.evaluate else 1)
    rows = min(64, config.batch)
    found = evaluate(run.engine, data, rows=rows, batches=batches, draws=draws, seed=config.seed)
    say(f"held-out {found}")
    if run.engine.caveat is not None:
        say(f"note        {run.engine.caveat}")
    text = {}
    if isinstance(data, Dataset):
        say(
            f"unigram entropy of the same text: {data.heldout_entropy_bits:.4f} bits per character "
            f"({data.unigram_bits:.4f} under the training text's frequencies)"
        )
        text = {"unigram_bits": data.unigram_bits, "heldout_entropy_bits": data.heldout_entropy_bits}
    path = run.path / "evaluation.json"
    before = read_json(path) if path.is_file() else {}
    fuller = max(before.get("sequences", 0), before.get("rows", 0)) if isinstance(before, dict) else 0
    if fuller > found.count:
        say(f"not kept: evaluation.json is of {fuller} sequences, this only of {found.count}")
        return found
    protocol = {
        **_protocol(run, data),
        "rows_at_a_time": rows,
        "batches": batches,
        "draws": draws,
        "seed": config.seed,
        "dtype": "float32",
        "hardware": describe_hardware(run.engine.device),
        "revision": revision(),
    }
    record = {**dataclasses.asdict(found), **text, "weights": run.weights, "objective": run.objective}
    write_json(path, {**record, "protocol": protocol})
    return found


def _protocol(run: Run, data: Dataset | PointData) -> dict[str, Any]:
    """What a held-out number is of: the data and how rows are made of it, the noise that it is an expectation over."""
    rows = {"corpus": data.fingerprint(), "length": data.width}
    if isinstance(data, Dataset):
        rows |= {"rows": data.config.rows, "holdout": data.config.holdout}
    noise = {}
    if run.report.plan is not None:
        parts = {
            "kernel": run.report.plan.kernel,
            "schedule": run.report.plan.schedule,
            "objective": run.report.plan.objective,
        }
        noise = {name: {"op": p.contract.op, **p.config.model_dump(mode="json")} for name, p in parts.items()}
    return {**noise, "data": rows, "blueprint": digest((run.path / LOCK).read_text(encoding="utf-8"))}


def evaluate_run(
    path: Path, *, device: torch.device, batches: int | None, draws: int, weights: str, say: Say
) -> Evaluation | Likelihood:
    """The held-out bound of a run folder's newest weights."""
    run = open_run(path, device=device, compile="off", weights=weights)
    say(f"weights     {run.weights}")
    data = run.data()
    if (changed := run.changed(data)) is not None:
        say(f"warning     {changed}: the bound is one on the new text")
    return _evaluate(run, data, say, batches=batches, draws=draws)


def sample_run(
    run: Run,
    *,
    batch: int,
    length: int,
    steps: int | None,
    seed: int,
    prompt: Tensor | None = None,
    given: Conditions | None = None,
    trajectory: bool = False,
    name: str = "samples.zarr",
    notes: Mapping[str, str] | None = None,
) -> tuple[list[str], Path]:
    """Draw samples and keep them in the run folder, with ``notes`` among their attributes (docs/training.md).

    ``given`` are conditions instead of the blueprint's. Returns the texts and where they lie.
    """
    frames: list[npt.NDArray[np.int32]] = []

    def on_step(number: int, rows: Tensor) -> None:
        if trajectory:
            frames.append(rows.cpu().numpy().astype(np.int32))

    more: dict[str, Any] = {} if given is None else {"given": given}
    rows = run.engine.sample(batch, length, steps=steps, prompt=prompt, seed=seed, on_step=on_step, **more)
    texts = run.decode(rows)
    engine, tokenizer = run.engine, run.tokenizer
    assert tokenizer is not None
    extra: dict[str, Any]
    if isinstance(engine, StringEngine):
        sampler: StringSampler[Any] | Sampler = engine.edits.sampler
        lengths = (rows != engine.edits.kernel.start).sum(-1).numpy()
        extra = {"mask": None, "start": engine.edits.kernel.start, "cut": sampler.cut}
    else:
        assert engine.process is not None
        sampler = engine.process.sampler
        lengths = document_lengths(rows.numpy(), pad=tokenizer.pad, end=tokenizer.end)
        held = sampler.config if given is None else given
        told = held.model_dump(mode="json", include=set(Conditions.model_fields), exclude_defaults=True)
        extra = {"mask": engine.process.kernel.mask, **({"conditions": told} if told else {})}
        if (guide := run.plan().classifier) is not None:
            extra["classifier"] = {"op": guide.contract.op, **guide.config.model_dump(mode="json", exclude={"counts"})}
    where = write_samples(
        run.path / name,
        rows.numpy(),
        texts,
        lengths=lengths,
        trajectory=np.stack(frames) if frames else None,
        attributes={
            "sampler": run.plan().sampler.contract.op,
            "steps": steps or sampler.steps,
            "seed": seed,
            "weights": run.weights,
            "revision": revision(),
            "blueprint": digest((run.path / LOCK).read_text(encoding="utf-8")),
            "device": str(run.engine.device),
            **extra,
            "pad": tokenizer.pad,
            "end": tokenizer.end,
            "clamped": sampler.clamped,
            "evaluations": sampler.evaluations,
            **({"prompt": prompt.tolist()} if prompt is not None else {}),
            **(notes or {}),
        },
    )
    return texts, where


def sample_points(run: Run, *, batch: int, seed: int) -> tuple[Tensor, Path]:
    """Draw rows of a flow and keep them, each with its -log p, in the run folder. Returns the rows and where they lie."""
    engine = run.engine
    assert isinstance(engine, FlowEngine)
    rows = engine.sample(batch, seed=seed)
    where = write_points(
        run.path / "samples.zarr",
        rows.numpy(),
        engine.bound_rows(rows, seed=seed).numpy(),
        attributes={
            "sampler": "inverse",
            "seed": seed,
            "weights": run.weights,
            "revision": revision(),
            "blueprint": digest((run.path / LOCK).read_text(encoding="utf-8")),
            "device": str(engine.device),
        },
    )
    return rows, where
