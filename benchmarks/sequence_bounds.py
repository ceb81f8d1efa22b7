"""Error of the bounds of single sequences at a few evaluations, against a reference of many.

    python benchmarks/sequence_bounds.py RUN [--sequences 200] [--context 32] [--length 128] [--draws 8] [--reference 512]

RUN is a trained run of token rows. Sequences are held-out rows, whose first ``--context`` tokens are given. The reference is
evaluated in parts of 64 draws, after each of which the comparison is printed.
"""

import argparse
import time

import numpy as np

from sedd_graph.data.rows import Dataset
from sedd_graph.evaluation.sequences import Bound, Scored, score
from sedd_graph.runs.open import open_run

PART = 64


def compared(few: list[Bound], many: list[list[Bound]]) -> str:
    """Return the differences of the estimates from the reference, in nats per token."""
    n = few[0].tokens
    found, reference = (np.array([b.nats for b in few]), np.mean([[b.nats for b in part] for part in many], axis=0))
    own = np.array([b.standard_error for b in few])
    other = np.sqrt(np.sum([[b.standard_error**2 for b in part] for part in many], axis=0)) / len(many)
    both = np.sqrt(own**2 + other**2)
    pooled = np.sqrt(np.mean(both**2))
    mean_error = np.sqrt(np.sum(both**2)) / len(few)
    return (
        f"mean {found.mean() / n:.4f}, reference {reference.mean() / n:.4f}: difference {(found - reference).mean() / n:+.4f} "
        f"with standard error {mean_error / n:.4f} nats per token; error of the mean of {len(few)} sequences {np.sqrt(np.sum(own**2)) / len(few) / n:.4f}; "
        f"of one sequence {np.sqrt(np.mean((found - reference) ** 2)) / n:.4f} (stated {pooled / n:.4f}); "
        f"{np.mean(np.abs(found - reference) < 2 * pooled):.1%} within two pooled standard errors"
    )


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--device")
    for name, value in (
        ("sequences", 200),
        ("context", 32),
        ("length", 128),
        ("draws", 8),
        ("reference", 512),
        ("rows", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    run = open_run(options.run, device=options.device, compile="off")
    data = run.data()
    if not isinstance(data, Dataset):
        raise SystemExit("the run is of points, not of token rows")
    chosen = np.linspace(0, data.heldout.count - 1, options.sequences).astype(np.int64)
    rows = data.heldout.take(chosen, 0).tokens[:, : options.length].tolist()
    texts = [Scored(tuple(row[: options.context]), tuple(row[options.context :])) for row in rows]
    start = time.perf_counter()
    few = score(run.engine, texts, draws=options.draws, seed=0, at_once=options.rows)
    print(f"{options.draws} draws of {len(texts)} sequences in {time.perf_counter() - start:.0f} s", flush=True)
    many = list[list[Bound]]()
    for part in range(options.reference // PART):
        many.append(score(run.engine, texts, draws=PART, seed=1 + part, at_once=options.rows))
        print(f"reference of {(part + 1) * PART} draws: {compared(few, many)}", flush=True)


if __name__ == "__main__":
    main()
