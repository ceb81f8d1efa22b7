"""Blocks that a certificate must not pass, must not crash on, and must not refuse: each built from components that lie or err."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import sedd_graph
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.check import Check
from sedd_graph.component.contract import Algebra, Rule, Signature
from sedd_graph.component.registry import Registry, discover
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.errors import BlueprintError, EnvironmentFault, UserError
from sedd_graph.graph.claims import uses
from sedd_graph.inverse import Contraction
from sedd_graph.verify import bounds
from sedd_graph.verify.block_fixture import BlockFixture
from sedd_graph.verify.inverse import prove_inverses
from tests.verify.test_inverse import Stretch

TEXT = """\
blueprint: 1
name: liars
axes: {b: batch, l: length, d: WIDTH, v: 129}
inputs: {tokens: int b l}
outputs: {log_x0: head}
blocks:
  layer:
    invertible: {CLAIM}
    inputs: {INPUTS}
    outputs: {OUTPUTS}
    nodes: NODES
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  trunk: {block: layer, in: {FED}EXTRA}
  head: {op: x0_head, in: {x: trunk.LAST, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: masked_count}
sample: {op: ancestral, steps: 4}
data: {tokenizer: {op: characters, size: 128}, length: 16}
"""


class Summed(Stretch):
    """Its log-determinant is one number for the whole batch."""

    def log_det(self, x: Tensor) -> Tensor:
        return self.log.sum().expand(1) * x.shape[1] * len(x)


class SummedWide(Stretch):
    """Its log-determinant of the whole batch is given for each row."""

    def log_det(self, x: Tensor) -> Tensor:
        return self.log.sum().expand(len(x)) * x.shape[1] * len(x)


class OnePosition(Stretch):
    """Its log-determinant is right for one position alone."""

    def log_det(self, x: Tensor) -> Tensor:
        return self.log.sum().expand(len(x))


class Mixing(Stretch):
    """Adds the mean of the other rows."""

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return x * self.log.exp() + (x.mean(0, keepdim=True) if len(x) > 1 else 0)

    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Tensor:
        scale = self.log.exp()
        return (out - (out.mean(0) / (scale + 1) if len(out) > 1 else 0)) / scale


class Doubling(Stretch):
    """2 x, declared to keep volumes."""

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return 2 * x

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return out / 2


class Raising(Stretch):
    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Tensor:
        raise RuntimeError("the table is empty")


class TwoValues(Stretch):
    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Any:
        return out * (-self.log).exp(), out


class OtherShape(Stretch):
    @solves("x", given=("out",), log_det="log_det")
    def inverse(self, out: Tensor) -> Tensor:
        return (out * (-self.log).exp())[:, :1]


class NoMethod(Stretch):
    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out",), "invers"),), log_det={"x": "log_det"})


class FailingForward(Stretch):
    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        raise ZeroDivisionError("no rows")


class NearZero(Component, kind="mixer"):
    """0.5 x near 0, and three times as far beyond 8."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 0.8})

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return 0.5 * x + torch.where(x.abs() > 8, 2.5 * (x - 8 * x.sign()), 0.0)


class Growing(NearZero):
    """The bound holds until the weight grows."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.log = nn.Parameter(torch.full((self.axis("d"),), -2.0))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return torch.sin(x) * self.log.exp()


class WideMap(NearZero):
    """A linear map of Lipschitz constant 1.0, declared 0.98."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight = nn.Parameter(torch.eye(self.axis("d")))
        self.norm = -1, 1.0

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 0.98})

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if self.norm[0] != self.weight._version:
            self.norm = self.weight._version, float(torch.linalg.matrix_norm(self.weight.detach(), 2))
        return x @ self.weight.T / self.norm[1]


