"""Classifiers of noisy vectors, for guidance by gradients.

Axes: r rows, l length, d width of a vector, v tokens, k labels.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.vectors.classifier import VectorClassifier, VectorClassifierConfig
from sedd_graph.diffusion.vectors.gaussian import signal, spread
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.errors import UserError

from ..noise._frequencies import Count, load_numbers

__all__ = ["EmbeddingCounts"]

MAX_LABELS = 4096
"""Largest accepted number of labels."""

Row = Annotated[tuple[Count, ...], pydantic.Field(min_length=2, max_length=2**16)]
Share = Annotated[float, pydantic.Field(gt=0, lt=1e18)]


class EmbeddingCounts(VectorClassifier, kind="vector_classifier"):
    """Naive Bayes classifier of noisy embeddings, from the token counts of each label.

    p(x_t | label) is the product over positions of the mixture of N(x_t; sqrt(alpha_bar) embedding of the token, variance of x_t
    given the token) under p(token | label). If the tokens of a text are independent given its label, p(label | x_t) is
    exact at every noise level.
    """

    example: ClassVar[Mapping[str, Any]] = {"counts": [[1, 2, 3, 4], [3, 2, 1, 4]], "label": 0}

    class Config(VectorClassifierConfig):
        counts: Annotated[tuple[Row, ...], pydantic.Field(min_length=2, max_length=MAX_LABELS)] | None = None
        """Token counts [k, v], at least 0: one row for each of 2 to 4,096 labels, one column for each token."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A ``.npy`` file of token counts [k, v] in place of ``counts``, below the working directory."""
        smoothing: Annotated[float, pydantic.Field(ge=1e-6, le=1e6)] = 1.0
        """Pseudocount added to each token count, from 1e-6 to 1e6, so that no token has probability 0."""
        prior: Annotated[tuple[Share, ...], pydantic.Field(min_length=2, max_length=MAX_LABELS)] | None = None
        """Prior probability of each label, up to a common factor, above 0; null: uniform."""

        @pydantic.model_validator(mode="after")
        def _one_source(self) -> "EmbeddingCounts.Config":
            if (self.counts is None) == (self.file is None):
                raise ValueError("give one of 'counts' and 'file'")
            if self.counts is not None and len({len(row) for row in self.counts}) > 1:
                raise ValueError("counts: all labels need as many counts, one for each token")
            return self

    config: Config
    prior: Tensor
    log_likelihood: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        given, tokens = self.config, self.axis("n")
        rows = load_numbers(given.file, 2) if given.file is not None else given.counts
        counts, what = torch.as_tensor(rows, dtype=torch.float64), given.file or "counts"
        if counts.shape[1] != tokens or not 2 <= len(counts) <= MAX_LABELS:
            raise UserError(
                f"{what} has {len(counts)} rows of {counts.shape[1]}; there must be 2 to {MAX_LABELS:,} labels, with a "
                f"count for each of the model's {tokens} tokens"
            )
        if bool((counts < 0).any()):
            raise UserError(f"{what} must hold counts: none negative")
        prior = torch.ones(len(counts)) if given.prior is None else torch.tensor(given.prior)
        if len(prior) != len(counts):
            raise UserError(f"prior has {len(prior)} entries, but there are {len(counts)} labels")
        smooth = counts + given.smoothing
        self.register_buffer("prior", prior.double().log().log_softmax(0), persistent=False)
        self.register_buffer("log_likelihood", (smooth / smooth.sum(-1, keepdim=True)).log(), persistent=False)

    @property
    def labels(self) -> int:
        return len(self.prior)

    def log_prob(self, x: Tensor, sigma: Tensor, kernel: VectorKernel, start_variance: float) -> Tensor:
        table = kernel.table().detach().to(x.dtype)
        level, variance = (v.to(x.dtype)[:, None, None] for v in (signal(sigma), spread(sigma, start_variance)))
        with full_precision(x):
            # log N(x; level * embedding, variance) up to terms that are the same for every token, [r, l, v]
            each = (level * (x @ table.T) - level.square() * (table.square().sum(-1) / 2)) / variance
            likelihood = (each[..., None, :] + self.log_likelihood.to(x.dtype)).logsumexp(-1)  # [r, l, k]
        return (self.prior.to(x.dtype) + likelihood.sum(1)).log_softmax(-1)
