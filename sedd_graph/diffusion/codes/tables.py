"""Tables of codewords, one row for each token, whose least distance is known: orthonormal, Hadamard, biorthogonal, digits.

Elements have the root mean square 1, so that every row has the norm sqrt(d). All rows of a table have the same norm.

Axes: v tokens (rows), d channels, k digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["biorthogonal", "digits_of", "hadamard", "number_of", "orthonormal", "require_digits", "require_two"]


def require_two(vocab: int) -> None:
    """Raise ValueError if there are fewer than two tokens: a code of one word carries nothing and has no distance."""
    if vocab < 2:
        raise ValueError(f"a code needs at least two tokens, not {vocab}")


def orthonormal(vocab: int, width: int) -> Tensor:
    """Return the first rows of the orthonormal DCT-II matrix times sqrt(d): float32 [v, d], d_min = sqrt(2 d).

    Args:
        vocab: Number of tokens, v, at most d: no more rows can be orthogonal to each other.
        width: Number of channels, d.

    Raises:
        ValueError: v exceeds d, or is less than 2.
    """
    require_two(vocab)
    if vocab > width:
        raise ValueError(
            f"{vocab:,} tokens have no orthonormal code of width {width:,}: at most {width:,} rows are orthogonal. Use a "
            f"width of at least {vocab:,}, or a code for more tokens than channels (digit_code, learned_code)"
        )
    k, m = torch.arange(vocab)[:, None], torch.arange(width)[None, :]
    angle = ((2 * m + 1) * k % (4 * width)).double() * (math.pi / (2 * width))  # reduced in integers: exact to rounding
    return (angle.cos() * torch.where(k == 0, 1.0, math.sqrt(2))).float()


def hadamard(width: int, count: int | None = None) -> Tensor:
    """Return the first rows of Sylvester's Hadamard matrix: elements 1 and -1, orthogonal, float32 [count, d].

    Args:
        width: Number of channels, d, a power of two.
        count: Number of rows; None for all d.

    Raises:
        ValueError: d is not a power of two.
    """
    if width < 1 or width & (width - 1):
        below = 1 << max(width, 1).bit_length() - 1
        raise ValueError(
            f"there is no Sylvester-Hadamard matrix of width {width}: the width must be a power of two, such as "
            f"{below} or {2 * below}"
        )
    both = torch.arange(width if count is None else count)[:, None] & torch.arange(width)[None, :]
    for shift in (32, 16, 8, 4, 2, 1):  # parity of the common bits
        both = both ^ (both >> shift)
    return 1.0 - 2.0 * (both & 1).float()


def biorthogonal(vocab: int, width: int, *, signs: bool = True) -> Tensor:
    """Return rows of a Hadamard matrix, followed by their negatives: elements 1 and -1, float32 [v, d].

    d_min is sqrt(2 d), or 2 sqrt(d) for two tokens of width 1. With d < v <= 2 d this is the biorthogonal code
    (first-order Reed-Muller code, of Hamming distance d / 2).

    Args:
        vocab: Number of tokens, v.
        width: Number of channels, d, a power of two.
        signs: True to use the negatives too, so that v is at most 2 d; False: v is at most d.

    Raises:
        ValueError: d is not a power of two, or v is less than 2 or more than there are rows.
    """
    require_two(vocab)
    rows, most = hadamard(width, min(vocab, width)), width * (2 if signs else 1)
    if vocab > most:
        what = "biorthogonal code (Hadamard rows and their negatives)" if signs else "Hadamard code"
        more = f"signs: true for up to {2 * width:,} tokens, " if not signs and vocab <= 2 * width else ""
        raise ValueError(
            f"{vocab:,} tokens have no {what} of width {width:,}, which has {most:,} words: use {more}a larger width, or a "
            "code for more tokens than that (digit_code, learned_code)"
        )
    return torch.cat([rows, -rows[: vocab - len(rows)]])


def require_digits(vocab: int, base: int, count: int) -> None:
    """Raise ValueError unless ``vocab`` numbers have ``count`` digits in base ``base``: 2 <= vocab <= base ** count.

    The largest number of ``count`` digits must be below 2^62, so that int64 holds it.
    """
    require_two(vocab)
    if base < 2:
        raise ValueError(f"digits need a base of at least 2, not {base}")
    if base**count < vocab:
        least = next(k for k in range(1, 64) if base**k >= vocab)
        raise ValueError(
            f"{count} digits in base {base} write {base**count:,} numbers, fewer than {vocab:,} tokens: at least {least} "
            "digits are needed"
        )
    if base**count > 2**62:
        raise ValueError(f"{count} digits in base {base} write numbers beyond 2^62: use fewer digits")


def digits_of(tokens: Tensor, base: int, count: int) -> Tensor:
    """Return the digits of each token in base ``base``, the least significant first: int64 [..., k].

    Args:
        tokens: Tokens in [0, base ** count), int64 [...].
        base: The base, at least 2.
        count: Number of digits, k.
    """
    powers = base ** torch.arange(count, device=tokens.device)
    return tokens[..., None] // powers % base


def number_of(digits: Tensor, base: int) -> Tensor:
    """Return the tokens whose digits in base ``base`` are given, the least significant first: int64 [...].

    Args:
        digits: Digits in [0, base), int64 [..., k].
        base: The base, at least 2.
    """
    powers = base ** torch.arange(digits.shape[-1], device=digits.device)
    return (digits * powers).sum(-1)
