"""Base class of the objectives of vectors in continuous time whose likelihood the probability-flow ODE gives, too."""

from typing import Annotated, ClassVar, Literal

import pydantic

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.flow import Flow, Method
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import VectorObjective

__all__ = ["FlowObjective"]


class FlowObjective(VectorObjective):
    """Base class: the distribution of times in training, and the ODE of ``eval --likelihood ode``."""

    abstract: ClassVar[bool] = True

    class Config(ComponentConfig):
        times: Literal["independent", "low_discrepancy"] = "low_discrepancy"
        """Distribution of the times of a global batch. ``independent``: independent uniform times; ``low_discrepancy``: an
        even grid with one random offset (less variance, no bias). Evaluation takes the grid."""
        steps: Annotated[int, pydantic.Field(ge=1, le=100_000)] = 32
        """Number of steps in which ``eval --likelihood ode`` integrates the ODE, from 1 to 100,000."""
        method: Method = "heun"
        """Method of that integration. ``euler``: order 1; ``heun``: order 2, with twice the evaluations."""
        probes: Annotated[int, pydantic.Field(ge=1, le=1024)] = 1
        """Number of random vectors in Hutchinson's estimate of each divergence, from 1 to 1,024."""

    config: Config

    def flow(self, kernel: VectorKernel, schedule: Schedule) -> Flow:
        config = self.config
        return Flow(kernel=kernel, schedule=schedule, steps=config.steps, method=config.method, probes=config.probes)
