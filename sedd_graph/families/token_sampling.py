"""Sampling of token rows of a fixed length: initial noise, prompt, conditions, guidance and network calls.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import nothing_hidden, taken
from sedd_graph.diffusion.conditions.allowed import Pieces, allowed_tokens
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.numerics import autocast_now
from sedd_graph.diffusion.tokens.block_diffusion import hold_prompt, write_blocks
from sedd_graph.diffusion.tokens.conditions import lacks
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.guidance import classified, lacks_scores, renoised, unprompted
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.particles import choose
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.row_noise import RowNoise
from sedd_graph.diffusion.tokens.sampler import chosen_steps
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine.block_cache import cached, uncached
from sedd_graph.engine.network import Network
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.families.text import check_tokens

__all__ = ["TokenSampling", "padding"]


def padding(count: int, batch: int) -> int:
    """Return how many rows are added to ``count`` rows of a batch: up to all, half or a quarter of it, or several batches.

    So a network that is compiled for each number of rows is compiled three times, and rows that have ended cost little.
    """
    sizes = [-(-batch // 4), -(-batch // 2), batch * -(-count // batch)]
    return next(size for size in sizes if size >= count) - count


class TokenSampling:
    """Validated sampling request for token rows; :meth:`rows` draws them.

    Args:
        parts: Components of the process.
        allowed: Mask of the states that samples may contain, bool [n].
        pieces: Function that returns the bytes of each token; None without a tokenizer.
        network: The network.
        request: The sampling request.

    Attributes:
        conditions: Conditions on the samples: those of the request, or else of the sampler's Config.
        classifier: Classifier that guides the samples: that of the request, or else of the process; None without
            guidance.
        length: Number of tokens per row.
        block: Number of tokens per block for block diffusion (BD3-LM); None if all positions are sampled at once.
        particles: Number of rows drawn for each one that is returned.
        effective: Effective sample size of the particles, (sum of weights)^2 / (sum of squared weights), averaged over
            the returned rows; a number from 1 to ``particles``. None before sampling, and without particles.

    Raises:
        UserError: The request has no length, or has conditions or guidance that kernel, sampler or objective do not
            support.
    """

    def __init__(
        self, parts: TokenParts, allowed: Tensor, pieces: Pieces | None, network: Network, request: SampleRequest
    ) -> None:
        self.parts, self.allowed, self._pieces = parts, allowed, pieces
        self.network, self.request, self.device = network, request, network.device
        sampler, kernel = parts.sampler, parts.kernel
        self.conditions: Conditions = sampler.config if request.conditions is None else request.conditions
        if (lack := lacks(self.conditions, kernel, sampler)) is not None:
            raise UserError(f"sample: the conditions need {lack}")
        self.classifier = request.classifier
        if self.classifier is None and parts.classifier is not None:
            self.classifier = parts.classifier.guide(parts.schedule)
        if self.classifier is not None and (lack := lacks_scores(kernel, sampler)) is not None:
            raise UserError(f"sample: guidance by a classifier needs {lack}")
        if request.length is None:
            raise UserError("sample: give a length: the number of tokens of each row")
        self.length, self.block = request.length, parts.objective.block
        self.particles = self.conditions.particles
        self.effective: float | None = None
        if self.particles > 1 and request.on_step is not None and request.tape is None:
            raise UserError("sample: with particles there is no trajectory: most of the rows are not returned")
        if request.tape is not None and request.prompt is not None:
            raise UserError("sample: a noise tape is of whole texts: leave the prompt out")
        if request.seeds is not None:
            if request.tape is not None or request.seeds.shape != (request.batch,):
                raise UserError(
                    f"sample: seeds must be int64 [{request.batch}], one for each row, and there is no tape"
                )
            if request.prompt is not None and self.conditions.observed == "renoise":
                raise UserError("sample: with observed: renoise rows share their noise: leave seeds out")
        if self.block is not None and request.attend is not None:
            raise UserError("sample: text in blocks has no padding to hide: leave attend out")
        if self.block is not None and (self.classifier is not None or self.conditions.guidance != 1):
            raise UserError("sample: guidance and classifiers need the whole text; this model writes it in blocks")

    def rows(self) -> tuple[Tensor, Conditions]:
        """Draw token rows.

        Returns:
            Token ids int64 [b, l], on the CPU, and the conditions on samples that were used (:attr:`conditions`).

        Raises:
            UserError: ``prompt`` or ``allowed`` of the request is invalid, or a condition on text is given without a
                tokenizer.
        """
        kernel, batch, length = self.parts.kernel, self.request.batch * self.particles, self.length
        may = self._may()
        may = self._repeated(may) if may.dim() > 2 else may
        generator = self.request.generator(self.device)
        whole = length if self.block is None else -(-length // self.block) * self.block
        if self.block is not None and may.dim() > 1:  # padded to whole blocks, which are cut to the length at the end
            may = torch.cat([may, self.allowed.expand(*may.shape[:-2], whole - length, -1)], -2)
        visible = self._visible(whole)
        tape: NoiseTape | None = self.request.tape
        if self.request.seeds is not None:
            any_place = may.reshape(-1, may.shape[-1]).any(0)
            tape = RowNoise.of(kernel, self.request.seeds, visible, allowed=any_place, device=self.device)
        if tape is None:
            x = kernel.prior(batch, whole, generator=generator, allowed=may.reshape(-1, may.shape[-1]).any(0))
        else:
            sampler = self.parts.sampler
            times = sampler.times(kernel, chosen_steps(self.request.steps, sampler.steps))
            x = tape.prepare(kernel, self.parts.schedule, times, whole, particles=self.particles)
        free = self._repeated(visible).contiguous()
        x = torch.where(free, x, 0)  # a token for padding, which the network does not read
        if self.request.prompt is not None:
            prompt = F.pad(self._repeated(self._prompt(self.request.prompt)), (0, whole - length), value=-1)
            x = torch.where(prompt < 0, x, prompt)
            free = free & (prompt < 0)
            if not bool(free.any()):
                self.parts.sampler.clamped = self.parts.sampler.evaluations = 0
                return x[:: self.particles, :length].cpu(), self.conditions
        pattern = self.conditions.matching
        matching = None if pattern is None else Matching(pattern, self._spelled, self.device)
        if matching is not None and tape is not None:
            tape.require_match(matching, may, length)
        settings = WalkSettings(
            free=free,
            kernel=kernel,
            schedule=self.parts.schedule,
            generator=generator,
            allowed=may,
            unconditioned=self.allowed if self.particles > 1 else None,
            matching=matching,
            draws=tape,
            on_step=self.request.on_step,
            on_confidence=self.request.on_confidence,
        )
        made = self._walk(x, settings) if self.block is None else self._write(x, settings, self.block)[:, :length]
        if (log_weight := self.parts.sampler.log_weight) is not None:
            chosen = choose(log_weight, self.particles, draws=Draws(generator) if tape is None else tape)
            made, self.effective = made[chosen.index], chosen.effective
        return made.cpu(), self.conditions

    def _repeated(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [b, ...] with each row once for each of its particles."""
        if self.particles == 1:
            return rows
        return taken(rows, torch.arange(len(rows), device=rows.device).repeat_interleave(self.particles))

    def _may(self) -> Tensor:
        """Return the mask of the states that samples may contain, bool [n], [l, n] or [b, l, n]."""
        may, allowed = self.allowed, self.request.allowed
        if allowed is not None:
            shape = (self.request.batch, self.length, len(may))
            if allowed.dtype != torch.bool or allowed.shape not in (shape, shape[1:], shape[2:]):
                raise UserError(
                    f"sample: allowed must be bool {list(shape[2:])}, {list(shape[1:])} or {list(shape)}, "
                    f"not {allowed.dtype} {list(allowed.shape)}"
                )
            may = may & allowed.to(self.device)
        return allowed_tokens(self.conditions, may, self.length, self._spelled)

    def _visible(self, whole: int) -> Tensor:
        """Return the mask of the positions that are no padding, bool [rows, l], l being ``whole``."""
        rows, attend = self.request.batch, self.request.attend
        if attend is None:
            return nothing_hidden(rows, whole, self.device)
        if attend.dtype != torch.bool or attend.shape not in ((rows, self.length), (1, self.length)):
            raise UserError(
                f"sample: attend must be bool [{rows}, {self.length}] (or one row), not {attend.dtype} "
                f"{list(attend.shape)}"
            )
        if bool(attend.all()):
            return nothing_hidden(rows, whole, self.device)
        if "attend" not in self.network.model.input_names:
            raise UserError("sample: this model has no input 'attend', so that it would read padding: leave attend out")
        return attend.to(self.device).expand(rows, -1)

    def _prompt(self, prompt: Tensor) -> Tensor:
        batch, length = self.request.batch, self.length
        if prompt.dim() != 2 or prompt.shape[1] != length or prompt.shape[0] not in (1, batch):
            raise UserError(f"sample: prompt must be [{batch}, {length}] (or one row), not {list(prompt.shape)}")
        check_tokens(prompt.clamp(min=0), self.parts.kernel.data_tokens)
        return prompt.to(self.device).expand(batch, length)

    def _spelled(self) -> Sequence[bytes | None]:
        """Return the bytes of each state (None without text). Raises :class:`UserError` without a tokenizer."""
        if self._pieces is None:
            raise UserError("there is no tokenizer, so tokens have no text: build from a run folder that has one")
        pieces, states = self._pieces(), self.parts.kernel.states
        return [*pieces, *[None] * (states - len(pieces))][:states]

    def _walk(self, x: Tensor, settings: WalkSettings) -> Tensor:
        """Run the sampler on all positions at once, from the noisy rows ``x``, int64 [b, l]; return samples [b, l]."""
        (kernel, schedule, _, sampler, _), network, request = self.parts, self.network, self.request
        batch, free, evaluations = len(x), settings.free, 0
        visible = self._repeated(self._visible(x.shape[1]))

        autocast = autocast_now(self.device)

        def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
            nonlocal evaluations
            evaluations += len(rows)
            own = rows
            # a compiled network is compiled again for each number of rows, so there are few
            fill = padding(len(rows), batch) if network.compiled_everywhere else 0
            if fill:
                x, t, rows = (torch.cat([v, v[:1].expand(fill, *v.shape[1:])]) for v in (x, t, rows))
            sigma = schedule.sigma(t)
            with autocast():
                found = network.begin({"tokens": x, "sigma": sigma, "t": t, "attend": taken(visible, rows)}, rows=own)
            found = found.under(autocast)

            def finish(values: Sequence[Tensor], groups: Groups) -> Mapping[str, Tensor]:
                outputs, row = found.finish(values[:-2], groups), groups.row
                return kernel.translate(outputs, values[-2][row[:, None], groups.place], values[-1][row])

            values, by_row = (*found.values, x, sigma), (*found.by_row, True, True)
            cut = tuple(v[: len(own)] if rows else v for v, rows in zip(values, by_row, strict=True))
            return Stage(cut, by_row, finish)

        denoise: Denoise = StagedDenoise(first)
        if request.prompt is not None and self.conditions.guidance != 1:
            denoise = unprompted(denoise, free, kernel, self.conditions.guidance)
        if self.classifier is not None:
            denoise = classified(denoise, kernel, schedule, self.classifier, free)
        noisy = request.prompt is not None and self.conditions.observed == "renoise"
        if noisy:
            denoise = renoised(denoise, x, free, kernel, schedule, settings.generator)
        timed = bool({"sigma", "t"} & set(network.model.input_names))
        timeless = self.classifier is None and not noisy and not timed
        with network.evaluating():
            out = sampler.run(denoise, x, dataclasses.replace(settings, timeless=timeless), steps=request.steps)
        sampler.evaluations = evaluations
        return out

    def _write(self, x: Tensor, settings: WalkSettings, block: int) -> Tensor:
        """Run the sampler block by block from the noisy rows ``x``, int64 [b, l]; return samples int64 [b, l].

        The network runs eagerly, since ``torch.compile`` would recompile for each length of the growing KV cache.
        """
        hold_prompt(settings.free, block)
        (rows, whole), network, request = x.shape, self.network, self.request
        with contextlib.ExitStack() as stack:
            stack.enter_context(network.evaluating(eager=True))
            denoiser: Callable[[Tensor], Denoise] = partial(uncached, network.model, block, parts=network.parts)
            if request.kv_cache:
                denoiser = stack.enter_context(
                    cached(network.model, block, rows=rows, length=whole, parts=network.parts)
                )

            def given(before: Tensor) -> Denoise:
                if request.on_block is not None:
                    request.on_block(before)
                return denoiser(before)

            return write_blocks(
                self.parts.sampler, given, x, settings, block=block, length=self.length, steps=request.steps
            )
