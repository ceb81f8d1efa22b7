"""Sampler of the probability-flow ODE by the reversible Heun method, exactly invertible.

Axes: b batch, l length, d width of a vector.
"""

from sedd_graph.diffusion.vectors.gaussian import along
from sedd_graph.diffusion.vectors.reversible import Field, Level, ReversibleSampler, State
from sedd_graph.diffusion.vectors.sampler import VectorSamplerConfig

__all__ = ["ReversibleHeun"]


class ReversibleHeun(ReversibleSampler, kind="vector_sampler"):
    """Sampler of the probability-flow ODE by the reversible Heun method (arXiv 2105.13493, algorithm 1), on a grid.

    A state is the sample y and a companion z, at which the network is evaluated. A step of length h from s to s' adds a half
    step, reflects the companion, and adds a half step at the companion's new place:

        m = y + h/2 f(z, s),   z' = 2 m - z,   y' = m + h/2 f(z', s').

    With both half steps rounded to the grid, every sum is exact, and the step from s' to s recovers y and z to the last
    bit. Order 2, with one evaluation of the network in a step (two of a self-conditioned network). `sedd-graph invert` walks from
    text to noise by it. It works with every kernel of vectors: in discrete time the steps end at the process's own times.
    """

    class Config(VectorSamplerConfig):
        pass

    config: Config

    @property
    def order(self) -> float:
        return 2.0

    def advance(self, field: Field, state: State, start: Level, end: Level) -> State:
        y, z = state
        half = along((end.s - start.s) / 2, y)
        middle = y + self.grid.snap(half * field(z, start))
        mirrored = 2 * middle - z
        return middle + self.grid.snap(half * field(mirrored, end)), mirrored
