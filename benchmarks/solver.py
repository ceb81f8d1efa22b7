"""Time of the inverse solver by depth of the graph: ``python benchmarks/solver.py``. No torch; seconds on one core."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sedd_graph.graph.model import Region
from sedd_graph.inverse import Program, solve
from tests.inverse.toys import chain, region


def two_streams(depth: int) -> Region:
    """Additive coupling of two streams."""
    branch = region(["x", "c"], {"h": ("fun2", ["x", "c"]), "o": ("fun", ["h"])}, {"x": "o"}, label="branch")
    nodes = {
        "f": (branch, ["x2", "c"]),
        "y1": ("add", ["x1", "f"]),
        "g": (branch, ["y1", "c"]),
        "y2": ("add", ["x2", "g"]),
    }
    layer = region(["x1", "x2", "c"], nodes, {"x1": "y1", "x2": "y2"}, label="layer")
    return region(["x1", "x2", "c"], {"t": (chain(layer, depth), ["x1", "x2", "c"])}, {"a": "t.x1", "b": "t.x2"})


def leapfrog(depth: int) -> Region:
    """Leapfrog steps."""
    nodes = {"f": ("fun2", ["x2", "c"]), "s": ("scale:0.5", ["f"]), "y": ("add", ["x1", "s"])}
    layer = region(["x1", "x2", "c"], nodes, {"x1": "x2", "x2": "y"})
    return region(["x1", "x2", "c"], {"t": (chain(layer, depth), ["x1", "x2", "c"])}, {"a": "t.x1", "b": "t.x2"})


def contractions(depth: int) -> Region:
    """Residual layers whose branch is a contraction."""
    layer = region(
        ["x", "c"], {"f": ("lip:0.9", ["x"]), "s": ("scale:0.5", ["f"]), "y": ("add", ["x", "s"])}, {"x": "y"}
    )
    return region(["x", "c"], {"t": (chain(layer, depth), ["x", "c"])}, {"a": "t.x"})


def sums(depth: int) -> Region:
    """Sums and differences, which need a linear solve."""
    nodes = {"s": ("add", ["a", "b"]), "d": ("sub", ["a", "b"]), "u": ("turn", ["s"]), "v": ("affine", ["d", "u"])}
    layer = region(["a", "b", "c"], nodes, {"a": "u", "b": "v"})
    return region(["a", "b", "c"], {"t": (chain(layer, depth), ["a", "b", "c"])}, {"a": "t.a", "b": "t.b"})


def one_stream(depth: int) -> Region:
    """Plain residual layers, which are not invertible."""
    layer = region(["x", "c"], {"f": ("fun2", ["x", "c"]), "y": ("add", ["x", "f"])}, {"x": "y"})
    return region(["x", "c"], {"t": (chain(layer, depth), ["x", "c"])}, {"a": "t.x"})


def main() -> None:
    """Time and print a table."""
    print(f"{'graph':<14}{'layers':>8}{'components':>12}{'seconds':>9}  result")
    for make in (two_streams, leapfrog, contractions, sums, one_stream):
        for depth in (250, 1000, 4000):
            outer = make(depth)
            start = time.perf_counter()
            found = solve(outer, given=["c"])
            spent = time.perf_counter() - start
            result = f"{found.level}, {len(found.derivations)} derivations" if isinstance(found, Program) else "refused"
            print(f"{make.__name__:<14}{depth:>8}{outer.size:>12}{spent:>9.2f}  {result}", flush=True)


if __name__ == "__main__":
    main()
