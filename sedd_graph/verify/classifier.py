"""Whether a classifier of noised rows is one. Axes: r rows, l positions, n states, k labels."""

from __future__ import annotations

import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier

__all__ = ["check_classifier"]

ROWS, LENGTH, STATES = 3, 5, 64


@torch.no_grad()
def check_classifier(classifier: NoisyClassifier, states: int) -> list[Check]:
    """Its chances are a law of labels, and what it says of changes is what asking for each says."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, states, (ROWS, LENGTH), generator=generator)
    x[:, 0] = states - 1  # a mask, where there is one
    sigma, label = torch.tensor([1e-3, 0.7, 4.0]), classifier.config.label
    device = next((b.device for b in (*classifier.parameters(), *classifier.buffers())), torch.device("cpu"))
    x, sigma = x.to(device), sigma.to(device)
    found = classifier.log_prob(x, sigma)
    shape = (ROWS, classifier.labels)
    right = found.shape == shape and bool(found.isfinite().all())
    error = float((found.exp().sum(-1) - 1).abs().max()) if right else float("inf")
    law = Check(
        "classifier.law",
        "chances of labels sum to 1",
        error < 1e-4,
        f"{error:.1e}" if right else f"{list(found.shape)}, not finite {list(shape)}",
        f"{ROWS} rows of {LENGTH} at three noise levels",
    )
    quick = classifier.changes(x, sigma, label) if right else None
    if quick is None:
        return [law]
    tokens = torch.randperm(states, generator=generator)[:STATES].to(device)
    asked = x.repeat(len(tokens), 1)
    asked[:, 0] = tokens.repeat_interleave(ROWS)
    slow = (
        classifier.log_prob(asked, sigma.repeat(len(tokens)))[:, label].view(len(tokens), ROWS).T
        - found[:, label, None]
    )
    gap = float((quick[:, 0, tokens] - slow).abs().max()) if quick.shape == (*x.shape, states) else float("inf")
    holds = None if classifier.first_order else gap < 1e-3
    how = f"nats, {len(tokens)} states at the first position{'; to first order, it says' if classifier.first_order else ''}"
    claim = "its short way to changes says what asking for each says"
    return [law, Check("classifier.changes", claim, holds, f"{gap:.1e}", how)]
