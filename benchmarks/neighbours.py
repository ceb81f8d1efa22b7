"""What the nearest-neighbour kernel costs at GPT-2's vocabulary: its graph, its draws, and a training step of a small model.

    python benchmarks/neighbours.py [--tokens 50257] [--width 256] [--rows 8] [--length 16]

Embeddings are those that a model would start from (normal draws). Prints the seconds of each part and the peak resident
memory of the process, and appends a record to benchmarks/results/neighbours.jsonl. Bars: the graph in 60 s and 2 GB.
"""

import argparse
import json
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import sedd_graph
from sedd_graph.engine.hardware import describe_hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "neighbours.jsonl"


def peak() -> float:
    """Peak resident GB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 50257), ("width", 256), ("rows", 8), ("length", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    record: dict[str, object] = {"imports_gb": peak(), **vars(given)}
    sizes = [f"params.tokens={given.tokens}", f"params.dim={given.width}", f"process.width={given.width}"]
    began = time.perf_counter()
    engine = sedd_graph.build(
        ROOT / "blueprints" / "neighbours-tiny.yaml", [*sizes, "data=null", "train=null"], device="cpu", compile="off"
    )
    kernel = engine.process.kernel
    graph = kernel.graph
    record |= {"graph_s": time.perf_counter() - began, "graph_gb": peak(), "edges": len(graph.to), "gap": graph.gap}
    print(
        f"graph: {record['graph_s']:.1f} s, peak {record['graph_gb']:.2f} GB; {len(graph.to):,} edges, greatest degree "
        f"{int(graph.start.diff().max())}, slowest mode dies in {1 / graph.gap:.2f} moves of each token"
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
    print(f"peak {peak():.2f} GB in all")
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
