"""``build``: a blueprint checked, proved, measured and compiled, and the run folder that the other verbs take."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sedd_graph.component.check import Check
from sedd_graph.component.progress import progress
from sedd_graph.data.config import DataConfig
from sedd_graph.data.points import PointData, open_points
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.engine import CompileMode, Engine
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.measure import Measure, measure
from sedd_graph.errors import UserError
from sedd_graph.families.strings import make_string_process
from sedd_graph.families.tokens import make_process
from sedd_graph.graph.claims import demoted
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg
from sedd_graph.runs.check import LOCK, Report, check, digest, lock_text, make_engine
from sedd_graph.store.files import new_run, write_json, write_text
from sedd_graph.verify.block_diffusion import prove_blocks
from sedd_graph.verify.classifier import check_classifier
from sedd_graph.verify.inverse import prove_inverses
from sedd_graph.verify.margin import check_margins
from sedd_graph.verify.output import check_output
from sedd_graph.verify.string_process import prove_strings
from sedd_graph.verify.tokens import prove_process

__all__ = [
    "CERTIFICATE",
    "Say",
    "build_run",
    "check_tokenizer",
    "checks_text",
    "prove",
    "provenance",
    "read_data",
    "revision",
    "write_graph",
]

Say = Callable[[str], None]
"""Where lines for the user go."""
CERTIFICATE = "certificate.json"
"""The file of a run folder that says what was proved."""


def read_data(report: Report, *, root: Path, tokenizer: Tokenizer | None = None) -> Dataset | PointData:
    """Text for a language model, points for a flow. Raises :class:`UserError`."""
    if isinstance(report.data, DataConfig):
        return open_data(report.data, root=root, tokenizer=tokenizer)
    assert report.flow is not None  # a check refuses points without a flow
    return open_points(report.data, root=root, shape=report.flow.shape)


def provenance(report: Report) -> dict[str, Any]:
    """Versions, arguments, revision and hardware, for run.json."""
    names = ["sedd_graph", "torch", "pydantic", "networkx", "einops", "zarr", "numpy", "safetensors"]
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "components": sorted({step.body.contract.distribution for _, step in report.graph.root.walk()}),  # type: ignore[union-attr]
        "revision": revision(),
    }


def revision() -> str:
    """The git revision of the code that runs, with a mark where it has been changed since; empty outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-changed" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


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
        checks, demotions = prove(report, device=device, say=say)
    report = dataclasses.replace(report, graph=demoted(report.graph, demotions))
    counted = measured(report)
    say("\n" + measure_text(counted, "row" if report.flow else "token"))
    text = lock_text(report)
    tokenizer, corpus = None, None
    if "data" in report.loaded.sections:
        data = read_data(report, root=report.loaded.root)
        corpus = data.fingerprint()
        rows = f"data        {data.train.count:,} training rows and {data.heldout.count:,} held-out rows of {data.width} {data.units.nats}s"
        if isinstance(data, Dataset):
            tokenizer = data.tokenizer
            check_tokenizer(report, tokenizer)
            rows += (
                f", {data.characters_per_token:.2f} characters per token; unigram entropy of the held-out text "
                f"{data.unigram_bits:.3f} bits per character"
            )
        say(rows)
    engine = make_engine(report, device=device, compile=compile or report.train.compile)
    if engine.process is not None:
        checks.append(fits := check_output(engine))
        if fits.holds is False:
            raise UserError(f"the head does not fit the kernel: {_listed([fits])}")
        if engine.process.classifier is not None:
            checks += (held := check_classifier(engine.process.classifier, engine.process.kernel.states))
            if wrong := [c for c in held if c.holds is False]:
                raise UserError(f"sample.classifier does not hold: {_listed(wrong)}")
    checks += check_margins(engine)
    if report.plan is not None or report.flow is not None:
        with progress("compiling"):
            say(warm_up(engine, report))
    run = new_run(runs, report.name, digest(text))
    write_text(run / "blueprint.yaml", blueprint.read_text(encoding="utf-8-sig"))
    write_graph(run, report)
    write_json(
        run / CERTIFICATE,
        {
            "checks": [dataclasses.asdict(c) for c in checks],
            "checkpointed": demotions,
            "measure": dataclasses.asdict(counted),
        },
    )
    write_json(
        run / "run.json",
        {
            **provenance(report),
            "hardware": describe_hardware(device),
            "root": str(report.loaded.root),
            "overrides": list(overrides),
            "compile": engine.compile_mode,
            "blueprint": digest(text),
            "corpus": corpus,
        },
    )
    if tokenizer is not None:
        write_text(run / TOKENIZER, tokenizer.to_json())
    return run


