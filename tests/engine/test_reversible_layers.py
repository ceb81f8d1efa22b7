"""Reversible execution layer by layer: gradients given out, inaccurate reconstruction, compilations, host reads, shards."""

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import sedd_graph
from sedd_graph.engine import compiling, range_guard, reversible
from sedd_graph.engine.drift import DriftGuard, DriftWarning, checksum, checksum_error
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.running import RunningModule

CHANGES = ["params.dim=16", "params.heads=2", "params.cond=8", "params.dropout=0.1"]
TOKENS = torch.randint(0, 100, (3, 12), generator=torch.Generator().manual_seed(0))


def build(*changes: str, compile: Any = "off") -> Engine:
    engine = sedd_graph.build(
        "blueprints/sedd-reversible-tiny.yaml", [*CHANGES, *changes], device="cpu", compile=compile
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in engine.model.parameters():  # gates start at zero, which would hide what is behind them
        nn.init.normal_(parameter, std=0.1, generator=generator)
    engine.model.train()
    return engine


def trunk(engine: Engine) -> RunningModule:
    found = engine.model._modules["trunk"]
    assert isinstance(found, RunningModule)
    return found


def backward(engine: Engine, *, times: int = 1) -> dict[str, Tensor]:
    """Gradients of so many backward passes, dropout on."""
    engine.model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    for _ in range(times):
        engine.loss(TOKENS).sum().backward()
    return {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}


def off(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-12)) for k in a)


@pytest.mark.parametrize("depth", [3, 12])
def test_gradients_are_given_out_layer_by_layer(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """Gradients alive that are not yet in ``.grad``, at the moment when a layer has computed its own."""
    engine, peak = build(f"params.depth={depth}"), 0
    one = len(list(trunk(engine)._modules["0"].parameters()))
    made: list[StorageWeakRef] = []
    plain = reversible.propagate

    def watched(run: LayerRun, gradients: list[Any]) -> dict[nn.Parameter, Tensor]:
        nonlocal peak
        found = plain(run, gradients)
        made.extend(StorageWeakRef(g.untyped_storage()) for g in found.values())
        kept = {p.grad.untyped_storage()._cdata for p in engine.model.parameters() if p.grad is not None}
        peak = max(peak, sum(not ref.expired() and ref.cdata not in kept for ref in made))
        return found

    monkeypatch.setattr(reversible, "propagate", watched)
    backward(engine)
    assert len(made) == depth * one
    assert peak == one


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "swapped positions": lambda x: x[:, [1, 0, *range(2, x.shape[1])]],
    "swapped channels": lambda x: x[..., [1, 0, *range(2, x.shape[-1])]],
    "one element": lambda x: (
        x + 0.01 * x.abs().max() * nn.functional.one_hot(torch.tensor(77), x.numel()).view(x.shape)
    ),
    "all elements": lambda x: x * 1.003,
    "one channel": lambda x: x + 0.01 * nn.functional.one_hot(torch.tensor(3), x.shape[-1]),
    "nan": lambda x: x.where(x != x.max(), torch.nan),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [0, 1])
def test_an_inaccurate_layer_spoils_no_gradient(monkeypatch: pytest.MonkeyPatch, fault: str, stream: int) -> None:
    """Gradients of layers above have been added to ``.grad`` when the fault comes, which holds another step's already."""
    depth = 5
    expected = backward(build(f"params.depth={depth}", "nodes.trunk.memory=store"), times=2)
    plain = LayerRun.invert
    for at in range(depth):
        engine, calls = build(f"params.depth={depth}"), 0

        def invert(run: LayerRun, at: int = at) -> None:
            nonlocal calls
            plain(run)
            calls += 1
            if calls == depth + depth - at:  # in the second step
                value = run.layout.inputs[run.layout.streams[stream]]
                run.values[value] = FAULTS[fault](run.values[value])

        monkeypatch.setattr(LayerRun, "invert", invert)
        with pytest.warns(DriftWarning, match="gradients of this step are recomputed") as warned:
            found = backward(engine, times=2)
        assert len(warned) == 1
        assert calls == depth + depth - at
        assert off(found, expected) < 1e-5
        assert trunk(engine).memory == "checkpoint"


