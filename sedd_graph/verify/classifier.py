"""Verification of classifiers of noisy token rows, as used for classifier guidance.

Axes: r rows, l positions, n states, k labels, c candidate states.
"""

from __future__ import annotations

import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.verify.guards import guarded

__all__ = ["check_classifier"]

ROWS, LENGTH, CANDIDATES = 3, 5, 64
"""Number of test rows, of positions per row, and maximum number of states that replace the first token of a row."""


@torch.no_grad()
def check_classifier(classifier: NoisyClassifier, states: int) -> list[Check]:
    """Verify that label probabilities of a classifier sum to 1, and that ``changes`` equals the differences of ``log_prob``.

    The classifier's method ``changes`` computes, for all single-token changes at once, the change in log p(label); here
    each change is also evaluated by ``log_prob``. For a classifier with ``first_order``, whose ``changes`` are
    approximate, the error is only reported.

    Args:
        classifier: The classifier, on any device.
        states: Number of states of a token, n.

    Returns:
        The results of the checks, the second only for a classifier with ``changes``.
    """
    return guarded("classifier", lambda: _checks(classifier, states))


def _checks(classifier: NoisyClassifier, states: int) -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, states, (ROWS, LENGTH), generator=generator)
    x[:, 0] = states - 1  # the mask, if there is one
    sigma, label = torch.tensor([1e-3, 0.7, 4.0]), classifier.config.label
    device = next((b.device for b in (*classifier.parameters(), *classifier.buffers())), torch.device("cpu"))
    x, sigma = x.to(device), sigma.to(device)
    found, shape = classifier.log_prob(x, sigma), (ROWS, classifier.labels)
    claim, how = "the probabilities of the labels sum to 1", f"{ROWS} rows of {LENGTH} at three noise levels"
    if found.shape != shape or not bool(found.isfinite().all()):
        wrong = "not finite" if found.shape == shape else f"shape {list(found.shape)}, not {list(shape)}"
        return [Check("classifier.law", claim, False, wrong, how)]
    law = Check.below("classifier.law", claim, float((found.exp().sum(-1) - 1).abs().max()), 1e-4, how)
    fast = classifier.changes(x, sigma, label)
    if fast is None:
        return [law]
    tokens = torch.randperm(states, generator=generator)[:CANDIDATES].to(device)
    changed = x.repeat(len(tokens), 1)
    changed[:, 0] = tokens.repeat_interleave(ROWS)
    log_prob = classifier.log_prob(changed, sigma.repeat(len(tokens)))[:, label].view(len(tokens), ROWS).T
    slow = log_prob - found[:, label, None]
    gap = float((fast[:, 0, tokens] - slow).abs().max()) if fast.shape == (*x.shape, states) else float("inf")
    holds = None if classifier.first_order else gap < 1e-3
    order = "; a first-order approximation by declaration" if classifier.first_order else ""
    how = f"nats, {len(tokens)} states at the first position{order}"
    claim = "the fast form of changes in log p(label) equals evaluating each change"
    return [law, Check("classifier.changes", claim, holds, f"{gap:.1e}", how)]
