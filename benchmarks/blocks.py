"""Tokens per second of a block model, with finished blocks remembered and without, in one run: ``python benchmarks/blocks.py``.

The same rows are drawn both ways. Fresh weights, first-hitting: one evaluation of a block per token, whatever the network says.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sedd_graph
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.sampler import WalkSettings
from sedd_graph.engine.block_cache import afresh, remembering

BLUEPRINT = Path(__file__).resolve().parent.parent / "blueprints" / "bd3lm-tiny.yaml"


@torch.no_grad()
def write(engine: Any, rows: int, length: int, how: str) -> tuple[Tensor, float]:
    """The rows and the seconds they took."""
    process = engine.process
    kernel, schedule, objective, sampler = process.kernel, process.schedule, process.objective, process.sampler
    block, device = objective.block, engine.device
    generator = torch.Generator(device).manual_seed(0)
    x = kernel.prior(rows, length, generator=generator, allowed=None)
    with contextlib.ExitStack() as stack:
        given: Any = lambda written: afresh(engine.model, block, written)  # noqa: E731
        if how == "remembered":
            given = stack.enter_context(remembering(engine.model, block, rows=rows, length=length))
        began = time.perf_counter()
        free = torch.ones_like(x, dtype=torch.bool)
        settings = WalkSettings(free=free, kernel=kernel, schedule=schedule, generator=generator)
        out = write_blocks(sampler, given, x, settings, block=block)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", help="changes to bd3lm-tiny, such as params.dim=256")
    given = parser.parse_args()
    print(f"{given.rows} rows of {given.length} tokens, {torch.get_num_threads()} threads, {given.device}")
    for block in given.blocks:
        engine = sedd_graph.build(BLUEPRINT, [f"objective.block={block}", "data=null", *given.overrides], device=given.device, compile="off")  # fmt: skip
        engine.model.eval()
        found = {how: write(engine, given.rows, given.length, how) for how in ("afresh", "remembered")}
        speed = {how: given.rows * given.length / seconds for how, (_, seconds) in found.items()}
        same = torch.equal(found["afresh"][0], found["remembered"][0])
        print(
            f"block {block:>3}  afresh {speed['afresh']:8.1f} tokens/s  remembered {speed['remembered']:8.1f} tokens/s  "
            f"{speed['remembered'] / speed['afresh']:5.2f} x  {'the same rows' if same else 'OTHER ROWS'}"
        )


if __name__ == "__main__":
    main()
