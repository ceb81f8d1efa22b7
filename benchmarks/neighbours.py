"""Time and memory of the nearest-neighbour kernel at GPT-2's vocabulary: its graph, and training steps of a small model.

    python benchmarks/neighbours.py [--tokens 50257] [--width 256] [--rows 8] [--length 16]

Embeddings are normal draws, as in a fresh model. Prints the seconds of each part and the peak resident memory of the process, and appends a record to benchmarks/results/neighbours.jsonl. Bars: the graph in 60 s and 2 GB.
"""

import argparse
import resource
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from common import BLUEPRINTS, append_record, token_process

import sedd_graph
from sedd_graph.engine.hardware import describe_hardware


def peak() -> float:
    """Return the peak resident GB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 50257), ("width", 256), ("rows", 8), ("length", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    record: dict[str, object] = {"imports_gb": peak(), **vars(given)}
    sizes = [f"params.tokens={given.tokens}", f"params.dim={given.width}", f"process.width={given.width}"]
    began = time.perf_counter()
    engine = sedd_graph.build(
        BLUEPRINTS / "neighbours-tiny.yaml", [*sizes, "data=null", "train=null"], device="cpu", compile="off"
    )
    kernel: Any = token_process(engine).kernel
    graph = kernel.graph
    record |= {"graph_s": time.perf_counter() - began, "graph_gb": peak(), "edges": len(graph.to), "gap": graph.gap}
    print(
        f"graph: {record['graph_s']:.1f} s, peak {record['graph_gb']:.2f} GB; {len(graph.to):,} edges, largest degree "
        f"{int(graph.start.diff().max())}, relaxation time {1 / graph.gap:.2f} moves per token"
    )
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-3)
    rows = torch.randint(given.tokens, (given.rows, given.length), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for name in ("first_step", "step"):
        began = time.perf_counter()
        loss = engine.loss(rows).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record |= {f"{name}_s": time.perf_counter() - began, f"{name}_nats_per_token": loss.item() / given.length}
        print(f"{name}: {record[f'{name}_s']:.1f} s, {record[f'{name}_nats_per_token']:.3f} nats per token")
    record |= {"peak_gb": peak(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
    record["hardware"] = describe_hardware(torch.device("cpu"))
    print(f"peak {peak():.2f} GB in total")
    append_record("neighbours", record)


if __name__ == "__main__":
    main()