def test_a_checksum_estimates_the_error_of_a_tensor() -> None:
    guard, generator = DriftGuard("x"), torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 32, generator=generator)
    weights = [guard.weights(x)]
    expected = [checksum(x, weights[0])]
    assert float(checksum_error([x], expected, weights)) == 0
    for size in (1e-4, 1e-3, 1e-2):
        error = size * torch.randn(x.shape, generator=generator)
        found = float(checksum_error([x + error], expected, weights))
        assert found == pytest.approx(float(error.norm() / x.norm()), rel=0.2)
        one = torch.zeros_like(x)
        one[1, 5, 9] = size * x.abs().max()
        assert 0.65 * size <= float(checksum_error([x + one], expected, weights)) <= 1.35 * size
    ids = torch.randint(0, 50, (4, 64, 3), generator=generator)
    weights = [guard.weights(ids)]
    changed = ids.clone()
    changed[3, 60, 1] += 1
    expected = [checksum(ids, weights[0])]
    assert float(checksum_error([ids], expected, weights)) == 0
    assert float(checksum_error([changed], expected, weights)) == float("inf")


def test_a_layer_adds_one_number_per_position_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass retains beside the tensors that autograd saves."""
    passes: list[reversible.Pass] = []
    plain = reversible.Pass.saved

    def saved(run: reversible.Pass, outputs: list[Tensor]) -> list[Tensor]:
        passes.append(run)
        return plain(run, outputs)

    monkeypatch.setattr(reversible.Pass, "saved", saved)
    loss = build("params.depth=6").loss(TOKENS)
    (run,) = passes
    held = [x for value in vars(run).values() for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
    assert loss.requires_grad
    assert [x.shape for x in held] == [TOKENS.shape] * (5 * 2)


def test_backward_twice_and_not_twice_differentiable() -> None:
    engine = build()
    loss = engine.loss(TOKENS).sum()
    inputs = [p for name, p in engine.model.named_parameters() if name.startswith("trunk.1.")]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)  # ends at layer 1
    again = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, again))
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(inputs, first, strict=True))  # type: ignore[arg-type]
    outputs = engine.model.run({"tokens": TOKENS, "sigma": torch.rand(3)}, torch.arange(3, dtype=torch.int32))[0]
    (gradient,) = torch.autograd.grad(outputs["log_score"].sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_frozen_beginning_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, inverted, plain = build("params.depth=4"), 0, LayerRun.invert
    for name, p in engine.model.named_parameters():
        p.requires_grad_(name.startswith(("trunk.2", "trunk.3", "head")))

    def invert(run: LayerRun) -> None:
        nonlocal inverted
        plain(run)
        inverted += 1

    monkeypatch.setattr(LayerRun, "invert", invert)
    found = backward(engine)
    assert inverted == 2
    assert trunk(engine).drift is not None
    stored = build("params.depth=4", "nodes.trunk.memory=store")
    for name, p in stored.model.named_parameters():
        p.requires_grad_(name.startswith(("trunk.2", "trunk.3", "head")))
    assert off(found, backward(stored)) < 2e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_one_compilation_for_each_branch(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiling, "inductor", backend)
    torch._dynamo.reset()
    engine = build("params.depth=3", compile="block")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = engine.loss(TOKENS)
        loss.sum().backward()
    assert len(compiled) == 2  # attention and feed-forward, each once for forward and backward of all layers


def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device whose numbers the host would wait for."""
    for module in (reversible, range_guard):
        monkeypatch.setattr(module, "reads", lambda device: False)


