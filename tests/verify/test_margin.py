"""Margin of embeddings: tokens are recovered from vectors with a smaller error, and need not be from others."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import pdist

import sedd_graph
from sedd_graph.diffusion.codes import nearest as distances
from sedd_graph.diffusion.codes.nearest import least_distance, nearest
from sedd_graph.verify import margin as module
from sedd_graph.verify.margin import check_margins

TABLE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def margin(table: torch.Tensor) -> float:
    return least_distance(table) / 2


def test_the_margin_is_half_the_least_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = pdist(TABLE.numpy()).min() / 2
    assert margin(TABLE) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(distances, "CHUNK", 2 * 40 * 7)  # in chunks, the last one shorter
    assert margin(TABLE) == pytest.approx(wanted, rel=1e-12)
    assert margin(torch.eye(5)) == pytest.approx(math.sqrt(2) / 2)
    far = TABLE + 1e6  # where squares lose the digits that differ
    assert margin(far) == pytest.approx(pdist(far.numpy()).min() / 2, rel=1e-9)
    assert margin(torch.cat([TABLE, TABLE[:1]])) == 0


def test_tokens_are_recovered_below_the_margin_and_not_above() -> None:
    half, generator = margin(TABLE), torch.Generator().manual_seed(1)
    error = torch.randn(500, *TABLE.shape, generator=generator, dtype=torch.float64)
    error *= 0.999 * half / error.norm(dim=-1, keepdim=True)
    wanted = torch.arange(40).expand(500, 40)
    assert torch.equal(nearest(TABLE, (TABLE + error).reshape(-1, 6)).reshape(500, 40), wanted)
    # the worst error: from one of the nearest two rows towards the other
    apart = torch.cdist(TABLE, TABLE) + torch.eye(40) * 1e9
    one, other = divmod(int(apart.argmin()), 40)
    towards = (TABLE[other] - TABLE[one]) / (2 * half)
    for share, row in ((0.999, one), (1.001, other)):
        assert nearest(TABLE, (TABLE[one] + share * half * towards)[None]).item() == row
    # the rows differ in norm, so that the greatest dot product is wrong even for exact vectors
    assert not torch.equal((TABLE @ TABLE.T).argmax(-1), torch.arange(40))


def test_a_build_measures_the_margin(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sedd_graph.build(small(), device="cpu", compile="off")
    (check,) = check_margins(engine.network)
    table = engine.model.state_dict()["embed.embed.weight"]
    assert (check.name, check.holds) == ("embed.margin", True)
    assert float(check.value) == pytest.approx(pdist(table.numpy()).min() / 2, rel=1e-3)
    monkeypatch.setattr(module, "LIMIT", 100)
    assert not check_margins(engine.network)


def test_a_table_without_distances_is_refused() -> None:
    for table in (torch.ones(1, 3), torch.full((2, 2), math.nan), torch.ones(3)):
        with pytest.raises(ValueError, match="two or more rows of finite numbers"):
            margin(table)
