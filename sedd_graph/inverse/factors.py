"""Factors of linear relations: exact fractions, the shortest decimal of a float64, logarithms and text."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

__all__ = ["log", "rational", "shown"]


@lru_cache(maxsize=4096)
def rational(factor: Fraction | int) -> Fraction:
    """Return the decimal number that a float64 factor was probably written as: 3/10 for 0.3.

    The float64 0.3 is exactly 5404319552844595 / 2^54. With decimals instead, 0.1 + 0.2 - 0.3 is 0. The decimal is the
    shortest one that denotes the same float64. A factor is returned unchanged if its value is not exactly a float64, or
    if its denominator is at most 2^20.

    Args:
        factor: The factor, as an exact fraction.
    """
    found = Fraction(factor)
    if found.denominator <= 2**20 or found.denominator & (found.denominator - 1):
        return found
    if found.numerator.bit_length() - found.denominator.bit_length() > 1000:
        return found
    near = float(found)
    return Fraction(repr(near)) if Fraction(near) == found else found


def log(factor: Fraction) -> float:
    """Return the natural logarithm of a positive fraction, which may lie outside the range of float64."""
    if Fraction(1, 2) < factor < 2:
        return math.log1p(float(factor - 1))
    return math.log(factor.numerator) - math.log(factor.denominator)


def shown(factor: Fraction) -> str:
    """Return a fraction as text: exact if it is short, such as 1/3 or 0.3, otherwise rounded to six digits."""
    short = max(abs(factor.numerator), factor.denominator) < 1000
    if short and factor.denominator < 10:
        return str(factor)
    exponent = log(abs(factor)) / math.log(10) if factor else 0.0
    if abs(exponent) < 300:
        text = f"{float(factor):.6g}"
        return text if Fraction(text) == factor else str(factor) if short else f"about {text}"
    whole = math.floor(exponent)
    return f"about {'-' * (factor < 0)}{10 ** (exponent - whole):.6g}e{whole:+d}"
