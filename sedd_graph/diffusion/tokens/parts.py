"""The set of components that define a diffusion process over rows of tokens."""

from __future__ import annotations

from typing import NamedTuple

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.diffusion.tokens.sampler import Sampler

__all__ = ["TokenParts"]


class TokenParts(NamedTuple):
    """The components of a diffusion process over rows of tokens: kernel, schedule, objective and sampler.

    Attributes:
        kernel: The forward process of one token.
        schedule: Total noise as a function of time.
        objective: The training loss.
        sampler: Generates rows.
        classifier: A classifier of noisy rows that guides samples towards a label; None: no guidance by a classifier.
    """

    kernel: Kernel
    schedule: Schedule
    objective: Objective
    sampler: Sampler
    classifier: NoisyClassifier | None = None
