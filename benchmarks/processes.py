"""What each process of noise is worth: all of them with one network, one corpus and equal steps.

    python benchmarks/processes.py [--steps N] [--only NAME ...] [--judge FOLDER]

Every process is a shipped blueprint, brought to the bytes of the built-in corpus in rows of 128 and to the same network,
so that all bounds are of the same text. Strings that change their length are trained on lines of it, as they are meant to be: their bounds
include where a line ends, and compare with each other alone. A process ends as one line of
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

from sedd_graph.data.rows import open_data
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.quality import diversity, documents, judge_statistics
from sedd_graph.runs.check import check, make_engine
from sedd_graph.training.loop import train

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "processes.jsonl"
ROWS = 32
LEVELS = (16, 64, 256)
SHARED = (
    "params.tokens=257",
    "data.tokenizer={op: bytes}",
    "params.dim=64",
    "params.heads=2",
    "params.cond=64",
    "params.dropout=0.0",
)
PROCESSES: dict[str, tuple[str, tuple[str, ...]]] = {
    # what: blueprint, overrides
    "absorb, score entropy": ("sedd-tiny", ()),
    "absorb, nelbo": ("mdlm-tiny", ()),
    "absorb, masked_count": ("mdlm-tiny", ("objective={op: masked_count}",)),
    "absorb, d3pm in 1,000 steps": ("d3pm-tiny", ()),
    "absorb, blocks of 4": ("bd3lm-tiny", ("sample={op: ancestral, steps: 128}",)),
    "power": ("power-tiny", ()),
    "spindle": ("spindle-tiny", ()),
    "learned_power, genmd4": ("genmd4-tiny", ()),
    "mixture": ("mixture-tiny", ()),
    "uniform, score entropy": ("sedd-uniform-tiny", ()),
    "unigram": ("unigram-tiny", ()),
    "ordinal": ("ordinal-tiny", ()),
    "neighbours": ("neighbours-tiny", ()),
    "delete, dise": ("did-tiny", ()),
    "indel, dise": ("indel-tiny", ()),
    "mask_delete, flexmdm": ("flexmdm-tiny", ()),
    "edit_flow (a loose bound)": ("editflow-tiny", ()),
}


def measure(what: str, steps: int, judge: Judge | None) -> dict[str, Any]:
    """Train ``what``, and measure what came of it."""
    name, own = PROCESSES[what]
    over = [*SHARED, *own, f"train.steps={steps}", "train.log_every=100", "train.ema=0.99"]
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
        "rows": report.data.rows,
        "length": report.data.length,
        "held_out": _held_out(data, judge),
        "samples": {},
    }
    for levels in LEVELS:
        start = time.perf_counter()
        rows = engine.sample(ROWS, report.data.length, steps=levels, seed=1)
        spent = time.perf_counter() - start
        tokens = int((rows < data.tokenizer.size).sum())
        told = _read(rows.numpy(), data.tokenizer, judge)
        record["samples"][str(levels)] = {"seconds": spent, "tokens": tokens, **told}
    return record


def _held_out(data: Any, judge: Judge | None) -> dict[str, float]:
    chosen = np.linspace(0, data.heldout.count - 1, ROWS).astype(np.int64)
    return _read(data.heldout.take(chosen, 0).tokens, data.tokenizer, judge)


def _read(rows: np.ndarray, tokenizer: Any, judge: Judge | None) -> dict[str, float]:
    told = dict(diversity(rows, tokenizer))
    if judge is not None:
        told |= judge_statistics(judge.read(documents(rows, tokenizer)))
    return told


def _table(records: list[dict[str, Any]]) -> str:
    """One line a process, in Markdown."""
    first = records[0]
    lines = [
        f"{first['steps']} steps of 32 rows of the built-in corpus as bytes, one seed, float32, {first['hardware']}, torch {first['torch']}. "
        f"{ROWS} samples each; entropy in nats per token; the judge of perplexity is {first['judge'] or 'none'}.",
        "",
        "| process | bits per byte | training, s | sampler | perplexity by 16, 64, 256 levels | entropy by them | tokens/s at 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("stream", "lines"):
        of_kind = [r for r in records if r["rows"] == kind]
        for r in of_kind:
            drawn = [r["samples"][str(levels)] for levels in LEVELS]
            speed = drawn[1]["tokens"] / drawn[1]["seconds"]
            lines.append(
                f"| {r['process']} | {r['bits']:.3f} ± {r['bits_standard_error']:.3f} | {r['train_seconds']:.0f} | `{r['sampler']}` "
                f"| {_told(drawn, 'generative_perplexity', ',.0f')} | {_told(drawn, 'entropy', '.2f')} | {speed:,.0f} |"
            )
        if of_kind:
            held = [of_kind[0]["held_out"]]
            what = "held-out rows of 128" if kind == "stream" else "held-out lines"
            lines.append(
                f"| *{what}* | | | | {_told(held, 'generative_perplexity', ',.0f')} | {_told(held, 'entropy', '.2f')} | |"
            )
    return "\n".join(lines)


def _told(of: list[dict[str, float]], name: str, form: str) -> str:
    return ", ".join(format(numbers[name], form) if name in numbers else "-" for numbers in of)


def main() -> None:
    """Measure what is asked for, record it, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", choices=list(PROCESSES), default=list(PROCESSES))
    parser.add_argument("--judge", type=Path)
    arguments = parser.parse_args()
    device = pick_device("cpu")
    judge = open_judge(arguments.judge, device=device) if arguments.judge else None
    common = {
        "steps": arguments.steps,
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "judge": None if judge is None else judge.facts().name,
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
