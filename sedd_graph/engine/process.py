"""The interface of a process: how rows are noised, trained on, bounded and sampled. Each family implements it once.

An engine composes a network and a process (:mod:`sedd_graph.engine.engine`); nothing subclasses the engine. The
implementations are in :mod:`sedd_graph.families`.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.guidance import Classifier
from sedd_graph.engine.network import Network
from sedd_graph.engine.regions import Model
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Graph

__all__ = [
    "KERNEL",
    "SCHEDULE",
    "OnDraw",
    "Process",
    "Prompt",
    "SampleRequest",
    "Samples",
    "Setup",
    "Stored",
    "TextWithHoles",
]


KERNEL, SCHEDULE = "process:kernel", "process:schedule"
"""Names of a learned kernel and a learned schedule among the modules of a model. No node can have them."""


OnDraw = Callable[[str, Tensor | None, Tensor], None]
"""Observer of the noise draws of a bound, called as ``on_draw(over, t, nats)``: float [b] each. ``over`` names the quantity that
``t`` is, such as ``time``; ``t`` is None where one row has several noise levels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The graph, components, device and tokens that a process is constructed with.

    Attributes:
        registry: The installed components.
        graph: The graph of the network.
        device: Device of the process's components.
        forbidden: Ids of tokens that are never generated.
        pieces: Returns the bytes of each token (None for a token without text); None where there is no tokenizer.
    """

    registry: Registry
    graph: Graph
    device: torch.device
    forbidden: Sequence[int] = ()
    pieces: Callable[[], Sequence[bytes | None]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One request for samples. A family refuses the fields that it does not support (:attr:`Process.refuses`).

    Attributes:
        batch: Number of rows.
        length: Tokens per row, or the most tokens per row where the model chooses lengths.
        steps: Sampler steps; None takes the number in the blueprint.
        seed: The same seed draws the same rows on the same device; None draws one from torch's global generator.
        prompt: int64 [b, l] or [1, l], tokens to keep, and -1 at the positions that the model fills in.
        attend: bool [b, l], False at padding.
        conditions: Replace the conditions of the blueprint's ``sample`` section.
        allowed: bool [n], [l, n] or [b, l, n], tokens that may be drawn.
        classifier: Replaces the classifier of the blueprint, which guides samples towards a label.
        on_step: Called as ``on_step(number, rows)`` with the initial rows (number 0) and after each step.
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
    on_step: Callable[[int, Tensor], None] | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a generator on ``device``, seeded by this request."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed(mix_seed(seed))


class Samples(NamedTuple):
    """Samples on the CPU.

    Attributes:
        rows: [b, ...], int64 tokens or float32 numbers.
        facts: How they were drawn, as JSON values.
        nats: -log p of each row, float64 [b], where it is known exactly.
    """

    rows: Tensor
    facts: Mapping[str, Any]
    nats: Tensor | None = None


class Stored(NamedTuple):
    """Samples as a run folder stores them: arrays [row, ...] by name, and one text per row (None where rows are not text)."""

    arrays: Mapping[str, npt.NDArray[Any]]
    text: Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextWithHoles:
    """Text to fill in: either ``text`` with marked holes, or a ``prefix``, a ``suffix`` or both around one hole.

    ``length`` is the number of tokens of the whole (the most, where the model chooses lengths); None takes a default.
    """

    text: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    length: int | None = None

    def check(self, example: str) -> None:
        """Raise :class:`UserError`, which shows ``example``, unless there is either a text, or a prefix or suffix."""
        if self.text is not None and (self.prefix is not None or self.suffix is not None):
            raise UserError("infill: give --text, or --prefix and --suffix, not both")
        if self.text is None and self.prefix is None and self.suffix is None:
            raise UserError(f"infill: give --text '{example}', or --prefix or --suffix")


class Prompt(NamedTuple):
    """A prompt as tokens.

    Attributes:
        tokens: int64 [1, l], with -1 where the model fills in.
        length: The ``length`` of the :class:`SampleRequest`.
        exact: True where samples follow the model's distribution given the prompt, False where they only approximate it.
        how: The reason for ``exact``, as text for the user.
    """

    tokens: Tensor
    length: int
    exact: bool
    how: str


class Process(ABC):
    """A family of processes: what a network is trained on and generates.

    Args:
        plan: The declared process (:mod:`sedd_graph.families.plan`).
        setup: The graph, the installed components, the device and the tokens.

    Raises:
        BlueprintError: The components of the plan do not work together.
    """

    family: ClassVar[str]
    """Name of the family, a key of :data:`sedd_graph.families.table.FAMILIES`."""
    batch_type: ClassVar[Callable[..., Any]]
    """Class of a batch of clean rows; its arguments are the fields of the data's rows, in order.

    A batch has ``len(batch)`` rows, ``width`` (tokens, or numbers, per row), ``counted`` (how many of them the loss is summed over,
    int64 [b]) and ``to(device)``."""
    trains: ClassVar[bool] = True
    """False for a family that can be neither trained nor sampled."""
    compiles: ClassVar[bool] = True
    """False where the network runs layer by layer, so that it is never compiled."""
    text: ClassVar[bool] = True
    """True where rows are text, which a tokenizer decodes."""
    exact: ClassVar[bool] = False
    """True where :meth:`bound_rows` returns -log p itself, per number of a row, and not an upper bound."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Fields of :class:`SampleRequest` that the family does not support, each with the reason."""

    def __init__(self, plan: Any, setup: Setup) -> None:
        self.plan = plan

    def describe(self) -> str:
        """Return one line for the user, such as the names of the components."""
        return str(self.plan.describe())

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        """Return the components with trained parameters by name; they are saved with those of the network."""
        return {}

    @abstractmethod
    def batch(self, rows: Any, device: torch.device) -> Any:
        """Return ``rows``, a tensor or a batch, as a batch on ``device``. Raises :class:`UserError` if they do not fit."""

    @abstractmethod
    def draw(self, batch: Any, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Any:
        """Draw the noise of one training step.

        Args:
            batch: The clean rows.
            random: Source of the random numbers.
            t: float32 [b], times in [0, 1]; drawn if None.
            xt: int64 [b, l], the noised rows; drawn if None.

        Raises:
            UserError: The family has no ``t`` or ``xt`` to fix.
        """

    @abstractmethod
    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of one draw.

        Args:
            model: The network's module.
            draw: As :meth:`draw` returns it.
            batch: The clean rows.
            key: int32 [b], the dropout key of each row; None turns dropout off.

        Returns:
            The loss in nats per row, float32 [b], and the saved activations by name.
        """

    @abstractmethod
    def bound_rows(
        self, network: Network, batch: Any, *, seeds: Sequence[int], on_draw: OnDraw | None = None
    ) -> Tensor:
        """Bound -log p of each row from above.

        Args:
            network: The network, in evaluation mode.
            batch: The clean rows.
            seeds: The bound is a mean over one noise draw per seed.
            on_draw: Observes each draw.

        Returns:
            Nats per row, float64 [b] on the CPU.
        """

    @property
    def caveat(self) -> str | None:
        """The reason why the bound is not comparable with those of other models; None where it is."""
        return None

    def noised(self, over: str, t: Tensor) -> Tensor:
        """Return the share of tokens that noise has changed at ``t``, a value of the quantity named ``over``; float64 as ``t``."""
        return t

    def example(self, rows: int, length: int) -> Tensor:
        """Return valid clean rows, such as int64 [rows, length], for one step that compiles or measures the network."""
        return torch.zeros(rows, length, dtype=torch.int64)

    # -- sampling ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """The default number of sampler steps; None for a sampler without a fixed number of steps."""
        return None

    def evaluations(self, request: SampleRequest) -> int | None:
        """Return the number of steps that ``request`` takes, noise removal included; None where the rows decide it."""
        steps = request.steps or self.steps
        return steps and steps + 1

    @abstractmethod
    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw samples. Raises :class:`UserError` where the request cannot be met."""

    def texts(self, rows: Tensor, tokenizer: Tokenizer | None) -> list[str]:
        """Return sampled rows [b, ...] as text for the user. Raises :class:`UserError` without the tokenizer that it takes."""
        if tokenizer is None:
            raise UserError("there is no tokenizer: tokens cannot become text")
        return [tokenizer.decode(row) for row in rows.tolist()]

    @abstractmethod
    def stored(self, samples: Samples, tokenizer: Tokenizer | None) -> Stored:
        """Return samples as the arrays and texts that are written to ``samples.zarr``."""

    @abstractmethod
    def conditions(self, changes: Mapping[str, Any]) -> Conditions | None:
        """Return the blueprint's conditions on samples with ``changes``, by the name of the field.

        Returns:
            None where the family supports no conditions, and there are no changes.

        Raises:
            UserError: A change is invalid or not supported.
        """

    def prompt(
        self, text: TextWithHoles, tokenizer: Tokenizer, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """Encode text with holes as a prompt.

        Args:
            text: The text to fill in.
            tokenizer: Encodes it.
            length: Tokens per row of the training data, which a text without a length of its own gets.
            prompts_trained: True if rows of the training data begin with clean prompts.
            observed: How the given text is held; see :class:`Conditions`.

        Raises:
            UserError: The text cannot be filled in.
        """
        raise UserError(f"infill: a process of {self.family} fills in no text")

    # -- verification -----------------------------------------------------------------------------------------------

    def check_data(self, data: DataConfig | PointsConfig) -> Iterator[tuple[str, str]]:
        """Yield the key and a message for each setting of the ``data`` section that does not fit the process."""
        if not isinstance(data, DataConfig):
            yield "data.points", "points are for flows: give an objective of kind likelihood, such as exact_likelihood"

    def check_tokenizer(self, size: int) -> str | None:
        """Return the reason why a tokenizer of ``size`` tokens does not fit; None where it does."""
        return None

    @classmethod
    def prove(cls, plan: Any, graph: Graph, registry: Registry) -> list[Check]:
        """Verify the process that ``plan`` declares on a small enumerable toy, within seconds on a CPU."""
        return []

    def check_network(self, network: Network) -> list[Check]:
        """Verify that the outputs of the untrained network have the properties that the process assumes."""
        return []

    def warnings(self) -> list[str]:
        """Return messages for the user at the end of training."""
        return []
