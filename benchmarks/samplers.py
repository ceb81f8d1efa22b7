"""Distance of every sampler from the distribution of the data by number of steps, with a perfect network on a toy.

    python benchmarks/samplers.py [--rows 100000]

Prints a Markdown table: total variation from the distribution over nine sequences (three tokens, two positions), evaluations
per row, and the distance that is expected of exact samples.
"""

import argparse
import math
from typing import Any

import torch

from sedd_graph.component.outputs import LOG_X0
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.tokens import make_parts
from sedd_graph.verify.statistics import total_variation
from sedd_graph.verify.toy import PAIR, Toy

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("absorb", "euler", {}),
    ("absorb", "tau_leaping", {}),
    ("absorb", "analytic", {}),
    ("absorb", "ancestral", {}),
    ("absorb", "ancestral", {"positions": "systematic"}),
    ("absorb", "predictor_corrector", {}),
    ("absorb", "psi", {}),
    ("absorb", "remdm", {"remask": "cap"}),
    ("absorb", "remdm", {"remask": "rescale", "eta": 0.1}),
    ("absorb", "remdm", {"remask": "conf"}),
    ("absorb", "remdm", {"remask": "loop"}),
    ("absorb", "first_hitting", {}),
    ("absorb", "confidence", {}),
    ("absorb", "entropy_bound", {"gamma": 0.0}),
    ("absorb", "entropy_bound", {"gamma": 2.0}),
    ("uniform", "euler", {}),
    ("uniform", "tau_leaping", {}),
    ("uniform", "analytic", {}),
    ("uniform", "ancestral", {}),
    ("uniform", "ancestral", {"positions": "systematic"}),
    ("uniform", "predictor_corrector", {}),
    ("uniform", "psi", {}),
    ("uniform", "uniformization", {}),
]
STEPS = (2, 4, 16, 64)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    rows = parser.parse_args().rows
    registry = discover()

    def part(op: str, **config: Any) -> Part:
        contract = registry.contract(op)
        return Part(contract, contract.config(**config))

    print(f"exact samples: about {math.sqrt(PAIR.tokens**PAIR.length / rows / 2):.4f} ({rows:,} rows)\n")
    print("| kernel | sampler | " + " | ".join(f"{n} steps" for n in STEPS) + " | evaluations per row |")
    print("|---|---|" + "---|" * (len(STEPS) + 1))
    for kernel, name, config in CASES:
        masked = kernel == "absorb"
        schedule = "loglinear" if masked else "geometric"
        parts = part(kernel), part(schedule), part("nelbo"), part(name, **config)
        plan = ProcessPlan("tokens", *parts, states=PAIR.tokens + masked, outputs=(LOG_X0,))
        toy = Toy(make_parts(plan, registry))
        sampler = toy.parts.sampler
        found = [f"{_distance(toy, rows, n):.4f}" for n in (STEPS if sampler.steps else (None,))]
        evaluations = (
            "steps + 1" if sampler.evaluations == rows * (STEPS[-1] + 1) else f"{sampler.evaluations / rows:.1f}"
        )
        if name == "predictor_corrector":
            evaluations = "2 steps + 1"
        shown = " ".join([name, *(f"{k}={v}" for k, v in config.items())])
        cells = found if len(found) > 1 else [found[0], *[""] * (len(STEPS) - 1)]
        note = " (heuristic)" if sampler.heuristic() else ""
        print(f"| {kernel} | {shown}{note} | " + " | ".join(cells) + f" | {evaluations} |", flush=True)


def _distance(toy: Toy, rows: int, steps: int | None) -> float:
    process, generator = toy.parts, torch.Generator().manual_seed(0)
    x = process.kernel.prior(rows, PAIR.length, generator=generator, allowed=None)
    free = torch.ones_like(x, dtype=torch.bool)
    settings = WalkSettings(free=free, kernel=process.kernel, schedule=process.schedule, generator=generator)
    out = toy.sample(x, "log_x0", settings, steps)
    return total_variation(toy.code(out, toy.tokens), toy.law)


if __name__ == "__main__":
    main()
