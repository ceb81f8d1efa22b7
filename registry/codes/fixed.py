"""Fixed codes from tokens to vectors, whose least distance is known: orthonormal, Hadamard and biorthogonal, digits.

Rows are not trained. Axes: b batch, l length, d width, digits.
"""

import dataclasses
import math
from typing import Annotated

import pydantic
import torch
from jaxtyping import Int
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Signature, SizeField
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import nearest
from sedd_graph.diffusion.codes.tables import biorthogonal, digits_of, number_of, orthonormal, require_digits

from ..network._shared import Positive

Base = Annotated[int, pydantic.Field(ge=2, le=2**16)]
Digits = Annotated[SizeField, pydantic.Field(le=32)]


class _Fixed(Code):
    """Base class of codes with a constant table."""

    abstract = True

    class Config(Code.Config):
        rms: Positive = 1.0
        """Root mean square of the elements of a codeword. Distances of codewords are proportional to it."""

    config: Config
    codewords: Tensor

    def _fix(self, rows: Tensor) -> None:
        self.register_buffer("codewords", rows * self.config.rms, persistent=False)

    def rows(self) -> Tensor:
        return self.codewords


class OrthonormalCode(_Fixed, kind="embedding"):
    """Codewords orthogonal to each other and of equal norm: rows of the cosine transform (DCT-II). For vocab <= d.

    The least distance is sqrt(2 d) rms.

    Raises:
        ValueError: ``vocab`` exceeds the width.
    """

    class Config(_Fixed.Config):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self._fix(orthonormal(self.config.vocab, self.axis("d")))


class HadamardCode(_Fixed, kind="embedding"):
    """Codewords of elements rms and -rms: rows of a Hadamard matrix, and their negatives (the biorthogonal code).

    The least distance is sqrt(2 d) rms. For vocab <= 2 d, or vocab <= d without negatives.

    Raises:
        ValueError: The width is not a power of two, or ``vocab`` exceeds the number of codewords.
    """

    class Config(_Fixed.Config):
        signs: bool = True
        """True to use the negatives of the rows too (biorthogonal code, vocab <= 2 d); false: rows alone (vocab <=
        d)."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self._fix(biorthogonal(self.config.vocab, self.axis("d"), signs=self.config.signs))

    def declared_distance(self) -> float:
        width = self.axis("d")
        return math.sqrt(4 if width == 1 else 2 * width) * float(self.codewords[0, 0].abs())


class DigitCode(_Fixed, kind="embedding"):
    """Codewords of many tokens at a small width: each digit of the token has a biorthogonal codeword of its own.

    A token is written with ``digits`` digits in base ``base``, the least significant first. Digit i is the codeword of
    ``base`` biorthogonal ones (``hadamard_code``) in channels i w to (i + 1) w - 1, with w = d / digits. In base 2 with
    w = 1 a codeword is the bits of the token as signs. The least distance is that of one digit: sqrt(2 w) rms, or 2 rms
    for w = 1. Vectors are decoded digit by digit, without comparing all tokens.

    Raises:
        ValueError: ``base`` ** ``digits`` is less than ``vocab``, or the width does not fit the digits.
    """

    class Config(_Fixed.Config):
        base: Base = 2
        """Base of the digits, at most 2 d / ``digits``."""
        digits: Digits
        """Number of digits, a divisor of the width; base ** digits is at least ``vocab``."""

    config: Config
    digit: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        vocab, base, count, width = self.config.vocab, self.config.base, self.config.digits, self.axis("d")
        require_digits(vocab, base, count)
        if width % count:
            raise ValueError(f"a width of {width} cannot be shared by {count} digits: use a multiple of {count}")
        rows = biorthogonal(base, width // count)
        self._fix(rows[digits_of(torch.arange(vocab, device=rows.device), base, count)].flatten(1))
        self.register_buffer("digit", rows * self.config.rms, persistent=False)

    @solves("tokens", given=("out",))
    def decode(self, out: Tensor) -> Tensor:
        found = number_of(nearest(self.digit, out.unflatten(-1, (self.config.digits, -1))), self.config.base)
        outside = found >= self.config.vocab  # digits of no token: far from all codewords
        if bool(outside.any()):
            found[outside] = nearest(self.codewords, out[outside])
        return found

    def declared_distance(self) -> float:
        width = self.digit.shape[1]
        least = math.sqrt(4 if width == 1 else 2 * width)
        return least * float(self.digit[0, 0].abs())


class DigitsOf(Component, kind="embedding"):
    """Digits of each token in base ``base``, the least significant first: a map of integers.

    It is a bijection between the tokens 0 .. vocab - 1 and the vectors of ``digits`` digits if vocab = base ** digits,
    and injective if vocab is less.

    Raises:
        ValueError: ``base`` ** ``digits`` is less than ``vocab``.
    """

    class Config(ComponentConfig):
        vocab: SizeField
        """Number of tokens."""
        base: Base = 2
        """Base of the digits."""
        digits: Digits
        """Number of digits; base ** digits is at least ``vocab``."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        require_digits(self.config.vocab, self.config.base, self.config.digits)

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        found = super().algebra(config, signature)
        onto = config.base**config.digits == config.vocab
        rules = tuple(dataclasses.replace(rule, onto=onto) for rule in found.rules)
        return dataclasses.replace(found, rules=rules, integers={"tokens": config.vocab})

    def forward(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, "b l digits"]:
        return digits_of(tokens, self.config.base, self.config.digits)

    @solves("tokens", given=("out",))
    def decode(self, out: Tensor) -> Tensor:
        return number_of(out, self.config.base)
