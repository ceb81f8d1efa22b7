"""Animation of a trajectory: the tokens after each sampler step, in the data format that ``film.js`` plays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.data.tokenizer import Tokenizer

__all__ = ["film_data"]

FRAMES = 200
"""Maximum number of frames; a longer trajectory is subsampled at evenly spaced steps."""


def film_data(
    frames: npt.NDArray[np.int64], tokenizer: Tokenizer, *, mask: int | None, label: str = ""
) -> dict[str, Any]:
    """Return the trajectory of one sample as JSON data for the animation.

    Frames after the first are stored as differences: with an absorbing kernel, most positions change only once.

    Args:
        frames: Token ids at the start (index 0) and after each sampler step, int64 [step, position].
        tokenizer: Decodes single tokens.
        mask: Token id of the mask, or None if the process has no mask.
        label: Heading of the road, if there are several.

    Returns:
        A dictionary with the keys ``label``; ``steps``: index in ``frames`` of each animation frame, of which there are at most
        :data:`FRAMES`; ``words``: decoded tokens, None for the mask;
        ``first``: for each position of the first frame, an index into ``words``; ``changes``: for each later frame,
        pairs (position, new index into ``words``).
    """
    steps = np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(np.int64))
    shown = frames[steps]
    ids, flat = np.unique(shown, return_inverse=True)
    indices = flat.reshape(shown.shape)
    return {
        "label": label,
        "steps": steps.tolist(),
        "words": [None if i == mask else tokenizer.decode([i]) for i in ids.tolist()],
        "first": indices[0].tolist(),
        "changes": [
            [[int(p), int(now[p])] for p in np.flatnonzero(now != before)] for before, now in pairwise(indices)
        ],
    }
