"""Tokens per second of a block model with and without the KV cache of finished blocks, in one run: ``python benchmarks/blocks.py``.

Both ways draw the same rows. The weights are fresh; first-hitting evaluates a block once per token, whatever the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial

import torch
from common import BLUEPRINTS, token_process
from torch import Tensor

import sedd_graph
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine import block_cache


@torch.no_grad()
def write(engine: sedd_graph.Engine, rows: int, length: int, *, block: int, cached: bool) -> tuple[Tensor, float]:
    """Return samples, int64 [rows, length], and the seconds that they took."""
    process, device = token_process(engine), engine.device
    generator = torch.Generator(device).manual_seed(0)
    x = process.kernel.prior(rows, length, generator=generator, allowed=None)
    with contextlib.ExitStack() as stack:
        given: Callable[[Tensor], Denoise] = partial(block_cache.uncached, engine.model, block)
        if cached:
            given = stack.enter_context(block_cache.cached(engine.model, block, rows=rows, length=length))
        free = torch.ones_like(x, dtype=torch.bool)
        settings = WalkSettings(free=free, kernel=process.kernel, schedule=process.schedule, generator=generator)
        began = time.perf_counter()
        out = write_blocks(process.sampler, given, x, settings, block=block)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out, time.perf_counter() - began


def main() -> None:
    """Time both ways at each block size, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", help="changes to bd3lm-tiny, such as params.dim=256")
    given = parser.parse_args()
    print(f"{given.rows} rows of {given.length} tokens, {torch.get_num_threads()} threads, {given.device}")
    for block in given.blocks:
        engine = sedd_graph.build(BLUEPRINTS / "bd3lm-tiny.yaml", [f"objective.block={block}", "data=null", *given.overrides], device=given.device, compile="off")  # fmt: skip
        engine.model.eval()
        plain, cached = (write(engine, given.rows, given.length, block=block, cached=on) for on in (False, True))
        speeds = [given.rows * given.length / seconds for _, seconds in (plain, cached)]
        same = torch.equal(plain[0], cached[0])
        print(
            f"block {block:>3}  without cache {speeds[0]:8.1f} tokens/s  with KV cache {speeds[1]:8.1f} tokens/s  "
            f"{speeds[1] / speeds[0]:5.2f} x  {'the same rows' if same else 'OTHER ROWS'}"
        )


if __name__ == "__main__":
    main()
