"""The interface of a process: what is generated, how it is noised, bounded and sampled. One implementation for each family.

An engine composes a network and a process (:mod:`sedd_graph.engine.engine`); nothing subclasses it. The implementations are in
:mod:`sedd_graph.families`. Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
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
    "Batch",
    "DataFacts",
    "GraphOnly",
    "OnDraw",
    "Process",
    "Prompt",
    "SampleRequest",
    "Samples",
    "Stored",
    "Text",
    "TextWithHoles",
]


KERNEL, SCHEDULE = "process:kernel", "process:schedule"
"""Names of a kernel and of a schedule with parameters among the modules of a model; no node can have them."""


class Batch(Protocol):
    """Clean rows on a device: what every family's batch can do."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """Tokens, or numbers, of a row."""

    @property
    def counted(self) -> Tensor:
        """int64 [b]: how many of them the loss is over."""

    def to(self, device: torch.device | str) -> Any: ...


class Text(Protocol):
    """The part of a tokenizer that processes call."""

    @property
    def size(self) -> int: ...

    @property
    def pad(self) -> int | None: ...

    @property
    def end(self) -> int | None: ...

    @property
    def forbidden(self) -> Sequence[int]: ...

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Sequence[int]) -> str: ...


OnDraw = Callable[[str, Tensor | None, Tensor], None]
"""``on_draw(over, t [b], nats [b])``: called with every noise draw of a bound. ``over`` names what ``t`` is; None: rows have no one
noise level."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One request for samples. A family refuses the fields that it has no use for.

    Attributes:
        batch: rows to draw.
        length: tokens of a row, or at most as many where the model chooses lengths.
        steps: sampler steps; by default those of the blueprint.
        seed: the same seed gives the same rows on the same device; by default drawn from torch's global generator.
        prompt: int64 [b, l] or [1, l]: tokens that stay, and -1 where the model fills in.
        attend: bool [b, l], false at padding.
        conditions: conditions on the text, in place of those of the blueprint's ``sample``.
        allowed: bool [n], [l, n] or [b, l, n]: tokens that may be drawn.
        classifier: guides samples towards a label, in place of the blueprint's.
        on_step: called with the number of each step and the rows after it.
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
        """Return the generator that all draws come from."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed(mix_seed(seed))


class Samples(NamedTuple):
    """Samples on the CPU: ``rows`` [b, ...], and ``facts`` about how they were drawn, as JSON values."""

    rows: Tensor
    facts: Mapping[str, Any]
    nats: Tensor | None = None
    """-log p of each row, float64 [b], where it is exact."""


class Stored(NamedTuple):
    """Samples as arrays [row, ...] by name, and as ``text`` where they are text."""

    arrays: Mapping[str, npt.NDArray[Any]]
    text: Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextWithHoles:
    """Text to fill in: ``text`` with holes in it, or a ``prefix`` and a ``suffix`` around what the model writes, in ``length`` tokens."""

    text: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    length: int | None = None

    def check(self, example: str) -> None:
        """Raises :class:`UserError` unless there is either a text, or a prefix or suffix."""
        if self.text is not None and (self.prefix is not None or self.suffix is not None):
            raise UserError("infill: give --text, or --prefix and --suffix, not both")
        if self.text is None and self.prefix is None and self.suffix is None:
            raise UserError(f"infill: give --text '{example}', or --prefix or --suffix")


class Prompt(NamedTuple):
    """A prompt as tokens, the ``length`` to ask for, and whether samples have the model's law given the prompt (``exact``), with the
    reason in words."""

    tokens: Tensor
    length: int
    exact: bool
    how: str


class DataFacts(NamedTuple):
    """The part of a blueprint's ``data`` section that a process must agree with.

    Attributes:
        length: tokens of a row.
        tokens: size of the tokenizer, where its Config tells it.
        stream: rows are cut from one stream, so that all have the same length.
        prompts: rows begin with clean prompts.
        points: rows are points, not tokens.
    """

    length: int
    tokens: int | None
    stream: bool
    prompts: bool
    points: bool


