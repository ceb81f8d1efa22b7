"""The worst of several measured numbers, where one that is not a number counts as the worst there is."""

from __future__ import annotations

import math

__all__ = ["least", "worst"]


def worst(*errors: float) -> float:
    """Return the largest of the errors, which is infinite if one of them is NaN; 0 without errors.

    Python's ``max`` drops NaN unless it comes first, so that an error that could not be measured would pass.

    Args:
        errors: The errors.
    """
    return max((math.inf if math.isnan(error) else float(error) for error in errors), default=0.0)


def least(*chances: float) -> float:
    """Return the smallest of the probabilities, at most 1, which is 0 if one of them is NaN.

    Python's ``min`` drops NaN unless it comes first, so that a test that could not be computed would pass.

    Args:
        chances: Probabilities, or upper bounds on them.
    """
    return min(0.0 if math.isnan(chance) else float(chance) for chance in (1.0, *chances))
