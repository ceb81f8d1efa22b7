"""Initial weights of a part of a network: the rows of the whole, in little memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_model
from sedd_graph.engine.network import Network
from sedd_graph.engine.shard_init import ShardInit
from sedd_graph.runs.check import check
from tests.conftest import ROOT, SMALL


class Peak(TorchDispatchMode):
    """Most bytes of storages that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return found


@pytest.mark.parametrize("name", ["small", "sedd-reversible-tiny", "bijective-text-tiny"])
@pytest.mark.parametrize("count", [1, 3])
def test_parts_are_the_rows_of_the_whole(tmp_path: Path, name: str, count: int) -> None:
    """Bit for bit, with buffers; the random numbers that follow are the same, too."""
    (tmp_path / "small.yaml").write_text(SMALL)
    report = check(tmp_path / "small.yaml" if name == "small" else ROOT / "blueprints" / f"{name}.yaml", ())
    torch.manual_seed(3)
    whole = build_model(report.graph, report.registry)
    follows = torch.rand(())
    rows = list[dict[str, Tensor]]()
    for index in range(count):
        part = ShardInit(index, count)
        network = Network(report.graph, report.registry, device=torch.device("cpu"), seed=3, part=part)
        assert torch.equal(torch.rand(()), follows)
        assert all(p.is_meta or not p.dim() for p in network.model.parameters())
        for (found, buffer), (expected, other) in zip(network.model.named_buffers(), whole.named_buffers(), strict=True):  # fmt: skip
            assert found == expected
            assert torch.equal(buffer, other)
        rows.append(part.named(network.model))
    for key, parameter in whole.named_parameters():
        if parameter.dim():
            assert torch.equal(torch.cat([own[key] for own in rows]), parameter), key


def test_memory_is_that_of_the_part_and_the_largest_component(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL.replace("dim: 16", "dim: 128").replace("depth: 2", "depth: 8"))
    report = check(tmp_path / "small.yaml", ())
    with Peak() as peak:
        part = ShardInit(1, 4)
        model = build_model(report.graph, report.registry, part)
        own = sum(row.nbytes for row in part.named(model).values())
    whole = sum(4 * p.numel() for p in model.parameters())
    largest = max(
        sum(4 * p.numel() for p in child.parameters())
        for module in model.modules()
        for child in module.children()
        if not any(grandchild.children() for grandchild in child.children())
    )
    assert own == pytest.approx(whole / 4, rel=0.02)
    assert peak.peak < own + 1.1 * largest + 2**16 < whole / 2


discover()
