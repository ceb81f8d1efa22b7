"""The largest of several measured errors, where an error that is not a number counts as infinite."""

from __future__ import annotations

import math

__all__ = ["worst"]


def worst(*errors: float) -> float:
    """Return the largest of the errors, which is infinite if one of them is NaN; 0 without errors.

    Python's ``max`` drops NaN unless it comes first, so that an error that could not be measured would pass.

    Args:
        errors: The errors.
    """
    return max((math.inf if math.isnan(error) else float(error) for error in errors), default=0.0)
