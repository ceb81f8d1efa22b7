"""Checks against a tolerance."""

import math

from sedd_graph.component.check import Check


def test_an_error_holds_below_its_tolerance_only() -> None:
    held = Check.below("kernel.sample", "draws follow P", 0.0123, 0.02, "total variation", digits=".4f")
    assert held == Check("kernel.sample", "draws follow P", True, "0.0123", "total variation")
    assert Check.below("kernel.nelbo", "", 1e-8, 1e-8, "").holds is False
    assert Check.below("kernel.nelbo", "", math.nan, 1e-8, "").holds is False
