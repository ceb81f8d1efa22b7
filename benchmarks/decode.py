"""Time and memory of decoding vectors to their nearest of 50,257 codewords of 256 float32 numbers.

Run ``python benchmarks/decode.py [VECTORS]``. Prints the wall time, the time of the processor, and the largest memory of the
process beyond that of its imports and inputs; and how many tokens are right.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from sedd_graph.diffusion.codes.nearest import Codebook

ROWS, WIDTH = 50_257, 256


def peak() -> int:
    """Return the largest resident memory of the process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(count: int) -> None:
    """Decode ``count`` vectors with errors of 90 % of the margin of two random codewords, and print time and memory."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(ROWS, WIDTH, generator=generator)
    tokens = torch.randint(0, ROWS, (count,), generator=generator)
    error = torch.randn(count, WIDTH, generator=generator)
    vectors = table[tokens] + 0.45 * error / error.norm(dim=1, keepdim=True) * (2 * WIDTH) ** 0.5 * 0.7
    before, wall, processor = peak(), time.perf_counter(), time.process_time()
    found = Codebook(table).decode(vectors)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{count:,} vectors among {ROWS:,} x {WIDTH}: {wall:.2f} s ({processor:.2f} s of the processor, {torch.get_num_threads()} threads)"
    )
    print(f"memory {(peak() - before) / 2**30:.2f} GiB beyond the inputs, {peak() / 2**30:.2f} GiB in all")
    print(f"{int((found == tokens).sum()):,} of {count:,} tokens right")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
