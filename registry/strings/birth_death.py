"""Kernels that delete and insert tokens, and the heads that predict insertions and deletions in the reverse process.

Axes: b batch, l positions of a string (the BOS token, then the tokens), d model width, v data tokens.
"""

import math
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.outputs import Output
from sedd_graph.diffusion.distillation import Distillable
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.deletion_distillation import DeletionDistillable
from sedd_graph.diffusion.strings.kernel import LOG_DELETE, LOG_INSERT, TOKENS, StringObjective, StringTable

from ..bijective._bijection import wide
from ..noise._frequencies import FrequencyConfig, thinned, token_frequencies
from ._heads import Scalar, TokenHead

__all__ = ["Delete", "DeletionHead", "Indel", "InsertionHead"]


class _Enumerated(BirthDeath):
    """Base class of the birth-death kernels of this module, with the table that proofs enumerate."""

    abstract: ClassVar[bool] = True
    toys: ClassVar[tuple[int, ...]] = (2, 3)

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.birth_death import BirthDeathTable

        return BirthDeathTable(self, one_length=one_length)


class Delete(_Enumerated, kind="string_kernel"):
    """Deletion kernel: deletes each token at rate 1; the prior is the empty string (DID, arXiv 2603.23507).

    Generation starts from the empty string and only inserts tokens.
    """

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

    def distillable(self, schedule: Schedule, objective: StringObjective[Any, Any]) -> Distillable:
        return DeletionDistillable(self, schedule, objective)


class Indel(_Enumerated, kind="string_kernel"):
    """Insertion-deletion kernel: the birth-death process TKF91 of Thorne, Kishino and Felsenstein (1991).

    Each token is deleted at rate 1 per unit of sigma, and new tokens are inserted in every gap, drawn from the token
    frequencies. Generation inserts and deletes, so it can revise the tokens that it has generated. The prior is a
    string of independent tokens whose length has a geometric distribution. The length of a noisy string converges to
    that distribution at rate 1 / (1 + mean_length) per unit of sigma, so the schedule must end at a total noise of at
    least about 7 (1 + mean_length).
    """

    class Config(FrequencyConfig):
        mean_length: Annotated[float, pydantic.Field(gt=0, le=65536)] = 4.0
        """Mean length of a string of the prior, in tokens, above 0 and at most 65,536."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("law", token_frequencies(self.config, self.data_tokens), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        # all likely strings of the toy must be enumerated
        short = min(cls.Config.model_validate(config).mean_length, 0.25 if states <= TOKENS + 1 else 0.06)
        return thinned(config, states - 1).model_copy(update={"mean_length": short})

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOG_INSERT, LOG_DELETE),)

    @property
    def births(self) -> float:
        return self.config.mean_length / (1 + self.config.mean_length)


class InsertionHead(TokenHead, kind="head"):
    """Head for insertions: ``log_insert`` [b, l, v], log of the expected number of missing tokens.

    Entry [b, i, v] is for copies of token v missing after position i (DID, arXiv 2603.23507). The output is the
    log-softmax of the token logits plus the log of the predicted number of all tokens missing after the position, in
    float32.

    The optional input ``table`` ties the output weights to a token embedding [v + 1, d]: they are all its rows but the
    last, which embeds the BOS token (the marker at position 0).
    """

    class Config(ComponentConfig):
        most: SizeField = 1024
        """Upper bound on the predicted number of tokens missing after a position."""

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
    """Head for deletions: ``log_delete`` [b, l], log-probability that noise inserted the token; float32.

    Entry [b, i] is for the token at position i of the noisy string.
    """

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        with full_precision(x):
            return F.logsigmoid(self.linear(wide(x)))
