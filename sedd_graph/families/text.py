"""Base class and helper functions of the processes on text (the families ``tokens``, ``strings`` and ``vectors``).

Axes: b batch, l length.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import OnDraw, Process, Setup
from sedd_graph.engine.samples import TextWithHoles
from sedd_graph.errors import Problem, UserError
from sedd_graph.families.plan import ProcessPlan

if TYPE_CHECKING:  # a model of tokens needs no other kernels, nor the time of importing them
    from sedd_graph.diffusion.strings.kernel import StringKernel
    from sedd_graph.diffusion.vectors.kernel import VectorKernel

__all__ = [
    "FREE",
    "LARGEST",
    "MASKED",
    "BoundDraw",
    "TextProcess",
    "all_but",
    "check_row",
    "check_tokens",
    "document_lengths",
    "fill_holes",
    "ids_of",
    "make_components",
    "problem",
    "split_holes",
]

FREE = -1
"""Placeholder for a token id in prompts: marks a position, or a hole of any length, that the model fills in."""
MASKED = "\N{LIGHT SHADE}"
"""Character that stands for a mask in a draft."""
LARGEST = 2**20
"""Maximum number of tokens of a prompt."""
_HOLE = re.compile(r"\[\[(\d+)\]\]")


def make_components(plan: ProcessPlan, registry: Registry, *, states: int | None = None) -> tuple[Any, Any, Any, Any]:
    """Construct the components of a process.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        states: Number of states of a small example for verification, for which the Configs of kernel and objective are
            reduced, too. None for the number of states and the Configs that the blueprint declares.

    Returns:
        Kernel, schedule, objective and sampler.
    """
    context = Context({"n": states or plan.states})
    classes = [registry.component(p.contract.op) for p in (plan.kernel, plan.objective, plan.schedule, plan.sampler)]
    kernel, objective = plan.kernel.config, plan.objective.config
    if states is not None:
        kernel, objective = classes[0].toy(kernel, states), classes[1].toy(objective)
    configs = (kernel, objective, plan.schedule.config, plan.sampler.config)
    made = [cls(config, context) for cls, config in zip(classes, configs, strict=True)]
    return made[0], made[2], made[1], made[3]


def problem(key: str, message: str) -> Problem:
    """Return a :class:`Problem` for a BlueprintError, at the dotted blueprint key ``key`` and without line number."""
    return Problem("blueprint", 0, 0, key, message)


class BoundDraw(NamedTuple):
    """Estimates of the upper bound on -log p of m rows, from one noise draw for each.

    Attributes:
        over: Name of the random variable that sets the noise level, such as ``time``.
        t: Its values, float [m], or [m, k] if a row has k noise levels; None if they are unknown.
        nats: The estimates, without ``left_out``, float32 [m].
        left_out: Unbiased estimate of the reconstruction term, nats, float64 [m], which may be 0 for all but a random
            subset of rows: -log p(x_0 | x_t) of a clean row x_0, x_t being drawn at the lowest noise that the objective
            counts. None if ``nats`` counts all noise, so that there is no such term.
    """

    over: str
    t: Tensor | None
    nats: Tensor
    left_out: Tensor | None = None


class TextProcess(Process):
    """Base class of the processes on text.

    Args:
        plan: Validated description of the process.
        setup: Graph, registry and device of the process.
        parts: Components of the process, which are moved to the device; None for one that is not declared.
    """

    batch_type = Batch
    plan: ProcessPlan
    kernel: Kernel | StringKernel | VectorKernel
    sampler: Any

    def __init__(self, plan: ProcessPlan, setup: Setup, parts: Iterable[nn.Module | None]) -> None:
        super().__init__(plan, setup)
        for part in parts:
            if part is not None:
                part.to(setup.device)
        self._device, self._forbidden, self._pieces = setup.device, setup.forbidden, setup.pieces

    def tokens(self, rows: Tensor | Batch, device: torch.device) -> Batch:
        """Return token rows, int64 [b, l] or a batch, as a batch on ``device``, without validation."""
        return (rows if isinstance(rows, Batch) else Batch.of(rows)).to(device)

    @abstractmethod
    def bound_draws(self, network: Network, batch: Batch, parts: Sequence[range], seed: int) -> Iterator[BoundDraw]:
        """Draw noise once for each row, and yield estimates of the upper bound on -log p of the rows of each part.

        Args:
            network: The network, in evaluation mode.
            batch: The clean rows whose noise is drawn together.
            parts: The rows that are evaluated at a time (:meth:`Process.bound_rows`).
            seed: Seed of the noise.
        """

    def randomness(self, batch: Batch, part: range, seed: int) -> Randomness:
        """Return the random numbers of the rows ``part`` of a batch."""
        return Randomness(torch.Generator(self._device).manual_seed(seed), start=part.start, total=len(batch))

    def bound_rows(
        self,
        network: Network,
        batch: Batch,
        parts: Sequence[range],
        *,
        seeds: Sequence[int],
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        total = torch.zeros(sum(map(len, parts)), dtype=torch.float64, device=network.device)
        for seed in seeds:
            drawn = list(self.bound_draws(network, batch, parts, seed))
            nats = torch.cat([each.nats for each in drawn])
            levels = [each.t for each in drawn if each.t is not None]
            rest = [each.left_out for each in drawn if each.left_out is not None]
            if on_draw is not None:
                on_draw(drawn[0].over, torch.cat(levels) if levels else None, nats)
            total += nats.double()
            if rest:
                total += torch.cat(rest)
        return total / len(seeds)

    def drafts(self, rows: Tensor, tokenizer: Tokenizer) -> list[str]:
        """Return rows between two sampler steps as text for the user, in which a mask is shown as :data:`MASKED`.

        Args:
            rows: Rows, int64 [b, l].
            tokenizer: The tokenizer.

        Raises:
            UserError: The bytes of a token depend on the tokens beside it.
        """
        shown = {
            token: MASKED.encode() if piece is None else piece for token, piece in self.draft_tokens(tokenizer).items()
        }
        return [b"".join(shown.get(token, b"") for token in row).decode("utf-8", "replace") for row in rows.tolist()]

    def draft_tokens(self, tokenizer: Tokenizer) -> Mapping[int, bytes | None]:
        mask = getattr(self.kernel, "mask", None)
        found: dict[int, bytes | None] = {} if mask is None else {mask: None}
        return found | {n: p for n, p in enumerate(tokenizer.pieces()) if p is not None and n != mask}

    @property
    def steps(self) -> int | None:
        steps: int | None = self.sampler.steps
        return steps

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        yield from super().check_data(data)
        size, tokens = data.tokenizer.size if isinstance(data, DataConfig) else None, self.kernel.data_tokens
        if size is not None and size != tokens:
            message = f"the tokenizer has {size:,} tokens, but the graph is built for {tokens:,} (states less the mask)"
            yield "data.tokenizer", message

    def check_tokenizer(self, size: int) -> str | None:
        if size <= (tokens := self.kernel.data_tokens):
            return None
        return (
            f"data.tokenizer has {size:,} tokens, more than the {tokens:,} that the graph is built for; "
            "raise params.tokens or choose a smaller tokenizer"
        )


def all_but(forbidden: Iterable[int], count: int) -> Tensor:
    """Return a mask of token ids, bool [``count``], False at the ``forbidden`` ids that are below ``count``."""
    found = torch.ones(count, dtype=torch.bool)
    found[[i for i in forbidden if i < count]] = False
    return found


def check_tokens(tokens: Tensor, count: int) -> None:
    """Raise :class:`UserError` unless ``tokens`` is int64 [b, l] with ids in [0, ``count``)."""
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise UserError(f"tokens must be int64 [batch, length], not {tokens.dtype} {list(tokens.shape)}")
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= count):
        raise UserError(
            f"tokens run from {int(tokens.min())} to {int(tokens.max())}; this model has {count} (0 to {count - 1})"
        )


def split_holes(text: str, hole: re.Pattern[str], form: str) -> list[str]:
    """Split a text at its holes.

    Args:
        text: The text.
        hole: Pattern of a hole. Its groups, if any, are returned between the parts, as by :func:`re.split`.
        form: Description of a hole for the error message.

    Returns:
        The parts of the text around the holes.

    Raises:
        UserError: The text has no hole.
    """
    parts = hole.split(text)
    if len(parts) == 1:
        raise UserError(f"infill: --text has no hole: write {form}")
    return parts


def ids_of(part: str | Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a part of a prompt: text, or the ids themselves.

    Args:
        part: The part.
        tokenizer: Tokenizer of the model.

    Raises:
        UserError: A token id does not exist.
    """
    if isinstance(part, str):
        return tokenizer.encode(part).tolist() if part else []
    if (wrong := next((i for i in part if not 0 <= i < tokenizer.size), None)) is not None:
        raise UserError(f"infill: there is no token {wrong}: token ids are from 0 to {tokenizer.size - 1:,}")
    return list(part)


