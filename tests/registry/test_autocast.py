"""Every node component under bfloat16 autocast compared with float32, and the parts that must stay in float32."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sedd_graph_registry.network._shared import full_linear
from sedd_graph_registry.network._tf32 import tf32_linear
from sedd_graph_registry.network.attention import Attention
from sedd_graph_registry.network.head import ScoreHead, X0Head
from sedd_graph_registry.network.norm import LayerNorm, RMSNorm
from sedd_graph_registry.network.time import SigmaEmbedding
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Component, Context
from sedd_graph.component.kinds import NODE, kinds_at
from sedd_graph.diffusion.batch import Batch, Randomness
from tests.registry.test_conformance import CASES, OWN, REGISTRY, Case


def node_cases() -> Iterator[Any]:
    for name, cases in CASES.items():
        if REGISTRY.component(OWN[name].op).kind in kinds_at(NODE):
            yield from (pytest.param(name, case, id=f"{name}-{i}") for i, case in enumerate(cases))


def made(name: str, case: Case) -> tuple[Component, list[Tensor | None], tuple[str, ...]]:
    """Return the component with noise on its parameters, inputs of length 6, and the kinds of its outputs."""
    config, connected, axes = case
    cls = REGISTRY.component(OWN[name].op)
    made = cls.Config.model_validate(config)
    signature = cls.signature(made, {"*": 2})
    ports = [p for p in signature.inputs if not p.optional or p.name in connected]
    symbols = {s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols}
    own = {n: v for n, v in made.model_dump().items() if isinstance(v, int)}
    sizes = {s: axes.get(s, own.get(s, 8)) for s in symbols} | {"b": 2, "l": 6}
    context = Context({s: v for s, v in sizes.items() if s not in "bl"}, frozenset(p.name for p in ports))
    torch.manual_seed(0)
    component = cls(made, context).eval()
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs: list[Tensor | None] = []
    for port in signature.inputs:
        shape = [n for d in port.type.dims for n in ([2, 6, 8] if d.variadic else [d.size.evaluate(sizes)])]
        drawn = {"float": torch.randn(shape), "int": torch.randint(0, sizes.get("v", 2), shape)}
        drawn["bool"] = torch.arange(shape[-1]).expand(shape) < shape[-1] - 1
        if port.name == "sigma":
            drawn["float"] = drawn["float"].abs() + 0.1
        if port.name == "angles":  # cosines and sines
            drawn["float"] = torch.stack([drawn["float"][0].cos(), drawn["float"][0].sin()])
        value = drawn[port.type.kind] if port in ports else None
        inputs += [value, value * 0.5] if port.variadic and value is not None else [value]
    return component, inputs, tuple(p.type.kind for p in signature.outputs)


def run(component: Component, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = component(*inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize(("name", "case"), [*node_cases()])
def test_bfloat16_is_near_float32(name: str, case: Case) -> None:
    if name == "transformers_backbone":
        pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    component, inputs, kinds = made(name, case)
    exact = run(component, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(component, inputs)
    for want, got, kind in zip(exact, found, kinds, strict=True):
        if kind != "float":
            assert torch.equal(want, got)
            continue
        # 8 bits of significand, a few roundings in a row
        error, size = (got.float() - want).double(), want.double().clamp(-100, 100)
        assert bool(got.isfinite().all())
        assert error.norm() <= 0.02 * size.norm() + 1e-6


def at(cls: type[Component], axes: dict[str, int], **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(cls.Config.model_validate(config), Context(axes, frozenset())).eval()


def bfloat16(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "config"), [(X0Head, {}), (X0Head, {"mask": "none"}), (ScoreHead, {}), (ScoreHead, {"scale": "none"})]
)
def test_heads_are_float32(cls: type[Component], config: dict[str, str], dtype: torch.dtype) -> None:
    """Probabilities sum to 1, and scores are those of float64 to float32's precision."""
    d, v = 64, 1001
    head = at(cls, {"d": d, "v": v}, init="normal", **config)
    with torch.no_grad():
        head.weight.mul_(20)
    x, tokens = torch.randn(2, 5, d).to(dtype), torch.randint(0, v, (2, 5))
    tokens[:, 0] = v - 1
    sigma = torch.tensor([1e-3, 3.0])
    rest = (tokens, sigma) if cls is ScoreHead else (tokens,)
    found = bfloat16(lambda: head(x, *rest))
    assert found.dtype == torch.float32
    logits = x.double() @ head.weight.detach().double().T
    if cls is ScoreHead:
        shift = torch.expm1(sigma.double()).log()[:, None, None] + torch.tensor(v - 1.0).double().log()
        want = (logits - shift if not config else logits).scatter(-1, tokens[..., None], 0.0)
        assert torch.allclose(found.double(), want, rtol=1e-5, atol=2e-5)
        return
    assert (found.double().exp().sum(-1) - 1).abs().max() < 1e-5
    if config:
        assert torch.allclose(found.double(), logits.log_softmax(-1), rtol=1e-5, atol=2e-5)
    else:  # the first position is masked in both rows
        assert torch.allclose(found[:, 0, :-1].double(), logits[:, 0, :-1].log_softmax(-1), rtol=1e-5, atol=2e-5)
        assert bool((found[..., -1] < -1e5).all() | (tokens == v - 1).any())


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_norms_reduce_in_float32(cls: type[Component]) -> None:
    """A mean or mean square summed in bfloat16 would be off by more than the deviation where values are far from zero."""
    norm = at(cls, {"d": 512})
    x = (torch.randn(2, 3, 512) + 30).bfloat16()
    with torch.no_grad():
        want = norm(x.double().float()).bfloat16()
    found = bfloat16(lambda: norm(x)).bfloat16()
    assert torch.equal(found, want)  # rounded once, at the end, if at all


