"""Time of a training step under a memory budget compared with one that stores all activations, in one run.

    python benchmarks/memory_budget.py [--depth N] [--rounds N]

The network is that of blueprints/sedd-reversible-tiny.yaml, widened, compiled. Budgets are a half, a quarter and a tenth of the
memory that the forward pass of the stored step retains, by the allocator; what the others retain is measured in the same way.
Times are interleaved, by the clock and by the time of the processor, which other processes affect less.
Appends to benchmarks/results/memory_budget.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time

import torch
from common import BLUEPRINTS, append_record
from torch import Tensor

import sedd_graph
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.engine.layer_cost import retained
from sedd_graph.graph.memory import planned
from sedd_graph.runs.check import check
from sedd_graph.runs.memory_plan import budget_plan
from sedd_graph.runs.open import make_engine

PARTS = {"half": 0.5, "quarter": 0.25, "tenth": 0.1}


def changes(arguments: argparse.Namespace) -> list[str]:
    """Return the changes to the blueprint."""
    found = [f"params.depth={arguments.depth}", "params.dim=256", "params.heads=4", "nodes.trunk.memory=auto"]
    return [*found, f"train.batch={arguments.batch}"]


def engine(arguments: argparse.Namespace, device: torch.device, budget: int | None) -> tuple[sedd_graph.Engine, str]:
    """Return the engine with a budget in bytes, or with all activations stored, and its plan."""
    if budget is None:
        found = [*changes(arguments), "nodes.trunk.memory=store"]
        return make_engine(check(BLUEPRINTS / "sedd-reversible-tiny.yaml", found), device=device, compile="block"), ""
    report = check(
        BLUEPRINTS / "sedd-reversible-tiny.yaml", [*changes(arguments), f"memory={{budget: {budget / 1000:.1f} kB}}"]
    )
    said: list[str] = []
    plan = budget_plan(report, device=device, compiled=True, say=said.append)
    if plan is None:
        raise SystemExit("there is no plan")
    report = dataclasses.replace(report, graph=planned(report.graph, plan.modes))
    return make_engine(report, device=device, compile="block"), "\n".join(said)


def step(made: sedd_graph.Engine, tokens: Tensor) -> tuple[float, float]:
    """Run a forward and backward pass; return its seconds by the clock and by the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    made.loss(tokens).sum().backward()
    made.model.zero_grad(set_to_none=True)
    if made.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Measure, print a table, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    tokens = torch.randint(0, 100, (arguments.batch, 128), generator=torch.Generator().manual_seed(0)).to(device)
    engines = {"store": engine(arguments, device, None)[0]}
    engines["store"].model.train()
    for _ in range(2):
        step(engines["store"], tokens)
    sizes = {"store": retained(functools.partial(engines["store"].loss, tokens), device)}
    plans = {}
    for name, part in PARTS.items():
        engines[name], plans[name] = engine(arguments, device, int(part * sizes["store"]))
        engines[name].model.train()
        for _ in range(2):
            step(engines[name], tokens)
        sizes[name] = retained(functools.partial(engines[name].loss, tokens), device)
        print(f"{name}: {plans[name]}", flush=True)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(arguments.rounds):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            seconds[name].append(step(engines[name], tokens))
    record: dict[str, object] = {"hardware": describe_hardware(device), "torch": torch.__version__, **vars(arguments)}
    print(f"{arguments.depth} layers of width 256, {arguments.batch} x 128 tokens, compiled, {arguments.rounds} rounds; {describe_hardware(device)}")  # fmt: skip
    print(f"{'budget':10}{'retained':>14}{'of stored':>11}{'time, processor':>26}{'clock':>26}")
    for name in engines:
        text, ratios = "", []
        for which in (1, 0):
            found = [a[which] / b[which] for a, b in zip(seconds[name], seconds["store"], strict=True)]
            low, middle, high = statistics.quantiles(found, n=4) if name != "store" else (1.0, 1.0, 1.0)
            ratios.append([low, middle, high])
            text += f"{middle:>10.3f} ({low:.3f} to {high:.3f})"
        print(f"{name:10}{sizes[name] / 2**20:>10.1f} MiB{sizes[name] / sizes['store']:>11.1%}{text}")
        record[name] = {"retained": sizes[name], "ratios": ratios, "seconds": seconds[name], "plan": plans.get(name)}
    append_record("memory_budget", record)


if __name__ == "__main__":
    main()
