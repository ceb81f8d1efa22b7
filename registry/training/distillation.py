"""Distillation objectives: coupled-pair consistency, and inverse distillation (IDLM)."""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.distillation import T_MIN, Direction, Distillable, Distillation, Networks, Optimum, Pair
from sedd_graph.errors import UserError

__all__ = ["IDLM", "Consistency"]

_REDRAWS = "rows of a fixed length and an objective that is a sum over positions"


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Draws of a step of :class:`Consistency`.

    Attributes:
        pair: Noisy rows x_s and x_t.
        uniform: Uniform numbers by which the student draws x_s, float64 [b, l]; None where the data do.
    """

    pair: Pair
    uniform: Tensor | None


class Consistency(Distillation, kind="distillation"):
    """Coupled-pair consistency: the student's prediction at x_t against the teacher's at x_s, s < t.

    x_s and x_t are drawn jointly given the clean row, by the process itself. The forward divergence is least at the mean of
    the teacher's predictions over x_s given x_t. For a perfect teacher that is the true posterior, since x_0, x_s and x_t are a
    Markov chain. (Duo, arXiv 2506.10892, has the same divergence for the kernel ``uniform``, with pairs of its own.) The reverse
    divergence seeks modes; it is least at the normalised geometric mean of the teacher's predictions, at tokens that x_s does
    not reveal, and its student is not the distribution of the data but a heuristic for few steps, as SDTT's is (arXiv 2410.21035).
    """

    class Config(ComponentConfig):
        divergence: Direction = "forward"
        """``forward``, KL(teacher || student): least at the true posterior if the teacher is perfect, so that it sharpens
        nothing. ``reverse``, KL(student || teacher): a heuristic that seeks modes."""
        pairs: Literal["data", "student"] = "data"
        """Who draws x_s given x_t: ``data``, by the process given the clean row; ``student``, a step of its own sampler, which is
        a heuristic."""
        rounds: Annotated[int, pydantic.Field(ge=1, le=32)] = 4
        """Number of rounds of equal length. The teacher of the first is the given run; that of each other is the student at the
        end of the round before, averaged as ``train.ema`` declares."""
        steps: Annotated[int, pydantic.Field(ge=1, le=2**20)] = 16
        """Number of sampler steps that the student is made for. The distance t - s is 1 / ``steps`` in the last round, and half
        as large in each round before."""

    config: Config

    @property
    def least_at(self) -> Optimum | None:
        return "posterior" if self.config.divergence == "forward" and self.config.pairs == "data" else None

    def heuristic(self) -> str | None:
        if self.config.divergence == "reverse":
            return (
                "the reverse divergence is least at the geometric mean of the teacher's predictions, which seeks modes"
            )
        if self.config.pairs == "student":
            return "x_s is drawn from the student's step, so that the teacher sees rows that are none of the data's"
        return None

    @property
    def rounds(self) -> int:
        return self.config.rounds

    def describe_round(self, number: int) -> str:
        return f"t - s is {self._gap(number):.3g}"

    def _gap(self, number: int) -> float:
        """Return the distance t - s in a round, counted from 0."""
        return 0.5 ** (self.rounds - 1 - number) / self.config.steps

    def lacks(self, process: Distillable) -> str | None:
        lack = process.lacks()
        return _REDRAWS if lack is None and self.config.pairs == "student" and process.redraws() is None else lack

    def draw(self, process: Distillable, batch: Any, number: int, random: Randomness) -> Coupled:
        t = T_MIN + (1 - T_MIN) * process.times(batch, random)
        s = (t - self._gap(number)).clamp(min=T_MIN / 2)
        return self.at(process, batch, s, t, random)

    def at(self, process: Distillable, batch: Any, s: Tensor, t: Tensor, random: Randomness) -> Coupled:
        pair = process.pair(batch, s, t, random)
        own = self.config.pairs == "student"
        return Coupled(pair, random.rand48(len(batch), batch.width).to(t.device) if own else None)

    def loss(self, process: Distillable, networks: Networks, draw: Coupled, batch: Any) -> Tensor:
        pair = draw.pair
        student = networks.student(pair.upper, batch)
        with torch.no_grad():
            if draw.uniform is not None and (redraws := process.redraws()) is not None:
                pair = redraws.stepped(student, pair, batch, draw.uniform)
            teacher = networks.teacher(pair.lower, batch)
        return process.divergence(student, teacher, pair, batch, self.config.divergence)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Draws of a step of :class:`IDLM`.

    Attributes:
        pair: Noisy rows, of which the student reconstructs those at time t.
        uniform: Uniform numbers by which the student draws clean rows, float64 [b, l].
        seed: Seed of the noise of these rows.
        start: Index of the first row in the global batch.
        total: Number of rows of the global batch; None if it has no others.
    """

    pair: Pair
    uniform: Tensor
    seed: int
    start: int
    total: int | None

    def random(self) -> Randomness:
        """Return the source of the noise of the student's rows."""
        generator = torch.Generator(self.uniform.device).manual_seed(self.seed)
        return Randomness(generator, start=self.start, total=self.total)