def fill_holes(text: TextWithHoles, tokenizer: Tokenizer, length: int) -> list[int]:
    """Encode text with holes of known sizes.

    Args:
        text: Either ``text.text``, in which ``[[N]]`` stands for N tokens to fill in, or ``text.prefix`` and
            ``text.suffix``, with one unmarked hole between them.
        tokenizer: Tokenizer of the model.
        length: Number of tokens of prefix, hole and suffix together, which determines the size of the unmarked hole.
            Not used for ``text.text``.

    Returns:
        Ids of all tokens of the row in order, with -1 (:data:`FREE`) at each position to fill in.

    Raises:
        UserError: The text has no hole, a hole is too large, or prefix and suffix leave no position to fill in.
    """
    if text.text is not None:
        row: list[int] = []
        form = "[[N]] where N tokens are free, such as 'The [[12]] is'"
        for index, part in enumerate(split_holes(text.text, _HOLE, form)):
            if index % 2 and (len(part) > 7 or len(row) + int(part) > LARGEST):
                raise UserError(f"infill: [[{part[:20]}]] makes more than {LARGEST:,} tokens")
            row += [FREE] * int(part) if index % 2 else tokenizer.encode(part).tolist()
        return row
    before, after = (ids_of(part or "", tokenizer) for part in (text.prefix, text.suffix))
    left = length - len(before) - len(after)
    if left <= 0:
        raise UserError(
            f"infill: prefix and suffix have {len(before) + len(after)} tokens; nothing is free of {length}"
        )
    return [*before, *[FREE] * left, *after]


