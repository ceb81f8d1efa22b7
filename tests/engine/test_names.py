"""Names of nodes that torch or the engine uses itself, sizes that no tensor has, and networks of many layers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_model, build_shapes
from sedd_graph.engine.measure import measure
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check


def test_every_attribute_of_a_module_can_name_a_node(small: Callable[..., Path]) -> None:
    """``training`` ended in an internal error at the first ``model.eval()``, ``plan`` when the model was built."""
    registry, report = discover(), check(small())
    found = build_model(report.graph, registry)
    own = {n for m in (found, found.root) for n in (*dir(m), *vars(m))} | {"training", "plan", "repeat", "keyed"}
    names = sorted(n for n in own if re.fullmatch(r"[a-z][a-z0-9_]*", n))
    assert len(names) > 50
    lines = "\n".join(f"      {name}: {{op: scale, in: x, with: {{by: 0.5}}}}" for name in names)
    sums = f"      total: {{op: add, in: [{', '.join(n for n in names)}]}}"
    path = small(
        ("      norm: {op: rms_norm, in: x}", f"{lines}\n{sums}\n      norm: {{op: rms_norm, in: total}}"),
        ("  embed: {op: token", "  training: {op: scale, in: embed, with: {by: 1}}\n  embed: {op: token"),
        ("in: {x: embed, attend", "in: {x: training, attend"),
    )
    graph = check(path).graph
    torch.manual_seed(0)
    model = build_model(graph, registry)
    inputs = {"tokens": torch.randint(0, 128, (2, 5)), "attend": torch.ones(2, 5, dtype=torch.bool)}
    model.train()
    before = model(**inputs)["log_x0"]
    before.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model.training is False
    assert model.root.training is False or model.root is not None
    model.load_state_dict(model.state_dict())
    model.half().float()
    model.requires_grad_(False)
    assert torch.allclose(model(**inputs)["log_x0"], before, atol=1e-2)


@pytest.mark.parametrize("dim", [2**32, 2**36, 2**38 - 2**10, 2**38])
def test_a_size_that_no_tensor_has_is_a_problem_of_its_node(small: Callable[..., Path], dim: int) -> None:
    with pytest.raises(BlueprintError, match=r"small.yaml:\d+:\d+: .*: op '.*': cannot be constructed.*overflow"):
        check(small(), [f"params.dim={dim}"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the stack by ulimit")
def test_many_layers_are_measured_within_a_small_stack(small: Callable[..., Path]) -> None:
    """3,000 layers overflowed a stack of 8 MiB (SIGSEGV): 150 do so in 384 KiB."""
    code = (
        "import sys; from sedd_graph.runs.check import check; from sedd_graph.engine.measure import measure;"
        f"r = check({str(small())!r}, ['params.depth=150', 'params.dim=4']);"
        "print(measure(r.graph, r.registry, batch=1, length=4).parameters)"
    )
    done = subprocess.run(
        ["bash", "-c", 'ulimit -s 384; ulimit -c 0; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0


def test_flops_are_those_of_the_counter_of_torch(small: Callable[..., Path]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    report = check(small())
    found = measure(report.graph, report.registry, batch=2, length=8)
    model = build_shapes(report.graph, report.registry)
    with torch.device("meta"):
        inputs = {"tokens": torch.zeros(2, 8, dtype=torch.int64), "attend": torch.ones(2, 8, dtype=torch.bool)}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert found.flops_per_token == round(counter.get_total_flops() / 16)
