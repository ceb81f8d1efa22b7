"""Counter-based randomness: the hash against its definition in plain integers, masks against chance, splits against wholes."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import sedd_graph
from sedd_graph.component.counter_rng import dropout, fold, hashed
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.engine.compiling import inductor
from tests.conftest import ROOT


def murmur(h: int) -> int:
    h &= 2**32 - 1
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def test_the_hash_is_murmurs() -> None:
    values = [0, 1, -1, 7, 2**31 - 1, -(2**31), 123456789, -987654321]
    found = hashed(torch.tensor(values, dtype=torch.int32)).tolist()
    assert [f % 2**32 for f in found] == [murmur(v) for v in values]


@pytest.mark.parametrize("width", [96, 100])  # vectorised, and with a scalar remainder
def test_compiled_masks_are_those_of_eager_code_without_overflow(width: int) -> None:
    """GCC once took the overflow of the compiled counters for a proof that loops end elsewhere: a segmentation fault."""

    def layer(x: Tensor, key: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x + dropout(x, 0.1, key), x.shape[-1:])

    x, key = torch.randn(8, 64, width), torch.randint(-(2**31), 2**31, (8,)).int()
    with torch.no_grad():
        found, codes = run_and_get_code(torch.compile(layer, fullgraph=True, dynamic=False, backend=inductor), x, key)
    torch.testing.assert_close(found, layer(x, key))
    assert any("int64_t x0" in code for code in codes)
    for code in codes:
        assert not re.search(r"arange\([^()]*, -?\d{3,}", code), "an index whose steps overflow int32"
        assert not re.search(r"int32_t\(\w+ [*+] \w+\)", code), "scalar products and sums of int32"


def masks(p: float, key: Tensor) -> Tensor:
    return (dropout(torch.ones(len(key), 40, 96), p, key) == 0).double() - p


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_as_chance_has_it(p: float) -> None:
    key = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int64, generator=torch.Generator().manual_seed(0)).int()
    m, v = masks(p, key), p * (1 - p)
    pairs = [(m, torch.zeros_like(m) + math.sqrt(v))]  # the mean itself
    pairs += [(m[..., k:], m[..., :-k]) for k in (1, 2, 8, 32)] + [(m[:, k:], m[:, :-k]) for k in (1, 2, 16)]
    pairs += [(m[1:], m[:-1]), (m, masks(p, fold(key, 0))), (masks(p, fold(key, 1)), masks(p, fold(key, 0)))]
    for a, b in pairs:
        assert abs(float((a * b).mean()) / v * math.sqrt(a.numel())) < 4.5
    kept = dropout(torch.full((2, 3, 5), 2.0), p, key[:2])
    assert bool(((kept == 0) | ((kept * (1 - p) - 2).abs() < 1e-6)).all())


def test_another_node_step_and_row_draw_otherwise() -> None:
    key = torch.tensor([5, 6], dtype=torch.int32)
    found = [dropout(torch.ones(2, 8, 64), 0.5, k) for k in (key, fold(key, 0), fold(key, 1), fold(fold(key, 0), 1))]
    rows = [row for mask in found for row in mask]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :])


def test_parts_of_a_batch_draw_what_the_whole_does() -> None:
    engine = sedd_graph.build(ROOT / "blueprints" / "sedd-tiny.yaml", ["params.depth=2"], device="cpu", compile="off")
    for parameter in engine.model.parameters():  # gates start at zero, which would hide dropout
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0))

    def losses(start: int, stop: int, seed: int = 3, on: bool = True) -> Tensor:
        random = Randomness(torch.Generator().manual_seed(seed), start=start, total=4)
        batch = Batch.of(tokens[start:stop])
        draw = engine.draw(batch, random=random)
        return engine.trained(draw, batch, random.keys(stop - start) if on else None)[0]

    whole = losses(0, 4)
    torch.testing.assert_close(torch.cat([losses(0, 1), losses(1, 4)]), whole)
    state = torch.get_rng_state()
    assert torch.equal(losses(0, 4), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(losses(0, 4, on=False), whole)
