"""One verified claim; a certificate lists them."""

from __future__ import annotations

import dataclasses

__all__ = ["Check"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and the measured value that decides it.

    Attributes:
        name: Dotted name, such as ``kernel.nelbo``.
        claim: The statement that is verified.
        holds: True if the claim holds, False if not; None for a note: a number without a tolerance, or a check that was not run.
        value: The measured value as text, with its unit where it has one.
        how: How the value was measured.
    """

    name: str
    claim: str
    holds: bool | None
    value: str
    how: str

    @classmethod
    def below(cls, name: str, claim: str, error: float, tolerance: float, how: str, *, digits: str = ".1e") -> Check:
        """Return a check that holds if ``error`` is below ``tolerance`` (NaN is not), shown in the format ``digits``."""
        return cls(name, claim, error < tolerance, f"{error:{digits}}", how)
