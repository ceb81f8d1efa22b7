"""What invertible layers cost and keep: each kind beside the plain network, at equal parameters and equal steps.

    python benchmarks/invertibility.py [--steps N] [--seeds N] [--rounds N]

Every network is a shipped blueprint with overrides that bring its parameters within 2 % of the plain one's. All train on the
built-in corpus, with the same data, order, optimizer and steps; the bound is over the same held-out rows. Then, in one run and in an order that
rotates, training steps are timed (compiled), and what autograd keeps for the backward pass is counted. Prints a
table in Markdown, and writes it with all numbers to benchmarks/results/invertibility.md and .jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from reversible import HERE, kept, timed
from turns import ratio

from sedd_graph.data.rows import open_data
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.loop import train

STORED = "nodes.trunk.memory=store"
NETWORKS = {
    # what: blueprint, overrides, how it is run another time (the numbers are the same, time and memory are not)
    "plain": ("sedd-tiny", (), None),
    "two streams": ("sedd-reversible-tiny", (), STORED),
    "contractions (i-ResNet)": ("sedd-iresnet-tiny", ("params.depth=6", "params.dim=132"), STORED),
    "bijective mix": ("sedd-bijective-mix-tiny", ("params.cond=112",), None),
}


def made(what: str, *more: str) -> tuple[Engine, int]:
    """The engine and its number of parameters."""
    name, changes, _ = NETWORKS[what]
    report = check(HERE.parent / "blueprints" / f"{name}.yaml", [*changes, *more])
    return make_engine(report, device=pick_device("cpu"), compile="block"), report.parameters


def learn(what: str, steps: int, seed: int) -> tuple[float, float]:
    """Held-out bound in bits per character after ``steps``, and its standard error over sequences."""
    name, changes, _ = NETWORKS[what]
    over = [*changes, f"train.steps={steps}", f"train.seed={seed}", "train.log_every=100", "train.ema=0.99"]
    report = check(HERE.parent / "blueprints" / f"{name}.yaml", over)
    data = open_data(report.data, root=HERE.parent / "blueprints")
    torch.manual_seed(seed)
    engine = make_engine(report, device=pick_device("cpu"), compile="block")
    with tempfile.TemporaryDirectory() as run:
        train(engine, data, report.train, run=Path(run))
    found = evaluate(engine, data, rows=64, batches=16, draws=4, seed=1)
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
    memory = {way: kept(engine, tokens) for way, (engine, _) in ways.items()}

    hardware = describe_hardware(pick_device("cpu"))
    lines = [
        f"{arguments.steps} steps of 32 x 128 characters of the built-in corpus, {arguments.seeds} seed(s), float32, {hardware}, torch {torch.__version__}.",
        "",
        "| network | parameters | bits per character | step, of plain | kept for backward |",
        "|---|---|---|---|---|",
    ]
    record: dict[str, object] = {"hardware": hardware, "torch": torch.__version__, **vars(arguments)}
    for way, (_, parameters) in ways.items():
        what = way.removesuffix(", stored")
        middle, error = ratio(seconds[way], seconds["plain"])
        mean = statistics.mean(bits for bits, _ in bounds[what])
        bound = f"{mean:.3f} ± {max(e for _, e in bounds[what]):.3f}" if way == what else "the same"
        lines.append(
            f"| {way} | {parameters:,} | {bound} | {middle:.2f} ± {error:.2f} | {memory[way] / 2**20:.1f} MiB |"
        )
        record[way] = {"seconds": seconds[way], "kept": memory[way], "bounds": bounds[what]}
    text = "\n".join(lines)
    print(text)
    (HERE / "results" / "invertibility.md").write_text(
        f"# Invertible layers beside plain ones\n\n{text}\n", encoding="utf-8"
    )
    with (HERE / "results" / "invertibility.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
