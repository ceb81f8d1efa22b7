"""Coupled draws and divergences of processes on token rows, for distillation (:mod:`sedd_graph.diffusion.distillation`).

Both need nothing of a kernel but its posterior q(x_s | x_t, x_0), which every kernel has. They are computed in groups of
positions of one row, or of one block, which have one noise level (:mod:`sedd_graph.diffusion.tokens.groups`).

Axes: b batch, l length, k blocks of a row, w positions of a block, g groups, m positions of a group, n states.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.categorical import pick
from sedd_graph.diffusion.distillation import LEAST, T_MIN, UNLIKELY, Direction, Distillable, Outputs, Pair, Redraws
from sedd_graph.diffusion.numerics import full_precision, take, tiny
from sedd_graph.diffusion.tokens.groups import LARGEST, Groups, group, rows_of
from sedd_graph.diffusion.tokens.kernel import CONTINUOUS, Kernel
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.stage import Stage
from sedd_graph.engine.regions import Model
from sedd_graph.engine.split import Split, begin, split
from sedd_graph.engine.tail import Reading, Tail
from sedd_graph.families.token_divergence import Compared, Divergence, Evaluated, predicted
from sedd_graph.graph.model import Graph

__all__ = ["TokenDistillable", "lower_states"]

_CELLS, _CELLS_ON_GPU = 2**19, 2**24
"""Largest number of probabilities held at a time while states are drawn; what fits into a CPU's cache is five times as fast."""