class Reads(TorchDispatchMode):
    """Counts operations by which the host reads a number, and waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_the_host_reads_nothing_in_a_step(monkeypatch: pytest.MonkeyPatch, arithmetic: str) -> None:
    engine = build(f"nodes.trunk.arithmetic={arithmetic}")
    waiting(monkeypatch)
    inputs = {"tokens": TOKENS, "sigma": torch.rand(3)}
    counts = []
    for _ in range(4):
        with Reads() as found:
            outputs, _ = engine.model.run(inputs, torch.arange(3, dtype=torch.int32))
            outputs["log_score"].sum().backward()
        counts.append(found.count)
    for number, count in enumerate(counts):
        # from the third step on, numbers of the step before the last, which a GPU has computed long ago
        late = 0 if number < 2 else 1 + (arithmetic == "exact")
        names = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero")
        assert sum(count[name] for name in names) == late
    assert trunk(engine).drift is not None
    assert float(trunk(engine).drift or 0) < 1e-4


def test_on_another_device_drift_is_seen_two_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = build(), LayerRun.invert
    waiting(monkeypatch)

    def invert(run: LayerRun) -> None:
        plain(run)
        value = run.layout.inputs[run.layout.streams[0]]
        run.values[value] = run.values[value] * 1.01

    monkeypatch.setattr(LayerRun, "invert", invert)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        backward(engine, times=2)
    with pytest.warns(DriftWarning, match="known now, after steps with its gradients"):
        backward(engine)
    assert trunk(engine).memory == "checkpoint"


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
sys.path.insert(0, os.getcwd())
from tests.engine.test_reversible_layers import build, TOKENS, trunk
from sedd_graph.engine.drift import DriftWarning
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.errors import UserError
import warnings
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], int(os.environ["WORLD_SIZE"])), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
rank, size = dist.get_rank(), dist.get_world_size()
inputs = {"tokens": TOKENS.repeat(2, 1), "sigma": torch.linspace(0.1, 3.0, 6)}
key = torch.arange(6, dtype=torch.int32)
share = slice(rank * 6 // size, (rank + 1) * 6 // size)

def step(engine):
    engine.model.zero_grad(set_to_none=True)
    for _ in range(2):  # accumulated
        own = {name: x[share] for name, x in inputs.items()}
        outputs, _ = engine.model.run(own, key[share])
        (outputs["log_score"].sin().sum() * (size if sharded else 1)).backward()
    found = {}
    for name, p in engine.model.named_parameters():
        g = p.grad
        if hasattr(g, "full_tensor"):
            g = g.full_tensor()
        elif size > 1:
            g = g.clone(); dist.all_reduce(g)
        found[name] = g
    return found

def shard(engine, modules):
    for module in modules:
        fully_shard(module)
    fully_shard(engine.model)
    register_fsdp_forward_method(engine.model, "run")

plain = LayerRun.invert
for memory, arithmetic, fault in (("reversible", "float", None), ("reversible", "exact", None), ("checkpoint", "exact", None), ("store", "exact", None), ("reversible", "float", 2)):
    changes = (f"nodes.trunk.memory={memory}", f"nodes.trunk.arithmetic={arithmetic}", "params.depth=3")
    sharded = False
    LayerRun.invert = plain
    expected = step(build(*changes))
    sharded, engine, calls = True, build(*changes), 0
    shard(engine, engine.model.layers())

    def invert(run):
        global calls
        plain(run)
        calls += 1
        if fault is not None and calls == fault and rank == size - 1:  # in one process only
            run.values[run.layout.inputs["x1"]] = run.values[run.layout.inputs["x1"]] * 1.1

    LayerRun.invert = invert
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = step(engine)
    assert [w.category for w in warned if w.category is DriftWarning] == [DriftWarning] * (fault is not None), warned
    for name, g in expected.items():
        assert torch.allclose(found[name], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()) + 1e-7), (memory, arithmetic, fault, name)
    assert type(next(trunk(engine).parameters())).__name__ == "DTensor"
LayerRun.invert = plain
engine = build()
shard(engine, engine.model.branches())
try:
    engine.model.run(inputs, key)
except UserError as error:
    assert "shard whole layers" in str(error)
else:
    raise AssertionError("branches sharded by themselves were let through")
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_sharded_layers(tmp_path: Path, size: int) -> None:
    store = tmp_path / "store"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(store)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert (worker.returncode, out.strip()[-4:]) == (0, "done"), err[-3000:]
