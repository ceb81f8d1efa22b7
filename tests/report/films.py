"""A reader of films that shares no code with the page or with the encoder."""

import base64
from typing import Any


def words_of(film: Any, row: int = 0) -> list[list[str]]:
    """The words of each frame of a row; a mask is empty."""
    return [["".join(map(str, _word(film, symbol))) for symbol, _ in frame] for frame in frames_of(film, row)]


def _word(film: Any, symbol: int) -> list[str]:
    word = film["words"][symbol]
    return [] if symbol == film["mask"] or word is None else [word]


def frames_of(film: Any, row: int = 0) -> list[list[tuple[int, int]]]:
    """Pairs (symbol, confidence) of each frame of a row of a film."""
    stream = iter(base64.b64decode(film["rows"][row]["frames"]))

    def integer(first: int) -> int:
        value, shift = first & 0x7F, 7
        while first & 0x80:
            first = next(stream)
            value |= (first & 0x7F) << shift
            shift += 7
        return value

    frames: list[list[tuple[int, int]]] = []
    shown: list[tuple[int, int]] = []
    for byte in stream:
        at = 0
        shown = list(shown)
        for _ in range(integer(byte)):
            skip, kind = divmod(integer(next(stream)), 4)
            at += skip
            if kind == 2:
                del shown[at]
                continue
            new = (integer(next(stream)), next(stream) if film["confident"] else 255)
            shown[at : at + (kind == 0)] = [new]
            assert kind in (0, 1)
            at += 1
        frames.append(shown)
    return frames
