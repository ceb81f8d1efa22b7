"""The components of a noise process of rows of tokens, together."""

from __future__ import annotations

from typing import NamedTuple

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.diffusion.tokens.sampler import Sampler

__all__ = ["TokenParts"]


class TokenParts(NamedTuple):
    """Kernel, schedule, objective and sampler, and a classifier of noised rows where samples are drawn towards a label."""

    kernel: Kernel
    schedule: Schedule
    objective: Objective
    sampler: Sampler
    classifier: NoisyClassifier | None = None
