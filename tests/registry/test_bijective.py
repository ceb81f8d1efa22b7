"""Inverses, log-determinants and gradients of the bijective components against autograd, scipy and shorter sequences."""

import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.bijective import contraction, coupling, linear, orthogonal, rearrange
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from sedd_graph.component.base import Component, Context
from sedd_graph.component.contract import Algebra
from sedd_graph.testing.conformance import check_component
from tests.registry.bijections import CASES, CONTRACTIONS, ORTHOGONAL, Case, inputs, make

scipy_fft = pytest.importorskip("scipy.fft")
scipy_linalg = pytest.importorskip("scipy.linalg")

# torch's compiler warns about torch's own code
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
every = pytest.mark.parametrize("case", CASES, ids=str)
SIZES = [(1, 1), (2, 6), (3, 33)]


def tail(case: Case, attend: Tensor | None) -> list[Tensor | None]:
    return [attend] if case.masks else []


def algebra(component: Component) -> Algebra:
    cls = type(component)
    return cls.algebra(component.config, cls.signature(component.config, {}))


def log_det(component: Component, values: list[Tensor], *rest: Tensor | None) -> Tensor:
    method = algebra(component).log_det["x"]
    return values[0].new_zeros(len(values[0])) if method == "zero" else getattr(component, method)(*values, *rest)


def inverse(component: Any, out: Tensor, values: list[Tensor], *rest: Tensor | None) -> Tensor:
    angles = [None] if isinstance(component, orthogonal.RotaryMix) else []
    return component.inverse(out, *values[1:], *angles, *rest)


