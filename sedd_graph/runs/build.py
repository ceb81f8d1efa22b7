"""Subcommand ``build``: check, verify and compile a blueprint, estimate its cost, and write its run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sedd_graph.component.check import Proof
from sedd_graph.component.progress import progress
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.network import CompileMode
from sedd_graph.errors import UserError
from sedd_graph.families.table import process_class
from sedd_graph.graph.claims import demoted
from sedd_graph.graph.memory import planned
from sedd_graph.graph.model import Op
from sedd_graph.runs.check import Report, check, digest, lock_text
from sedd_graph.runs.distilled import distiller
from sedd_graph.runs.graph_files import write_graph
from sedd_graph.runs.memory import measure_text, measure_training, require_training_memory
from sedd_graph.runs.memory_plan import budget_plan
from sedd_graph.runs.open import CERTIFICATE, Run, check_tokenizer, make_engine, read_data, write_run_manifest
from sedd_graph.runs.prove import prove_all, prove_network, prove_student
from sedd_graph.runs.provenance import provenance
from sedd_graph.runs.start import read_start
from sedd_graph.runs.token_cache import PendingCache
from sedd_graph.runs.trial import try_step
from sedd_graph.store.files import write_json, write_text
from sedd_graph.store.run_folder import new_run, require_utf8
from sedd_graph.verify.margin import margins

__all__ = ["build_run"]


def build_run(
    blueprint: Path,
    overrides: Sequence[str],
    *,
    runs: Path,
    device: torch.device,
    compile: CompileMode | None,
    proof: Proof = "full",
    ignore_memory: bool = False,
    processes: int | None = None,
    weights: Path | None = None,
    table: str | None = None,
    teacher: Run | None = None,
    say: Callable[[str], None],
) -> Path:
    """Check, verify and compile a blueprint, and write its run folder.

    Checking validates the blueprint, and verification tests its diffusion process and derived inverses numerically. The
    compute and memory that training needs are estimated and printed, and a step of training is run and measured.

    Args:
        blueprint: The blueprint file.
        overrides: Changes to the blueprint as ``key=value``, such as ``train.steps=100``.
        runs: Folder in which the run folder is created.
        device: Device on which inverses are verified and a trial step of training is run (and compiled).
        compile: Scope of ``torch.compile``: ``auto``, ``block``, ``whole``, ``cuda_graphs`` or ``off``, as in
            :meth:`sedd_graph.engine.network.Network.compile`; None takes ``train.compile`` of the blueprint.
        proof: Strength of the verification of the process: ``full``, or ``quick`` with fewer cases.
        ignore_memory: True to print a warning instead of raising an error if training needs more memory than the device
            has.
        processes: Number of processes that will train: memory is estimated and measured for the rows of one of them. None:
            the number that ``train.parallel`` of the blueprint declares, else 1.
        weights: Weights that training starts from (:func:`sedd_graph.runs.start.read_start`); None for random ones.
        table: With ``weights``: a table of names, a file or the name of a shipped one.
        teacher: The run that the new one is distilled from, with its weights, tokenizer and data; None for training on data.
        say: Function that prints a line for the user.

    Returns:
        The path of the run folder.

    Raises:
        BlueprintError: The blueprint is not valid.
        UserError: A verification fails, training does not fit into memory, the data cannot be read, or the batch cannot be
            divided by the processes.
    """
    report = check(blueprint, overrides)
    config = report.train
    processes = processes or (config.parallel.replicate or 1) * (config.parallel.shard or 1)
    if config.batch % (config.accumulate * processes):
        raise UserError(
            f"train.batch = {config.batch} is not a multiple of accumulate * processes = {config.accumulate} * {processes}"
        )
    for path in (runs, report.loaded.root):
        require_utf8(path)
    source = blueprint.read_text(encoding="utf-8-sig")
    say(str(report))
    weights = weights if teacher is None else teacher.path
    start = None if weights is None else read_start(report, weights, table, say)
    with progress("proving"):
        checks, demotions = prove_all(report, device=device, proof=proof, say=say)
        checks += prove_student(report, say)
    # `train` ignores the section distill of a run without a teacher
    objective = None if teacher is None else report.distillation
    report = dataclasses.replace(report, graph=demoted(report.graph, demotions), distillation=objective)
    compiled = (compile or report.train.compile) != "off"
    with progress("measuring"):
        plan = budget_plan(report, device=device, compiled=compiled, say=say, processes=processes)
    if plan is not None:
        report = dataclasses.replace(report, graph=planned(report.graph, plan.modes))
    cost = measure_training(report, processes, None if plan is None else plan.size)
    say("\n" + measure_text(cost, report))
    if process_class(report.plan.family).trains:
        require_training_memory(cost, report, device, ignore=ignore_memory, say=say)
    data, tokens = None, PendingCache()
    if "data" in report.loaded.sections:
        known = None if start is None else start.tokenizer(report) if teacher is None else teacher.tokenizer
        root = report.loaded.root if teacher is None else teacher.data_root()
        data = read_data(report, root=root, cache=tokens, tokenizer=known)
        say(f"data        {data.describe()}")
        if start is not None and (warning := start.other_tokenizer(data.tokenizer)):
            say(f"warning     {warning}")
    mode = compile or report.train.compile
    engine = make_engine(report, device=device, compile=mode if teacher is None else "off")
    tokenizer = None if data is None else data.tokenizer
    if tokenizer is not None:
        check_tokenizer(engine, tokenizer)
    initial = None if start is None else start.load(engine)
    if teacher is not None:
        engine = distiller(engine, report)
        engine.compile(mode)
    checks += prove_network(engine)
    for code, margin in margins(engine.network).items():
        say(f"margin      {code}: {margin}")
    trial = None
    if engine.process.trains:
        with progress("compiling"):
            trial = try_step(engine, data, report.train, cost, processes=processes)
        say(trial.text(engine.device))
    digest_ = digest(lock_text(report))
    facts = {
        **_origin(report, engine.device),
        "overrides": list(overrides),
        "compile": engine.compile_mode,
        "blueprint": digest_,
        "corpus": None if data is None else data.fingerprint(),
        **({} if start is None else {"weights": start.facts()}),
        **({} if teacher is None else {"teacher": teacher.path.name, "root": str(teacher.root)}),
    }

    def write(run: Path) -> None:
        write_text(run / "blueprint.yaml", source)
        write_graph(run, report)
        tried = {} if trial is None else {"trial": dataclasses.asdict(trial)}
        found = {"checks": [dataclasses.asdict(c) for c in checks], "checkpointed": demotions}
        if plan is not None:
            found["memory"] = {name: dataclasses.asdict(mode) for name, mode in plan.modes.items()}
        write_json(run / CERTIFICATE, {**found, "measure": dataclasses.asdict(cost), **tried})
        write_json(run / "run.json", facts)
        if tokenizer is not None:
            write_text(run / TOKENIZER, tokenizer.to_json())
        tokens.write(run)
        if start is not None and initial is not None:
            start.write(run, initial)
        write_run_manifest(run)

    return new_run(runs, report.name, digest_, write)


def _origin(report: Report, device: torch.device) -> Mapping[str, object]:
    """Return the facts of run.json that do not depend on the data."""
    ops = [step.body for _, step in report.graph.root.walk() if isinstance(step.body, Op)]
    facts = {"hardware": describe_hardware(device), "root": str(report.loaded.root)}
    return provenance(op.contract.distribution for op in ops) | facts
