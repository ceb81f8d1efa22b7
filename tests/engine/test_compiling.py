"""How blocks are compiled: any number of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sedd_graph
from sedd_graph.engine import compiling as backend
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine, read_data
from sedd_graph.training.distributed import World
from sedd_graph.training.parallel import compile_mode
from sedd_graph.training.trainer import Trainer
from tests.conftest import ROOT

TINY = ROOT / "blueprints" / "sedd-tiny.yaml"
SMALL = ["params.dim=16", "params.heads=2", "params.depth=1", "params.cond=8", "data.length=16", "train.batch=4"]


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


@pytest.mark.parametrize("mode", ["whole", "cuda_graphs"])
def test_cuda_graphs_reach_inductor(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as library
    import torch._inductor.config as inductor_config

    recorded: list[bool] = []

    def compile_fx(graph: torch.fx.GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        with inductor_config.patch(config_patches):  # raises for a name that Inductor does not have
            recorded.append(inductor_config.triton.cudagraphs)
        return graph.forward

    monkeypatch.setattr(library, "compile_fx", compile_fx)
    torch.compiler.reset()
    engine = make_engine(check(TINY, SMALL), device=torch.device("cpu"), compile="off")
    monkeypatch.setattr(engine.network, "device", torch.device("cuda"))
    engine.compile(mode)
    assert engine.compile_mode == mode
    monkeypatch.setattr(engine.network, "device", torch.device("cpu"))
    engine.loss(torch.randint(0, 128, (4, 16))).sum().backward()
    assert recorded == [mode == "cuda_graphs"]


def test_where_cuda_graphs_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(TINY, [*SMALL, "train.compile=cuda_graphs"])
    with pytest.raises(UserError, match="compile: cuda_graphs needs a CUDA GPU, not cpu; choose block or whole"):
        make_engine(report, device=torch.device("cpu"), compile="cuda_graphs")
    engine = make_engine(report, device=torch.device("cpu"), compile="off")
    engine.network.compile_mode = "cuda_graphs"
    data = read_data(report, root=TINY.parent)
    with pytest.raises(UserError, match="cuda_graphs is for one process, not 2"):
        Trainer(engine, data, report.train, Path(), World(0, 2), print)
    with pytest.raises(BlueprintError, match="cuda_graphs needs accumulate: 1"):
        check(TINY, [*SMALL, "train.compile=cuda_graphs", "train.accumulate=2"])
    sharded = check(TINY, [*SMALL, "train.compile=cuda_graphs", "train.parallel.shard=null"]).train
    with pytest.raises(UserError, match=r"cuda_graphs needs train\.parallel\.shard: 1"):
        compile_mode(engine, sharded)
    other = check(ROOT / "blueprints" / "sedd-reversible-tiny.yaml", ["params.depth=1"])
    engine = make_engine(other, device=torch.device("cpu"), compile="off")
    monkeypatch.setattr(engine.network, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="needs blocks that are neither reversible nor checkpointed"):
        engine.compile("cuda_graphs")
