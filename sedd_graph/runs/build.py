"""Subcommand ``build``: check, verify and compile a blueprint, estimate its cost, and write its run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sedd_graph.component.check import Proof
from sedd_graph.component.progress import progress
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.network import CompileMode
from sedd_graph.families.table import process_class
from sedd_graph.graph.claims import demoted
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg
from sedd_graph.graph.memory import planned
from sedd_graph.graph.model import Op
from sedd_graph.runs.check import LOCK, Report, check, digest, lock_text
from sedd_graph.runs.memory import measure_text, measure_training, require_training_memory
from sedd_graph.runs.memory_plan import budget_plan
from sedd_graph.runs.open import CERTIFICATE, check_tokenizer, make_engine, read_data, write_run_manifest
from sedd_graph.runs.prove import prove_all, prove_network
from sedd_graph.runs.provenance import provenance
from sedd_graph.runs.token_cache import PendingCache
from sedd_graph.store.files import write_json, write_text
from sedd_graph.store.run_folder import new_run, require_utf8
from sedd_graph.verify.margin import margins

__all__ = ["build_run", "write_graph"]


def build_run(
    blueprint: Path,
    overrides: Sequence[str],
    *,
    runs: Path,
    device: torch.device,
    compile: CompileMode | None,
    proof: Proof = "full",
    ignore_memory: bool = False,
    say: Callable[[str], None],
) -> Path:
    """Check, verify and compile a blueprint, and write its run folder.

    Checking validates the blueprint, and verification tests its diffusion process and derived inverses numerically. The
    compute and memory that training needs are estimated and printed.

    Args:
        blueprint: The blueprint file.
        overrides: Changes to the blueprint as ``key=value``, such as ``train.steps=100``.
        runs: Folder in which the run folder is created.
        device: Device on which inverses are verified and one trial training step is run (and compiled).
        compile: Scope of ``torch.compile``: ``auto``, ``block``, ``whole`` or ``off``, as in
            :meth:`sedd_graph.engine.network.Network.compile`; None takes ``train.compile`` of the blueprint.
        proof: Strength of the verification of the process: ``full``, or ``quick`` with fewer cases.
        ignore_memory: True to print a warning instead of raising an error if training needs more memory than the device
            has.
        say: Function that prints a line for the user.

    Returns:
        The path of the run folder.

    Raises:
        BlueprintError: The blueprint is not valid.
        UserError: A verification fails, training does not fit into memory, or the data cannot be read.
    """
    report = check(blueprint, overrides)
    for path in (runs, report.loaded.root):
        require_utf8(path)
    source = blueprint.read_text(encoding="utf-8-sig")
    say(str(report))
    with progress("proving"):
        checks, demotions = prove_all(report, device=device, proof=proof, say=say)
    report = dataclasses.replace(report, graph=demoted(report.graph, demotions))
    compiled = (compile or report.train.compile) != "off"
    with progress("measuring"):
        plan = budget_plan(report, device=device, compiled=compiled, say=say)
    if plan is not None:
        report = dataclasses.replace(report, graph=planned(report.graph, plan.modes))
    cost = measure_training(report)
    if plan is not None:
        cost = dataclasses.replace(cost, saved_bytes=plan.size)
    say("\n" + measure_text(cost, report))
    if process_class(report.plan.family).trains:
        require_training_memory(cost, report, device, ignore=ignore_memory, say=say)
    data, tokens = None, PendingCache()
    if "data" in report.loaded.sections:
        data = read_data(report, root=report.loaded.root, cache=tokens)
        say(f"data        {data.describe()}")
    engine = make_engine(report, device=device, compile=compile or report.train.compile)
    tokenizer = None if data is None else data.tokenizer
    if tokenizer is not None:
        check_tokenizer(engine, tokenizer)
    checks += prove_network(engine)
    for code, margin in margins(engine.network).items():
        say(f"margin      {code}: {margin}")
    if engine.process.trains:
        with progress("compiling"):
            say(_warm_up(engine, cost.batch, cost.length))
    digest_ = digest(lock_text(report))
    facts = {
        **_origin(report, engine.device),
        "overrides": list(overrides),
        "compile": engine.compile_mode,
        "blueprint": digest_,
        "corpus": None if data is None else data.fingerprint(),
    }

    def write(run: Path) -> None:
        write_text(run / "blueprint.yaml", source)
        write_graph(run, report)
        found = {"checks": [dataclasses.asdict(c) for c in checks], "checkpointed": demotions}
        if plan is not None:
            found["memory"] = {name: dataclasses.asdict(mode) for name, mode in plan.modes.items()}
        write_json(run / CERTIFICATE, {**found, "measure": dataclasses.asdict(cost)})
        write_json(run / "run.json", facts)
        if tokenizer is not None:
            write_text(run / TOKENIZER, tokenizer.to_json())
        tokens.write(run)
        write_run_manifest(run)

    return new_run(runs, report.name, digest_, write)


def _origin(report: Report, device: torch.device) -> Mapping[str, object]:
    """Return the facts of run.json that do not depend on the data."""
    ops = [step.body for _, step in report.graph.root.walk() if isinstance(step.body, Op)]
    facts = {"hardware": describe_hardware(device), "root": str(report.loaded.root)}
    return provenance(op.contract.distribution for op in ops) | facts


def write_graph(run: Path, report: Report) -> None:
    """Write the lock file, and the network graph as JSON, SVG and Mermaid, to a run folder.

    The lock file is the blueprint with all default values and component versions.

    Args:
        run: The run folder.
        report: Result of checking the blueprint.
    """
    write_text(run / LOCK, lock_text(report))
    for name, draw in (("graph.json", to_json), ("graph.svg", to_svg), ("graph.mmd", to_mermaid)):
        write_text(run / name, draw(report.graph))


def _warm_up(engine: Engine, rows: int, length: int) -> str:
    """Run one trial step, so that a model that cannot run or compile fails now; return a line for the user."""
    began = time.perf_counter()
    given = engine.process.example(rows, length)
    if not engine.process.compiles:
        engine.model.eval()  # layers that are initialised from data must not be initialised from these rows
    if engine.compile_mode == "off":
        given = given[:1]
    engine.loss(given).mean().backward()
    engine.model.zero_grad(set_to_none=True)
    engine.model.train()
    how = "eager" if engine.compile_mode == "off" else f"compiled ({engine.compile_mode})"
    return f"engine      {how}, first step {time.perf_counter() - began:.1f} s on {describe_hardware(engine.device)}"