@pytest.mark.parametrize("case", [*CASES, *CONTRACTIONS], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "attend"])
def test_contract(case: Case, masked: bool) -> None:
    if masked and not case.masks:
        pytest.skip("takes no mask")
    heads = case.config.get("heads", 1)
    check_component(case.cls, case.config, axes={"d": case.d, "r": case.d // heads}, connected=("attend",) * masked)


@pytest.mark.parametrize("mode", ["halves", "interleave"])
@pytest.mark.parametrize("of", ["values", "mask"])
@pytest.mark.parametrize("cls", [rearrange.SplitSequence, rearrange.JoinSequence])
def test_contract_of_split_and_join_sequence(cls: type[Component], mode: str, of: str) -> None:
    check_component(cls, {"mode": mode, "of": of}, axes={"h": 3, "d": 2})


def test_contract_of_rotary_mix_with_angles() -> None:
    check_component(orthogonal.RotaryMix, connected=("angles",))


@every
@pytest.mark.parametrize(("b", "l"), SIZES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_round_trip(case: Case, b: int, l: int, scale: float) -> None:
    component, values = make(case), inputs(case, b, l, scale=scale)
    out = component(*values)
    error = (inverse(component, out, values, *tail(case, None)) - values[0]).abs()
    if case.cls is coupling.Spline:  # the inverse multiplies rounding errors by one over the slope
        x = values[0].requires_grad_()
        error = error * torch.autograd.grad(component(x, values[1]).sum(), x)[0].clamp(max=1)
    assert error.max() <= 1e-10


@every
def test_log_det_is_that_of_the_jacobian(case: Case) -> None:
    component, values = make(case), inputs(case, 1, 3)
    matrix = jacobian(lambda x: component(x, *values[1:]).flatten(), values[0]).flatten(1)
    assert abs(torch.linalg.slogdet(matrix).logabsdet - log_det(component, values).item()) <= 1e-8
    several = inputs(case, 3, 3)
    alone = torch.cat([log_det(component, [v[i : i + 1] for v in several]) for i in range(3)])
    assert torch.allclose(log_det(component, several), alone, rtol=1e-12)


@every
def test_gradients(case: Case) -> None:
    component = make(case)
    values = [v.requires_grad_() for v in inputs(case, 2, 3)]
    parameters = list(component.parameters())
    assert gradcheck(lambda *v: component(*v[: len(values)]), (*values, *parameters))
    if algebra(component).log_det["x"] != "zero":
        assert gradcheck(lambda *v: log_det(component, list(v[: len(values)])), (*values, *parameters))


@pytest.mark.parametrize("case", [c for c in CASES if c.masks], ids=str)
def test_padding(case: Case) -> None:
    """Padding keeps its values; other positions and the log-determinant are those of the sequence without padding."""
    component, values = make(case), inputs(case, 2, 7)
    attend = torch.tensor([[True, False, True, True, False, True, False], [False] * 2 + [True] * 5])
    with torch.no_grad():
        out = component(*values, attend)
        assert torch.equal(out[~attend], values[0][~attend])
        back = inverse(component, out, values, attend)
        assert (back - values[0]).abs().max() <= 1e-8
        for row in range(2):
            short = [v[row : row + 1, attend[row]] for v in values]
            assert torch.allclose(component(*short, None)[0], out[row, attend[row]], atol=1e-12)
            expected = log_det(component, short, None)
            assert torch.allclose(log_det(component, values, attend)[row], expected[0], atol=1e-12)
        hidden = component(*values, torch.zeros_like(attend))
        assert torch.equal(hidden, values[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip_in_float32_under_autocast(case: Case) -> None:
    """No value on the way to the inverse is rounded to bfloat16."""
    component, values = make(case, dtype=torch.float32), inputs(case, 2, 6, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = component(*values)
        back = inverse(component, out, values, *tail(case, None))
    assert out.dtype == torch.float32
    assert (back - values[0]).abs().max() <= (5e-3 if case.cls is coupling.Spline else 2e-5)


# -- orthogonal maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ORTHOGONAL, ids=str)
@pytest.mark.parametrize("moved", [0.0, 0.3, 10.0])
def test_orthogonal(case: Case, moved: float) -> None:
    component, l = make(case, moved=moved), 3
    matrix = jacobian(lambda x: component(x).flatten(), inputs(case, 1, l)[0]).flatten(1)
    assert (matrix @ matrix.T - torch.eye(l * case.d)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "case", [Case(orthogonal.Orthogonal, {"kind": k}, 64, False) for k in ("cayley", "matrix_exp")]
)
def test_learned_maps_start_as_the_identity(case: Case) -> None:
    x = inputs(case, 2, 3)[0]
    assert torch.equal(make(case, moved=0.0)(x), x)
    pairs = make(Case(orthogonal.Orthogonal, {"reflections": 4}, 64, False), moved=0.0)
    assert torch.allclose(pairs(x), x, atol=1e-14)
    assert torch.equal(make(Case(orthogonal.RotaryMix, {}, 64, False), moved=0.0)(x), x)


def test_householder_is_the_product_of_its_reflections() -> None:
    case = Case(orthogonal.Orthogonal, {"reflections": 3}, 5, False)
    component, (x,) = make(case), inputs(case, 2, 3)
    expected = x
    for v in component.weight:
        expected = expected - 2 * (expected @ v)[..., None] * v / v.square().sum()
    assert torch.allclose(component(x), expected, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 513])
def test_dct_is_scipys(n: int) -> None:
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    over_sequence = make(Case(orthogonal.DCT, {"over": "sequence"}, 3, True))
    expected = torch.from_numpy(scipy_fft.dct(x.numpy(), axis=1, norm="ortho"))
    assert (over_sequence(x) - expected).abs().max() <= 1e-12
    over_channels = make(Case(orthogonal.DCT, {}, n, True))
    assert (over_channels(x.mT) - expected.mT).abs().max() <= 1e-12
    assert (over_sequence(x.float()) - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("d", [1, 2, 8, 32, 256])
def test_hadamard_is_scipys(d: int) -> None:
    x = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x @ torch.from_numpy(scipy_linalg.hadamard(d)).double() / math.sqrt(d)
    assert torch.allclose(make(Case(orthogonal.Hadamard, {}, d, False))(x), expected, atol=1e-12)


def test_hadamard_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="a width that is a power of two, not 12"):
        make(Case(orthogonal.Hadamard, {}, 12, False))


def test_matrix_exp_and_cayley_are_scipys() -> None:
    for kind in ("cayley", "matrix_exp"):
        case = Case(orthogonal.Orthogonal, {"kind": kind}, 6, False)
        component = make(case)
        skew = (component.weight.triu(1) - component.weight.triu(1).T).detach().numpy()
        eye = torch.eye(6, dtype=torch.float64).numpy()
        expected = scipy_linalg.expm(skew) if kind == "matrix_exp" else scipy_linalg.inv(eye + skew) @ (eye - skew)
        assert torch.allclose(component(torch.from_numpy(eye)[None])[0], torch.from_numpy(expected), atol=1e-12)


# -- rearrangements ---------------------------------------------------------------------------------------------------


def test_reverse_and_roll_move_the_attended_positions() -> None:
    x = torch.arange(7.0)[None, :, None]
    attend = torch.tensor([[True, True, False, True, True, False, False]])
    assert make(Case(rearrange.Reverse, {}, 1, True))(x, attend).flatten().tolist() == [4, 3, 2, 1, 0, 5, 6]
    assert make(Case(rearrange.Roll, {"by": 1}, 1, True))(x, attend).flatten().tolist() == [4, 0, 2, 1, 3, 5, 6]
    assert make(Case(rearrange.Roll, {"by": -2}, 1, True))(x).flatten().tolist() == [2, 3, 4, 5, 6, 0, 1]


def test_shuffle_is_fixed_by_its_seed() -> None:
    """Checkpoints depend on the permutation, so golden values pin it."""
    case = Case(rearrange.Shuffle, {"seed": 5}, 7, False)
    assert make(case)(torch.arange(7.0)[None, None]).flatten().tolist() == GOLDEN_SHUFFLE


GOLDEN_SHUFFLE = [6, 2, 4, 1, 0, 5, 3]


def test_split_and_join_sequence() -> None:
    x = torch.arange(6.0)[None, :, None]
    for mode, first in (("halves", [0, 1, 2]), ("interleave", [0, 2, 4])):
        config = rearrange.SplitSequence.Config(mode=mode)
        x0, x1 = rearrange.SplitSequence(config, Context({}))(x)
        assert x0.flatten().tolist() == first
        assert sorted([*first, *x1.flatten().tolist()]) == list(range(6))
        assert torch.equal(rearrange.JoinSequence(config, Context({}))(x0, x1), x)
    with pytest.raises(ValueError, match="a sequence of 5 has no two equal parts"):
        rearrange.SplitSequence(config, Context({}))(x[:, :5])


# -- maps with a volume -----------------------------------------------------------------------------------------------


def test_plu_starts_as_a_rotation_and_is_the_product_of_its_factors() -> None:
    case = Case(linear.PLU, {}, 16, True)
    component = make(case, moved=0.0)
    matrix = component(torch.eye(16, dtype=torch.float64)[None])[0].T
    assert torch.allclose(matrix @ matrix.T, torch.eye(16, dtype=torch.float64), atol=1e-6)  # made in float32
    moved = make(case)
    _, _, upper = torch.linalg.lu(moved(torch.eye(16, dtype=torch.float64)[None])[0].T)
    assert torch.allclose(upper.diagonal().abs().log().sum() * 5, moved.log_det(torch.zeros(1, 5, 16).double())[0])


def test_affine_scale_is_bounded() -> None:
    case = Case(coupling.Affine, {"clamp": 0.5}, 2, True)
    x, t = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    out = make(case)(x, torch.tensor([[[1e9, -1e9]]]), t)
    assert torch.allclose(out.flatten(), torch.tensor([0.5, -0.5]).exp())


def test_spline_is_the_identity_with_zero_parameters_and_beyond_its_bound() -> None:
    case = Case(coupling.Spline, {}, 3, True)
    x, params = inputs(case, 4, 50, scale=3.0)
    component = make(case)
    assert torch.allclose(component(x, torch.zeros_like(params)), x, atol=1e-14)
    beyond = x.abs() >= 3
    out = component(x, params)
    assert beyond.any()
    assert torch.equal(out[beyond], x[beyond])
    order = x[..., 0].flatten().argsort()
    same = params[:1, :1].expand_as(params)
    assert (component(x, same)[..., 0].flatten()[order].diff() > 0).all()


def test_spline_is_continuous_and_smooth_at_its_bound() -> None:
    case = Case(coupling.Spline, {"bound": 2.0}, 1, True)
    component, params = make(case), inputs(case, 1, 1)[1]
    for edge in (-2.0, 2.0):
        x = torch.tensor([[[edge * (1 - 1e-7)]]], dtype=torch.float64)
        assert abs(component(x, params) - x).item() <= 1e-6
        assert abs(component.log_det(x, params)).item() <= 1e-5


def test_act_norm_is_initialised_from_the_first_training_batch() -> None:
    case = Case(linear.ActNorm, {}, 5, True)
    component = make(case, moved=0.0).train()
    x = inputs(case, 8, 9)[0] * torch.tensor([1.0, 2.0, 3.0, 0.1, 0.0]) + 7
    attend = torch.arange(9)[None] < torch.arange(2, 10)[:, None]
    x[~attend] = 1e6  # padding does not affect the statistics
    rows = component(x, attend)[attend]
    assert torch.allclose(rows.mean(0), torch.zeros(5).double(), atol=1e-10)
    assert torch.allclose(rows.std(0, correction=0), torch.tensor([1.0, 1, 1, 1, 0]).double(), atol=1e-10)
    before = {k: v.clone() for k, v in component.state_dict().items()}
    component(x * 3 + 1)
    assert all(torch.equal(v, before[k]) for k, v in component.state_dict().items())
    assert (component.inverse(rows[None], None)[0] - x[attend]).abs().max() <= 1e-10
    again = make(case, moved=0.0).train()
    again.load_state_dict(before)
    assert torch.equal(again(x, attend), component(x, attend))


def test_act_norm_gradients() -> None:
    case = Case(linear.ActNorm, {}, 3, True)
    component, (x,) = make(case), inputs(case, 2, 4)
    component.mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    component.log_deviation.copy_(torch.tensor([0.3, -1.0, 0.0]))
    component.ready.fill_(True)
    attend = torch.tensor([[True] * 4, [True, True, False, False]])

    def run(x: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(component, {"log_scale": log_scale, "bias": bias}, (x, attend))

    points = [t.detach().clone().requires_grad_() for t in (x, component.log_scale, component.bias)]
    assert gradcheck(run, points)
    assert torch.autograd.gradgradcheck(run, points)
    with torch.no_grad():
        assert torch.equal(component(x, attend), run(*points))


def test_act_norm_in_evaluation_is_the_identity_before_initialisation() -> None:
    case = Case(linear.ActNorm, {}, 5, True)
    component, (x,) = make(case, moved=0.0), inputs(case, 2, 3)
    assert torch.equal(component(x), x)
    assert not component.ready


def test_linear_can_start_as_zero() -> None:
    case = Case(linear.Linear, {"width": 3, "init": "zero"}, 5, False)
    assert not make(case, moved=0.0)(inputs(case, 1, 2)[0]).any()
    check_component(linear.Linear, {"width": 3})


# -- compiled -------------------------------------------------------------------------------------------------


class All(torch.nn.Module):
    """Every bijection and its inverse."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases
        self.parts: Any = torch.nn.ModuleList([make(c, dtype=torch.float32) for c in cases])

    def forward(self, values: list[list[Tensor]]) -> list[Tensor]:
        found = []
        for case, part, v in zip(self.cases, self.parts, values, strict=True):
            out = part(*v)
            found += [out, inverse(part, out, v, *tail(case, None))]
        return found


@pytest.mark.slow
@compiles
def test_bijections_compile_with_fullgraph() -> None:
    whole = All([*CASES])
    values = [inputs(c, 2, 6, dtype=torch.float32) for c in CASES]
    expected = whole(values)
    found = torch.compile(whole, fullgraph=True, dynamic=False)(values)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.slow
@compiles
def test_contractions_compile_with_fullgraph() -> None:
    for case in (CONTRACTIONS[0], CONTRACTIONS[-1]):
        part = make(case, dtype=torch.float32)
        x = inputs(case, 2, 6, dtype=torch.float32)[0].requires_grad_()
        found = torch.compile(part, fullgraph=True, dynamic=False)(x)
        assert torch.allclose(found, part(x), atol=1e-5)
        found.sum().backward()
        assert x.grad is not None


@compiles
def test_act_norm_is_initialised_when_compiled() -> None:
    case = Case(linear.ActNorm, {}, 5, True)
    eager, compiled = make(case, moved=0.0).train(), make(case, moved=0.0).train()
    function = torch.compile(compiled, fullgraph=True, dynamic=False)
    for seed in range(3):
        x = inputs(case, 4, 6, seed=seed)[0] + 3
        assert torch.allclose(function(x), eager(x), atol=1e-12)
    assert compiled.ready


def test_rounding_margin_is_small() -> None:
    assert contraction.rounding_margin(torch.Size([768, 768]), torch.float32) < 1e-5