def check_row(row: list[int], tokenizer: Tokenizer) -> None:
    """Raise :class:`UserError` if a prompt has more than 2^20 tokens, or ids that the tokenizer forbids.

    Args:
        row: Token ids of the prompt, with -1 (:data:`FREE`) at positions to fill in, which count as tokens.
        tokenizer: Tokenizer of the model.
    """
    if set(row) & set(tokenizer.forbidden):
        raise UserError("infill: the text has characters that the model was not trained on")
    if len(row) > LARGEST:
        raise UserError(f"infill: the text has {len(row):,} tokens, more than {LARGEST:,}")


def document_lengths(tokens: npt.NDArray[np.int64], *, pad: int | None, end: int | None) -> npt.NDArray[np.int64]:
    """Return the length of the document in each row.

    Args:
        tokens: Token ids, int64 [row, position].
        pad: Id of the padding token, which is not counted at the end of a row; None if there is no such token.
        end: Id of the end-of-text token. The document ends with the first one, which is counted. None if there is no
            such token.

    Returns:
        Number of tokens, int64 [row].
    """
    _, width = tokens.shape
    text = np.ones_like(tokens, dtype=np.bool_) if pad is None else tokens != pad
    lengths: npt.NDArray[np.int64] = width - np.argmax(text[:, ::-1], axis=1).astype(np.int64)
    lengths[~text.any(axis=1)] = 0
    if end is not None:
        ends = tokens == end
        first = np.where(ends.any(axis=1), np.argmax(ends, axis=1) + 1, width)
        np.minimum(lengths, first, out=lengths)
    return lengths
