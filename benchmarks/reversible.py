"""Time and memory of reversible execution compared with stored activations and checkpointing, in one run.

    python benchmarks/reversible.py [--depth N] [--rounds N]

Times training steps (forward and backward) of the network of blueprints/sedd-reversible-tiny.yaml, widened, with interleaved
timing. Memory is the bytes that autograd saves for the backward pass, counted with its saved-tensor hooks, per added layer.
Appends to benchmarks/results/reversible.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import weakref
from collections.abc import Mapping

import torch
from common import BLUEPRINTS, append_record
from interleaved import interleave, ratio
from torch import Tensor

import sedd_graph
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.engine.network import CompileMode

WAYS = {
    "store": ("store", "float"),
    "checkpoint": ("checkpoint", "float"),
    "reversible": ("reversible", "float"),
    "reversible, exact": ("reversible", "exact"),
}


class Held:
    """A saved tensor, alive as long as the autograd graph holds it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()


def engine(way: str, depth: int, device: torch.device, compile: CompileMode) -> sedd_graph.Engine:
    """Return the network of the blueprint at ``depth``, run in one of the ``WAYS``."""
    memory, arithmetic = WAYS[way]
    changes = [f"params.depth={depth}", "params.dim=256", "params.heads=4", f"nodes.trunk.memory={memory}"]
    changes.append(f"nodes.trunk.arithmetic={arithmetic}")
    return sedd_graph.build(BLUEPRINTS / "sedd-reversible-tiny.yaml", changes, device=device, compile=compile)


def saved_bytes(made: sedd_graph.Engine, tokens: Tensor) -> int:
    """Return the bytes that autograd saves between forward and backward, without parameters. Runs eagerly."""
    own = {p.untyped_storage()._cdata for p in made.model.parameters()}
    packed: list[weakref.ref[Held]] = []

    def pack(x: Tensor) -> Held:
        held = Held(x)
        packed.append(weakref.ref(held))
        return held

    with torch.compiler.set_stance("force_eager"), torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
        loss = made.loss(tokens)
    storages = [held.x.untyped_storage() for ref in packed if (held := ref()) is not None]
    del loss
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in own}.values())


def timed(engines: Mapping[str, sedd_graph.Engine], tokens: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return seconds of a forward and backward pass of each, for every round."""

    def step(made: sedd_graph.Engine) -> None:
        made.loss(tokens).mean().backward()
        made.model.zero_grad(set_to_none=True)
        if made.device.type == "cuda":
            torch.cuda.synchronize()

    for made in engines.values():
        for _ in range(3):
            step(made)
    return interleave({name: functools.partial(step, made) for name, made in engines.items()}, rounds, 2)


def main() -> None:
    """Time, count, print a table, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    tokens = torch.randint(0, 100, (arguments.batch, 128), generator=torch.Generator().manual_seed(0))
    seconds = timed({way: engine(way, arguments.depth, device, "block") for way in WAYS}, tokens, arguments.rounds)
    memory = {way: [saved_bytes(engine(way, depth, device, "off"), tokens[:4]) for depth in (4, 12)] for way in WAYS}
    slope = {way: (memory[way][1] - memory[way][0]) / 8 for way in WAYS}
    print(
        f"two-stream SEDD, dim 256, {arguments.depth} layers, {arguments.batch} x 128 tokens, compiled; {describe_hardware(device)}"
    )
    print(f"{'':20}{'step':>10}{'ratio to store':>18}{'saved per layer (4 rows)':>26}")
    record: dict[str, object] = {"hardware": describe_hardware(device), "torch": torch.__version__, **vars(arguments)}
    for way in WAYS:
        middle, error = ratio(seconds[way], seconds["store"])
        print(f"{way:20}{statistics.median(seconds[way]):>8.3f} s{middle:>11.3f} +- {error:.3f}{slope[way] / 1024:>14,.1f} KiB ({slope[way] / slope['store']:.2%})")  # fmt: skip
        record[way] = {"seconds": seconds[way], "ratio": middle, "standard_error": error, "bytes_per_layer": slope[way]}
    append_record("reversible", record)


if __name__ == "__main__":
    main()
