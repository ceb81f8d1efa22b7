"""What the tests of string kernels share: components by name, and defects that any kernel can have."""

from typing import Any

import torch

from sedd_graph.component.check import Check
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.families.plan import Part

REGISTRY = discover()


def part(op: str, **config: Any) -> Part:
    """Return a component under a Config."""
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


def failing(checks: list[Check]) -> set[str]:
    """Return the names of the checks that do not hold."""
    return {c.name for c in checks if c.holds is False}


def half_noise(kernel: Any) -> None:
    """Draws are made at half the noise."""
    sample = kernel.sample
    kernel.sample = lambda batch, sigma, **how: sample(batch, sigma / 2, **how)


def one_token_prior(kernel: Any) -> None:
    """The prior is a string of one token, the last state before the start."""
    kernel.prior = lambda rows, **how: Strings(
        torch.tensor([[kernel.start, kernel.start - 1]] * rows), torch.ones(rows, 2, dtype=torch.bool)
    )
