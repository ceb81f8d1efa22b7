"""The film of one sample: its tokens after each step of the sampler, in the form that ``film.js`` plays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.data.tokenizer import Tokenizer

__all__ = ["film_data"]

FRAMES = 200
"""Largest number of frames; a longer trajectory is shown at evenly spaced steps."""


def film_data(frames: npt.NDArray[np.int64], tokenizer: Tokenizer, *, mask: int | None) -> dict[str, Any]:
    """Return a trajectory as JSON data.

    Args:
        frames: tokens after each step, int64 [step, position].
        tokenizer: decodes single tokens.
        mask: id of the mask token, if the process has one.

    Returns:
        ``steps``: the steps shown. ``words``: decoded tokens, null for the mask. ``first``: the first frame, as indices
        into ``words``. ``changes``: for each later frame, pairs of a position and its new index. Most positions change
        once under absorbing noise, so changes are far smaller than frames.
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
