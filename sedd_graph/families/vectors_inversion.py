"""Exact inversion of the sampler of a process on vectors: text -> vectors -> noise -> vectors -> text.

Axes: b batch, l length, k streams of a state, d width of a vector, v tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import along, noise_std
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.reversible import Level, ReversibleSampler, State, levels_of
from sedd_graph.diffusion.vectors.sampler import VectorWalk, VectorWalkSettings
from sedd_graph.engine.inversion import Held, Inversion, Reached
from sedd_graph.engine.network import Network
from sedd_graph.errors import UserError

__all__ = ["VectorInversion"]

TRIES = 8
"""Number of draws of noise around a token before it gets none."""


class VectorInversion(Inversion):
    """The bijection of a reversible sampler of vectors.

    Args:
        parts: The components of the process.
        sampler: Its sampler.
        allowed: Tokens that samples may contain, bool [v], [l, v] or [b, l, v].
        steps: Number of steps; None: that of the sampler's Config.

    Raises:
        UserError: There are more steps than the process has.
    """

    def __init__(self, parts: VectorParts, sampler: ReversibleSampler, allowed: Tensor, steps: int | None) -> None:
        self._parts, self._sampler, self._allowed = parts, sampler, allowed
        self.steps = sampler.count(parts.kernel, steps)
        self.shape = (sampler.streams, parts.kernel.width)
        self.tokens = parts.kernel.data_tokens

    def around(self, network: Network, tokens: Tensor, seeds: Tensor) -> Tensor:
        kernel, schedule = self._parts.kernel, self._parts.schedule
        with network.evaluating(), torch.no_grad():
            walk, levels = self._walk(network, tokens, torch.ones_like(tokens, dtype=torch.bool))
            last = levels[-1]
            clean = kernel.embed(walk.settings.tokens).double()
            generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
            # y = s x_0 + noise, and x_0 spreads around the embedding
            spread = (1 + kernel.start_variance(schedule) * last.s.square()).sqrt()
            noise, wrong = torch.zeros_like(clean), torch.ones_like(tokens, dtype=torch.bool)
            for attempt in range(TRIES + 1):
                drawn = _normal(generators, clean) if attempt < TRIES else torch.zeros_like(clean)
                noise = torch.where(wrong[..., None].to(clean.device), along(spread, clean) * drawn, noise)
                state = self._sampler.begin(along(last.s, clean) * clean + noise)
                wrong = self._decoded(walk, state, last) != tokens
                if not bool(wrong.any()):
                    break
        return self._counts(state)

    def to_noise(self, network: Network, state: Tensor) -> Tensor:
        with network.evaluating(), torch.no_grad():
            tokens = torch.zeros(state.shape[:2], dtype=torch.int64)
            walk, levels = self._walk(network, tokens, torch.ones_like(tokens, dtype=torch.bool))
            return self._counts(self._sampler.backward(walk, self._values(state, network), levels))

    def to_text(
        self,
        network: Network,
        noise: Tensor,
        *,
        held: Held | None = None,
        on_state: Callable[[Tensor], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Reached:
        tokens = torch.zeros(noise.shape[:2], dtype=torch.int64) if held is None else held.tokens
        free = torch.ones_like(tokens, dtype=torch.bool) if held is None else ~held.where
        with network.evaluating(), torch.no_grad():
            state = self._values(noise, network)
            walk, levels = self._walk(network, tokens, free, first=state[0], on_step=on_step)
            told = None if on_state is None else lambda found: on_state(self._counts(found))
            end = self._sampler.forward(walk, state, levels, told)
            return Reached(walk.rounded().cpu(), self._counts(end))

    def mixed(self, noise: Tensor, new: Tensor, *, strength: float, seeds: Tensor) -> Tensor:
        old = self._sampler.grid.values(noise)
        sigma = self._parts.kernel.sigma(self._parts.schedule, torch.ones(1, dtype=torch.float64)).cpu()
        fresh = _normal([torch.Generator().manual_seed(int(seed)) for seed in seeds], old[:, :, 0])
        fresh = fresh / float(noise_std(sigma))
        share = torch.where(new, 1.0, strength)[..., None].double()
        change = (1 - share).sqrt() * old[:, :, 0] + share.sqrt() * fresh - old[:, :, 0]
        # the streams keep their distance, but at new positions, where they are equal
        moved = old + self._sampler.grid.snap(change)[:, :, None]
        moved = torch.where(new[..., None, None], moved[:, :, :1], moved)
        return self._sampler.grid.counts(moved)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _walk(
        self,
        network: Network,
        tokens: Tensor,
        free: Tensor,
        *,
        first: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[VectorWalk, list[Level]]:
        """Return a run that draws no noise, and its noise levels, from the highest.

        Args:
            network: The network.
            tokens: Given tokens, int64 [b, l].
            free: Positions without given tokens, bool [b, l].
            first: Vectors at the highest noise in the coordinates of the ODE, [b, l, d]; None: zeros.
            on_step: Callback for the rounded rows.
        """
        kernel, schedule = self._parts.kernel, self._parts.schedule
        tokens, free = tokens.to(network.device), free.to(network.device)
        sigma = kernel.sigma(schedule, torch.ones(len(tokens), dtype=torch.float64, device=network.device))
        shape = (*tokens.shape, kernel.width)
        start = torch.zeros(shape, dtype=torch.float64, device=network.device) if first is None else first
        settings = VectorWalkSettings(
            kernel=kernel,
            schedule=schedule,
            generator=torch.Generator(network.device).manual_seed(0),
            tokens=tokens.clamp(0, kernel.data_tokens - 1),
            free=free,
            allowed=self._allowed,
            classifier=self._parts.classifier,
            on_step=on_step,
            start=(along(noise_std(sigma), start) * start).float(),
        )
        own = "estimate" in network.model.input_names
        denoise = Denoiser(network.run, kernel, schedule, torch.ones_like(free), self_conditioned=own)
        walk = VectorWalk(denoise, settings, clamp=self._sampler.config.clamp)
        return walk, levels_of(walk, self._sampler.times(walk, self.steps))

    def _decoded(self, walk: VectorWalk, state: State, last: Level) -> Tensor:
        """Return the tokens that are decoded from a state at the lowest noise, int64 [b, l]."""
        self._sampler.forward(walk, state, [last])
        return walk.rounded().cpu()

    def _counts(self, state: State) -> Tensor:
        return torch.stack([self._sampler.grid.counts(x) for x in state], dim=2).cpu()

    def _values(self, counts: Tensor, network: Network) -> State:
        if counts.dim() != 4 or tuple(counts.shape[2:]) != self.shape:
            raise UserError(
                f"the noise has the shape {list(counts.shape)}, not [b, l, {self.shape[0]}, {self.shape[1]}]"
            )
        return tuple(self._sampler.grid.values(counts.to(network.device)).unbind(2))


def _normal(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Draw standard normal noise, one generator for each row, float64 of the shape and on the device of ``like``."""
    drawn = [torch.randn(like.shape[1:], generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(drawn).to(like.device)
