"""What each process of noise is worth: all of them with one network, one corpus and equal steps.

    python benchmarks/processes.py [--steps N] [--only NAME ...] [--judge FOLDER]

Every process is a shipped blueprint, brought to the bytes of the built-in corpus in rows of 128 and to the same network;
strings that change their length get those rows, too, so that all bounds are of the same text. A process ends as one line of
benchmarks/results/processes.jsonl, so that a run can be made in parts; the table is of the newest line of each that was had with the
same steps, and goes to benchmarks/results/processes.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sedd_graph.api import check, make_engine
from sedd_graph.data.rows import open_data
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.quality import documents, judged, variety
from sedd_graph.training.loop import train

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "processes.jsonl"
ROWS, LENGTH = 32, 128
LEVELS = (16, 64, 256)
BYTES = ("params.tokens=257", "data.tokenizer={op: bytes}", "data.rows=stream", f"data.length={LENGTH}")
PROCESSES: dict[str, tuple[str, tuple[str, ...]]] = {
    # what: blueprint, overrides
    "absorb, score entropy": ("sedd-tiny", ()),
    "absorb, nelbo": ("mdlm-tiny", ()),
    "absorb, masked_count": ("mdlm-tiny", ("objective={op: masked_count}",)),
    "absorb, d3pm in 1,000 steps": ("d3pm-tiny", ()),
    "absorb, blocks of 4": ("bd3lm-tiny", ("sample={op: ancestral, steps: 128}",)),
    "power": ("power-tiny", ()),
    "learned_power, genmd4": ("genmd4-tiny", ()),
    "mixture": ("mixture-tiny", ()),
    "uniform, score entropy": ("sedd-uniform-tiny", ()),
    "unigram": ("unigram-tiny", ()),
    "ordinal": ("ordinal-tiny", ()),
    "neighbours": ("neighbours-tiny", ()),
    "delete, dise": ("did-tiny", ()),
    "indel, dise": ("indel-tiny", ("process.mean_length=128",)),
}


def measure(what: str, steps: int, judge: Judge | None) -> dict[str, Any]:
    """Train ``what``, and measure what came of it."""
    name, own = PROCESSES[what]
    over = [*BYTES, *own, f"train.steps={steps}", "train.log_every=100", "train.ema=0.99", "params.dropout=0.0"]
    report = check(HERE.parent / "blueprints" / f"{name}.yaml", over)
    assert report.plan is not None
    data = open_data(report.data, root=HERE.parent / "blueprints")
    torch.manual_seed(0)
    engine = make_engine(report, device=pick_device("cpu"), compile="block")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as run:
        train(engine, data, report.train, run=Path(run))
    seconds = time.perf_counter() - start
    found = evaluate(engine, data, rows=32, batches=12, draws=2, seed=1)
    record: dict[str, Any] = {
        "process": what,
        "blueprint": name,
        "overrides": over,
        "parameters": report.parameters,
        "train_seconds": seconds,
        "bits": found.bits_per_character,
        "bits_standard_error": found.bits_standard_error,
        "sampler": report.plan.sampler.contract.op,
        "samples": {},
    }
    for levels in LEVELS:
        start = time.perf_counter()
        rows = engine.sample(ROWS, LENGTH, steps=levels, seed=1)
        spent = time.perf_counter() - start
        tokens = int((rows < data.tokenizer.size).sum())
        told = _read(rows.numpy(), data.tokenizer, judge)
        record["samples"][str(levels)] = {"seconds": spent, "tokens": tokens, **told}
    return record


def _read(rows: np.ndarray, tokenizer: Any, judge: Judge | None) -> dict[str, float]:
    told = dict(variety(rows, tokenizer))
    if judge is not None:
        told |= judged(judge.read(documents(rows, tokenizer)))
    return told


def _table(records: list[dict[str, Any]]) -> str:
    """One line a process, in Markdown."""
    first = records[0]
    lines = [
        f"{first['steps']} steps of 32 x {LENGTH} bytes of the built-in corpus, one seed, float32, {first['hardware']}, torch {first['torch']}. "
        f"Samples: {ROWS} of {LENGTH}; entropy in nats per token; judge {first['judge'] or 'none'}. "
        f"Held-out rows: entropy {first['held_out']['entropy']:.2f}"
        + (f", perplexity {first['held_out']['generative_perplexity']:.0f}." if first["judge"] else "."),
        "",
        "| process | bits per byte | trained, s | sampler | perplexity by 16, 64, 256 levels | entropy | tokens/s at 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        drawn = [r["samples"][str(levels)] for levels in LEVELS]
        perplexity = ", ".join(
            f"{d['generative_perplexity']:,.0f}" if "generative_perplexity" in d else "-" for d in drawn
        )
        entropy = ", ".join(f"{d['entropy']:.2f}" for d in drawn)
        speed = drawn[1]["tokens"] / drawn[1]["seconds"]
        lines.append(
            f"| {r['process']} | {r['bits']:.3f} ± {r['bits_standard_error']:.3f} | {r['train_seconds']:.0f} | `{r['sampler']}` "
            f"| {perplexity} | {entropy} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, record it, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", choices=list(PROCESSES), default=list(PROCESSES))
    parser.add_argument("--judge", type=Path)
    arguments = parser.parse_args()
    device = pick_device("cpu")
    judge = open_judge(arguments.judge, device=device) if arguments.judge else None
    held = open_data(check(HERE.parent / "blueprints" / "mdlm-tiny.yaml", BYTES).data, root=HERE.parent / "blueprints")
    chosen = np.linspace(0, held.heldout.count - 1, ROWS).astype(np.int64)
    common = {
        "steps": arguments.steps,
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "judge": None if judge is None else judge.facts()["name"],
        "held_out": _read(held.heldout.take(chosen, 0).tokens, held.tokenizer, judge),
    }
    for what in arguments.only:
        record = {**common, **measure(what, arguments.steps, judge)}
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {r["process"]: r for r in lines if r["steps"] == arguments.steps}
    text = _table([newest[what] for what in PROCESSES if what in newest])
    print(text)
    RESULTS.with_suffix(".md").write_text(f"# Processes at equal steps\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
