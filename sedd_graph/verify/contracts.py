"""State of the global random number generators, for checks that a component leaves them alone."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["generators_state"]


def generators_state() -> tuple[bytes, object, bytes]:
    """Return the states of the global random generators of torch (CPU), Python and NumPy.

    Two calls return equal states if no generator was used or seeded between them.
    """
    _, keys, place, *_ = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), random.getstate(), bytes(np.asarray(keys)) + repr(place).encode()
