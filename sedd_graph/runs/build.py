"""``build``: a blueprint checked, proved, measured and compiled, and the run folder that the other verbs take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sedd_graph.component.check import Check
from sedd_graph.component.progress import progress
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.measure import Measure, measure
from sedd_graph.engine.network import CompileMode
from sedd_graph.errors import UserError
from sedd_graph.families.table import process_class
from sedd_graph.graph.claims import demoted
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg
from sedd_graph.graph.model import Op
from sedd_graph.runs.check import LOCK, Report, check, digest, lock_text
from sedd_graph.runs.open import CERTIFICATE, check_tokenizer, make_engine, read_data
from sedd_graph.runs.provenance import provenance
from sedd_graph.store.files import new_run, write_json, write_text
from sedd_graph.verify.inverse import prove_inverses
from sedd_graph.verify.margin import check_margins

__all__ = ["Say", "build_run", "checks_text", "prove_all", "write_graph"]

Say = Callable[[str], None]
"""Prints one line for the user."""


def build_run(
    blueprint: Path,
    overrides: Sequence[str],
    *,
    runs: Path,
    device: torch.device,
    compile: CompileMode | None,
    say: Say,
) -> Path:
    """Check, prove, measure, compile, and write a run folder. Returns its path."""
    report = check(blueprint, overrides)
    say(str(report))
    with progress("proving"):
        checks, demotions = prove_all(report, device=device, say=say)
    report = dataclasses.replace(report, graph=demoted(report.graph, demotions))
    rows = max(1, report.train.batch // report.train.accumulate)  # of one backward pass
    counted = measure(report.graph, report.registry, batch=rows, length=report.data.length)
    say("\n" + _measure_text(counted, "token" if report.plan is None else report.plan.unit))
    data = None
    if "data" in report.loaded.sections:
        data = read_data(report, root=report.loaded.root)
        say(_data_text(data))
    engine = make_engine(report, device=device, compile=compile or report.train.compile)
    if isinstance(data, Dataset):
        check_tokenizer(engine, data.tokenizer)
    checks += (outputs := engine.process.check_network(engine.network))
    if wrong := [c for c in outputs if c.holds is False]:
        raise UserError(f"the network does not fit the process: {_failures(wrong)}")
    checks += check_margins(engine.network)
    if report.plan is not None:
        with progress("compiling"):
            say(_warm_up(engine, rows, report.data.length))
    certificate = {
        "checks": [dataclasses.asdict(c) for c in checks],
        "checkpointed": demotions,
        "measure": dataclasses.asdict(counted),
    }
    return _write_run(runs, report, blueprint, overrides, certificate, data, engine)


def _data_text(data: Dataset | PointData) -> str:
    text = f"data        {data.train.count:,} training rows and {data.heldout.count:,} held-out rows of {data.width} {data.units.nats}s"
    if isinstance(data, Dataset):
        text += (
            f", {data.characters_per_token:.2f} characters per token; unigram entropy of the held-out text "
            f"{data.unigram_bits:.3f} bits per character"
        )
    return text


def _write_run(
    runs: Path,
    report: Report,
    blueprint: Path,
    overrides: Sequence[str],
    certificate: Mapping[str, object],
    data: Dataset | PointData | None,
    engine: Engine,
) -> Path:
    """Write the run folder. Returns its path."""
    text = lock_text(report)
    run = new_run(runs, report.name, digest(text))
    write_text(run / "blueprint.yaml", blueprint.read_text(encoding="utf-8-sig"))
    write_graph(run, report)
    write_json(run / CERTIFICATE, certificate)
    facts = {
        "hardware": describe_hardware(engine.device),
        "root": str(report.loaded.root),
        "overrides": list(overrides),
        "compile": engine.compile_mode,
        "blueprint": digest(text),
        "corpus": None if data is None else data.fingerprint(),
    }
    ops = [step.body for _, step in report.graph.root.walk() if isinstance(step.body, Op)]
    write_json(run / "run.json", provenance(op.contract.distribution for op in ops) | facts)
    if isinstance(data, Dataset):
        write_text(run / TOKENIZER, data.tokenizer.to_json())
    return run


def write_graph(run: Path, report: Report) -> None:
    """Write the lock file of a run folder, and its graph as JSON, SVG and Mermaid."""
    write_text(run / LOCK, lock_text(report))
    for name, draw in (("graph.json", to_json), ("graph.svg", to_svg), ("graph.mmd", to_mermaid)):
        write_text(run / name, draw(report.graph))


def prove_all(report: Report, *, device: torch.device, say: Say) -> tuple[list[Check], list[str]]:
    """Every claim held to numbers, and the paths of the blocks that are to be checkpointed since theirs does not hold.

    Raises :class:`UserError` with every claim that fails and is not to be answered so.
    """
    plan = report.plan
    checks = [] if plan is None else process_class(plan.family).prove(plan, report.graph, report.registry)
    certificates = prove_inverses(report.graph, report.registry, device=device)
    lenient = [c for c in certificates if c.broken and c.use.on_failure == "checkpoint"]
    failing = [("the noise process does not hold", tuple(c for c in checks if c.holds is False))]
    failing += [(f"block {c.use.name!r} is not undone", c.broken) for c in certificates if c not in lenient]
    checks += [check for c in certificates for check in c.checks]
    if checks:
        say("\n" + checks_text(checks))
    broken = [f"{what}: {_failures(found)}" for what, found in failing if found]
    if broken:
        raise UserError("\n".join(broken))
    for c in lenient:
        say(f"warning     block {c.use.name!r} is checkpointed, not rebuilt: {_failures(c.broken)}")
    return checks, [c.use.path for c in lenient]


def _failures(checks: Sequence[Check]) -> str:
    return "; ".join(f"{c.name}: {c.claim} ({c.value})" for c in checks)


def _measure_text(found: Measure, unit: str) -> str:
    gib = 2**30
    return (
        f"compute     {found.flops_per_token:,} FLOPs per {unit} forward, {3 * found.flops_per_token:,} in training\n"
        f"memory      about {(found.state_bytes + found.saved_bytes) / gib:.2f} GiB to train in float32: {found.state_bytes / gib:.2f} for weights, "
        f"gradients, moments and average, {found.saved_bytes / gib:.2f} kept for backward ({found.batch} rows of {found.length})"
    )


def checks_text(checks: Sequence[Check]) -> str:
    """One line for each check, as the console shows them."""
    width = max(len(c.name) for c in checks)
    marks = {True: "holds", False: "FAILS", None: "note "}
    return "\n".join(
        ["claims"] + [f"  {marks[c.holds]}  {c.name:<{width}}  {c.claim}: {c.value}  [{c.how}]" for c in checks]
    )


def _warm_up(engine: Engine, rows: int, length: int) -> str:
    """Run one small step, so that what cannot run or compile fails now."""
    began = time.perf_counter()
    given = engine.process.example(rows, length)
    if not engine.process.compiles:
        engine.model.eval()  # layers that are initialised from data must not be initialised from this
    if engine.compile_mode == "off":
        given = given[:1]
    engine.loss(given).mean().backward()
    engine.model.zero_grad(set_to_none=True)
    engine.model.train()
    how = "eager" if engine.compile_mode == "off" else f"compiled ({engine.compile_mode})"
    return f"engine      {how}, first step {time.perf_counter() - began:.1f} s on {describe_hardware(engine.device)}"