class IDLM(Distillation, kind="distillation"):
    """Inverse distillation: L(f*, p) - min_f L(f, p) over the distribution p of the student's rows (arXiv 2602.19066).

    L is the process's own bound, f* the teacher, and p the distribution of clean rows that the student draws at noisy rows x_t
    of the data. The minimum over f is that of a third network, the follower, which is trained on the student's rows. Where L is
    tight, as in continuous time, the difference is KL(p || p*), p* being the distribution that the teacher was trained on: it is
    least at p = p* alone. The gradient for discrete rows is that of the score function (REINFORCE), whose variance
    ``credit: token`` reduces at the price of a bias. ``credit: prediction`` takes, in place of the drawn token, the mean over all
    tokens that the student may draw there, as Di[M]O does for masks (arXiv 2503.15457).
    """

    follows = True

    class Config(ComponentConfig):
        credit: Literal["token", "row", "prediction"] = "token"
        """Which terms of the bound a drawn token answers for: ``row``, all of its row, an unbiased gradient of large variance;
        ``token``, those at its own position, a heuristic that leaves out its effect on others. ``prediction``: as ``token``, but
        all tokens that may be drawn answer, by what teacher and follower predict there."""

    config: Config

    @property
    def least_at(self) -> Optimum | None:
        return "data" if self.config.credit == "row" else None

    def heuristic(self) -> str | None:
        if self.config.credit == "row":
            return None
        return f"with credit: {self.config.credit} a token answers for its own position alone, so that the gradient is biased"

    def lacks(self, process: Distillable) -> str | None:
        return process.lacks() or (_REDRAWS if process.redraws() is None else None)

    def draw(self, process: Distillable, batch: Any, number: int, random: Randomness) -> Generated:
        t = T_MIN + (1 - T_MIN) * process.times(batch, random)
        return self.at(process, batch, t / 2, t, random)

    def at(self, process: Distillable, batch: Any, s: Tensor, t: Tensor, random: Randomness) -> Generated:
        pair = process.pair(batch, s, t, random)
        uniform = random.rand48(len(batch), batch.width).to(t.device)
        generator = random.generator
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        return Generated(pair, uniform, seed, random.start, random.total)

    def loss(self, process: Distillable, networks: Networks, draw: Generated, batch: Any) -> Tensor:
        redraws, upper = process.redraws(), draw.pair.upper
        if redraws is None or networks.follower is None:
            raise UserError(f"idlm needs {_REDRAWS}")
        student = networks.student(upper, batch)
        rows, log_p = redraws.reconstructed(student, upper, batch, draw.uniform)
        noisy = redraws.noised(rows, draw.random())
        follower, teacher = networks.follower(noisy, rows), networks.teacher(noisy, rows)
        nats = redraws.nats(follower, noisy, rows)
        with torch.no_grad():
            excess = redraws.nats(teacher, noisy, rows) - nats
            value = excess.sum(-1)
        if self.config.credit == "prediction":
            trained = redraws.excess(student, upper, teacher, follower, noisy, rows)
        else:
            others = (value.sum() - value) / max(1, len(value) - 1)
            credit = (value - others)[:, None] if self.config.credit == "row" else excess - excess.mean()
            trained = (credit * log_p).sum(-1)
        trained = trained + nats.sum(-1)
        return value + trained - trained.detach()
