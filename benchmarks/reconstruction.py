"""Reconstruction error of derived inverses by depth, arithmetic and kind of block.

    python benchmarks/reconstruction.py [--width N] [--depths N N ...]

For each block of blueprints/blocks/reversible.yaml, at a small width, with random weights and random streams of standard
deviation 1: a chain of layers is run forward and inverted layer by layer, with dropout. Writes
benchmarks/results/reconstruction.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS

from sedd_graph.component.registry import discover
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.errors import DivergedError, SeddGraphError
from sedd_graph.graph.claims import uses
from sedd_graph.runs.check import inverses
from sedd_graph.store.files import write_text
from sedd_graph.verify.block_fixture import BATCH, LENGTH, BlockFixture

BLUEPRINT = """
blueprint: 1
name: reconstruction
use: {rev: "sedd_graph:blocks/reversible.yaml"}
params: {dim: 32}
axes: {b: batch, l: length, d: "${params.dim}", e: 16, v: 13}
inputs: {tokens: int b l, sigma: float b}
outputs: {log_score: head}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  time: {op: sigma_embedding, in: sigma, out: float b e}
  rope: {op: rotary, in: embed.out, with: {dim: "${params.dim}//2"}}
  rope2: {op: rotary, in: embed.out, with: {dim: "${params.dim}//4"}}
  two: {block: rev.two_stream, in: {x1: embed.out, x2: embed.out, c: time, angles: rope}, with: {heads: 2}}
  leap: {block: rev.leapfrog, in: {before: two.x1, x: two.x2, c: time, angles: rope}, with: {heads: 2}}
  affine: {block: rev.affine_coupling, in: {x: leap.x, c: time, angles: rope2}, with: {heads: 2}}
  contraction: {block: rev.contraction, in: {x: affine, c: time}, with: {heads: 2}}
  mix: {block: rev.mix, in: contraction}
  plu: {block: rev.mix_plu, in: mix}
  join: {op: mean, in: [plu, leap.before]}
  head: {op: score_head, in: {x: join, tokens: tokens, sigma: sigma}, out: float b l v}
"""
KINDS = {
    "two_stream": "additive, two streams",
    "leapfrog": "leapfrog",
    "affine_coupling": "affine coupling",
    "mix": "act_norm, orthogonal",
    "mix_plu": "act_norm, PLU",
    "contraction": "contraction, 0.9",
}
EXACT = ("two_stream", "leapfrog")
"""Blocks that only add: the others round when they are inverted."""
SIZES = {1.0: "random gates", 0.1: "random gates, a tenth"}
"""Scale of the random numbers that are added to the initial weights, and so of log-scales and gates."""
WAYS: dict[str, tuple[torch.dtype, bool, Grid | None]] = {
    "float64": (torch.float64, False, None),
    "float32": (torch.float32, False, None),
    "bfloat16 branches": (torch.float32, True, None),
    "exact, grid of 2^-16": (torch.float32, False, Grid()),
}


def row(fixture: BlockFixture, way: str, depths: list[int], moved: float) -> list[str]:
    """Return the cells of one line: relative errors, ``equal``, or the reason why there is none."""
    dtype, narrow, grid = WAYS[way]
    layers = fixture.chain(dtype, max(depths), device=torch.device("cpu"), spread=moved)
    cells: list[str] = []
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
            for _, error, equal in fixture.round_trips(layers, depths, dtype=dtype, grid=grid):
                cells.append("equal" if equal else f"{error:.0e}" if math.isfinite(error) else "lost")
    except SeddGraphError as error:
        stopped = "left the grid" if isinstance(error, DivergedError) else "no convergence"
        cells += [stopped] * (len(depths) - len(cells))
    return cells


def main() -> None:
    """Measure all, print lines as they are measured, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48, 96, 192, 512])
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reconstruction.yaml"
        path.write_text(BLUEPRINT, encoding="utf-8")
        graph, _ = inverses(path, [f"params.dim={arguments.width}"])
    layers = {use.name: use.layer for use in uses(graph.root)}
    tables = []
    with torch.no_grad():
        for moved, what in SIZES.items():
            head = f"| {what} | arithmetic | {' | '.join(map(str, arguments.depths))} |"
            lines = [head, f"|---|---|{'---|' * len(arguments.depths)}"]
            print("\n".join(lines), flush=True)
            for name, kind in KINDS.items():
                fixture = BlockFixture(layers[name], discover())
                for way in [w for w, (_, _, grid) in WAYS.items() if grid is None or name in EXACT]:
                    cells = row(fixture, way, arguments.depths, moved)
                    lines.append(f"| {kind} | {way} | {' | '.join(cells)} |")
                    print(lines[-1], flush=True)
            tables.append("\n".join(lines))
    text = (
        "# Reconstruction error by depth, arithmetic and kind of block\n\n"
        f"Width {arguments.width}, {BATCH} rows of {LENGTH} tokens, different random weights in every layer, dropout on. "
        "Columns: number of layers. Cells: relative error of the reconstructed streams; `equal`: equal to the last bit; "
        "`lost`: not finite. First table: weights that start at zero, such as those of gates and log-scales, are drawn with "
        "standard deviation 1 / sqrt(fan-in); second table: with a tenth of it. bfloat16 is emulated; streams stay float32. "
        f"{time.perf_counter() - began:.0f} s on {describe_hardware(torch.device('cpu'))}.\n\n"
    )
    write_text(RESULTS / "reconstruction.md", text + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
