"""Distance of samplers for masks from the distribution of the data by number of steps, exactly, and its order.

    python benchmarks/sampler_order.py

Enumerates the distribution after every step over all rows with masks: three positions of three tokens, a perfect network, no
sample. Prints a Markdown table of total variation, and of the order p between the last two columns (the error is
proportional to steps^-p).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.tokens.walk import T_MIN, Walk, WalkSettings

V, L = 3, 3
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ancestral", {}),
    ("psi", {"kappa": 0.95}),
    ("psi", {"kappa": 0.6}),
    ("psi", {"kappa": 0.0}),
    ("remdm", {"remask": "cap", "eta": 0.02}),
    ("remdm", {"remask": "cap", "eta": 0.2}),
    ("remdm", {"remask": "rescale", "eta": 0.02}),
    ("remdm", {"remask": "rescale", "eta": 0.5}),
    ("remdm", {"remask": "rescale", "eta": 1.0}),
    ("remdm", {"remask": "loop"}),
    ("remdm", {"remask": "loop", "eta": 0.2, "alpha_on": 0.9}),
    ("remdm", {"remask": "loop", "eta": 1.0, "alpha_on": 0.5}),
]
STEPS = (4, 16, 64, 256, 1024, 4096)


class Enumeration:
    """All rows of three positions with masks, and the perfect network at each."""

    def __init__(self) -> None:
        weights = torch.rand(V**L, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 4 + 0.002
        self.law = weights / weights.sum()
        self.states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
        self.masked = self.states == V
        clean = torch.tensor(list(itertools.product(range(V), repeat=L)))
        fits = ((self.states[:, None] == clean) | self.masked[:, None]).all(-1) * self.law
        one = torch.nn.functional.one_hot(clean, V).double()
        self.network = torch.einsum("sc,clv->slv", fits / fits.sum(1, keepdim=True), one)

    def distance(self, steps: list[tuple[float, float]]) -> float:
        """Return the total variation between the data and the samples.

        Args:
            steps: For each step the probability that a mask is replaced by a token, and that a token is masked again.
        """
        law = torch.zeros(len(self.states), dtype=torch.float64)
        law[-1] = 1.0
        for shown, again in steps:
            law = law @ self._step(shown, again)
        clean = ~self.masked.any(1)
        return float((law[clean] - self.law).abs().sum() / 2)

    def _step(self, shown: float, again: float) -> Tensor:
        kept = torch.nn.functional.one_hot(self.states, V + 1).double() * (1 - again)
        kept[..., V] += again
        drawn = torch.cat([shown * self.network, torch.full_like(self.network[..., :1], 1 - shown)], -1)
        each = torch.where(self.masked[..., None], drawn, kept)
        out = torch.ones(len(self.states), len(self.states), dtype=torch.float64)
        for i in range(L):
            out *= each[:, i][:, self.states[:, i]]
        return out


def plan(name: str, config: dict[str, Any], count: int) -> list[tuple[float, float]]:
    """Return the steps of a sampler: the probability that a mask is replaced, and that a token is masked again."""
    registry = discover()
    schedule = registry.component("loglinear")(registry.contract("loglinear").config(), Context({}))
    if name == "remdm":
        sampler = registry.component(name)(registry.contract(name).config(**config), Context({"n": V + 1}))
        kernel = registry.component("absorb")(registry.contract("absorb").config(), Context({"n": V + 1}))
        free, generator = torch.ones(1, 1, dtype=torch.bool), torch.Generator()
        settings = WalkSettings(free=free, kernel=kernel, schedule=schedule, generator=generator)
        levels = sampler.levels(Walk(lambda *_: {}, torch.zeros(1, 1).long(), settings, sampler.config), count)
    else:
        times = torch.linspace(1.0, T_MIN, count + 1, dtype=torch.float64)
        alphas = [*torch.exp(-schedule.sigma(times)).tolist(), 1.0]
        levels = [(a, b, 0.0) for a, b in itertools.pairwise(alphas)]
    found = []
    for now, below, eta in levels:
        bound = min(1.0, (1 - below) / now)
        again = eta * bound if config.get("remask") == "rescale" else min(eta, bound)
        if name == "psi":
            again = (1 - config["kappa"]) * (1 - below)
        found.append((1.0 if below == 1 else (below - (1 - again) * now) / (1 - now), again))
    return found


def main() -> None:
    """Compute and print the table."""
    toy = Enumeration()
    print("| sampler | " + " | ".join(f"{n:,} steps" for n in STEPS) + " | order |")
    print("|---|" + "---|" * (len(STEPS) + 1))
    for name, config in CASES:
        found = [toy.distance(plan(name, config, n)) for n in STEPS]
        order = math.log(found[-2] / found[-1]) / math.log(STEPS[-1] / STEPS[-2])
        shown = " ".join([name, *(f"{k}={v}" for k, v in config.items())])
        print(f"| {shown} | " + " | ".join(f"{d:.4f}" for d in found) + f" | {order:.2f} |", flush=True)


if __name__ == "__main__":
    main()
