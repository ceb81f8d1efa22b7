"""Classifiers of noisy rows, for classifier guidance.

Axes: r rows, l length, n states (the last is the mask), m = n - 1 data tokens, k labels.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.tokens.classifier import ClassifierConfig, NoisyClassifier
from sedd_graph.diffusion.tokens.kernel import ONLY_MASKS, Kernel
from sedd_graph.errors import UserError

from ..noise._frequencies import Count, load_numbers

__all__ = ["TokenCounts"]

MAX_LABELS = 4096
"""Largest accepted number of labels."""

Row = Annotated[tuple[Count, ...], pydantic.Field(min_length=2, max_length=2**16)]
Share = Annotated[float, pydantic.Field(gt=0, lt=1e18)]


class TokenCounts(NoisyClassifier, kind="classifier"):
    """Naive Bayes classifier of partly masked rows, from the token counts of each label.

    p(label | x) is proportional to p(label) times the product of p(token | label) over the unmasked tokens of x. If all
    tokens are masked at the same rate, masks are independent of the label, so that the classifier is as accurate at
    every noise level as it is for clean text.
    """

    example: ClassVar[Mapping[str, Any]] = {"counts": [[1, 2, 3], [3, 2, 1]], "label": 0}

    class Config(ClassifierConfig):
        counts: Annotated[tuple[Row, ...], pydantic.Field(min_length=2, max_length=MAX_LABELS)] | None = None
        """Token counts [k, m], at least 0: one row for each of 2 to 4,096 labels, one column for each data token."""
        file: Annotated[str, pydantic.Field(max_length=1024)] | None = None
        """A ``.npy`` file of token counts [k, m] in place of ``counts``, below the working directory."""
        smoothing: Annotated[float, pydantic.Field(ge=1e-6, le=1e6)] = 1.0
        """Pseudocount added to each token count, from 1e-6 to 1e6, so that no token has probability 0."""
        prior: Annotated[tuple[Share, ...], pydantic.Field(min_length=2, max_length=MAX_LABELS)] | None = None
        """Prior probability of each label, up to a common factor, above 0; null: uniform."""

        @pydantic.model_validator(mode="after")
        def _one_source(self) -> "TokenCounts.Config":
            if (self.counts is None) == (self.file is None):
                raise ValueError("give one of 'counts' and 'file'")
            if self.counts is not None and len({len(row) for row in self.counts}) > 1:
                raise ValueError("counts: all labels need as many counts, one for each data token")
            return self

    config: Config
    prior: Tensor
    log_likelihood: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        given, tokens = self.config, self.axis("n") - 1
        rows = load_numbers(given.file, 2) if given.file is not None else given.counts
        counts, what = torch.as_tensor(rows, dtype=torch.float64), given.file or "counts"
        if counts.shape[1] != tokens or not 2 <= len(counts) <= MAX_LABELS:
            raise UserError(
                f"{what} has {len(counts)} rows of {counts.shape[1]}; there must be 2 to {MAX_LABELS:,} labels, with a count for "
                f"each of the model's {tokens} data tokens"
            )
        if bool((counts < 0).any()):
            raise UserError(f"{what} must hold counts: none negative")
        prior = torch.ones(len(counts)) if given.prior is None else torch.tensor(given.prior)
        if len(prior) != len(counts):
            raise UserError(f"prior has {len(prior)} entries, but there are {len(counts)} labels")
        smooth = counts + given.smoothing
        log_likelihood = (smooth / smooth.sum(-1, keepdim=True)).log().T
        self.register_buffer("prior", prior.double().log().log_softmax(0), persistent=False)
        # log p(state | label) [n, k], 0 for the mask
        padded = torch.cat([log_likelihood, torch.zeros(1, len(counts))])
        self.register_buffer("log_likelihood", padded, persistent=False)

    @property
    def labels(self) -> int:
        return len(self.prior)

    def lacks(self, kernel: Kernel) -> str | None:
        return None if kernel.masks_evenly else ONLY_MASKS

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (self.prior + self.log_likelihood[x].sum(1)).log_softmax(-1).float()

    def changes(self, x: Tensor, sigma: Tensor, label: int) -> Tensor:
        each = self.log_likelihood[x]
        whole = self.prior + each.sum(1)
        others = (whole[:, None] - each).log_softmax(-1)  # log p(label | all other positions), [r, l, k]
        table = self.log_likelihood
        with_it = others[..., label, None] + table[:, label] - torch.log(others.exp() @ table.exp().T)
        return (with_it - whole.log_softmax(-1)[:, label, None, None]).float()
