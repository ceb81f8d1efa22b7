"""Requests to a process, and what it returns: samples, stored arrays, texts with holes and prompts.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.guidance import Classifier
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import UserError

__all__ = ["Prompt", "SampleRequest", "Samples", "Stored", "TextWithHoles"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Parameters of one sampling call.

    A field that the family of the model does not support (:attr:`Process.refuses`) must be None. Otherwise
    :meth:`Engine.generate` raises an error. The model chooses the lengths of samples in the family ``strings``.

    Attributes:
        batch: Number of rows, b.
        length: Tokens per row, l; the largest number of tokens where the model chooses lengths. Required for text; None
            for a flow, whose rows are real numbers.
        steps: Number of sampler steps; in block diffusion, of steps for each block. None: the number in the blueprint.
        seed: Seed; the same seed gives the same rows on the same device. None: a random seed from torch's global
            generator.
        prompt: Given tokens, int64 [b, l] or [1, l], with -1 at the positions to fill in; where the model chooses
            lengths, int64 [1, p] with one -1 for each hole. None: no given tokens.
        attend: Attention mask, bool [b, l]: False at padding. None: no padding.
        conditions: Conditions that replace those of the blueprint's ``sample`` section; None: the blueprint's.
        allowed: Mask of the tokens that may be drawn, bool [n], [l, n] or [b, l, n]; None: no further restriction.
        classifier: Classifier for guidance towards a label, instead of the one in the blueprint; None: the blueprint's.
        seeds: Seed of each row, int64 [b], in place of ``seed``: a row then depends neither on the other rows of the batch
            nor on padding. None: one seed for the batch.
        tape: Noise that is recorded, so that the samples are given texts, or replayed; ``seed`` is then not used. None:
            noise from ``seed``.
        on_step: Callback ``on_step(number, rows)``, called with 0 and the initial rows, int64 [b, l], and after each
            step with the step's number, from 1, and the rows.
        on_confidence: Callback ``on_confidence(number, confidences)``, called before ``on_step`` with the same number and,
            for each token of the rows, the probability that the model gave it when it was drawn, float32 [b, l]; NaN at
            tokens that were not drawn from the model. None: they are not computed.
        on_block: Callback ``on_block(rows)`` of models that generate text in blocks (:attr:`Process.block`), called
            before each block with the tokens of the blocks before it, int64 [b, m].
        kv_cache: False to evaluate the finished blocks of text in blocks again for each block, instead of caching their
            keys and values. The samples are equal up to rounding.
    """

    batch: int
    length: int | None = None
    steps: int | None = None
    seed: int | None = None
    prompt: Tensor | None = None
    attend: Tensor | None = None
    conditions: Conditions | None = None
    allowed: Tensor | None = None
    classifier: Classifier | None = None
    seeds: Tensor | None = None
    tape: NoiseTape | None = None
    on_step: Callable[[int, Tensor], None] | None = None
    on_confidence: Callable[[int, Tensor], None] | None = None
    on_block: Callable[[Tensor], None] | None = None
    kv_cache: bool = True

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a random generator on ``device``, seeded with ``seed``, or at random if ``seed`` is None."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed(mix_seed(seed))


class Samples(NamedTuple):
    """Sampled rows and metadata.

    Attributes:
        rows: Tokens, int64 [b, l], or points, float32 [b, ...], on the CPU.
        facts: Metadata about how the rows were drawn, as JSON values by name.
        nats: -log p of each row in nats, float64 [b]; None unless the family computes it exactly.
        given: True at the tokens of the prompt, bool [b, l], on the CPU; None without a prompt.
    """

    rows: Tensor
    facts: Mapping[str, Any]
    nats: Tensor | None = None
    given: Tensor | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of sampled text that are stored, by name.

        Returns:
            ``tokens``, int64 [b, l]; and, if there was a prompt, ``given``, bool [b, l], True at its tokens.
        """
        given = {} if self.given is None else {"given": self.given.numpy()}
        return {"tokens": self.rows.numpy(), **given}


class Stored(NamedTuple):
    """Samples in the format that is written to a run folder.

    Attributes:
        arrays: Arrays by name; the first axis is the row.
        text: Decoded text of each row; None where rows are not text.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    text: Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextWithHoles:
    """Infilling request: a ``text`` with marked holes, or the text before and after one hole (``prefix``, ``suffix``).

    Attributes:
        text: Text in which ``[[N]]`` marks a hole of N tokens, or ``[[]]`` a hole of any size where the model chooses
            lengths. None: ``prefix`` or ``suffix`` is given instead.
        prefix: Text before the hole, or its token ids; None: the hole is at the start.
        suffix: Text after the hole, or its token ids; None: the hole is at the end.
        length: Number of tokens of the filled-in text, given text included (the largest number where the model chooses
            lengths). If None, it follows from a ``text`` with ``[[N]]``: its own tokens plus N for each hole. For
            ``[[]]``, and for ``prefix`` and ``suffix``, None selects the argument ``length`` of :meth:`Process.prompt`.
    """

    text: str | None = None
    prefix: str | Sequence[int] | None = None
    suffix: str | Sequence[int] | None = None
    length: int | None = None

    def check(self, example: str) -> None:
        """Verify that either ``text`` is given, or ``prefix``, ``suffix`` or both.

        Args:
            example: Text with a hole in the syntax of the family, shown in the error message.

        Raises:
            UserError: All three are None, or ``text`` is given together with ``prefix`` or ``suffix``.
        """
        if self.text is not None and (self.prefix is not None or self.suffix is not None):
            raise UserError("infill: give --text, or --prefix and --suffix, not both")
        if self.text is None and self.prefix is None and self.suffix is None:
            raise UserError(f"infill: give --text '{example}', or --prefix or --suffix")


class Prompt(NamedTuple):
    """An infilling request encoded as tokens.

    Attributes:
        tokens: Given tokens, int64 [1, l], with -1 at the positions to fill in; one -1 for each hole where the model
            chooses lengths.
        length: Number of tokens of each sampled row, given tokens included; the largest number where the model chooses
            lengths. To be passed on as :attr:`SampleRequest.length`.
        exact: Whether samples follow the model's conditional distribution given the prompt, or only approximate it.
        how: Explanation of ``exact`` for the user.
    """

    tokens: Tensor
    length: int
    exact: bool
    how: str
