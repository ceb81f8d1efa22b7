"""Films of trajectories: the tokens after each sampler step, in the data format that ``templates/player.js`` plays.

Frames are stored as differences, in binary: of a row of 1,024 tokens under an absorbing kernel, 256 steps take a few kilobytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.report.edit_script import gaps

__all__ = ["UNKNOWN", "Symbols", "Track", "film_data"]

FRAMES, ROWS, POSITIONS, BYTES = 513, 16, 4096, 640_000
"""Largest numbers of frames of a film, of rows, of tokens of a row, and of bytes as JSON."""
UNKNOWN = 255
"""A confidence that is not known; others are 254 times a probability, rounded."""
_REPLACE, _INSERT, _DELETE = 0, 1, 2


class Track(NamedTuple):
    """The trajectory of one row.

    Attributes:
        name: Name of the row for the user.
        tokens: Token ids at the start (index 0) and after each sampler step, int64 [step, position].
        confidence: Probability that the model gave each token, times 254, or :data:`UNKNOWN`, uint8 [step, position];
            None if no probabilities were stored.
    """

    name: str
    tokens: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.uint8] | None = None


class Symbols(NamedTuple):
    """What tokens are shown as.

    Attributes:
        tokenizer: Gives the text of tokens.
        mask: Token id of the mask; None if the process has no mask.
        start: Token id that pads rows whose lengths change, which is not shown; None if rows have one length.
        pad: Token id of padding, which is shown as nothing; None if there is none.
    """

    tokenizer: Tokenizer
    mask: int | None = None
    start: int | None = None
    pad: int | None = None

    def words(self, ids: Sequence[int]) -> list[str | list[int] | None]:
        """Return the text of tokens; their bytes, if they are no whole UTF-8 text; None for tokens without text."""
        pieces = self.tokenizer.pieces()

        def word(i: int) -> str | list[int] | None:
            if i == self.pad or i == self.mask:
                return ""
            if not 0 <= i < len(pieces) or (piece := pieces[i]) is None:
                return None
            try:
                return piece.decode()
            except UnicodeDecodeError:
                return list(piece)

        return [word(i) for i in ids]


def film_data(
    tracks: Sequence[Track],
    symbols: Symbols,
    *,
    label: str = "",
    note: str = "",
    limit: int = BYTES,
) -> dict[str, Any]:
    """Return the trajectories of some rows as JSON data of a film.

    Of a film that would have more than ``limit`` bytes, fewer rows and then fewer frames are taken, evenly spaced. The
    comment at the top of ``templates/player.js`` defines the format.

    Args:
        tracks: The rows, of equal numbers of steps; at most :data:`ROWS` of them are taken, and of each row
            at most :data:`POSITIONS` tokens.
        symbols: What tokens are shown as.
        label: Name of the film; empty if there is only one.
        note: Further text about it.
        limit: Largest number of bytes.
    """
    rows, frames = min(ROWS, len(tracks)), min(FRAMES, len(tracks[0].tokens))
    while True:
        film = _film(tracks[:rows], frames, symbols, label, note)
        if (rows == 1 and frames <= 2) or len(json.dumps(film, separators=(",", ":"))) <= limit:
            return film
        if rows > 4 or (rows > 1 and frames <= 64):
            rows //= 2
        else:
            frames = max(2, frames // 2)


def _film(tracks: Sequence[Track], frames: int, symbols: Symbols, label: str, note: str) -> dict[str, Any]:
    count = len(tracks[0].tokens)
    steps = np.unique(np.linspace(0, count - 1, frames).round().astype(np.int64))
    confident = any(track.confidence is not None for track in tracks)
    shown = [track.tokens[steps, :POSITIONS] for track in tracks]
    mask = -1 if symbols.mask is None else symbols.mask
    ids = np.unique(np.concatenate([*(part.ravel() for part in shown), [mask]]))
    rows = []
    for track, part in zip(tracks, shown, strict=True):
        sure = np.full_like(part, UNKNOWN, dtype=np.uint8)
        if track.confidence is not None:
            sure = track.confidence[steps, :POSITIONS]
        lengths = None if symbols.start is None else (part != symbols.start).sum(1)
        code = _encode(np.searchsorted(ids, part), sure, lengths, confident=confident)
        rows.append({"name": track.name, "frames": base64.b64encode(code).decode()})
    return {
        "label": label,
        "note": note,
        "words": symbols.words(ids.tolist()),
        "mask": int(np.searchsorted(ids, mask)) if mask >= 0 else -1,
        "steps": steps.tolist(),
        "confident": confident,
        "rows": rows,
    }


def _encode(
    symbols: npt.NDArray[np.int64],
    sure: npt.NDArray[np.uint8],
    lengths: npt.NDArray[np.int64] | None,
    *,
    confident: bool,
) -> bytes:
    """Return the frames of a row in binary.

    Args:
        symbols: Symbol of each position, int64 [frame, position].
        sure: Confidence of each position, uint8 [frame, position].
        lengths: Number of tokens of each frame, int64 [frame]; None: tokens keep their positions.
        confident: Whether confidences are written.
    """
    made, stay = bytearray(), lengths is None
    ends = [symbols.shape[1]] * len(symbols) if lengths is None else lengths.tolist()
    rows = [(symbols[i, :n], sure[i, :n]) for i, n in enumerate(ends)]
    for (old, old_sure), (new, new_sure) in pairwise([(symbols[0, :0], sure[0, :0]), *rows]):
        changes = list(_changes(old, old_sure, new, new_sure, stay=stay and len(old) == len(new)))
        _put(made, len(changes))
        for skip, op, at in changes:
            _put(made, 4 * skip + op)
            if op != _DELETE:
                _put(made, int(new[at]))
                if confident:
                    made.append(int(new_sure[at]))
    return bytes(made)


def _changes(
    old: npt.NDArray[np.int64],
    old_sure: npt.NDArray[np.uint8],
    new: npt.NDArray[np.int64],
    new_sure: npt.NDArray[np.uint8],
    *,
    stay: bool,
) -> Iterator[tuple[int, int, int]]:
    """Yield the changes from one frame to the next; ``stay``: tokens keep their positions.

    Yields:
        Triples of the number of tokens to skip, the kind of the change, and the new token's position.
    """
    if stay:
        before = 0
        for at in np.flatnonzero((old != new) | (old_sure != new_sure)).tolist():
            yield at - before, _REPLACE, at
            before = at + 1
        return
    done = new_done = skip = 0
    for gap in [*gaps(old, new), None]:
        start = len(old) if gap is None else gap.start
        for offset in range(start - done):  # kept tokens, whose confidence may be a new one
            if old_sure[done + offset] != new_sure[new_done + offset]:
                yield skip, _REPLACE, new_done + offset
                skip = -1
            skip += 1
        if gap is None:
            return
        both = min(gap.stop - gap.start, gap.new_stop - gap.new_start)
        kinds = [_REPLACE] * both + [_INSERT] * (gap.new_stop - gap.new_start - both)
        for offset, kind in enumerate(kinds):
            yield skip, kind, gap.new_start + offset
            skip = 0
        for _ in range(gap.stop - gap.start - both):
            yield skip, _DELETE, 0
            skip = 0
        done, new_done = gap.stop, gap.new_stop


def _put(made: bytearray, value: int) -> None:
    """Append an unsigned integer in LEB128."""
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