class Count(Component, kind="arithmetic"):
    """A stream of integers turned: plus one."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        return x + 1

    @solves("x", given=("out",))
    def inverse(self, out: Tensor) -> Tensor:
        return out - 1


PARTS = [Stretch, Summed, SummedWide, OnePosition, Mixing, Doubling, Raising, TwoValues, OtherShape, NoMethod]
PARTS += [FailingForward, NearZero, Growing, WideMap, Count]  # type: ignore[list-item]  # one list of several base classes
NAMES = {"".join(f"_{c.lower()}" if c.isupper() else c for c in part.__name__)[1:]: part for part in PARTS}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    together = discover() | Registry.of(NAMES)
    monkeypatch.setattr("sedd_graph.component.registry._installed", lambda path: (together, []))
    return together


def write(folder: Path, nodes: str, **changes: str) -> Path:
    """The blueprint with one block of the given nodes."""
    values = {"CLAIM": "level: injective", "INPUTS": "x: float b l d", "OUTPUTS": "x: out", "NODES": nodes}
    values |= {"FED": "x: embed", "EXTRA": "", "LAST": "x", "WIDTH": "8"} | changes
    text = TEXT
    for old, new in values.items():
        text = text.replace(old, new)
    path = folder / "liars.yaml"
    path.write_text(text)
    return path


def certificate(path: Path) -> dict[str, Check]:
    report = sedd_graph.check(path)
    made = prove_inverses(report.graph, report.registry, device=torch.device("cpu"))
    return {check.name.partition(".")[2]: check for one in made for check in one.checks}


def failing(path: Path) -> dict[str, Check]:
    return {name: check for name, check in certificate(path).items() if check.holds is False}


# -- rows of a batch --------------------------------------------------------------------------------------------------

MOVED = (
    "{turned: {op: permute, in: x, with: {pattern: b l d -> l b d}}, norm: {op: OP, in: turned},"
    " out: {op: permute, in: norm, with: {pattern: l b d -> b l d}}}"
)


@pytest.mark.parametrize("op", ["act_norm", "stretch"])
def test_a_log_det_of_another_axis_than_the_batch_is_refused(registry: Registry, tmp_path: Path, op: str) -> None:
    """Axis 0 of what the component sees is the length: it gives one number for each position, not for each row."""
    path = write(tmp_path, MOVED.replace("OP", op), CLAIM="level: bijective")
    found = certificate(path)
    assert {name for name, check in found.items() if check.holds is False} == set()
    assert found["log_det"].holds is None
    assert f"op '{op}' (norm) computes a log-determinant for each index of axis 0" in found["log_det"].how
    (use,) = uses(sedd_graph.check(path).graph.root)
    layout = Layout(use.layer, ())
    run = LayerRun(layout, build_block(use.layer, registry))
    run.put(layout.inputs.values(), [torch.randn(2, 3, 8)])
    with pytest.raises(UserError, match="has no log-determinant of each row: op"):
        forward_with_log_det(run, 2)


def test_a_factor_follows_the_batch_wherever_it_goes(registry: Registry, tmp_path: Path) -> None:
    path = write(tmp_path, MOVED.replace("op: OP, in: turned", "op: scale, in: turned, with: {by: 0.3}"))
    assert certificate(path)["log_det"].holds is True
    (use,) = uses(sedd_graph.check(path).graph.root)
    layout = Layout(use.layer, ())
    run = LayerRun(layout, build_block(use.layer, registry))
    run.put(layout.inputs.values(), [torch.randn(2, 3, 8)])
    assert torch.allclose(forward_with_log_det(run, 2), torch.full((2,), 24 * math.log(0.3)))


FLOW = """
blueprint: 1
name: moved-flow
axes: {b: batch, d: 3}
inputs: {x: float b 1 d}
outputs: {z: out}
nodes: MOVED
objective: {op: exact_likelihood}
data: {points: {op: two_moons}}
"""


def test_a_flow_whose_batch_leaves_axis_0_is_refused_by_check(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text(FLOW.replace("MOVED", MOVED.replace("OP", "act_norm")))
    with pytest.raises(BlueprintError, match="the likelihood needs a log-determinant of each row: op 'act_norm'"):
        sedd_graph.check(path)


def test_rows_that_influence_one_another_are_caught(registry: Registry, tmp_path: Path) -> None:
    found = certificate(write(tmp_path, "{out: {op: mixing, in: x}}", CLAIM="level: bijective"))["log_det"]
    assert found.holds is False
    assert "the output 'x' of a row depends on the other rows of the batch" in found.value


def test_attention_over_the_batch_has_no_likelihood_of_a_row(registry: Registry, tmp_path: Path) -> None:
    nodes = (
        "{parts: {op: split, in: x, with: {sizes: [4, 4]}},"
        " turned: {op: permute, in: parts.x0, with: {pattern: b l d -> l b d}},"
        " attended: {op: reverse, in: turned}, back: {op: permute, in: attended, with: {pattern: l b d -> b l d}},"
        " y: {op: add, in: [parts.x1, back]}, out: {op: concat, in: [y, parts.x0]}}"
    )
    found = certificate(write(tmp_path, nodes))["log_det"]
    assert found.holds is None
    assert "one row of the batch may influence another one" in found.how


@pytest.mark.parametrize("op", ["summed", "summed_wide", "one_position"])
def test_a_log_det_of_other_rows_or_positions_is_caught(registry: Registry, tmp_path: Path, op: str) -> None:
    found = failing(write(tmp_path, f"{{out: {{op: {op}, in: x}}}}", CLAIM="level: bijective"))
    assert found.keys() == {"log_det"}
    if op == "summed":
        assert "node 'out': op 'summed'" in found["log_det"].value
        assert "gives shape [1], not one number for each of 2 rows, [2]" in found["log_det"].value


def test_a_log_det_of_a_whole_batch_is_refused_at_run_time(registry: Registry, tmp_path: Path) -> None:
    path = write(tmp_path, "{out: {op: summed, in: x}}", CLAIM="level: bijective")
    (use,) = uses(sedd_graph.check(path).graph.root)
    layout = Layout(use.layer, ())
    run = LayerRun(layout, build_block(use.layer, registry))
    run.put(layout.inputs.values(), [torch.randn(4, 3, 8)])
    with pytest.raises(EnvironmentFault, match=r"op 'summed' .*: its log-determinant 'log_det' gives shape \[1\]"):
        forward_with_log_det(run, 4)


# -- liars ------------------------------------------------------------------------------------------------------------


def test_zero_declared_for_2x_is_caught_where_the_jacobian_is_too_large(registry: Registry, tmp_path: Path) -> None:
    path = write(tmp_path, "{out: {op: doubling, in: x}}", CLAIM="level: bijective", WIDTH="2048")
    found = failing(path)
    assert found.keys() == {"log_det"}
    assert found["log_det"].value.startswith(f"0 against {2048 * math.log(2):.8g} nats")
    assert "estimated by Lanczos quadrature with 16 probes" in found["log_det"].how


def test_an_honest_wide_block_passes_its_estimate(registry: Registry, tmp_path: Path) -> None:
    found = certificate(write(tmp_path, "{out: {op: stretch, in: x}}", CLAIM="level: bijective", WIDTH="2048"))
    assert found["log_det"].holds is True
    assert "+-" in found["log_det"].value


@pytest.mark.parametrize("op", ["near_zero", "growing"])
def test_a_bound_that_holds_only_near_by_is_refuted(registry: Registry, tmp_path: Path, op: str) -> None:
    nodes = f"{{f: {{op: {op}, in: x}}, out: {{op: add, in: [x, f]}}}}"
    found = failing(write(tmp_path, nodes))["contraction"]
    assert float(found.value) > 0.8
    assert "the largest: inputs" in found.how


@pytest.mark.parametrize("jacobian", [1536, 0], ids=["whole", "lanczos"])
def test_a_wide_linear_map_is_refuted_closely(
    registry: Registry, tmp_path: Path, jacobian: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "JACOBIAN", jacobian)
    path = write(tmp_path, "{f: {op: wide_map, in: x}, out: {op: add, in: [x, f]}}", WIDTH="256")
    (use,) = uses(sedd_graph.check(path).graph.root)
    fixture = BlockFixture(use.layer, registry)
    (step,) = (d for d in fixture.layout.program.derivations if isinstance(d, Contraction))
    with torch.no_grad():
        slope = bounds.largest_slope(fixture, torch.float64, step).slope
    assert 0.99 < slope < 1.000001


# -- errors of components ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("raising", "RuntimeError: the table is empty"),
        ("two_values", "its inversion rule 'inverse' gives 2 values, not one for each of x"),
        ("other_shape", "gives 'x' as float64 [2, 1, 8], not as float64 [2, 6, 8]"),
        ("no_method", "its inversion rule names 'invers', which is no method"),
        ("failing_forward", "ZeroDivisionError: no rows"),
    ],
)
def test_an_error_is_a_finding_with_its_place(registry: Registry, tmp_path: Path, op: str, text: str) -> None:
    found = certificate(write(tmp_path, f"{{good: {{op: stretch, in: x}}, out: {{op: {op}, in: good}}}}"))
    (check,) = found.values()
    assert (check.name, check.holds) == ("layer.round_trip", False)
    assert text in check.value
    assert f"block 'layer', node 'out': op '{op}' (" in check.value


# -- right blocks ------------------------------------------------------------------------------------------------------


def test_a_scale_by_a_decimal_is_bijective(registry: Registry, tmp_path: Path) -> None:
    path = write(tmp_path, "{out: {op: scale, in: x, with: {by: 0.3}}}", CLAIM="level: bijective")
    assert failing(path) == {}


@pytest.mark.parametrize(
    ("outputs", "nodes"),
    [("x: out, c: c", "{}"), ("x: out, c: c2", "{c2: {op: scale, in: c, with: {by: 2}}}")],
    ids=["passed", "changed"],
)
@pytest.mark.parametrize("repeat", ["", ", repeat: 3, memory: store"])
def test_a_given_input_that_is_an_output(
    registry: Registry, tmp_path: Path, outputs: str, nodes: str, repeat: str
) -> None:
    """The level, the log-determinant and the reconstruction do not depend on what is passed on beside the stream."""
    inner = "f: {op: feed_forward, in: c}, s: {op: scale, in: x, with: {by: 0.3}}, out: {op: add, in: [s, f]}"
    path = write(
        tmp_path,
        nodes[:-1] + (", " if nodes != "{}" else "") + inner + "}",
        CLAIM="given: [c], level: bijective",
        INPUTS="x: float b l d, c: float b l d",
        OUTPUTS=outputs,
        FED="x: embed, c: embed",
        EXTRA=repeat,
    )
    assert failing(path) == {}
    found = certificate(path)
    assert found["log_det"].holds is True


@pytest.mark.parametrize("exact", [False, True])
def test_integers_that_pass_through(registry: Registry, tmp_path: Path, exact: bool) -> None:
    path = write(
        tmp_path,
        "{f: {op: feed_forward, in: c}, out: {op: add, in: [x, f]}, n: {op: count, in: k}}",
        INPUTS="x: float b l d, c: float b l d, k: int b l, m: bool b l",
        OUTPUTS="x: out, c: c, k: n, m: m",
        CLAIM="given: [c], level: volume_preserving",
        FED="x: embed, c: embed, k: tokens, m: attend",
        EXTRA=", repeat: 2, arithmetic: exact" if exact else ", repeat: 2",
    )
    path.write_text(
        path.read_text().replace("inputs: {tokens: int b l}", "inputs: {tokens: int b l, attend: bool b l}")
    )
    assert failing(path) == {}


def test_two_outputs_of_one_value_are_no_bijection(registry: Registry, tmp_path: Path) -> None:
    path = write(tmp_path, "{out: {op: stretch, in: x}}", OUTPUTS="x: out, y: out", LAST="y")
    assert failing(path) == {}
    path = write(tmp_path, "{out: {op: stretch, in: x}}", OUTPUTS="x: out, y: out", LAST="y", CLAIM="level: bijective")
    with pytest.raises(BlueprintError, match="the outputs 'x' and 'y' are one value"):
        sedd_graph.check(path)
