"""The set of components that define a diffusion process on vectors."""

from __future__ import annotations

from typing import NamedTuple

from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.classifier import VectorClassifier
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import VectorObjective
from sedd_graph.diffusion.vectors.sampler import VectorSampler

__all__ = ["VectorParts"]


class VectorParts(NamedTuple):
    """The components of a diffusion process on vectors.

    Attributes:
        kernel: Embeddings, Gaussian noise and rounding.
        schedule: Total noise as a function of time.
        objective: The training loss.
        sampler: Generates rows.
        classifier: A classifier of noisy vectors that guides samples towards a label; None: no guidance.
    """

    kernel: VectorKernel
    schedule: Schedule
    objective: VectorObjective
    sampler: VectorSampler
    classifier: VectorClassifier | None = None
