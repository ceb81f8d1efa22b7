"""Components whose algebra is wrong on purpose: each is caught by the name of the check that it fails."""

from fractions import Fraction

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Rule, Signature
from sedd_graph.testing.conformance import ConformanceError, check_component

Value = Float[Tensor, "b l d"]


class Shift(Component, kind="mixer"):
    """Right in everything: what the others break."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        found = super().algebra(config, signature)
        return Algebra(
            found.rules,
            linear={"out": {"x": Fraction(2), "by": Fraction(-1)}},
            lipschitz={("x", "out"): 2.0, ("by", "out"): 1.0},
            log_det=found.log_det,
        )

    def forward(self, x: Value, by: Value) -> Value:
        return 2 * x - by

    @solves("x", given=("out", "by"), log_det="volume")
    def inverse(self, out: Tensor, by: Tensor) -> Tensor:
        return (out + by) / 2

    def volume(self, x: Tensor, by: Tensor) -> Tensor:
        return x.new_full((len(x),), x[0].numel() * 0.6931471805599453)


class WrongInverse(Shift, kind="mixer"):
    @solves("x", given=("out", "by"), log_det="volume")
    def inverse(self, out: Tensor, by: Tensor) -> Tensor:
        return out / 2 + by / 2 + 1e-6


class InverseOfOnlySomeInputs(Shift, kind="mixer"):
    """``relu`` can be undone only where it was not at work."""

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(super().algebra(config, signature).rules)

    def forward(self, x: Value, by: Value) -> Value:
        return torch.relu(2 * x - by)


class WrongShape(Shift, kind="mixer"):
    @solves("x", given=("out", "by"), log_det="volume")
    def inverse(self, out: Tensor, by: Tensor) -> Tensor:
        return ((out + by) / 2)[:, :1]


class SaysZero(Shift, kind="mixer"):
    @solves("x", given=("out", "by"), log_det="zero")
    def inverse(self, out: Tensor, by: Tensor) -> Tensor:
        return (out + by) / 2


class TogetherIsNotApart(Shift, kind="mixer"):
    def with_log_det(self, method: str, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        out, volume = super().with_log_det(method, x, by)
        return out, volume + 1e-6


class WrongSign(Shift, kind="mixer"):
    def volume(self, x: Tensor, by: Tensor) -> Tensor:
        return -super().volume(x, by)


class OneNumberForAll(Shift, kind="mixer"):
    def volume(self, x: Tensor, by: Tensor) -> Tensor:
        return super().volume(x, by).sum()


class NotSquare(Component, kind="mixer"):
    """Twice as many numbers come out as went in: it can be undone, but has no volume."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Value) -> Float[Tensor, "b l 2*d"]:
        return torch.cat([x, x], -1)

    @solves("x", given=("out",), log_det="zero")
    def inverse(self, out: Tensor) -> Tensor:
        return out.chunk(2, -1)[0]


class WrongFactor(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(linear={"out": {"x": Fraction(2), "by": Fraction(1)}})


class BoundTooLow(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 1.999})


class BoundOfTheStart(Component, kind="mixer"):
    """Its bound holds for the weights that it starts with, and training moves them."""

    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.scale = nn.Parameter(torch.ones(self.axis("d")))

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 1.0})

    def forward(self, x: Value) -> Value:
        return x * self.scale


class SquareIsNotLipschitz(Component, kind="mixer"):
    """Its slope is small where inputs are small."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("x", "out"): 6.0})

    def forward(self, x: Value) -> Value:
        return x.square()


class InSingle(Shift, kind="mixer"):
    """A constant kept in float32 takes the digits."""

    @solves("x", given=("out", "by"), log_det="volume")
    def inverse(self, out: Tensor, by: Tensor) -> Tensor:
        return ((out + by) / 2).float().double()


class OnlyFloat32(Shift, kind="mixer"):
    def forward(self, x: Value, by: Value) -> Value:
        return 2 * x - by @ torch.eye(by.shape[-1])


class NoSuchTarget(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra((Rule("y", ("out",), "inverse"),))


class NoSuchPort(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out", "c"), "inverse"),))


class NoSuchMethod(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out", "by"), "invert"),), log_det={"x": "volumes"})


class NeedsItsTarget(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra((Rule("x", ("out", "x"), "inverse"),))


class NoSuchPair(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(lipschitz={("out", "x"): 1.0})


class MovesAndRounds(Component, kind="mixer"):
    """Says that it only moves numbers, and computes on the way."""

    class Config(ComponentConfig):
        pass

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return Algebra(moves=True)

    def forward(self, x: Value) -> Value:
        return (x.flip(-1) + 0.1) - 0.1


class Raises(Shift, kind="mixer"):
    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        raise KeyError("sizes")


def test_what_is_right_passes() -> None:
    check_component(Shift)


BROKEN = [
    (WrongInverse, "inverse", "'inverse' gives 'x' from out with a relative error of"),
    (InverseOfOnlySomeInputs, "inverse", "relative error"),
    (WrongShape, "inverse", "not as it went in"),
    (InSingle, "inverse", "relative error"),
    (SaysZero, "log_det", "of 'x' is 0 nats, but 11.0904 by the Jacobian"),
    (WrongSign, "log_det", "of 'x' is -11.0904 nats, but 11.0904 by the Jacobian"),
    (TogetherIsNotApart, "log_det", "'with_log_det' gives other values than 'forward' and 'volume' apart"),
    (OneNumberForAll, "log_det", "'volume' gives [], not one number of nats for each sequence"),
    (NotSquare, "log_det", "of 'x': the Jacobian of the outputs that it is reconstructed from is 32 x 16"),
    (WrongFactor, "linear", "'out' is not 2 x + 1 by"),
    (BoundTooLow, "lipschitz", "'out' moves 2 times as far as 'x', not at most 1.999"),
    (BoundOfTheStart, "lipschitz", "not at most 1"),
    (SquareIsNotLipschitz, "lipschitz", "not at most 6"),
    (OnlyFloat32, "float64", "cannot be evaluated in float64: RuntimeError"),
    (NoSuchTarget, "algebra", "rule 'inverse' gives 'y', which is no input; inputs: x, by"),
    (NoSuchPort, "algebra", "rule 'inverse' is given 'c', which is no port"),
    (NoSuchMethod, "algebra", "rule 'invert' is no method"),
    (NeedsItsTarget, "algebra", "rule 'inverse' is given 'x', which is its target"),
    (NoSuchPair, "algebra", "('out', 'x') is no pair of an input and an output"),
    (MovesAndRounds, "moves", "'out' holds numbers that did not come in"),
    (Raises, "algebra", "KeyError: 'sizes'"),
]


@pytest.mark.parametrize(("cls", "check", "text"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_broken(cls: type[Component], check: str, text: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_component(cls)
    assert {name for name, _ in caught.value.failures} == {check}
    assert any(text in seen for _, seen in caught.value.failures), caught.value.failures
