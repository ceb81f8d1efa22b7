"""Milliseconds per string for the ratios of deletions and insertions: strings of 1,024 tokens, in batches.

    python benchmarks/edits.py [--rows 32] [--length 1024]

Processor time of this process (one thread), the least of three runs.
"""

import argparse
import time

import torch
from sedd_graph_registry.edits import Delete, Indel

from sedd_graph.component import Context
from sedd_graph.diffusion.edits import BirthDeath
from sedd_graph.diffusion.roles import Batch, Randomness

TOKENS = 50_257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context = Context({"n": TOKENS + 1})
    kernels: dict[str, BirthDeath] = {
        "delete": Delete(Delete.Config(), context),
        "indel": Indel(Indel.Config(mean_length=16), context),
    }
    generator = torch.Generator().manual_seed(0)
    clean = Batch.of(torch.randint(0, TOKENS, (arguments.rows, arguments.length), generator=generator))
    for name, kernel in kernels.items():
        for sigma in (0.02, 0.7, 3.0):
            level = torch.full((arguments.rows,), sigma)
            noisy = kernel.sample(clean, level, random=Randomness(generator), width=None)
            best = float("inf")
            for _ in range(3):
                began = time.process_time()
                kernel.target(clean, noisy, level)
                best = min(best, time.process_time() - began)
            mean = float(noisy.lengths.double().mean())
            print(
                f"{name:7} sigma {sigma:<5} {mean:7.1f} tokens left  {1000 * best / arguments.rows:6.1f} ms per string"
            )


if __name__ == "__main__":
    main()
