"""How blocks are compiled: any number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sedd_graph
from sedd_graph.engine import compiling as backend


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, about its own code
def test_more_blocks_than_torch_compiles_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.config as dynamo_config

    compiled: list[Any] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(backend, "inductor", traced)
    count = 10
    blocks = "".join(
        f"  own{i}:\n    inputs: {{x: float b l d}}\n    outputs: {{x: out}}\n    nodes:\n"
        f"      up: {{op: linear, in: x, with: {{width: {8 + i}}}}}\n      out: {{op: linear, in: up, with: {{width: 4}}}}\n"
        for i in range(count)
    )
    nodes = "".join(
        f"  n{i}: {{block: own{i}, in: {'x' if i == 0 else f'n{i - 1}'}, repeat: 2}}\n" for i in range(count)
    )
    path = tmp_path / "many.yaml"
    path.write_text(
        "blueprint: 1\nname: many\naxes: {b: batch, l: length, d: 4}\ninputs: {x: float b l d}\n"
        f"outputs: {{x: n{count - 1}}}\nblocks:\n{blocks}nodes:\n{nodes}"
    )
    x = torch.randn(2, 3, 4, requires_grad=True)
    plain = sedd_graph.build(path, device="cpu", compile="off")
    torch.compiler.reset()
    with dynamo_config.patch(recompile_limit=8):  # torch's own, whatever ran in this process before
        engine = sedd_graph.build(path, device="cpu", compile="block")
        engine.model.load_state_dict(plain.model.state_dict())
        assert torch.allclose(engine.model(x=x)["x"], plain.model(x=x)["x"], atol=1e-6)
    assert len(compiled) == count  # one for both repeats of each
