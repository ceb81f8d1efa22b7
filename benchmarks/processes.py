"""Bound, samples and speed of every noise process, with one network, one corpus and equal steps.

    python benchmarks/processes.py [--steps N] [--only NAME ...] [--judge FOLDER]

Every process is a shipped blueprint, with overrides for the bytes of the built-in corpus in rows of 128 and for the same
network, so that all bounds are of the same text. String processes are trained on lines of it: their bounds include where a
line ends, and compare only with each other. The result of a process is one line of benchmarks/results/processes.jsonl, so
that processes can be measured in several runs; the table of the newest line of each with the same number of steps is written
to benchmarks/results/processes.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import BLUEPRINTS, RESULTS, append_record, bound, data_config, text_data

from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.quality import diversity, documents, judge_statistics
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.loop import train

ROWS = 32
LEVELS = (16, 64, 256)
SHARED = (
    "params.tokens=257",
    "data.tokenizer={op: bytes}",
    "params.dim=64",
    "params.heads=2",
    "params.dropout=0.0",
)
CONDITION = "params.cond=64"
"""Width of the time embedding, of all networks but that of Diffusion-LM, where it is ``params.dim``."""
VECTORS = ("data.length=128", "train.batch=32")
PROCESSES: dict[str, tuple[str, tuple[str, ...]]] = {
    # process: blueprint, overrides
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
    "steps, d3pm's Gaussian": (
        "d3pm-gaussian-tiny",
        ("process.steps=256", "objective.steps=256", "process.beta_last=0.08"),
    ),
    "absorb, masked_count, tokens as codewords": (
        "bijective-text-tiny",
        (
            "blocks.text.nodes.code.op=digit_code",
            "blocks.text.nodes.code.with.base=5",
            "blocks.text.nodes.code.with.digits=4",
        ),
    ),
    "vectors, Diffusion-LM": ("diffusion-lm-tiny", (*VECTORS, "params.positions=128")),
    "vectors, LangFlow": ("langflow-tiny", VECTORS),
    "delete, dise": ("did-tiny", ()),
    "indel, dise": ("indel-tiny", ()),
    "mask_delete, flexmdm": ("flexmdm-tiny", ()),
    "edit_flow (a loose bound)": ("editflow-tiny", ()),
}


def measure(what: str, steps: int, judge: Judge | None) -> dict[str, Any]:
    """Train one process, evaluate it, and draw samples with each number of steps."""
    name, own = PROCESSES[what]
    condition = () if name == "diffusion-lm-tiny" else (CONDITION,)
    over = [*SHARED, *condition, *own, f"train.steps={steps}", "train.log_every=100", "train.ema=0.99"]
    report = check(BLUEPRINTS / f"{name}.yaml", over)
    config, data = data_config(report), text_data(report, root=BLUEPRINTS)
    torch.manual_seed(0)
    engine = make_engine(report, device=pick_device("cpu"), compile="block")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as run:
        train(engine, data, report.train, run=Path(run))
    seconds = time.perf_counter() - start
    found = bound(engine, data, rows=32, batches=12, draws=2)
    record: dict[str, Any] = {
        "process": what,
        "blueprint": name,
        "overrides": over,
        "parameters": report.parameters,
        "train_seconds": seconds,
        "bits": found.bits_per_character,
        "bits_standard_error": found.bits_standard_error,
        "measures": dict(found.measures),
        "sampler": report.plan.sampler_op,
        "rows": config.rows,
        "length": config.length,
        "held_out": _held_out(data, judge),
        "samples": {},
    }
    for levels in LEVELS:
        start = time.perf_counter()
        rows = engine.sample(ROWS, config.length, steps=levels, seed=1)
        spent = time.perf_counter() - start
        tokens = int((rows < data.tokenizer.size).sum())
        quality = _quality(rows.numpy(), data.tokenizer, judge)
        record["samples"][str(levels)] = {"seconds": spent, "tokens": tokens, **quality}
    return record


def _held_out(data: Dataset, judge: Judge | None) -> dict[str, float]:
    chosen = np.linspace(0, data.heldout.count - 1, ROWS).astype(np.int64)
    return _quality(data.heldout.take(chosen, 0).tokens, data.tokenizer, judge)


def _quality(rows: npt.NDArray[np.int64], tokenizer: Tokenizer, judge: Judge | None) -> dict[str, float]:
    """Return entropy and repetition of rows, and their perplexity under ``judge``."""
    numbers = dict(diversity(rows, tokenizer))
    if judge is not None:
        numbers |= judge_statistics(judge.read(documents(rows, tokenizer)))
    return numbers


def _table(records: list[dict[str, Any]]) -> str:
    """Return one line per process, in Markdown."""
    first = records[0]
    lines = [
        f"{first['steps']} steps of 32 rows of the built-in corpus as bytes, one seed, float32, {first['hardware']}, torch {first['torch']}. "
        f"{ROWS} samples each; entropy in nats per token; perplexity is under {first['judge'] or 'none'}.",
        "",
        "| process | bits per byte | rounding | training, s | sampler | perplexity at 16, 64, 256 steps | entropy, nats, at 16, 64, 256 steps | tokens/s at 64 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("stream", "lines"):
        of_kind = [r for r in records if r["rows"] == kind]
        for r in of_kind:
            drawn = [r["samples"][str(levels)] for levels in LEVELS]
            speed = drawn[1]["tokens"] / drawn[1]["seconds"]
            lines.append(
                f"| {r['process']} | {r['bits']:.3f} ± {r['bits_standard_error']:.3f} | {_rounding(r)} | {r['train_seconds']:.0f} | `{r['sampler']}` "
                f"| {_cells(drawn, 'generative_perplexity', ',.0f')} | {_cells(drawn, 'entropy', '.2f')} | {speed:,.0f} |"
            )
        if of_kind:
            held = [of_kind[0]["held_out"]]
            what = "held-out rows of 128" if kind == "stream" else "held-out lines"
            lines.append(
                f"| *{what}* | | | | | {_cells(held, 'generative_perplexity', ',.0f')} | {_cells(held, 'entropy', '.2f')} | |"
            )
    return "\n".join(lines)


def _rounding(record: dict[str, Any]) -> str:
    """Return the share of tokens that rounding recovers from clean vectors, for processes on vectors."""
    found = record.get("measures", {}).get("rounding_accuracy")
    return "" if found is None else f"{100 * found:.2f} %"


def _cells(of: list[dict[str, float]], name: str, form: str) -> str:
    return ", ".join(format(numbers[name], form) if name in numbers else "-" for numbers in of)


def main() -> None:
    """Measure the chosen processes, record, and print the table of all."""
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
        append_record("processes", record)
    lines = [json.loads(line) for line in (RESULTS / "processes.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = {r["process"]: r for r in lines if r["steps"] == arguments.steps}
    text = _table([newest[what] for what in PROCESSES if what in newest])
    print(text)
    (RESULTS / "processes.md").write_text(f"# Processes at equal steps\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
