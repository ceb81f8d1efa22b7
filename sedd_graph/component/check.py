"""One verified claim; a certificate lists them."""

from __future__ import annotations

import dataclasses

__all__ = ["Check"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim, whether it holds, the number that decides it, and how that number was computed.

    ``holds`` is None for a note: a number that decides nothing, or a check that was not run (``value`` says why).
    """

    name: str
    claim: str
    holds: bool | None
    value: str
    how: str
