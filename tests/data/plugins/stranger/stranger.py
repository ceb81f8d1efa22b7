"""A stranger's plugin: two versions of one component, and something that is none."""

from jaxtyping import Float
from torch import Tensor

from sedd_graph import Component, ComponentConfig


class Triple(Component, kind="arithmetic"):
    """Three times the input."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return 3 * x


class TripleAgain(Triple):
    """Three times the input, by addition."""

    def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return x + x + x


def plain() -> None:
    """Not a component."""
