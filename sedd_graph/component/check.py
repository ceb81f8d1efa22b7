"""Result of one verified claim. The certificate of a run is a list of these results."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["Check", "Proof"]

Proof = Literal["quick", "full"]
"""Strength of a verification: ``full``, or ``quick`` with fewer cases in less time."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of one verification: a claim, whether the claim holds, and the measured value that decides it.

    Attributes:
        name: Dotted name, such as ``kernel.nelbo``.
        claim: The statement that is verified.
        holds: True if the claim holds. None if nothing is decided: a value without a tolerance, or a check that was not
            run.
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
        """Return a check that holds if ``error < tolerance``, so that NaN fails.

        Args:
            name: Dotted name of the check.
            claim: The statement that is verified.
            error: The measured error, stored as ``value``.
            tolerance: Exclusive upper bound of the error.
            how: How the error was measured.
            digits: Format specification of ``value``.
        """
        return cls(name, claim, error < tolerance, f"{error:{digits}}", how)