def write_graph(run: Path, report: Report) -> None:
    """Write the lock file of a run folder, and its graph as JSON, SVG and Mermaid."""
    write_text(run / LOCK, lock_text(report))
    write_text(run / "graph.json", to_json(report.graph))
    write_text(run / "graph.svg", to_svg(report.graph))
    write_text(run / "graph.mmd", to_mermaid(report.graph))


def prove(report: Report, *, device: torch.device, say: Say) -> tuple[list[Check], list[str]]:
    """Every claim held to numbers, and the paths of the blocks that are to be checkpointed since theirs does not hold.

    Raises :class:`UserError` with every claim that fails and is not to be answered so.
    """
    plan = report.plan
    checks = [] if plan is None else (prove_strings if plan.edits else prove_process)(plan, report.registry)
    if plan is not None and not plan.edits:
        checks += prove_blocks(report.graph, plan, report.registry)
    certificates = prove_inverses(report.graph, report.registry, device=device)
    lenient = [c for c in certificates if c.broken and c.use.on_failure == "checkpoint"]
    failing = [("the noise process does not hold", tuple(c for c in checks if c.holds is False))]
    failing += [(f"block {c.use.name!r} is not undone", c.broken) for c in certificates if c not in lenient]
    checks += [check for c in certificates for check in c.checks]
    if checks:
        say("\n" + checks_text(checks))
    broken = [f"{what}: {_listed(found)}" for what, found in failing if found]
    if broken:
        raise UserError("\n".join(broken))
    for c in lenient:
        say(f"warning     block {c.use.name!r} is checkpointed, not rebuilt: {_listed(c.broken)}")
    return checks, [c.use.path for c in lenient]


def _listed(checks: Sequence[Check]) -> str:
    return "; ".join(f"{c.name}: {c.claim} ({c.value})" for c in checks)


def measured(report: Report) -> Measure:
    """FLOPs and memory of one backward pass of the declared training."""
    rows = max(1, report.train.batch // report.train.accumulate)
    return measure(report.graph, report.registry, batch=rows, length=report.data.length)


def measure_text(found: Measure, unit: str) -> str:
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


def check_tokenizer(report: Report, tokenizer: Tokenizer) -> None:
    """Raises :class:`UserError` where the graph is not built for the tokenizer's tokens."""
    if report.plan is None:
        return
    make = make_string_process if report.plan.edits else make_process
    tokens = make(report.plan, report.registry).kernel.data_tokens
    if tokenizer.size > tokens:
        raise UserError(
            f"data.tokenizer has {tokenizer.size:,} tokens, more than the {tokens:,} that the graph is built for; "
            "raise params.tokens or choose a smaller tokenizer"
        )


def warm_up(engine: Engine, report: Report) -> str:
    """Run one small step, so that what cannot run or compile fails now."""
    import time

    began = time.perf_counter()
    rows = max(1, report.train.batch // report.train.accumulate)
    given = torch.zeros(rows, report.data.length, dtype=torch.int64)
    if report.flow is not None:
        given = torch.zeros(rows, *report.flow.shape)
        engine.model.eval()  # what starts from data must not start from this
    if engine.compile_mode == "off":
        given = given[:1]
    engine.loss(given).mean().backward()
    engine.model.zero_grad(set_to_none=True)
    engine.model.train()
    how = "eager" if engine.compile_mode == "off" else f"compiled ({engine.compile_mode})"
    return f"engine      {how}, first step {time.perf_counter() - began:.1f} s on {describe_hardware(engine.device)}"
