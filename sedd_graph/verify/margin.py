"""Margins of a network's embeddings: the error up to which the nearest embedding is still that of the original token.

The margin is half the least Euclidean distance of two rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from sedd_graph.component.base import Component
from sedd_graph.component.check import Check
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import least_distance
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.network import Network
from sedd_graph.graph.claims import uses
from sedd_graph.verify.decoding import LIMIT, SHARE, decode_faults, decoders, distance_of

__all__ = ["LENGTH", "Margin", "check_margins", "has_codes", "margins"]

LENGTH = 1024
"""Number of positions of a sequence for which errors are bounded."""
MARGIN, ERROR = "margin_", "code_error_"
"""Prefixes of the metrics with the margin of a code and the bound on errors; the path of the code follows."""


class Margin(NamedTuple):
    """Margin of a code, and the bound on the error of the vectors that the inverse of a block decodes by it.

    Attributes:
        half: Half the least distance of two codewords; None if the table is too large to compare all pairs and no
            distance is declared.
        error: Upper bound on the error of a reconstructed vector; infinite if there is none; None if no invertible block
            contains the code.
        reason: How the bound follows, or why there is none, as text.
    """

    half: float | None
    error: float | None
    reason: str

    def __str__(self) -> str:
        text = "not measured" if self.half is None else f"{self.half:.6g}"
        if self.error is None:
            return text
        if math.isinf(self.error):
            return f"{text}; no bound on the errors of reconstructed vectors: {self.reason}"
        return f"{text}; reconstructed vectors are off by at most {self.error:.2g} ({self.reason})"

    def metrics(self, path: str) -> dict[str, float]:
        """Return the margin and the error bound, where there are numbers, as metrics of the code at ``path``."""
        named = {f"{MARGIN}{path}": self.half, f"{ERROR}{path}": self.error}
        return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}


def margins(network: Network) -> dict[str, Margin]:
    """Return the margin of each code of a network with its present weights, by dotted path.

    Args:
        network: The network.
    """
    bounds = dict(_bounds(network))
    found = {}
    for path, code in _codes(network):
        measured, declared = distance_of(code)
        least = declared if measured is None else measured
        error, reason = bounds.get(path, (None, ""))
        found[path] = Margin(None if least is None else least / 2, error, reason)
    return found


def has_codes(network: Network) -> bool:
    """Return whether a network has codes, whose margins :func:`margins` measures."""
    return any(True for _ in _codes(network))


def _codes(network: Network) -> Iterator[tuple[str, Code]]:
    return ((path, part) for path, part in network.model.named_modules() if isinstance(part, Code))


def _bounds(network: Network) -> Iterator[tuple[str, tuple[float, str]]]:
    """Yield the path of each code within an invertible block, with the bound on the errors of its vectors."""
    for use in uses(network.graph.root):
        claim = use.layer.claim
        layer: Any = network.model.root
        for name in use.path.split("."):
            layer = layer._modules[name]
        path = use.path
        if layer.repeat:
            layer, path = layer._modules["0"], f"{use.path}.0"
        if claim is None or not any(isinstance(part, Code) for part in layer.modules()):
            continue
        layout = Layout(use.layer, claim.given, Grid() if use.exact else None)
        for found in decoders(layout, layer, LENGTH):
            yield f"{path}.{found.path}", (found.error, found.reason)


def check_margins(network: Network) -> list[Check]:
    """Verify the codes of a network, and measure the margin of each other embedding table.

    Tables with fewer than two rows are skipped, and those that need more than
    :data:`~sedd_graph.verify.decoding.LIMIT` (2^36) multiplications.

    Args:
        network: The network.

    Returns:
        For each code, the check ``margin``: codewords are distinct, a declared distance is no larger than the measured
        one, and errors of reconstructed vectors are bounded below the margin, where the inverse of a block decodes them;
        and the check ``decode``: perturbed codewords are decoded to their tokens. For another table, one check, which
        holds if the margin is positive; with margin 0 it is a note (``holds`` is None).
    """
    found = [check for path, code in _codes(network) for check in _check_code(path, code)]
    for path, measured in margins(network).items():
        if measured.error is not None:
            found.append(_check_error(path, measured))
    for path, part in network.model.named_modules():
        if isinstance(part, Code) or not isinstance(part, Component):
            continue
        if part.kind != "embedding" or "table" not in part.outputs:
            continue
        table = part(torch.zeros(1, 1, dtype=torch.int64, device=network.device))[part.outputs.index("table")]
        if len(table) < 2 or len(table) ** 2 * table.shape[1] > LIMIT:
            continue
        half = least_distance(table) / 2
        claim = "with any error below half the least distance of embeddings, the nearest one is the right token"
        how = f"nearest of {len(table):,} rows, untrained, Euclidean"
        found.append(Check(f"{path}.margin", claim, True if half > 0 else None, f"{half:.4g}", how))
    return found


def _check_code(path: str, code: Code) -> Iterator[Check]:
    measured, declared = distance_of(code)
    words = f"{len(code.rows()):,} codewords"
    claim = "with any error below half the least distance of codewords, the nearest one is the right token"
    if measured is None:
        half = None if declared is None else declared / 2
        value = "not measured" if half is None else f"{half:.6g}"
        yield Check(f"{path}.margin", claim, None, value, f"{words}: too many pairs to compare; as declared")
    elif declared is not None and declared > measured * (1 + 1e-6):
        text = f"{measured / 2:.6g}, less than half the declared least distance {declared:.6g}"
        yield Check(f"{path}.margin", claim, False, text, f"all pairs of {words}, float64")
    else:
        yield Check(f"{path}.margin", claim, measured > 0, f"{measured / 2:.6g}", f"all pairs of {words}, float64")
    claim = "codewords, and codewords moved towards the nearest other one, are decoded to their tokens"
    wrong, tried = decode_faults(code)
    how = f"{tried:,} codewords, moved by {SHARE:g} of half the distance"
    yield Check(f"{path}.decode", claim, not wrong, f"{wrong:,} wrong", how)


def _check_error(path: str, found: Margin) -> Check:
    claim = "vectors that the derived inverse reconstructs are nearer to their codewords than the margin"
    half, error = found.half, math.inf if found.error is None else found.error
    if half is None or math.isinf(error):
        return Check(f"{path}.error", claim, None, "no bound", found.reason)
    return Check(f"{path}.error", claim, error < half, f"{error:.4g} against {half:.6g}", found.reason)