class Process(ABC):
    """What a network is trained on and generates. Made once per engine, with its components on the engine's device."""

    family: ClassVar[str]
    batch_type: ClassVar[Callable[..., Any]]
    """Class of a batch: made of the arrays of the data's rows, in order."""
    compiles: ClassVar[bool] = True
    """Whether training may be compiled."""
    trains: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {}
    """Fields of :class:`SampleRequest` that the family has no use for, each with the reason."""

    @classmethod
    def make(
        cls,
        plan: Any,
        registry: Registry,
        *,
        graph: Graph,
        device: torch.device,
        forbidden: Sequence[int] = (),
        pieces: Callable[[], Sequence[bytes | None]] | None = None,
    ) -> Process:
        """Make the process that ``plan`` declares. Raises :class:`sedd_graph.errors.BlueprintError` where its components do not go
        together."""
        return cls()

    # -- training and evaluation ------------------------------------------------------------------------------------

    def learned(self) -> Mapping[str, nn.Module]:
        """Components with parameters of their own, which are trained and saved with the network's, by name."""
        return {}

    @abstractmethod
    def batch(self, rows: Any, device: torch.device) -> Any:
        """Check rows (a tensor or a batch) and put them on ``device``. Raises :class:`UserError`."""

    @abstractmethod
    def draw(self, batch: Any, *, random: Randomness, t: Tensor | None = None, xt: Tensor | None = None) -> Any:
        """Draw the noise of one training step; ``t`` [b] and ``xt`` [b, l] fix it."""

    @abstractmethod
    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss, nats [b], and the saved activations. ``key`` int32 [b] turns dropout on."""

    @abstractmethod
    def bound_rows(
        self, network: Network, batch: Any, *, seeds: Sequence[int], on_draw: OnDraw | None = None
    ) -> Tensor:
        """Return an upper bound on -log p of each row, nats, float64 [b] on the CPU: a mean over one draw for each seed."""

    @property
    def caveat(self) -> str | None:
        """Why the bound is not comparable with those of other models; None where it is."""
        return None

    def noised(self, over: str, t: Tensor) -> Tensor:
        """The share of tokens that noise has changed at ``t``, which is counted in ``over``."""
        return t

    def example(self, rows: int, length: int) -> Tensor:
        """Rows of the right shape for a trial step."""
        return torch.zeros(rows, length, dtype=torch.int64)

    # -- sampling ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Default number of sampler steps; None for a sampler that takes no number of steps."""
        return None

    def evaluations(self, request: SampleRequest) -> int | None:
        """Steps that a request takes, noise removal included; None where the rows decide."""
        steps = request.steps or self.steps
        return steps and steps + 1

    @abstractmethod
    def sample(self, network: Network, request: SampleRequest) -> Samples:
        """Draw samples. Raises :class:`UserError` where the request cannot be met."""

    def texts(self, rows: Tensor, tokenizer: Text | None) -> list[str]:
        """Samples as text for a reader."""
        if tokenizer is None:
            raise UserError("there is no tokenizer: tokens cannot become text")
        return [tokenizer.decode(row) for row in rows.tolist()]

    @abstractmethod
    def stored(self, samples: Samples, tokenizer: Text | None) -> Stored:
        """Samples as they are stored in a run folder."""

    @abstractmethod
    def conditions(self, changes: Mapping[str, Any]) -> Conditions | None:
        """Conditions of the blueprint with ``changes``. Raises :class:`UserError` where the family takes none."""

    def prompt(
        self, text: TextWithHoles, tokenizer: Text, *, length: int, prompts_trained: bool, observed: str
    ) -> Prompt:
        """Read text with holes as a prompt.

        Args:
            length: of a row of the training data.
            prompts_trained: rows of the training data begin with clean prompts.
            observed: see :class:`Conditions`.

        Raises:
            UserError: where it cannot be filled in.
        """
        raise UserError(f"infill: a process of {self.family} fills in no text")

    # -- verification -----------------------------------------------------------------------------------------------

    def check_data(self, data: DataFacts) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for everything in which the data does not fit the process."""
        if data.points:
            yield "data.points", "points are for flows: give an objective of kind likelihood, such as exact_likelihood"

    def check_tokenizer(self, size: int) -> str | None:
        """Why a tokenizer of ``size`` tokens does not fit; None where it does."""
        return None

    @classmethod
    def prove(cls, plan: Any, graph: Graph, registry: Registry) -> list[Check]:
        """Verify the process that ``plan`` declares on an enumerable toy of its own. Takes a few seconds on a CPU."""
        return []

    def check_network(self, network: Network) -> list[Check]:
        """Verify that the network's outputs, as it stands, are what the process takes them for."""
        return []

    def warnings(self) -> list[str]:
        """What a user should know after training."""
        return []

    def describe(self) -> str:
        """One line for a reader, such as the kernel's name."""
        return self.family


class GraphOnly(Process):
    """A blueprint that is a graph without a process: it can be built and run, not trained or sampled."""

    family = "graph"
    trains = False

    def _missing(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "this blueprint is a graph without a process: add process, objective and sample to train or sample"
        )

    batch = draw = loss = bound_rows = sample = stored = conditions = prompt = _missing
