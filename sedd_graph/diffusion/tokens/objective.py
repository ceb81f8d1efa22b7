"""The interface of objectives: training losses of rows of tokens. Implementations are components.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.batch import Batch, Draw, Randomness, repeated
from sedd_graph.diffusion.numerics import tiny
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import CONTINUOUS, ONLY_MASKS, Kernel

__all__ = ["FEEDS", "DrawRequest", "Objective", "for_each", "lower_posterior"]


FEEDS = (
    Input("tokens", "int b l", "noisy tokens x_t"),
    Input("sigma", "float b", "total noise at time t"),
    Input("t", "float b", "time, from 0 (clean) to 1 (noise)"),
    Input("attend", "bool b l", "positions that may be attended to; padding may not"),
)
"""Inputs of a graph under an objective that noises all positions of a row to the same level."""


@dataclasses.dataclass(frozen=True)
class DrawRequest:
    """Arguments of :meth:`Objective.draw`: a batch, the noise process, and optionally fixed times or noisy rows.

    Attributes:
        batch: Clean rows.
        kernel: The kernel that noises each token.
        schedule: Total noise as a function of time.
        random: Source of all random numbers of the draw.
        t: Times, [b]; None: drawn at random.
        xt: Noisy rows, int64 [b, l]; None: drawn at random.
    """

    batch: Batch
    kernel: Kernel
    schedule: Schedule
    random: Randomness
    t: Tensor | None = None
    xt: Tensor | None = None

    def noised(self, sigma: Tensor) -> Tensor:
        """Return the noisy rows: ``xt`` if it is set, and otherwise a sample of x_t given x_0 at total noise ``sigma``.

        Args:
            sigma: Total noise, [b].

        Returns:
            int64 [b, l].
        """
        if self.xt is not None:
            return self.xt
        return self.kernel.sample(self.batch.tokens, sigma, random=self.random, corrupt=self.batch.corrupt)


class Objective(Component, ABC):
    """The training loss: an upper bound on -log p(x_0), nats per row."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the network outputs that the loss accepts, the preferred one first."""
    needs_mask: ClassVar[bool] = False
    """True if the objective requires a kernel with :attr:`Kernel.masks_evenly`."""
    trains_noise: ClassVar[bool] = False
    """True if the gradient is unbiased for the kernel's parameters as well.

    The distribution of the noisy rows depends on these parameters, so differentiating the loss of a fixed sample is not
    enough.
    """
    steady: ClassVar[bool] = False
    """True if times are uniform and dsigma/dt enters the loss only as a factor.

    The other factor must depend only on total noise and on the noisy rows at that noise. Learned schedules require this
    property (:func:`sedd_graph.diffusion.tokens.schedule_loss.steadied`).
    """
    discrete: ClassVar[bool] = False
    """True if the objective accepts kernels in discrete time (:attr:`Kernel.steps`)."""
    sums_positions: ClassVar[bool] = False
    """True if :meth:`loss`, and :meth:`reconstruction`, are sums over positions, of terms that depend on the row only by
    its noise level.

    The loss of any row of m positions of a row is then the sum of their terms. Training evaluates the output head and the
    loss of a few positions at a time, and only of those that :meth:`read_positions` returns. Numerical verification
    compares the sum with the loss of whole rows. A loss of several noisy rows for each clean row is evaluated whole.
    """
    slack: ClassVar[float] = 0.01
    """Largest excess of the bound over the entropy of the data, as a fraction of the entropy, with a perfect network.

    The proof verifies it, and shows a slack above 0.01.
    """
    over: ClassVar[str] = "time"
    """Meaning of :attr:`Draw.t`: ``time``, or ``masked`` for the fraction of masked tokens."""
    feeds: ClassVar[tuple[Input, ...]] = FEEDS
    """Inputs of the graph that :meth:`inputs` returns."""

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        """Return the Config for rows of a few positions that numerical verification uses in place of ``config``.

        By default ``config`` itself.
        """
        return config

    @property
    def block(self) -> int | None:
        """Number of positions per block, for an objective of block diffusion; None for other objectives.

        Each block is noised given the clean blocks before it. With blocks, the inputs of the graph are those of
        :func:`sedd_graph.diffusion.tokens.block_diffusion.block_inputs`, and samples are generated block by block.
        """
        return None

    @property
    def raw_first(self) -> bool:
        """True if the model of the step that ends at clean text is the prediction ``log_x0`` itself.

        Only read if :attr:`measure` is ``steps``. By default it is the posterior, as in the other steps.
        """
        return False

    @property
    def measure(self) -> Literal["time", "masked", "steps"]:
        """Form of the bound that the mean loss estimates: ``time``, ``masked`` or ``steps``.

        It determines the loss of a single draw, which numerical verification compares with :meth:`loss`:

        - ``time``, an integral over time: ``draw.weight * draw.dsigma`` times the kernel's :meth:`Kernel.score_entropy`
          or :meth:`Kernel.nelbo`.
        - ``masked``, a mean over the number k of masked tokens, uniform from 1 to the number L of tokens that may be
          corrupted: L / k times the cross-entropy of the clean tokens at the masks.
        - ``steps``, a sum over the steps of a process in discrete time: ``draw.weight`` times the KL divergence of two
          distributions of the state after the reverse step, at total noise :meth:`below`: from the one given the clean
          token to the one that the network predicts.

        The terms are summed over the positions that count. :meth:`loss` may add a cost of each clean token that depends
        on that token alone. The default follows :attr:`over`.
        """
        return "masked" if self.over == "masked" else "time"

    def below(self, draw: Draw, kernel: Kernel, schedule: Schedule) -> Tensor:
        """Return total noise one discrete time step before that of the draw, so after its reverse step, [b].

        Required if :attr:`measure` is ``steps``, and otherwise unused.
        """
        raise NotImplementedError(f"{type(self).__name__} declares the measure 'steps' and must define 'below'")

    def off_optimum(self, draw: Draw, kernel: Kernel, schedule: Schedule) -> str | None:
        """Return why the loss of ``draw`` is not least at the true posterior; None if it is, as it is by default.

        The reason is a main clause. The optimum of such a loss is not verified.

        Args:
            draw: Noisy rows of one time.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.
        """
        return None

    def reads_mask(self, kernel: Kernel) -> bool:
        """Return True if ``log_x0`` may be a prediction over all states, the mask among them (D3PM's logits).

        It may then also differ from the token where that is visible and therefore clean. By default False.
        """
        return False

    def differs(self) -> str | None:
        """Return why the training loss differs from :meth:`bound` in value; None if they are equal.

        A loss that differs is only required to be least at the true posterior; its values are not verified.
        """
        return None

    def lacks(self, kernel: Kernel) -> str | None:
        """Return a description of the kind of kernel that the objective requires; None if ``kernel`` is suitable."""
        if kernel.steps is not None and not self.discrete:
            return CONTINUOUS
        if kernel.learned and not self.trains_noise:
            return "a kernel without trained parameters (genmd4 trains those of a kernel)"
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def of_positions(self) -> Objective:
        """Return the objective whose :meth:`loss` is evaluated on rows of a few positions, if :attr:`sums_positions`.

        By default the objective itself. An objective of block diffusion returns that of a block: the rows have positions of
        one block, and one noise level each.
        """
        return self

    def read_positions(self, draw: Draw, batch: Batch, kernel: Kernel) -> Tensor:
        """Return the positions whose terms depend on the network or are not 0, if :attr:`sums_positions`.

        By default they are the positions that count (``loss & corrupt``); of these, under a kernel with carry-over unmasking
        (:attr:`Kernel.carries_over`), the masked ones, since no rate of the forward process leads to a visible token.

        Args:
            draw: One noisy row for each clean row.
            batch: The clean rows.
            kernel: The kernel that noises each token.

        Returns:
            bool [b, l].
        """
        counts = batch.loss & batch.corrupt
        return counts & (draw.xt == kernel.mask) if kernel.carries_over else counts

    def inputs(self, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """Return the inputs of the graph by name.

        Args:
            draw: Noisy rows with their times and noise levels.
            batch: The clean rows that ``draw`` was sampled from.
        """
        return {"tokens": draw.xt, "sigma": draw.sigma, "t": draw.t, "attend": for_each(draw, batch.attend)}

    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        """Draw times and noisy rows for a batch: calls :meth:`draw` with a :class:`DrawRequest` of these arguments.

        Args:
            batch: Clean rows.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.
            random: Source of all random numbers of the draw.
            t: Times, [b]; None: drawn at random.
            xt: Noisy rows, int64 [b, l]; None: drawn at random.
        """
        return self.draw(DrawRequest(batch, kernel, schedule, random, t, xt))

    @abstractmethod
    def draw(self, request: DrawRequest) -> Draw:
        """Draw times and noisy rows. All random numbers of the loss are drawn here; :meth:`loss` is deterministic.

        Args:
            request: The batch, the noise process, and optionally fixed times or noisy rows.
        """

    @abstractmethod
    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Return the loss of each clean row; its mean over draws is the bound on -log p(x_0).

        The method is pure tensor code, for ``torch.compile``.

        Args:
            outputs: The network's outputs for ``draw`` by name, converted by :meth:`Kernel.translate`.
            draw: The result of :meth:`draw`.
            batch: The clean rows.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.

        Returns:
            Nats, float32 [b], also if ``draw`` has several noisy rows for each clean row.
        """

    def bound(self) -> Objective:
        """Return the objective without loss terms that are not part of the bound; by default the objective itself."""
        return self

    def evaluated(self, kernel: Kernel) -> Objective:
        """Return the objective used for evaluation: :meth:`bound`, or the same bound estimated with less variance.

        Args:
            kernel: The kernel, on which the choice may depend.
        """
        return self.bound()

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        """Draw times and noisy rows for an evaluation of the bound.

        Args:
            batch: Clean rows.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.
            random: Source of all random numbers of the draw.

        Returns:
            The objective that :meth:`evaluated` returns, and the draw to pass to its :meth:`loss`.
        """
        objective = self.evaluated(kernel)
        return objective, objective.corrupt(batch, kernel, schedule, random=random)

    def reconstruction_draw(self, request: DrawRequest) -> Draw | None:
        """Draw noisy rows at the lowest noise that :meth:`loss` counts, to evaluate :meth:`reconstruction`.

        Args:
            request: The batch, the noise process, and the random numbers.

        Returns:
            The draw; None if :meth:`loss` counts all noise, as it does by default.
        """
        return None

    def reconstruction(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        """Return -log p(x_0 | x_t) of each row at the lowest noise: the part of the bound that :meth:`loss` leaves out.

        Evaluation adds it to the mean of :meth:`loss`, which without it could be less than -log p(x_0).

        Args:
            outputs: The network's outputs for ``draw`` by name, converted by :meth:`Kernel.translate`.
            draw: The result of :meth:`reconstruction_draw`.
            batch: The clean rows.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.

        Returns:
            Nats, float32 [b].
        """
        return torch.zeros(len(batch), device=draw.xt.device)


def lower_posterior(outputs: Mapping[str, Tensor], draw: Draw, kernel: Kernel, below: Tensor) -> Tensor:
    """Return the model's distribution of the state of each token at a lower noise level, given the noisy row.

    Args:
        outputs: ``log_x0`` or ``log_score`` by name, [b, l, n].
        draw: The noisy rows that the outputs belong to.
        kernel: The kernel that noises each token.
        below: The lower total noise, [b]; 0 for the clean token.

    Returns:
        Probabilities, float32 [b, l, n].
    """
    if "log_x0" in outputs:
        return kernel.posterior(outputs["log_x0"].float().exp(), draw.xt, draw.sigma, below)
    score = outputs["log_score"].float().exp()
    # scores that belong to no distribution give negative probabilities
    probs = kernel.analytic(score, draw.xt, draw.sigma, below).clamp(min=0)
    return probs / probs.sum(-1, keepdim=True).clamp(min=tiny(probs))


def for_each(draw: Draw, rows: Tensor) -> Tensor:
    """Repeat per-row values of a batch for a draw with several noisy rows per clean row.

    The batch is repeated as a whole (like ``Tensor.repeat``, not ``repeat_interleave``).

    Args:
        draw: A draw with c * b noisy rows.
        rows: Values of the b clean rows, [b, ...].

    Returns:
        [c * b, ...].
    """
    copies = len(draw.xt) // len(rows)
    return repeated(rows, copies)
