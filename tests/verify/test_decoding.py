"""Blocks that start from tokens: derivation, certificate, error bounds, and codes that lie, each caught by name."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, Int
from sedd_graph_registry.codes.fixed import HadamardCode
from sedd_graph_registry.codes.learned import LearnedCode
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.check import Check
from sedd_graph.component.contract import Algebra, Signature, SizeField
from sedd_graph.component.registry import Registry, discover
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.read_back import read_back
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.graph.claims import uses
from sedd_graph.inverse import Solve
from sedd_graph.testing.conformance import ConformanceError, check_component
from sedd_graph.verify.block_fixture import BlockFixture
from sedd_graph.verify.decoding import decoders, reconstruction_error
from sedd_graph.verify.inverse import prove_inverses
from sedd_graph.verify.margin import check_margins, margins

TEXT = """\
blueprint: 1
name: from-tokens
axes: {b: batch, l: length, d: 8, v: 13}
inputs: {tokens: int b l}
outputs: {x: text}
blocks:
  text:
    invertible: {level: LEVEL}
    inputs: {tokens: int b l}
    outputs: {x: out}
    nodes: NODES
nodes:
  text: {block: text, in: tokensEXTRA}
"""
CODE = "code: {op: CODE, in: tokens, out: float b l d, with: {vocab: v}}"
ISOMETRIES = f"{{{CODE}, a: {{op: hadamard, in: code.out}}, b: {{op: shuffle, in: a}}, out: {{op: hadamard, in: b}}}}"
CONTRACTION = (
    f"{{{CODE}, up: {{op: lipschitz_linear, in: code.out, with: {{width: 16, bound: 0.9, bias: none}}}},"
    " act: {op: lipschitz_act, in: up, with: {activation: relu}},"
    " down: {op: lipschitz_linear, in: act, with: {width: 8, bound: 0.9, bias: none}},"
    " out: {op: add, in: [code.out, down]}}"
)
COUPLING = (
    f"{{{CODE}, half: {{op: split, in: code.out, with: {{sizes: [4, 4]}}}},"
    " f: {op: attention, in: half.x0, with: {heads: 2}}, y: {op: add, in: [half.x1, f]},"
    " g: {op: feed_forward, in: y}, z: {op: add, in: [half.x0, g]}, out: {op: concat, in: [y, z]}}"
)
FLOW = (
    f"{{{CODE}, half: {{op: split, in: code.out, with: {{sizes: [4, 4]}}}}, both: {{op: linear, in: half.x0, with: {{width: 8}}}},"
    " map: {op: split, in: both, with: {sizes: [4, 4]}}, moved: {op: affine, in: {x: half.x1, s: map.x0, t: map.x1}},"
    " joined: {op: concat, in: [moved, half.x0]}, out: {op: plu, in: joined}}"
)


class DotProduct(LearnedCode):
    """Decodes to the greatest dot product, though norms differ."""

    @solves("tokens", given=("out",))
    def decode(self, out: Tensor) -> Tensor:
        return (out @ self.rows().T).argmax(-1)


class TooFar(HadamardCode):
    """Declares twice the least distance."""

    def declared_distance(self) -> float:
        return 2 * super().declared_distance()


class Unrounded(Component, kind="mixer"):
    """A rotation of pairs of channels, declared to have no rounding errors."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        found = super().algebra(config, signature)
        return dataclasses.replace(found, lipschitz={("x", "out"): 1.0}, rounding={("x", "out"): 0.0})

    def turn(self, x: Tensor, angle: float) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.cat([cos * first - sin * second, sin * first + cos * second], -1)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.turn(x, 0.7)

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return self.turn(out, -0.7)


