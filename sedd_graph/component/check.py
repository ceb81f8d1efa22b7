"""One claim held to numbers: what a certificate is made of."""

from __future__ import annotations

import dataclasses

__all__ = ["Check"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim, whether it holds, the number it rests on, and how that was found.

    ``holds`` is None for a note: a number that nothing rests on, or a check that was not run (``value`` says why).
    """

    name: str
    claim: str
    holds: bool | None
    value: str
    how: str
