"""Encoders of the noise level."""

import pytest
import torch

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover


@pytest.mark.parametrize("op", ["sigma_embedding", "gaussian_fourier", "learned_time", "timestep_embedding"])
def test_vectors_are_in_float32_under_autocast(op: str) -> None:
    cls = discover().component(op)
    torch.manual_seed(0)
    component = cls(cls.Config(), Context({"e": 24, "d": 24}, frozenset({"sigma", "timestep"}), "time"))
    sigma = torch.tensor([1e-3, 0.5, 0.5005, 7.0])
    expected = component(sigma)
    with torch.autocast("cpu", torch.bfloat16):
        found = component(sigma)
        assert torch.nn.functional.linear(found, torch.eye(24)).dtype == torch.bfloat16  # autocast goes on after it
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found[1], found[2])
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in component.mlp.parameters())
