"""Test cases of the bijective components, and functions that construct a component and its inputs."""

from typing import Any, NamedTuple

import torch
from sedd_graph_registry.bijective import contraction, coupling, linear, orthogonal, rearrange
from torch import Tensor

from sedd_graph.component.base import Component, Context


class Case(NamedTuple):
    """A component and a config, tested at width ``d``; ``masks`` is true where ``forward`` takes ``attend``."""

    cls: type[Component]
    config: dict[str, Any]
    d: int
    masks: bool

    def __str__(self) -> str:
        return "-".join([self.cls.__name__, *map(str, self.config.values()), str(self.d)])


CASES = [
    Case(coupling.Affine, {}, 3, True),
    Case(coupling.Affine, {"clamp": 0.5}, 8, True),
    Case(coupling.Spline, {}, 3, True),
    Case(coupling.Spline, {"bins": 3, "bound": 1.5}, 4, True),
    Case(coupling.Spline, {"bins": 2, "bound": 8.0, "smallest": 1e-2}, 1, True),
    Case(rearrange.Reverse, {}, 3, True),
    Case(rearrange.Roll, {"by": 2}, 3, True),
    Case(rearrange.Roll, {"by": -11}, 4, True),
    Case(rearrange.Shuffle, {"seed": 5}, 7, False),
    Case(orthogonal.Orthogonal, {"kind": "householder"}, 5, False),
    Case(orthogonal.Orthogonal, {"kind": "householder", "reflections": 3}, 16, False),
    Case(orthogonal.Orthogonal, {"kind": "cayley"}, 6, False),
    Case(orthogonal.Orthogonal, {"kind": "matrix_exp"}, 6, False),
    Case(orthogonal.Hadamard, {}, 8, False),
    Case(orthogonal.Hadamard, {}, 16, False),
    Case(orthogonal.DCT, {"over": "channels"}, 7, True),
    Case(orthogonal.DCT, {"over": "sequence"}, 4, True),
    Case(orthogonal.RotaryMix, {}, 6, False),
    Case(linear.PLU, {}, 6, True),
    Case(linear.ActNorm, {}, 5, True),
]

ORTHOGONAL = [case for case in CASES if case.cls.__module__.endswith("orthogonal")]
CONTRACTIONS = [
    Case(contraction.LipschitzLinear, {"width": 5, "bound": 0.7}, 8, False),
    Case(contraction.LipschitzLinear, {"width": 12, "bound": 2.0, "bias": "none"}, 4, False),
    *(Case(contraction.LipschitzAct, {"activation": kind}, 4, False) for kind in ("relu", "tanh", "elu", "lip_swish")),
    Case(contraction.L2Attention, {"heads": 2}, 8, True),
    Case(contraction.L2Attention, {"heads": 1, "bound": 0.5}, 4, True),
]


def make(case: Case, *, dtype: torch.dtype = torch.float64, moved: float = 0.3) -> Any:
    """Return the component in evaluation mode, with normal noise of size ``moved`` added to its parameters."""
    torch.manual_seed(0)
    heads = case.config.get("heads", 1)
    context = Context({"d": case.d, "r": case.d // heads}, frozenset(), "under_test")
    component = case.cls(case.cls.Config.model_validate(case.config), context).to(dtype).eval()
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(torch.randn_like(parameter) * moved)
    return component


def inputs(
    case: Case, b: int, l: int, *, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return random arguments of the component's ``forward``, without ``attend``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return (torch.randn(b, l, width, generator=generator, dtype=torch.float64) * scale).to(dtype)

    found = [draw(case.d)]
    if case.cls is coupling.Affine:
        found += [draw(case.d), draw(case.d)]
    if case.cls is coupling.Spline:
        found += [draw(case.d * (3 * case.config.get("bins", 8) - 1))]
    return found
