"""Abstract interface of a process: noising, training loss, likelihood bound and sampling.

An engine composes a network and a process (:mod:`sedd_graph.engine.engine`). There is one implementation in
:mod:`sedd_graph.families` for each family of processes: ``tokens`` (diffusion on token rows of a fixed length),
``strings`` (diffusion on strings whose length changes), ``vectors`` (diffusion of the embeddings of token rows),
``points`` (normalizing flows on rows of real numbers) and ``graph`` (a network without a process).

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sedd_graph.component.check import Check, Proof
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.bitstream.reversible import ReversibleNoise
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.distillation import Distillable, Distillation
from sedd_graph.engine.inversion import Inversion
from sedd_graph.engine.network import Network
from sedd_graph.engine.regions import Model
from sedd_graph.engine.samples import Prompt, SampleRequest, Samples, Stored, TextWithHoles
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.engine.tail import Tail
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Graph

__all__ = [
    "KERNEL",
    "SCHEDULE",
    "OnDraw",
    "Process",
    "Setup",
]


KERNEL, SCHEDULE = "process:kernel", "process:schedule"
"""Names of a trainable noise kernel and a trainable schedule as submodules of the network's module.

No node of a graph can have these names, since node names have no colon.
"""


OnDraw = Callable[[str, Tensor | None, Tensor], None]
"""Callback for each noise draw of a likelihood bound, called as ``on_draw(over, t, nats)``.