def test_qk_norm_reduces_in_float32() -> None:
    """Queries and keys have a root mean square of 1 at any scale of the input."""
    attention = at(Attention, {"r": 256}, heads=1, qk_norm="rms")
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen[:] = [q, k]
        return v

    x = torch.randn(1, 4, 256) * 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sedd_graph_registry.network.attention.F.scaled_dot_product_attention", spy)
        bfloat16(lambda: attention(x))
    assert len(seen) == 2
    for value in seen:
        assert (value.float().square().mean(-1).sqrt() - 1).abs().max() < 1e-3


def test_near_noise_levels_have_different_embeddings() -> None:
    """bfloat16 cannot represent 300.5; cosines and sines of sigma are computed in float32."""
    time = at(SigmaEmbedding, {"e": 64})
    levels = torch.tensor([300.0, 300.5])
    a, b = bfloat16(lambda: time(levels)).float()
    with torch.no_grad():
        exact = time(levels[:1])[0] - time(levels[1:])[0]
    assert ((a - b) - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("name", ["sedd-tiny", "sedd-uniform-tiny", "mdlm-tiny"])
def test_log_scores_and_losses_are_float32(name: str) -> None:
    """The loss of the same outputs is equal inside autocast and outside, up to the order of the sum over positions."""
    engine = sedd_graph.build(
        f"blueprints/{name}.yaml", ["params.depth=1", "params.dim=32"], device="cpu", compile="off"
    )
    engine.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():  # at the start all predictions are uniform
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = Batch.of(torch.randint(0, 128, (4, 16)))
    draw = engine.draw(batch, random=Randomness(torch.Generator().manual_seed(0)))
    inputs = {"tokens": draw.xt, "sigma": draw.sigma, "t": draw.t, "attend": batch.attend}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = engine.model.run(inputs)[0]
        inside, _ = engine.trained(draw, batch)
    assert all(v.dtype == torch.float32 for v in outputs.values())
    process: Any = engine.process
    outside = process.objective.loss(outputs, draw, batch, process.kernel, process.schedule)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("states", [64, 67])
def test_the_linear_map_of_heads_on_a_gpu_pads_its_states(states: int) -> None:
    """Run on a CPU, where its products are in float32: the numbers and gradients of the linear map."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 5), (states, 5), (states,)))
    before = torch.backends.cuda.matmul.fp32_precision
    for with_bias in (bias, None):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        others = [v.clone().requires_grad_() for v in (x, weight)]
        found, expected = tf32_linear(*leaves, with_bias), full_linear(*others, with_bias)
        torch.testing.assert_close(found, expected)
        (found.square().sum() + expected.square().sum()).backward()
        for a, b in zip(leaves, others, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tf32_linear(x, weight, bias), full_linear(x, weight, bias))
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_only_the_product_of_heads_is_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = Tensor.__matmul__

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return plain(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", product)
    before = torch.backends.cuda.matmul.fp32_precision
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    tf32_linear(x, weight, None).sum().backward()
    assert seen == 3 * ["tf32"]  # the product, and the gradients of both factors
    x @ weight.t()
    assert seen[3:] == [before]
    assert before != "tf32"
