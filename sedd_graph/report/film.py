"""The film of one sample: what the sampler held after each step, as the little data that ``film.js`` plays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.data.tokenizer import Tokenizer

__all__ = ["film_data"]

FRAMES = 200
"""A longer way is shown in so many frames, evenly spread."""


def film_data(frames: npt.NDArray[np.int64], tokenizer: Tokenizer, *, mask: int | None) -> dict[str, Any]:
    """int64 [step, position] as JSON: ``steps`` shown, ``words``, the ``first`` frame and the ``changes`` of each next.

    Frames and changes hold indices into ``words``, in which null stands for the mask. With ``absorb`` most positions
    change once, so changes are far smaller than frames.
    """
    steps = np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(np.int64))
    shown = frames[steps]
    ids, flat = np.unique(shown, return_inverse=True)
    indices = flat.reshape(shown.shape)
    return {
        "steps": steps.tolist(),
        "words": [None if i == mask else tokenizer.decode([i]) for i in ids.tolist()],
        "first": indices[0].tolist(),
        "changes": [
            [[int(p), int(now[p])] for p in np.flatnonzero(now != before)] for before, now in pairwise(indices)
        ],
    }