def lower_states(
    kernel: Kernel, clean: Tensor, xt: Tensor, sigma: Tensor, sigma_next: Tensor, uniform: Tensor
) -> Tensor:
    """Draw x_s given x_t and the clean tokens, so that x_0, x_s and x_t are a Markov chain.

    Args:
        kernel: The kernel.
        clean: Clean tokens, int64 [g, m].
        xt: Noisy tokens, int64 [g, m].
        sigma: Total noise of x_t, [g].
        sigma_next: Total noise of x_s, [g].
        uniform: Uniform numbers, float64 [g, m].

    Returns:
        int64 [g, m].
    """
    cells = _CELLS_ON_GPU if xt.device.type == "cuda" else _CELLS
    found, size = torch.empty_like(xt), max(1, cells // (kernel.states * xt.shape[1]))
    for start in range(0, len(xt), size):
        part = slice(start, start + size)
        known = torch.zeros(*clean[part].shape, kernel.states, device=xt.device).scatter(-1, clean[part, :, None], 1.0)
        weights = kernel.posterior(known, xt[part], sigma[part], sigma_next[part]).clamp(min=0)
        found[part] = pick(weights.flatten(0, 1), uniform[part].flatten())[0].view_as(found[part])
    return found


class TokenDistillable(Distillable, Redraws):
    """Coupled draws and divergences of a process on token rows.

    Args:
        parts: Kernel, schedule, objective and sampler.
        output: What the network's output is translated to, ``log_score`` or ``log_x0``.
        graph: Typed graph of the network; None: outputs are given by name, and :meth:`run` evaluates whole networks.
    """

    def __init__(self, parts: TokenParts, output: str, graph: Graph | None = None) -> None:
        self.output, self._graph = output, graph
        self.kernel, self.schedule, self.objective = parts.kernel, parts.schedule, parts.objective
        self._divergences = {direction: Divergence(self.kernel, direction) for direction in get_args(Direction)}
        self._splits: dict[Model, Split | None] = {}
        self._tails: dict[tuple[Model, Direction], Tail] = {}

    def lacks(self) -> str | None:
        if self.kernel.steps is not None:
            return CONTINUOUS
        if self.kernel.learned or self.schedule.learned:
            return "a kernel and a schedule without trained parameters"
        return None

    # -- draws ------------------------------------------------------------------------------------------------------

    def _blocks(self, batch: Batch) -> int:
        return 1 if self.objective.block is None else batch.width // self.objective.block

    def _random(self, batch: Batch, random: Randomness) -> Randomness:
        """Return the source of random numbers of the blocks of a batch, as rows."""
        k = self._blocks(batch)
        return Randomness(random.generator, start=random.start * k, total=random.total and random.total * k)

    def _groups(self, read: Tensor, batch: Batch) -> Groups:
        """Return the positions ``read``, bool [b, l], in groups, those alone that are in use."""
        found, used = group(read, self._blocks(batch), LARGEST)
        return found.part(0, int(used))

    def times(self, batch: Batch, random: Randomness) -> Tensor:
        rows, k = len(batch), self._blocks(batch)
        found = self._random(batch, random).low_discrepancy(rows * k).to(batch.tokens.device)
        return found if self.objective.block is None else found.view(rows, k)

    def _draw(self, xt: Tensor, t: Tensor) -> Draw:
        sigma = self.schedule.sigma(t.flatten()).detach().view(t.shape)
        return Draw(xt, t, sigma, torch.ones_like(t), torch.ones_like(t))

    def pair(self, batch: Batch, s: Tensor, t: Tensor, random: Randomness) -> Pair:
        lower, upper = self._draw(batch.tokens, s), self._draw(batch.tokens, t)
        k, device = self._blocks(batch), batch.tokens.device
        tokens, corrupt = (x.reshape(len(batch) * k, -1) for x in (batch.tokens, batch.corrupt))
        xt = self.kernel.sample(tokens, upper.sigma.flatten(), random=self._random(batch, random), corrupt=corrupt)
        upper = dataclasses.replace(upper, xt=xt.view_as(batch.tokens))
        uniform = random.rand48(*batch.tokens.shape).to(device)
        moved = batch.corrupt & (upper.xt != batch.tokens) if self.kernel.carries_over else batch.corrupt
        at = self._groups(moved, batch)
        row, place = at.row[:, None], at.place
        states = lower_states(
            self.kernel,
            batch.tokens[row, place],
            upper.xt[row, place],
            upper.sigma.flatten()[at.unit],
            lower.sigma.flatten()[at.unit],
            uniform[row, place],
        )
        return Pair(dataclasses.replace(lower, xt=_put(upper.xt, at, states)), upper)

    def stepped(self, outputs: Outputs, pair: Pair, batch: Batch, uniform: Tensor) -> Pair:
        at = self._groups(self.objective.read_positions(pair.upper, batch, self.kernel), batch)
        with full_precision(pair.upper.xt):
            weights = self._below(outputs, pair.upper, at, pair.lower.sigma.flatten()[at.unit])
        states = pick(weights.flatten(0, 1), uniform[at.row[:, None], at.place].flatten())[0].view_as(at.place)
        return dataclasses.replace(pair, lower=dataclasses.replace(pair.lower, xt=_put(pair.upper.xt, at, states)))

    def redraws(self) -> Redraws | None:
        return self if self.objective.sums_positions else None

    def reconstructed(self, outputs: Outputs, draw: Draw, batch: Batch, uniform: Tensor) -> tuple[Batch, Tensor]:
        at = self._groups(self.objective.read_positions(draw, batch, self.kernel), batch)
        with full_precision(draw.xt):
            law = self._data(self._below(outputs, draw, at, torch.zeros_like(draw.sigma.flatten()[at.unit])))
            flat = law.flatten(0, 1)
            drawn = pick(flat.detach(), uniform[at.row[:, None], at.place].flatten())[0]
            log_p = (take(flat, drawn).clamp(min=LEAST).log() - flat.sum(-1).clamp(min=LEAST).log()).view_as(at.place)
        place = (at.row[:, None] * batch.width + at.place)[at.valid]
        logs = torch.zeros(batch.tokens.numel(), device=law.device).index_put((place,), log_p[at.valid])
        tokens = _put(batch.tokens, at, drawn.view_as(at.place))
        return dataclasses.replace(batch, tokens=tokens), logs.view(batch.tokens.shape)

    def noised(self, batch: Batch, random: Randomness) -> Draw:
        return self.objective.corrupt(batch, self.kernel, self.schedule, random=random)

    def nats(self, outputs: Outputs, draw: Draw, batch: Batch) -> Tensor:
        read = self.objective.read_positions(draw, batch, self.kernel)
        found, used = group(read, self._blocks(batch), 1)
        at = found.part(0, int(used))
        short, rows = rows_of(draw, batch, at)
        with full_precision(draw.xt):
            there = {name: value.float() for name, value in _evaluated(outputs).stage.at(at).items()}
            there = dict(self.kernel.translate(there, short.xt, short.sigma))
            each = self.objective.of_positions().loss(there, short, rows, self.kernel, self.schedule)
        place = at.row * batch.width + at.place[:, 0]
        return torch.zeros(batch.tokens.numel(), device=each.device).index_put((place,), each).view(batch.tokens.shape)

    def excess(
        self, student: Outputs, draw: Draw, teacher: Outputs, follower: Outputs, noisy: Draw, batch: Batch
    ) -> Tensor:
        read = [self.objective.read_positions(x, batch, self.kernel) for x in (draw, noisy)]
        at = self._groups(read[0] & read[1], batch)
        sigma = noisy.sigma.flatten()[at.unit]
        zero = torch.zeros_like(sigma)
        with full_precision(draw.xt):
            q = self._data(self._below(student, draw, at, zero))
            # the noisy token was drawn from the clean one, and tells of it
            q = self.kernel.posterior(q, noisy.xt[at.row[:, None], at.place], sigma, zero).clamp(min=0)
            q = q / q.sum(-1, keepdim=True).clamp(min=tiny(q))
            f, p = (self._below(x, noisy, at, zero).detach().clamp(min=UNLIKELY).log() for x in (follower, teacher))
            nats = torch.where(at.valid, (q * (f - p)).sum(-1), 0.0).sum(-1) / -torch.expm1(-sigma)
            return torch.zeros(len(batch), device=nats.device).index_add(0, at.row, nats)

    # -- predictions ------------------------------------------------------------------------------------------------

    def run(self, model: Model, draw: Draw, batch: Batch, key: Tensor | None) -> tuple[Evaluated, dict[str, Tensor]]:
        if model not in self._splits:
            self._splits[model] = None if self._graph is None else split(self._graph, model)
        parts = self._splits[model]
        stage, saved = begin(model, parts, self.objective.inputs(draw, batch), key)
        return Evaluated(stage, model, parts), saved

    def _below(self, outputs: Outputs, draw: Draw, at: Groups, below: Tensor) -> Tensor:
        """Return the predicted probabilities of the state at total noise ``below`` [g], float32 [g, m, n]."""
        x, sigma = draw.xt[at.row[:, None], at.place], draw.sigma.flatten()[at.unit]
        return predicted(self.kernel, _evaluated(outputs).stage.at(at), x, sigma, below)

    def _data(self, law: Tensor) -> Tensor:
        """Return probabilities of states [..., n] with 0 for the mask, which is no clean token."""
        if self.kernel.mask is None:
            return law
        return law.index_fill(-1, torch.tensor([self.kernel.mask], device=law.device), 0.0)

    def _state(self, pair: Pair) -> Tensor:
        """Return total noise of the state whose distributions are compared, of the shape of the times.

        It is 0, clean text, for predictions of the clean token. A step of scores amplifies errors exponentially in its length:
        the state is that after a second step as long as that from t to s.
        """
        if self.output == "log_x0":
            return torch.zeros_like(pair.upper.t)
        time = (2 * pair.lower.t - pair.upper.t).clamp(min=T_MIN / 4)
        return self.schedule.sigma(time.flatten()).detach().view(time.shape)

    def divergence(self, student: Outputs, teacher: Outputs, pair: Pair, batch: Batch, direction: Direction) -> Tensor:
        own, other = _evaluated(student), _evaluated(teacher)
        read, below = self.objective.read_positions(pair.upper, batch, self.kernel), self._state(pair).flatten()

        def compared(at: Groups) -> tuple[Compared, Batch]:
            (upper, rows), (lower, _) = (rows_of(draw, batch, at) for draw in (pair.upper, pair.lower))
            with torch.no_grad():
                return Compared(upper, lower, below[at.unit], other.stage.at(at)), rows

        if own.model is None or own.parts is None or self.kernel.tabular:
            at = self._groups(read, batch)
            nats: Tensor = self._divergences[direction](own.stage.at(at), *compared(at))
            return torch.zeros(len(batch), device=nats.device).index_add(0, at.row, nats)
        if (own.model, direction) not in self._tails:
            self._tails[own.model, direction] = Tail(own.model, own.parts, self._divergences[direction])
        tail = self._tails[own.model, direction]
        return tail.finish(own.stage.values, Reading(read, self._blocks(batch), compared))


def _evaluated(outputs: Outputs) -> Evaluated:
    """Return what :meth:`TokenDistillable.run` returned, or outputs that are given by name in its form."""
    return outputs if isinstance(outputs, Evaluated) else Evaluated(Stage.of(outputs))


def _put(rows: Tensor, at: Groups, states: Tensor) -> Tensor:
    """Return rows [b, l] with the states [g, m] at the positions of groups."""
    place = at.row[:, None] * rows.shape[1] + at.place
    return rows.flatten().scatter(0, place[at.valid], states[at.valid]).view_as(rows)
