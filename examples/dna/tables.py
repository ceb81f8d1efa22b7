"""Print what tables of k-mers reach on the held-out bases of a run, and the bound of its model on the same bases.

    python tables.py RUN [--corpus FOLDER]

A table of order k has p(base | the k bases before it), counted in the training part (both strands, as the model is trained on)
with one added to every count. Order 1 is a bigram table. Tables read the bases before a row, too, which the model does not.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.data.sources import read_corpus
from sedd_graph.runs.open import open_run

BASES = "ACGT"
Codes = npt.NDArray[np.int64]


def codes(text: str) -> Codes:
    """Return 0 to 3 for each base of a text, and -1 for any other letter."""
    table = np.full(256, -1, np.int64)
    table[[ord(base) for base in BASES]] = range(4)
    return table[np.frombuffer(text.encode("ascii"), np.uint8)]


def contexts(bases: Codes, order: int) -> tuple[Codes, Codes, Codes]:
    """Return the context (as a number) and the base at each position that has one, and those positions, int64 [n] each."""
    position = np.arange(order, len(bases))
    number = np.zeros(len(position), np.int64)
    fine = bases[order:] >= 0
    for back in range(order, 0, -1):
        before = bases[order - back : len(bases) - back]
        fine &= before >= 0
        number = 4 * number + np.maximum(before, 0)
    return number[fine], bases[order:][fine], position[fine]


def fit(texts: list[str], order: int) -> npt.NDArray[np.float64]:
    """Return log2 p(base | context) of add-one counts, float64 [4**order, 4]."""
    counts = np.ones((4**order, 4))
    for text in texts:
        number, base, _ = contexts(codes(text), order)
        np.add.at(counts, (number, base), 1)
    return np.log2(counts / counts.sum(1, keepdims=True))


def bits(texts: list[str], heldout: str, order: int) -> float:
    """Return the bits per base of ``heldout`` under the table of ``order``; a base without a full context costs 2 bits."""
    number, base, _ = contexts(known := codes(heldout), order)
    total = int((known >= 0).sum())
    return float((2.0 * (total - len(base)) - fit(texts, order)[number, base].sum()) / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of dna-tiny after `sedd-graph eval`")
    parser.add_argument("--corpus", type=Path, help="folder of the FASTA files (default: the folder of the blueprint)")
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3, 5, 7], help="orders of the tables")
    arguments = parser.parse_args()
    run = open_run(arguments.run, device="cpu", compile="off", weights="fresh")
    config, root = run.report.data, arguments.corpus or run.data_root()
    if not isinstance(config, DataConfig):
        sys.exit(f"{arguments.run} is not a run on text")
    texts = [document.text for document in read_corpus(config.corpus, root=root)]
    data = open_data(config, root=root)
    rows = data.heldout.take(np.arange(data.heldout.count), 0).tokens
    heldout = "".join(run.decode(rows)).replace("\n", "")
    print(f"{len(heldout):,} held-out bases; {sum(map(len, texts)):,} bases for training, both strands")
    for order in arguments.orders:
        print(f"table of order {order}   {bits(texts, heldout, order):.4f} bits per base")
    if (record := arguments.run / "evaluation.json").exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        error = found["bits_standard_error"]
        print(
            f"the model          {found['bits_per_character']:.4f} +- {error:.4f}, of {found['tokens']:,} bases, an upper bound"
        )


if __name__ == "__main__":
    main()
