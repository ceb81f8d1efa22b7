"""Verification of classifiers of noisy vectors."""

from __future__ import annotations

import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.vectors.classifier import VectorClassifier
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.verify.worst import worst

__all__ = ["check_classifier"]


@torch.no_grad()
def check_classifier(classifier: VectorClassifier, kernel: VectorKernel) -> list[Check]:
    """Verify a classifier of noisy vectors: its probabilities sum to 1, and its gradient is that of the probability.

    Args:
        classifier: The classifier.
        kernel: Kernel with the number of tokens of the classifier.
    """
    generator = torch.Generator().manual_seed(31)
    x = torch.randn(6, 3, kernel.width, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 8.0], dtype=torch.float64)
    found = classifier.log_prob(x, sigma, kernel, 0.01)
    shape = tuple(found.shape) == (len(x), classifier.labels)
    total = float(found.double().logsumexp(-1).abs().max()) if shape else torch.inf
    checks = [
        Check.below("classifier.normalised", "the probabilities of the labels sum to 1", total, 1e-5, "6 rows of 3")
    ]
    if not shape:
        return checks
    label, strength = classifier.config.label, classifier.config.strength
    slope, step, error = classifier.gradient(x, sigma, kernel, 0.01).double(), 1e-5, 0.0
    for place in range(3):
        for entry in range(kernel.width):
            moved = [x.clone(), x.clone()]
            moved[0][:, place, entry] += step
            moved[1][:, place, entry] -= step
            up, down = (classifier.log_prob(m, sigma, kernel, 0.01)[:, label].double() for m in moved)
            error = worst(error, float((strength * (up - down) / (2 * step) - slope[:, place, entry]).abs().max()))
    scale = 1 + float(slope.abs().max())
    claim = "guidance is the gradient of the label's log-probability, times the strength"
    return [*checks, Check.below("classifier.gradient", claim, error / scale, 1e-4, "central differences in float64")]