class Duplicates(LearnedCode):
    """Two tokens have one codeword."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        with torch.no_grad():
            self.weight[5] = self.weight[9]


class Levels(Component, kind="embedding"):
    """Tokens as numbers, decoded by rounding; no code, so that its margin is unknown."""

    class Config(ComponentConfig):
        vocab: SizeField

    def forward(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return tokens[..., None].to(torch.get_default_dtype()).expand(-1, -1, self.axis("d"))

    @solves("tokens", given=("out",))
    def decode(self, out: Tensor) -> Tensor:
        return out[..., 0].round().long()


PARTS: dict[str, type[Component]] = {
    "dot_product": DotProduct,
    "too_far": TooFar,
    "unrounded": Unrounded,
    "duplicates": Duplicates,
    "levels": Levels,
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    together = discover() | Registry.of(PARTS)
    monkeypatch.setattr("sedd_graph.component.registry._installed", lambda path: (together, []))
    return together


def write(folder: Path, nodes: str, *, code: str = "hadamard_code", level: str = "injective", extra: str = "") -> Path:
    path = folder / "from-tokens.yaml"
    text = TEXT.replace("NODES", nodes).replace("CODE", code).replace("LEVEL", level).replace("EXTRA", extra)
    path.write_text(text)
    return path


def certificate(path: Path) -> dict[str, Check]:
    """Return the checks of the block and of its code, by the last part of their names."""
    report = sedd_graph.check(path)
    made = prove_inverses(report.graph, report.registry, device=torch.device("cpu"))
    found = {check.name: check for one in made for check in one.checks}
    engine = sedd_graph.build(path, device="cpu", compile="off")
    return found | {check.name: check for check in check_margins(engine.network)}


def failing(path: Path) -> set[str]:
    return {name for name, check in certificate(path).items() if check.holds is False}


@pytest.mark.parametrize(
    ("nodes", "code", "bounded"),
    [
        (ISOMETRIES, "hadamard_code", True),
        (ISOMETRIES, "learned_code", True),
        (CONTRACTION, "learned_code", True),
        (COUPLING, "hadamard_code", False),
        (FLOW, "learned_code", False),
    ],
    ids=["isometries", "isometries-learned", "contraction", "coupling", "flow"],
)
def test_tokens_are_reconstructed_through_vectors(tmp_path: Path, nodes: str, code: str, bounded: bool) -> None:
    path = write(tmp_path, nodes, code=code)
    found = certificate(path)
    assert {name for name, check in found.items() if check.holds is False} == set()
    assert found["text.round_trip"].holds is True
    assert "3 rows of 1, 1 row of 11, 1 row of 64" in found["text.round_trip"].how
    assert "text.log_det" not in found
    assert (found["text.code.margin"].holds, found["text.code.decode"].holds) == (True, True)
    assert found["text.error"].holds is (True if bounded else None)
    assert found["text.code.error"].holds is (True if bounded else None)
    if not bounded:
        op = "attention" if nodes is COUPLING else "plu"
        assert f"op '{op}' (" in found["text.code.error"].how


@pytest.mark.parametrize(("nodes", "code"), [(ISOMETRIES, "learned_code"), (CONTRACTION, "learned_code")])
def test_no_input_exceeds_the_error_bound(tmp_path: Path, nodes: str, code: str) -> None:
    """Errors of the worst of many weights, lengths and tokens; the bound is finite, and not a million times too large."""
    report = sedd_graph.check(write(tmp_path, nodes, code=code))
    (use,) = uses(report.graph.root)
    fixture = BlockFixture(use.layer, report.registry)
    share = 0.0
    for seed in range(12):
        spread, factor = ((1.0, 1.0), (30.0, 1.0), (1.0, 1e3), (1.0, 1e-3))[seed % 4]
        with torch.no_grad():
            layer = fixture.layer(torch.float32, seed, spread=spread, factor=factor)
        for length in (1, 40):
            inputs = fixture.inputs(torch.float32, 3, length, seed)
            if seed % 2:  # the largest codeword everywhere
                norms = fixture.layout.by_path["code"].module(layer).rows().detach().norm(dim=1)
                inputs = [torch.full_like(inputs[0], int(norms.argmax()))]
            (found,) = decoders(fixture.layout, layer, length)
            error = reconstruction_error(fixture.layout, layer, None, inputs, found.vectors)
            assert error <= found.error < math.inf
            share = max(share, error / found.error)
    assert share > 1e-4


def test_exact_arithmetic_rounds_the_codewords_alone(tmp_path: Path) -> None:
    path = write(tmp_path, COUPLING, code="learned_code", extra=", arithmetic: exact")
    found = certificate(path)
    assert {name for name, check in found.items() if check.holds is False} == set()
    assert found["text.exact"].value == "equal"
    assert found["text.error"].holds is True
    engine = sedd_graph.build(path, device="cpu", compile="off")
    margin = margins(engine.network)["text.code"]
    assert margin.half is not None
    assert margin.error is not None
    assert 0 < margin.error <= 2**-17 * math.sqrt(8) * 1.001
    assert margin.error < margin.half
    tokens = torch.randint(0, 13, (3, 9))
    (use,) = uses(engine.network.graph.root)
    layout, layer = Layout(use.layer, (), Grid()), engine.model.get_submodule("text")
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = engine.model.run({"tokens": tokens})[0]["x"]
            run = LayerRun(layout, layer)
            run.put(layout.outputs.values(), [outputs])
            run.invert()
        (again,) = run.take(layout.inputs.values())
        assert torch.equal(again, tokens)


def test_training_reconstructs_the_tokens_of_exact_blocks(tmp_path: Path) -> None:
    """Gradients of the codewords, computed from reconstructed tokens, equal those of stored activations."""
    found = []
    for memory in ("reversible", "store"):
        path = write(tmp_path, COUPLING, code="learned_code", extra=f", arithmetic: exact, memory: {memory}")
        engine = sedd_graph.build(path, device="cpu", compile="off")
        out = engine.model.run({"tokens": torch.arange(26).view(2, 13) % 13})[0]["x"]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert torch.allclose(found[0][name], gradient, rtol=1e-4, atol=1e-5)
    assert found[1]["text.code.weight"].abs().sum(1).min() > 0


def test_digits_are_bijective_and_have_no_log_determinant(tmp_path: Path) -> None:
    nodes = "{out: {op: digits, in: tokens, with: {vocab: VOCAB, base: 2, digits: 3}}}"
    path = write(tmp_path, nodes.replace("VOCAB", "8"), level="volume_preserving")
    found = certificate(path)
    assert {name for name, check in found.items() if check.holds is False} == set()
    assert "text.log_det" not in found
    report = sedd_graph.check(path)
    assert "integers, which have no log-determinant" in str(report)
    (use,) = uses(report.graph.root)
    layout = Layout(use.layer, ())
    run = LayerRun(layout, build_block(use.layer, report.registry))
    run.put(layout.inputs.values(), [torch.arange(8).view(2, 4)])
    with pytest.raises(UserError, match="tokens holds integers, and a bijection between finite sets changes no prob"):
        forward_with_log_det(run, 2)
    with pytest.raises(
        BlueprintError, match="claims to be volume_preserving, but is proved to be no more than injective"
    ):
        sedd_graph.check(write(tmp_path, nodes.replace("VOCAB", "7"), level="volume_preserving"))


def test_vectors_of_tokens_have_no_volume(tmp_path: Path) -> None:
    with pytest.raises(BlueprintError, match="tokens holds no real numbers, so that the map is onto its image only"):
        sedd_graph.check(write(tmp_path, ISOMETRIES, level="bijective"))
    report = sedd_graph.check(write(tmp_path, ISOMETRIES))
    (use,) = uses(report.graph.root)
    layout = Layout(use.layer, ())
    assert any(isinstance(d, Solve) and d.path == "code" for d in layout.program.derivations)
    run = LayerRun(layout, build_block(use.layer, report.registry))
    run.put(layout.inputs.values(), [torch.arange(8).view(2, 4)])
    with pytest.raises(UserError, match="no log-determinant: it is tokens holds no real numbers"):
        forward_with_log_det(run, 2)


# -- liars ------------------------------------------------------------------------------------------------------------


def test_a_decoder_by_dot_products_is_caught(registry: Registry, tmp_path: Path) -> None:
    found = failing(write(tmp_path, ISOMETRIES, code="dot_product"))
    assert "text.code.decode" in found
    with pytest.raises(ConformanceError, match=r"decode: .* perturbed codewords are decoded to other tokens"):
        check_component(DotProduct, {"vocab": 13})


def test_a_least_distance_that_is_too_large_is_caught(registry: Registry, tmp_path: Path) -> None:
    found = certificate(write(tmp_path, ISOMETRIES, code="too_far"))
    assert {name for name, check in found.items() if check.holds is False} == {"text.code.margin"}
    assert "less than half the declared least distance 8" in found["text.code.margin"].value
    with pytest.raises(ConformanceError, match="distance: the least distance of codewords is 4, and 8 is declared"):
        check_component(TooFar, {"vocab": 13})


def test_an_error_bound_without_rounding_is_caught(registry: Registry, tmp_path: Path) -> None:
    nodes = f"{{{CODE}, a: {{op: unrounded, in: code.out}}, out: {{op: unrounded, in: a}}}}"
    found = certificate(write(tmp_path, nodes, code="learned_code"))
    assert {name for name, check in found.items() if check.holds is False} == {"text.error"}
    with pytest.raises(ConformanceError, match="rounding: 'out' of 'x' is off by"):
        check_component(Unrounded)


def test_a_decoder_that_is_no_code_is_not_certified(registry: Registry, tmp_path: Path) -> None:
    found = certificate(write(tmp_path, ISOMETRIES, code="levels"))
    assert found["text.round_trip"].holds is True
    assert found["text.error"].holds is None
    assert "code is no sedd_graph.plugin.Code: its margin is unknown" in found["text.error"].how


def test_equal_codewords_are_refused(registry: Registry, tmp_path: Path) -> None:
    found = failing(write(tmp_path, ISOMETRIES, code="duplicates"))
    assert {"text.code.margin", "text.code.decode"} <= found
    with pytest.raises(UserError, match=r"text\.code\.margin"):
        sedd_graph.build(tmp_path / "from-tokens.yaml", device="cpu", compile="off", prove=True)


def test_a_code_that_does_not_exist_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path, ISOMETRIES)
    path.write_text(path.read_text().replace("v: 13", "v: 17"))
    with pytest.raises(BlueprintError, match=r"text\.code: op 'hadamard_code': 17 tokens have no biorthogonal code"):
        sedd_graph.check(path)


def test_the_inputs_of_a_block_are_read_back_from_its_outputs(tmp_path: Path) -> None:
    engine = sedd_graph.build(
        write(tmp_path, COUPLING, code="learned_code", extra=", arithmetic: exact"), device="cpu", compile="off"
    )
    tokens = torch.randint(0, 13, (5, 7))
    assert torch.equal(read_back(engine.network, "text", {"tokens": tokens})["tokens"], tokens)
    with pytest.raises(UserError, match=r"no invertible block .* has the path 'test' \(did you mean 'text'\?\)"):
        read_back(engine.network, "test", {"tokens": tokens})
