"""FlexAttention where a mask hides whole blocks: the numbers of dense attention, one table of blocks, plain attention elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from sedd_graph_registry.network import _masked
from sedd_graph_registry.network.attention import Attention
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention as library
from torch.nn.functional import gelu, scaled_dot_product_attention

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion import visibility
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens import block_diffusion
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.engine import compiling
from sedd_graph.engine.engine import Engine
from tests.conftest import ROOT

LENGTH = 160  # twice as many positions are two blocks and a half of 128
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """FlexAttention on a CPU, which has its operator (with gradients), but no kernels. The graphs that are compiled."""
    graphs: list[torch.fx.GraphModule] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(visibility, "DEVICES", ("cpu",))
    monkeypatch.setattr(_masked, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(compiling, "inductor", traced)
    block_diffusion._kept_layout.cache_clear()
    torch.compiler.reset()
    yield graphs
    block_diffusion._kept_layout.cache_clear()


def flexes(graph: torch.fx.GraphModule) -> int:
    return sum("flex_attention" in str(node.target) for node in graph.graph.nodes)


def sees_of(length: int = LENGTH) -> Tensor:
    tokens = torch.zeros(1, length, dtype=torch.int64)
    return block_inputs(tokens, tokens, block=16)["sees"]


def run(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradients of a weighted sum of its entries."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("kind", ["blocks", "random"])
def test_values_and_gradients(flex: list[torch.fx.GraphModule], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sees = sees_of()
    if kind == "random":  # nowhere a block that is shown whole
        sees = visibility.with_blocks((torch.rand(2 * LENGTH, 2 * LENGTH, generator=generator) < 0.02) | sees_of())
    qkv = [torch.randn(2, 3, 2 * LENGTH, 16, generator=generator) for _ in range(3)]
    compiled = torch.compile(_masked.masked_attention, backend=compiling.inductor, fullgraph=True)
    found = run(lambda q, k, v: compiled(q, k, v, None, sees), *qkv)
    assert [flexes(graph) for graph in flex] == [1]
    expected = run(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=sees), *qkv)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_under_a_memory_budget(flex: list[torch.fx.GraphModule]) -> None:
    """AOTAutograd differentiates the operator, and chooses what the backward pass computes again."""
    sees, generator = sees_of(), torch.Generator().manual_seed(0)
    up, down = (torch.randn(16, 16, generator=generator) for _ in range(2))

    def layer(x: Tensor) -> Tensor:
        return gelu(_masked.masked_attention(x @ up, x @ down, x, None, sees) @ up)

    inner = aot_autograd(
        fw_compiler=lambda graph, inputs: graph.forward, partition_fn=min_cut_rematerialization_partition
    )

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        flex.append(graph)
        with functorch_config.patch(activation_memory_budget=0.4):
            return inner(graph, inputs)

    x = torch.randn(1, 2, 2 * LENGTH, 16, generator=generator)
    found = run(torch.compile(layer, backend=backend, fullgraph=True, dynamic=False), x)
    assert flexes(flex[-1]) == 1
    for a, b in zip(found, run(layer, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_where_flex_cannot_serve(flex: list[torch.fx.GraphModule]) -> None:
    sees, generator = sees_of(), torch.Generator().manual_seed(0)
    every = torch.ones(1, 1, 1, 2 * LENGTH, dtype=torch.bool)
    compiled = torch.compile(_masked.masked_attention, backend=compiling.inductor, fullgraph=True, dynamic=False)
    for width, dtype, mask, table in (
        (8, torch.float32, None, sees),
        (16, torch.float64, None, sees),
        (16, torch.float32, every, sees),
        (16, torch.float32, None, sees.clone()),
    ):
        q, k, v = (torch.randn(1, 2, 2 * LENGTH, width, generator=generator).to(dtype) for _ in range(3))
        found = compiled(q, k, v, mask, table)
        assert torch.equal(found, scaled_dot_product_attention(q, k, v, attn_mask=sees))
        assert flexes(flex[-1]) == 0
    assert torch.equal(_masked.masked_attention(q, k, v, None, sees), found)  # eager code
    small = sees_of(16)
    assert not hasattr(small, visibility._NAME)


def test_a_mask_of_rows_is_added(flex: list[torch.fx.GraphModule]) -> None:
    node = Attention(Attention.Config(heads=2), Context({"r": 16}))
    x, sees = torch.randn(2, 2 * LENGTH, 32), sees_of()
    attend = torch.arange(2 * LENGTH) < torch.tensor([[2 * LENGTH], [LENGTH]])
    want = node(x, None, attend, sees)
    node.compile(backend=compiling.inductor, fullgraph=True, dynamic=False)
    torch.testing.assert_close(node(x, None, attend, sees), want)
    assert flexes(flex[-1]) == 0
    nothing = torch.ones((), dtype=torch.bool).expand(2, 2 * LENGTH)  # a mask that hides nothing
    torch.testing.assert_close(node(x, None, nothing, sees), node(x, None, None, sees))
    assert flexes(flex[1]) == flexes(flex[2]) == 1


def losses(engine: Engine, batch: Batch) -> list[Tensor]:
    engine.model.zero_grad(set_to_none=True)
    random = Randomness(torch.Generator().manual_seed(0))
    loss = engine.trained(engine.draw(batch, random=random), batch, random.keys(len(batch)))[0]
    loss.sum().backward()
    return [loss.detach(), *(p.grad for p in engine.model.parameters() if p.grad is not None)]


def test_block_diffusion(flex: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["params.dim=32", "params.heads=2", "params.depth=2", "params.cond=8", f"data.length={LENGTH}"]
    engine = sedd_graph.build(ROOT / "blueprints" / "bd3lm-tiny.yaml", changes, device="cpu", compile="off")
    for parameter in engine.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = Batch.of(torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0)))
    engine.model.train()
    want, bound = losses(engine, batch), engine.bound_rows(batch, seed=3)
    made: list[int] = []
    create = library.create_block_mask

    def counted(*arguments: Any, **more: Any) -> Any:
        made.append(1)
        return create(*arguments, **more)

    monkeypatch.setattr(library, "create_block_mask", counted)
    block_diffusion._kept_layout.cache_clear()
    engine.compile("block", everywhere=True)
    for _ in range(3):
        found = losses(engine, batch)
    assert len(flex) == 1  # of all layers and steps
    assert flexes(flex[0]) == 1
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(engine.bound_rows(batch, seed=3), bound)
    assert [flexes(graph) for graph in flex] == [1] * len(flex)
    assert made == [1]
