"""Bound, time and memory of each kind of invertible layer compared with a plain network, at equal parameters and equal steps.

    python benchmarks/invertibility.py [--steps N] [--seeds N] [--rounds N]

Every network is a shipped blueprint with overrides that bring its parameters within 2 % of the plain one's. All train on the
built-in corpus, with the same data, order, optimizer and steps; the bound is over the same held-out rows. Then compiled
training steps are timed, interleaved, and the bytes that autograd saves for the backward pass are counted. Prints a table in
Markdown, and writes it with all numbers to benchmarks/results/invertibility.md and .jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import BLUEPRINTS, RESULTS, append_record, bound, text_data
from interleaved import ratio
from reversible import saved_bytes, timed

from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.loop import train

STORED = "nodes.trunk.memory=store"
NETWORKS = {
    # network: blueprint, overrides, override for a second timing (with equal numbers, other time and memory)
    "plain": ("sedd-tiny", (), None),
    "two streams": ("sedd-reversible-tiny", (), STORED),
    "contractions (i-ResNet)": ("sedd-iresnet-tiny", ("params.depth=6", "params.dim=132"), STORED),
    "bijective mix": ("sedd-bijective-mix-tiny", ("params.cond=112",), None),
}


def made(what: str, *more: str) -> tuple[Engine, int]:
    """Return the engine and its number of parameters."""
    name, changes, _ = NETWORKS[what]
    report = check(BLUEPRINTS / f"{name}.yaml", [*changes, *more])
    return make_engine(report, device=pick_device("cpu"), compile="block"), report.parameters


def learn(what: str, steps: int, seed: int) -> tuple[float, float]:
    """Return the held-out bound in bits per character after ``steps``, and its standard error over sequences."""
    name, changes, _ = NETWORKS[what]
    over = [*changes, f"train.steps={steps}", f"train.seed={seed}", "train.log_every=100", "train.ema=0.99"]
    report = check(BLUEPRINTS / f"{name}.yaml", over)
    data = text_data(report, root=BLUEPRINTS)
    torch.manual_seed(seed)
    engine = make_engine(report, device=pick_device("cpu"), compile="block")
    with tempfile.TemporaryDirectory() as run:
        train(engine, data, report.train, run=Path(run))
    found = bound(engine, data, rows=64, batches=16, draws=4)
    return found.bits_per_character, found.bits_standard_error


def main() -> None:
    """Train, time, count, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    bounds = {what: [learn(what, arguments.steps, seed) for seed in range(arguments.seeds)] for what in NETWORKS}

    ways = {what: made(what) for what in NETWORKS}
    ways |= {f"{what}, stored": made(what, more) for what, (_, _, more) in NETWORKS.items() if more}
    tokens = torch.randint(0, 100, (32, 128), generator=torch.Generator().manual_seed(0))
    seconds = timed({way: engine for way, (engine, _) in ways.items()}, tokens, arguments.rounds)
    memory = {way: saved_bytes(engine, tokens) for way, (engine, _) in ways.items()}

    hardware = describe_hardware(pick_device("cpu"))
    lines = [
        f"{arguments.steps} steps of 32 x 128 characters of the built-in corpus, {arguments.seeds} seed(s), float32, {hardware}, torch {torch.__version__}.",
        "",
        "| network | parameters | bits per character | step, relative to plain | saved for backward |",
        "|---|---|---|---|---|",
    ]
    record: dict[str, object] = {"hardware": hardware, "torch": torch.__version__, **vars(arguments)}
    for way, (_, parameters) in ways.items():
        what = way.removesuffix(", stored")
        middle, error = ratio(seconds[way], seconds["plain"])
        mean = statistics.mean(bits for bits, _ in bounds[what])
        cell = f"{mean:.3f} ± {max(e for _, e in bounds[what]):.3f}" if way == what else "the same"
        lines.append(
            f"| {way} | {parameters:,} | {cell} | {middle:.2f} ± {error:.2f} | {memory[way] / 2**20:.1f} MiB |"
        )
        record[way] = {"seconds": seconds[way], "kept": memory[way], "bounds": bounds[what]}
    text = "\n".join(lines)
    print(text)
    (RESULTS / "invertibility.md").write_text(f"# Invertible layers beside plain ones\n\n{text}\n", encoding="utf-8")
    append_record("invertibility", record)


if __name__ == "__main__":
    main()
