"""Position-wise suffix at a few positions: the same numbers as the whole network, for every shipped blueprint of tokens."""

from pathlib import Path

import pytest
import torch

import sedd_graph
from sedd_graph.component.axes import parse_port_type
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix, length_dim, take
from sedd_graph.families.tokens import TokenProcess
from sedd_graph.graph.model import Op
from tests.conftest import BLUEPRINTS

SMALL = [
    p
    for p in BLUEPRINTS
    if (
        p.stem.endswith("tiny")
        and p.stem
        not in (
            "flow-tiny",
            "did-tiny",
            "indel-tiny",
            "editflow-tiny",
            "flexmdm-tiny",
            "diffusion-lm-tiny",
            "langflow-tiny",
            "elf-tiny",
        )
    )
    or p.stem in ("first", "learn")
]


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_a_few_positions_give_the_same_numbers(path: Path) -> None:
    engine = sedd_graph.build(path, device="cpu", compile="off")
    process, root = engine.process, engine.network.graph.root
    assert isinstance(process, TokenProcess)
    for p in engine.model.parameters():  # a zero would hide the steps after it
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    engine.model.eval()
    states, generator = process.kernel.states, torch.Generator().manual_seed(0)
    x = torch.randint(0, states, (3, 12), generator=generator)
    at = torch.tensor([[3, 0], [11, 11], [5, 6]])
    inputs = {"tokens": x, "sigma": torch.rand(3), "t": torch.rand(3), "attend": torch.ones(3, 12, dtype=torch.bool)}
    if process.objective.block is not None:
        inputs = block_inputs(x, x, block=process.objective.block)
    suffix = PositionwiseSuffix(root)
    heads = [s.name for s in root.steps if isinstance(s.body, Op) and s.body.contract.kind == "head"]
    assert set(heads) <= set(suffix.dims)
    with torch.no_grad():
        groups = Groups(torch.arange(3), torch.arange(3), at, torch.ones_like(at, dtype=torch.bool))
        whole, few = engine.model.run(inputs)[0], engine.network.begin(inputs).at(groups)
    assert whole.keys() == few.keys()
    for name, value in whole.items():
        assert few[name].shape == (3, 2, value.shape[-1])
        torch.testing.assert_close(few[name], take(value, at, 1), rtol=1e-4, atol=1e-5)


def test_the_dimension_of_positions() -> None:
    assert length_dim(parse_port_type("float b l d")) == 1
    assert length_dim(parse_port_type("float b h length r")) == 2
    assert length_dim(parse_port_type("float b d")) is None
    for text in ("float b 2*l d", "float b l l", "float *s d"):
        with pytest.raises(ValueError, match="no one axis of positions"):
            length_dim(parse_port_type(text))


def test_take() -> None:
    value = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    at = torch.tensor([[3, 1], [0, 0]])
    torch.testing.assert_close(take(value, at, 2), torch.stack([value[0][:, [3, 1]], value[1][:, [0, 0]]]))
    table = torch.arange(20).reshape(4, 5)
    torch.testing.assert_close(take(table, at, 0), torch.stack([table[[3, 1]], table[[0, 0]]]))