``over`` is the name of the random variable that was drawn and sets the noise level of a row, such as ``time`` or
``masked`` (the fraction of masked tokens). ``t`` has its values, float [b], or [b, k] if a row has k noise levels; None
if they are unknown. ``nats`` is the bound on -log p of each row for this draw, float [b].
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Environment in which a process is constructed.

    Attributes:
        registry: The installed components.
        graph: Typed graph of the network.
        device: Device of the process's components.
        forbidden: Ids of tokens that are never sampled.
        pieces: Function that returns the bytes of each token id (None for a token without text); None where there is no
            tokenizer.
    """

    registry: Registry
    graph: Graph
    device: torch.device
    forbidden: Sequence[int] = ()
    pieces: Callable[[], Sequence[bytes | None]] | None = None


class Process(ABC):
    """Abstract base class of processes: noising, training loss, likelihood bound and sampling.

    Each subclass implements one family of processes, such as diffusion on token rows of a fixed length (``tokens``) or
    normalizing flows on rows of real numbers (``points``).

    Args:
        plan: The process that the blueprint declares, validated (:class:`sedd_graph.families.plan.Plan`).
        setup: Registry, graph, device and tokenizer information.

    Raises:
        BlueprintError: The declared components are not compatible with each other.
    """

    family: ClassVar[str]
    """Name of the family, a key of :data:`sedd_graph.families.table.FAMILIES`."""
    batch_type: ClassVar[Any]
    """Class of a batch of clean rows. Its method ``of_arrays`` takes the arrays that a data set yields for its rows, in order.

    A batch has ``len(batch)`` rows; ``width``, the number of tokens (or real numbers) of a row; ``counted``, for each
    row the number of its tokens (or real numbers) that the loss is summed over, int64 [b]; and the method
    ``to(device)``.
    """
    trains: ClassVar[bool] = True
    """Whether the family can be trained and sampled."""
    compiles: ClassVar[bool] = True
    """Whether the network can be compiled; False for a family that evaluates it layer by layer."""
    autocasts: ClassVar[bool] = True
    """Whether the network may be evaluated in bfloat16 (autocast); False for a family that computes in float32 always."""
    text: ClassVar[bool] = True
    """Whether rows are text, decoded by a tokenizer."""
    chooses_lengths: ClassVar[bool] = False
    """Whether the model chooses the lengths of samples and of holes, so that :attr:`SampleRequest.length` is the largest."""
    exact: ClassVar[bool] = False
    """Whether :meth:`bound_rows` returns -log p itself instead of an upper bound."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Maps the name of each field of :class:`SampleRequest` that the family does not support to the reason, which is
    part of the error message."""

    likelihood: str = "bound"
    """The likelihood that :meth:`bound_rows` computes, one of :attr:`likelihoods`."""

    def __init__(self, plan: Any, setup: Setup) -> None:
        self.plan = plan
        self.setup = setup

    def describe(self) -> str:
        """Return a one-line description for the user, such as the names of the components."""
        return str(self.plan.describe())

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        """Return the trainable components of the process, such as a learned schedule, by their submodule names.

        The engine adds them to the network's module, so that their weights are saved with those of the network.
        """
        return {}

    @property
    def loss_unit(self) -> str:
        """Unit of the training loss, ``nats`` by default; what evaluation reports is in nats always."""
        return "nats"

    @abstractmethod
    def batch(self, rows: Any, device: torch.device) -> Any:
        """Convert clean rows to a batch of :attr:`batch_type` on ``device``.

        Args:
            rows: Tokens, int64 [b, l]; points, float32 [b, ...]; or a batch.
            device: Target device.

        Raises:
            UserError: The rows do not have the model's shape or dtype.
        """

    @abstractmethod
    def draw(self, batch: Any, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Any:
        """Draw the noise of one training step.

        Args:
            batch: Batch of clean rows.
            random: Source of random numbers.
            t: Diffusion times in [0, 1], float32 [b]; drawn if None.
            xt: Noised rows x_t, int64 [b, l]; drawn if None.

        Returns:
            The noise draw, in the form that :meth:`loss` takes.

        Raises:
            UserError: ``t`` or ``xt`` is given, and the family does not support it.
        """

    @abstractmethod
    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss for one noise draw.

        Args:
            model: Module of the network.
            draw: Noise draw returned by :meth:`draw`.
            batch: Batch of clean rows.
            key: Dropout key of each row, int32 [b]; None turns dropout off.

        Returns:
            The loss per row in :attr:`loss_unit`, float32 [b], and the saved activations of the network by dotted path.
        """

    @classmethod
    def has_tail(cls, plan: Any, registry: Registry) -> bool:
        """Return whether :meth:`tail` returns one, for a network whose outputs are computed position by position.

        Args:
            plan: The declared process.
            registry: The installed components.
        """
        return False

    def tail(self, model: Model) -> Tail | None:
        """Return network and training loss as a trunk and an end that is evaluated at a few positions at a time.

        None if :meth:`loss` evaluates the whole network on whole rows, as by default.

        Args:
            model: Module of the network.
        """
        return None

    @abstractmethod
    def bound_rows(
        self,
        network: Network,
        batch: Any,
        parts: Sequence[range],
        *,
        seeds: Sequence[int],
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        """Estimate an upper bound on -log p of some rows of a batch.

        The noise of a row depends on its place in the batch, not on which rows are evaluated with it.

        Args:
            network: Network in evaluation mode.
            batch: Batch of clean rows, whose noise is drawn together.
            parts: The rows that are evaluated at a time, one part after the other; m in all. Indices beyond the batch,
                which pad compiled shapes, start again at its first row (:func:`sedd_graph.diffusion.batch.part_of`).
            seeds: Seeds of the noise draws; the bound is averaged over one draw per seed.
            on_draw: Callback for each noise draw of all parts together, see :data:`OnDraw`.

        Returns:
            The bound in nats per row, float64 [m], on the network's device, which is not waited for.
        """

    @property
    def row_multiple(self) -> int:
        """Number of tokens of which the length of rows must be a multiple; 1 by default."""
        return 1

    def distillable(self) -> Distillable:
        """Return what the process gives to distillation objectives.

        Raises:
            UserError: The process cannot be distilled.
        """
        raise UserError(f"a process of {self.family} has no coupled noise of discrete states, and cannot be distilled")

    def row_bounds(self, network: Network, batch: Any, *, seeds: Sequence[int], draws: int, at_once: int) -> Tensor:
        """Estimate an upper bound on -log p of each row by itself; :meth:`bound_rows` spreads draws over the rows of a batch.

        The noise of a row follows from its seed alone, and its draws are spread evenly over the noise levels.

        Args:
            network: Network in evaluation mode.
            batch: Batch of clean rows.
            seeds: Seed of each row.
            draws: Number of evaluations of the network for each row.
            at_once: Largest number of rows that the network evaluates at a time.

        Returns:
            Two independent estimates of each row, nats, float64 [b, 2], whose mean is the estimate. They are equal where the
            result is exact; the second is NaN if there is one draw.
        """
        found, sizes = torch.full((len(batch), 2), torch.nan, dtype=torch.float64), (draws - draws // 2, draws // 2)
        for row, seed in enumerate(seeds):
            for half, size in enumerate(sizes if draws > 1 else sizes[:1]):
                copies = batch.part(range(row, row + 1)).part(range(size))
                parts = [range(start, min(start + at_once, size)) for start in range(0, size, at_once)]
                own = mix_seed(seed, half)
                found[row, half] = self.bound_rows(network, copies, parts, seeds=[own]).mean().cpu()
        return found.to(network.device)

    def measures(self, network: Network, batch: Any, part: range, *, seed: int) -> Mapping[str, Tensor]:
        """Return further measures of each row that evaluation reports beside the bound; none by default.

        Args:
            network: Network in evaluation mode.
            batch: Batch of clean rows, whose noise is drawn together.
            part: The rows that are evaluated, which may reach beyond the batch as for :meth:`bound_rows`.
            seed: Seed of the noise.

        Returns:
            For each name, such as ``rounding_accuracy``, a quantity summed over the counted tokens of a row, float [b].
            Evaluation divides the sum over rows by the number of tokens.
        """
        return {}

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """Names of the likelihoods that :meth:`bound_rows` can compute; ``bound``, the default, is an upper bound."""
        return ("bound",)

    def choose_likelihood(self, name: str) -> None:
        """Choose the likelihood that :meth:`bound_rows` computes.

        Args:
            name: One of :attr:`likelihoods`.

        Raises:
            UserError: The process has no such likelihood.
        """
        if name not in self.likelihoods:
            raise UserError(f"--likelihood: {name!r} is not one of this model's: {', '.join(self.likelihoods)}")
        self.likelihood = name

    @property
    def caveat(self) -> str | None:
        """Reason why the likelihood bound is not comparable with that of other models; None if it is comparable."""
        return None

    def noised(self, over: str, t: Tensor) -> Tensor:
        """Return the expected fraction of a row's tokens that noise has changed, for given noise levels.

        The default implementation returns ``t``, for a variable that is this fraction itself, such as ``masked``.

        Args:
            over: Name of the random variable that sets the noise level, such as ``time`` or ``masked``, see
                :data:`OnDraw`.
            t: Values of that variable, float64, of any shape.

        Returns:
            Fractions in [0, 1], float64, of the shape of ``t``.
        """
        return t

    def example(self, rows: int, length: int) -> Tensor:
        """Return arbitrary clean rows of valid shape and dtype, for a trial training step.

        Args:
            rows: Number of rows.
            length: Tokens per row; ignored where rows are points.

        Returns:
            Tokens, int64 [rows, length], or points, float32 [rows, ...].
        """
        return torch.zeros(rows, length, dtype=torch.int64)

    # -- sampling ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Default number of sampler steps; None for a sampler without a fixed number of steps."""
        return None

    def evaluations(self, request: SampleRequest) -> int | None:
        """Return the total number of sampler steps for ``request``, including the final noise removal.

        None where the number is not known before sampling.

        Args:
            request: Number of steps and length.
        """
        steps = request.steps or self.steps
        return steps and steps + 1

    def inversion(self, steps: int | None = None) -> Inversion | None:
        """Return the sampler's bijection between vectors of text and noise; None, the default, if it has none.

        Args:
            steps: Number of sampler steps; None: the number in the blueprint.

        Raises:
            UserError: The number of steps is invalid.
        """
        return None

    @property
    def block(self) -> int | None:
        """Number of tokens that are sampled together, block by block from left to right; None: the whole row."""
        return None

    def span(self, request: SampleRequest) -> int | None:
        """Return the number of tokens per row in one evaluation of the network by the sampler.

        This is the length of a row, or the block size in block diffusion, whose earlier blocks are in the KV cache. The
        memory that sampling needs is estimated from this number; None if it is not known before sampling.

        Args:
            request: Number of steps and length.
        """
        return request.length or 1

    def positions(self, request: SampleRequest) -> int | None:
        """Return the largest number of positions of a row that the sampler's network evaluates; None for points.

        Args:
            request: Length of the samples.
        """
        return request.length

    @abstractmethod
    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw samples.

        Args:
            network: The trained network.
            request: Number of rows, length, seed, prompt and conditions. Fields that the family does not support
                are None.

        Raises:
            UserError: A field of ``request`` is invalid for the model.
        """

    def reversible_noise(self) -> ReversibleNoise:
        """Return the forward process as a bijection of texts and bitstreams.

        Raises:
            UserError: The family has none.
        """
        raise UserError(
            f"invert --by kernel: a process of {self.family} has no kernel of tokens or strings, whose noise is a bijection "
            "with a bitstream"
        )

    def texts(self, rows: Tensor, tokenizer: Tokenizer | None) -> list[str]:
        """Convert sampled rows to text for the user.

        Args:
            rows: Sampled rows, [b, ...].
            tokenizer: Tokenizer of the data; None if there is none.

        Raises:
            UserError: Rows are tokens, and there is no tokenizer.
        """
        if tokenizer is None:
            raise UserError("there is no tokenizer: tokens cannot become text")
        return [tokenizer.decode(row) for row in rows.tolist()]

    def drafts(self, rows: Tensor, tokenizer: Tokenizer) -> list[str]:
        """Return rows between two sampler steps as text for the user, masks included.

        Args:
            rows: Rows, int64 [b, l].
            tokenizer: The tokenizer.

        Raises:
            UserError: Rows are not text.
        """
        raise UserError(f"a process of {self.family} has no drafts that are text")

    def draft_tokens(self, tokenizer: Tokenizer) -> Mapping[int, bytes | None]:
        """Return the bytes of each token id of a row between two sampler steps: None for a mask.

        Ids without text, such as padding, are not in the result.

        Args:
            tokenizer: The tokenizer.

        Raises:
            UserError: Rows are not text, or the bytes of a token depend on the tokens beside it.
        """
        raise UserError(f"a process of {self.family} has no drafts that are text")

    @abstractmethod
    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        """Convert samples to the format that is written to a run folder.

        Args:
            samples: Samples returned by :meth:`sample`.
            tokenizer: Tokenizer that decodes rows; None if there is none.
        """

    @abstractmethod
    def conditions(self, changes: Mapping[str, Any]) -> Conditions | None:
        """Return the conditions on samples: those of the blueprint, with some fields changed.

        Args:
            changes: Values of fields of :class:`Conditions`, by field name. ``forbid`` and ``allow`` are added to those
                of the blueprint; other fields replace them.

        Returns:
            The conditions; None if the family supports no conditions.

        Raises:
            UserError: A change is invalid or not supported by the family.
        """

    def prompt(
        self, text: TextWithHoles, tokenizer: Tokenizer, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """Encode an infilling request as a prompt of tokens.

        Args:
            text: The text to fill in.
            tokenizer: Tokenizer of the data.
            length: Number of tokens of the filled-in text if ``text`` determines none: the tokens per row of the
                training data.
            prompts_trained: Whether rows of the training data begin with clean prompts.
            observed: Treatment of the given tokens during sampling, ``clamp`` or ``renoise``; see
                :attr:`Conditions.observed`.

        Raises:
            UserError: The family does not support infilling, or the text cannot be filled in.
        """
        raise UserError(f"infill: a process of {self.family} fills in no text")

    # -- verification -----------------------------------------------------------------------------------------------

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        """Verify that the family supports the ``data`` section of the configuration.

        Args:
            data: The section.

        Yields:
            A pair (dotted configuration key, error message) for each unsupported setting.
        """
        if not isinstance(data, DataConfig):
            yield "data.points", "points are for flows: give an objective of kind likelihood, such as exact_likelihood"

    def check_tokenizer(self, size: int) -> str | None:
        """Return an error message if the model has fewer tokens than a tokenizer of ``size`` tokens; otherwise None."""
        return None

    @classmethod
    def prove(cls, plan: Any, graph: Graph, registry: Registry, proof: Proof) -> list[Check]:
        """Verify the declared process numerically on a small enumerable example, within seconds on a CPU.

        Args:
            plan: The declared process.
            graph: Typed graph of the network.
            registry: The installed components.
            proof: Strength of the verification: ``full``, or ``quick`` with fewer cases in less time.

        Returns:
            One result for each verified property.
        """
        return []

    @classmethod
    def prove_distillation(cls, plan: Any, registry: Registry, objective: Distillation) -> list[Check]:
        """Verify a distillation objective with the process numerically on a small enumerable example.

        Args:
            plan: The declared process.
            registry: The installed components.
            objective: The objective.

        Returns:
            One result for each verified property; none, by default, for a family that cannot be distilled.
        """
        return []

    def check_network(self, network: Network) -> list[Check]:
        """Verify that the outputs of the untrained network have the properties that the process assumes.

        Args:
            network: The network.

        Returns:
            One result for each verified property.
        """
        return []

    def warnings(self) -> list[str]:
        """Return warning messages to show to the user at the end of training."""
        return []
