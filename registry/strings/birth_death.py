"""Kernels that delete and insert tokens, and the heads that predict insertions and deletions.

Axes: b batch, l positions of a string (the start state and the tokens), d model width, v data tokens.
"""

import math
from typing import Annotated, ClassVar

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.outputs import Output
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import LOG_DELETE, LOG_INSERT, StringTable

from ..bijective._bijection import wide
from ..noise._frequencies import FrequencyConfig, thinned, token_frequencies
from ._heads import Scalar, TokenHead

__all__ = ["Delete", "DeletionHead", "Indel", "InsertionHead"]


class _Enumerated(BirthDeath):
    """A kernel of births and deaths with its enumerable toy."""

    abstract: ClassVar[bool] = True

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.birth_death import BirthDeathTable

        return BirthDeathTable(self, one_length=one_length)


class Delete(_Enumerated, kind="string_kernel"):
    """Every token is deleted at rate 1; noise is the empty string (DID, arXiv 2603.23507). Generation only inserts."""

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer(
            "law", torch.full((self.data_tokens,), 1 / self.data_tokens, dtype=torch.float64), persistent=False
        )

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_INSERT,),)

    @property
    def births(self) -> float:
        return 0.0


class Indel(_Enumerated, kind="string_kernel"):
    """Every token is deleted at rate 1, and new ones are inserted anywhere, drawn by frequency: the birth-death process of
    Thorne, Kishino and Felsenstein (1991). Generation inserts and deletes, so it can revise its own tokens.

    Noise is a string of independent tokens of geometric length. Lengths converge at the rate 1 / (1 + mean_length), so the
    schedule must end at a total noise of about 7 (1 + mean_length) or more.
    """

    class Config(FrequencyConfig):
        mean_length: Annotated[float, pydantic.Field(gt=0, le=65536)] = 4.0
        """Mean length of pure noise, tokens, above 0 up to 65,536."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("law", token_frequencies(self.config, self.data_tokens), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        # all likely strings of the toy must be enumerated
        short = min(cls.Config.model_validate(config).mean_length, 0.25)
        return thinned(config, states - 1).model_copy(update={"mean_length": short})

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_INSERT, LOG_DELETE),)

    @property
    def births(self) -> float:
        return self.config.mean_length / (1 + self.config.mean_length)


class InsertionHead(TokenHead, kind="head"):
    """``log_insert``: log softmax over the tokens missing behind each position plus the log of their number, in float32 (DID's form).

    ``table`` is a token embedding with the start state, whose data tokens are used as output weights.
    """

    class Config(ComponentConfig):
        most: SizeField = 1024
        """Upper bound on the predicted number of missing tokens per gap."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.total = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"], table: Float[Tensor, "v+1 d"] | None = None) -> Float[Tensor, "b l v"]:
        with full_precision(x):
            rows = wide(x)
            many, highest = self.total(rows)[..., None], math.log(self.config.most)
            return self.logits(rows, table).log_softmax(-1) + highest - F.softplus(highest - many)


class DeletionHead(Component, kind="head"):
    """``log_delete``: the log-probability that the token at each position was inserted by noise, in float32."""

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        with full_precision(x):
            return F.logsigmoid(self.linear(wide(x)))
