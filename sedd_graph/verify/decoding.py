"""Decoding of tokens at the end of an inverse: distance of the codewords, and the error of the vectors that are decoded.

A derived inverse reconstructs vectors and then decodes each to the token whose codeword is nearest. The token is right if
the error of the vector is below the margin, half the least distance of two codewords. The error is bounded a priori
(:mod:`sedd_graph.inverse.error_bound`), for all inputs and weights; with exact arithmetic, only the codewords are rounded.

Axes: v tokens, d channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import dot_error, least_distance, nearest_others
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.fixed_point import Iteration
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.graph.model import Ref
from sedd_graph.inverse import Solve
from sedd_graph.inverse.error_bound import error_bounds

__all__ = ["LIMIT", "Decoder", "decode_faults", "decoders", "distance_of", "reconstruction_error", "uncertified"]

LIMIT = 2**36
"""Largest number of multiplications (v^2 d) for which all pairs of codewords are compared: about a second on a CPU."""
PROBED = 1024
"""Largest number of codewords that :func:`decode_faults` perturbs if their pairs exceed :data:`LIMIT`."""
SHARE = 0.999
"""Size of the perturbations of :func:`decode_faults`, as a share of half the distance to the nearest codeword."""
UNIT = 2.0**-24
"""Unit roundoff of float32."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A code from which the inverse of a block decodes tokens.

    Attributes:
        path: Dotted path of the code within the block.
        vectors: Reference of the vectors that are decoded.
        error: Upper bound on the error of such a vector, Euclidean; infinite if there is none.
        reason: Why there is no bound, or how it follows, as text.
    """

    path: str
    vectors: Ref
    error: float
    reason: str


def distance_of(code: Code) -> tuple[float | None, float | None]:
    """Return the least distance of a code's words by comparing all pairs, and the one that the code declares.

    Either is None if it is not known: with more than :data:`LIMIT` multiplications, or if nothing is declared.
    """
    rows = code.rows()
    measured = least_distance(rows) if len(rows) ** 2 * rows.shape[1] <= LIMIT else None
    return measured, code.declared_distance()


def decoders(layout: Layout, layer: nn.Module, length: int) -> list[Decoder]:
    """Return the codes from which the inverse of a block decodes tokens, with bounds on the errors of the vectors.

    Args:
        layout: Layout of the block. With a grid (exact arithmetic) sums do not round, and the error is that of rounding the
            codewords to the grid; otherwise the bounds are those of float32.
        layer: Module of the block, whose codewords are read.
        length: Number of positions of a sequence; a bound of float32 grows with its square root.
    """
    solved = [d for d in layout.program.derivations if isinstance(d, Solve)]
    codes = {d.path: (d, code) for d in solved if isinstance(code := layout.by_path[d.path].module(layer), Code)}
    if not codes:
        return []
    rows = {path: code.rows().detach() for path, (_, code) in codes.items()}
    vectors = {path: _vectors(d) for path, (d, _) in codes.items()}
    if layout.grid is not None:
        return [Decoder(p, vectors[p], _rounded(rows[p], layout.grid), f"grid of 2^-{layout.grid.bits}") for p in codes]
    norms = {vectors[p]: math.sqrt(length) * float(rows[p].double().norm(dim=1).max()) for p in codes}
    found = error_bounds(layout.program, unit=UNIT, norms=norms, tolerance=_tolerance)
    return [
        Decoder(
            p, ref, found.errors[ref] + _own_error(rows[p]), found.reasons.get(ref, f"float32, {length:,} positions")
        )
        for p, ref in vectors.items()
    ]


def uncertified(layout: Layout, layer: nn.Module) -> list[str]:
    """Return the paths of the components that decode integers from real numbers and are no :class:`Code`.

    The distance of their codewords is unknown, so that nothing bounds the errors that they tolerate.
    """
    found = []
    for step in layout.inverse:
        d = step.derivation
        if isinstance(d, Solve) and all(layout.flat.types[v].kind == "int" for v in step.targets):
            reads = any(v >= 0 and layout.flat.types[v].kind == "float" for v in step.given)
            if reads and not isinstance(layout.by_path[d.path].module(layer), Code):
                found.append(d.path)
    return found


def _vectors(d: Solve) -> Ref:
    """Return the reference of the vectors that a code decodes: its output among the rule's arguments."""
    pairs = zip(d.rule.given, d.given, strict=True)
    return next(ref for name, ref in pairs if ref is not None and name not in d.inputs)


def _tolerance(lipschitz: float) -> float:
    return Iteration(lipschitz=lipschitz).limits(torch.float32)[0]


def _rounded(rows: Tensor, grid: Grid) -> float:
    """Return the largest error of a codeword that is rounded to the grid."""
    return float((grid.snap(rows).double() - rows.double()).norm(dim=1).max()) + _own_error(rows)


def _own_error(rows: Tensor) -> float:
    """Return the error of a vector that has the effect of the rounding errors of scores in float64."""
    largest = float(rows.double().norm(dim=1).max())
    return 8 * dot_error(rows.shape[1], 2.0**-53) * largest


def decode_faults(code: Code) -> tuple[int, int]:
    """Perturb codewords towards their nearest others, and return how many are decoded wrongly, and how many were tried.

    The perturbation is :data:`SHARE` of half the distance, in the direction in which the least error changes the token.

    Args:
        code: The code.
    """
    rows = code.rows().detach()
    chosen = torch.arange(len(rows), device=rows.device)
    if len(rows) ** 2 * rows.shape[1] > LIMIT:
        chosen = chosen[:: -(-len(rows) // PROBED)]
    others = nearest_others(rows, chosen)
    start, end = rows[chosen].double(), rows[others].double()
    moved = (start + SHARE / 2 * (end - start)).to(rows.dtype)
    # where codewords are so near that rounding the vector moves it over the middle, nothing can be decided
    sound = (moved.double() - start).norm(dim=1) < (moved.double() - end).norm(dim=1)
    found = code.decode(torch.cat([rows[chosen], moved])[None])[0].split(len(chosen))
    wrong = (found[0] != chosen) | ((found[1] != chosen) & sound)
    return int(wrong.sum()), len(chosen)


@torch.no_grad()
def reconstruction_error(
    layout: Layout, layer: nn.Module, key: Tensor | None, inputs: Sequence[Tensor], vectors: Ref
) -> float:
    """Return the error of vectors that the inverse of a block reconstructs: the largest of the rows, Euclidean.

    Args:
        layout: Layout of the block.
        layer: Module of the block.
        key: Dropout key, int32 [b]; None without dropout.
        inputs: Inputs of the block, in order.
        vectors: Reference of the vectors, float [b, l, d].
    """
    at = layout.index[vectors]
    run = LayerRun(layout, layer, key, [False] * layout.count)
    run.put(layout.inputs.values(), inputs)
    run.forward()
    back = LayerRun(layout, layer, key, [False] * layout.count)
    back.put(layout.outputs.values(), run.take(layout.outputs.values()))
    back.put([layout.inputs[name] for name in layout.given], run.take(layout.inputs[name] for name in layout.given))
    back.invert()
    difference = (back.values[at].double() - run.values[at].double()).flatten(1)
    return float(difference.norm(dim=1).max())
