"""Products of the backward pass have no autocast, wherever a gradient is computed while the forward pass has it.

Torch recommends this, and it is what eager autograd does. A component that turns autocast off for its own products would
else have gradients that are rounded to bfloat16.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sedd_graph
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.engine.compiling import inductor
from sedd_graph.engine.fixed_point import log_det
from tests.engine.test_reversible_gradients import STACK


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(x: Tensor, weight: Tensor) -> Tensor:
    """Return a product in float32 under autocast too."""
    with full_precision(x):
        return F.linear(x.float(), weight)


def test_reversible_layers_have_the_gradients_of_stored_ones(tmp_path: Path) -> None:
    """Exact arithmetic reconstructs the inputs to the last bit; unfused attention has float32 products under autocast."""
    found = []
    for memory in ("store", "reversible"):
        path = tmp_path / f"{memory}.yaml"
        path.write_text(
            STACK.replace("memory: reversible", f"arithmetic: exact\n    memory: {memory}"), encoding="utf-8"
        )
        model = sedd_graph.build(path, device="cpu", compile="off").model.train()
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(draw(*p.shape, seed=i) * 0.3)
        inputs = {"x1": draw(3, 5, 8, seed=1), "x2": draw(3, 5, 8, seed=2), "c": draw(3, 6, seed=3)}
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                outputs, _ = model.run(inputs, torch.tensor([11, -7, 2], dtype=torch.int32))
                loss = sum((y.float().sin().sum() for y in outputs.values()), torch.zeros(()))
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_compiled_code_has_the_gradients_of_eager_code() -> None:
    torch.compiler.reset()
    compiled = torch.compile(wide, backend=inductor, fullgraph=True, dynamic=False)
    x, weight = draw(16, 32, seed=0), draw(8, 32, seed=1)
    found = []
    for function in (wide, compiled):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves)
        assert out.dtype == torch.float32
        out.sin().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact_up_to", [128, 0], ids=["exact", "series"])
def test_log_determinants_are_those_of_full_precision(exact_up_to: int) -> None:
    weight = torch.linalg.qr(draw(6, 6, seed=4))[0] * 0.5
    x = draw(3, 6, seed=5)

    def found() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return log_det(
            lambda y: wide(y, weight).tanh(), x, lipschitz=0.5, exact_up_to=exact_up_to, generator=generator
        ).value

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found(), plain)
