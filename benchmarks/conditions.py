"""Distance of samples under conditions from the model's distribution given the condition, by number of particles.

    python benchmarks/conditions.py [--rows 20000]

Prints a Markdown table for a toy that can be enumerated (three tokens, three positions, a perfect network, the kernel absorb):
total variation from the distribution of the data given the condition, for `first_hitting` and for `ancestral` with one step
and with 64, and with 4 and 16 particles. `P` is the probability of the condition.
"""

import argparse
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.tokens.particles import choose
from sedd_graph.diffusion.tokens.walk import WalkSettings

V, L = 3, 3
PIECES = [b"a", b"b", b"c", None]
CLEAN = torch.tensor(list(itertools.product(range(V), repeat=L)))
TEXTS = ["".join("abc"[i] for i in row) for row in CLEAN.tolist()]
CONDITIONS: list[tuple[str, dict[int, str], str | None]] = [
    ("allow {0: a}", {0: "a"}, None),
    ("allow {0: [ab], 2: [bc]}", {0: "[ab]", 2: "[bc]"}, None),
    ("forbid a", {0: "[bc]", 1: "[bc]", 2: "[bc]"}, None),
    ("matching a.*", {}, "a.*"),
    ("matching .*ab.*", {}, ".*ab.*"),
    ("matching [ab]*", {}, "[ab]*"),
    ("matching aab|bcc|cba", {}, "aab|bcc|cba"),
    ("matching (a[bc]|bb|c)+", {}, "(a[bc]|bb|c)+"),
]
PARTICLES = (1, 4, 16)


class World:
    """The toy: a distribution of 27 rows, and the perfect network for it under the kernel absorb."""

    def __init__(self, spread: float) -> None:
        generator = torch.Generator().manual_seed(5)
        weights = torch.exp(spread * torch.randn(V**L, generator=generator, dtype=torch.float64))
        self.law = weights / weights.sum()
        registry = discover()
        self.registry = registry
        self.kernel = registry.component("absorb")(registry.contract("absorb").config(), Context({"n": V + 1}))
        self.schedule = registry.component("loglinear")(registry.contract("loglinear").config(), Context({}))
        states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
        masked = states == V
        fits = ((states[:, None] == CLEAN) | masked[:, None]).all(-1) * self.law
        clean = torch.einsum("sc,clv->slv", fits / fits.sum(1, keepdim=True), torch.nn.functional.one_hot(CLEAN, V + 1).double())  # fmt: skip
        self.table = clean.log().clamp(min=-1e6).float()

    def denoise(self, x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
        """Evaluate the perfect network."""
        found = self.table[(x * (V + 1) ** torch.arange(L).flip(0)).sum(-1)]
        return {"log_x0": found if at is None else found.gather(1, at[..., None].expand(-1, -1, V + 1))}

    def distance(self, name: str, allow: dict[int, str], pattern: str | None, particles: int, rows: int, **config: Any) -> tuple[float, float]:  # fmt: skip
        """Return the total variation from the distribution given the condition, and the probability of the condition."""
        fits = torch.tensor(
            [
                all(re.fullmatch(p, text[i]) for i, p in allow.items())
                and (pattern is None or bool(re.fullmatch(pattern, text)))
                for text in TEXTS
            ]
        )
        allowed = torch.ones(L, V + 1, dtype=torch.bool)
        for i, p in allow.items():
            allowed[i] = torch.tensor([*(re.fullmatch(p, token) is not None for token in "abc"), False])
        sampler = self.registry.component(name)(self.registry.contract(name).config(**config), Context({"n": V + 1}))
        generator = torch.Generator().manual_seed(0)
        x = torch.full((rows * particles, L), V)
        settings = WalkSettings(
            free=x == V,
            kernel=self.kernel,
            schedule=self.schedule,
            generator=generator,
            allowed=allowed,
            unconditioned=torch.ones(V + 1, dtype=torch.bool) if particles > 1 else None,
            matching=None if pattern is None else Matching(pattern, lambda: PIECES, torch.device("cpu")),
            timeless=True,
        )
        out = sampler.run(self.denoise, x, settings)
        if particles > 1:
            out = out[choose(sampler.log_weight, particles, draws=Draws(generator)).index]
        found = torch.bincount((out * V ** torch.arange(L).flip(0)).sum(-1), minlength=V**L) / rows
        chance = float(self.law[fits].sum())
        return float((found - self.law * fits / chance).abs().sum() / 2), chance


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    rows = parser.parse_args().rows
    world = World(1.5)
    print(f"exact samples: up to about {math.sqrt(V**L / rows / 2):.3f} ({rows:,} rows)\n")
    print("| condition | P | ancestral, 1 step | ancestral, 64 steps | first_hitting | 4 particles | 16 particles |")
    print("|---|---|---|---|---|---|---|")
    for label, allow, pattern in CONDITIONS:
        steps = [world.distance("ancestral", allow, pattern, 1, rows, steps=n)[0] for n in (1, 64)]
        exact = [world.distance("first_hitting", allow, pattern, k, rows) for k in PARTICLES]
        cells = [f"{d:.3f}" for d in [*steps, *(d for d, _ in exact)]]
        shown = label.replace("|", "\\|")
        print(f"| `{shown}` | {exact[0][1]:.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
