"""Faults of string kernels: of their draws, priors, rates and targets."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.strings import Strings
from tests.verify.string_faults import fault, patched, scaled


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def noise_5_percent_high(parts: StringParts) -> None:
    patched(parts.kernel, "sample", lambda m, batch, sigma, **k: m(batch, 1.05 * sigma, **k))


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def wrong_in_a_narrow_stretch(parts: StringParts) -> None:
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(batch, torch.where((sigma > 0.4) & (sigma < 0.5), 0.5 * sigma, sigma), **k),
    )


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws objective.contract")
def rows_noised_together(parts: StringParts) -> None:
    class Same(Randomness):
        def rand(self, rows: int, *shape: int) -> Tensor:
            return super().rand(rows, *shape)[:1].expand(rows, *shape)

    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, *, random, width: m(
            batch, sigma, random=Same(random.generator, start=random.start, total=random.total), width=width
        ),
    )


@fault("delete", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def last_token_is_never_lost(parts: StringParts) -> None:
    def wrap(m: Any, batch: Any, sigma: Tensor, **k: Any) -> Any:
        found = m(batch, sigma, **k)
        strings = found[0] if isinstance(found, tuple) else found
        bare = (strings.lengths == 0) & batch.attend.any(-1)
        width = max(2, strings.tokens.shape[1])
        tokens = torch.nn.functional.pad(strings.tokens, (0, width - strings.tokens.shape[1]), value=parts.kernel.start)
        attend = torch.nn.functional.pad(strings.attend, (0, width - strings.attend.shape[1]))
        last = batch.tokens.gather(1, (batch.attend.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
        tokens[:, 1] = torch.where(bare, last, tokens[:, 1])
        attend[:, 1] |= bare
        made = dataclasses.replace(strings, tokens=tokens, attend=attend)
        return (made, *found[1:]) if isinstance(found, tuple) else made

    patched(parts.kernel, "sample", wrap)


@fault("delete", "indel", "edit_flow", "flexmdm", names="strings.sample objective.draws")
def third_token_is_lost_twice_as_fast(parts: StringParts) -> None:
    """Right for two data tokens."""

    def wrap(m: Any, batch: Any, sigma: Tensor, **k: Any) -> Any:
        many = ((batch.tokens == 2) & batch.attend).any(-1)
        return m(batch, torch.where(many, 1.5 * sigma, sigma), **k)

    patched(parts.kernel, "sample", wrap)


@fault("delete", names="strings.sample objective.draws")
def fourth_position_is_noised_less(parts: StringParts) -> None:
    """Right for strings of three tokens."""
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(batch, torch.where(batch.attend.sum(-1) > 3, 0.8 * sigma, sigma), **k),
    )


@fault("delete", "flexmdm", names="strings.spared")
def prompts_are_noised(parts: StringParts) -> None:
    patched(
        parts.kernel,
        "sample",
        lambda m, batch, sigma, **k: m(dataclasses.replace(batch, corrupt=batch.attend), sigma, **k),
    )


@fault("indel", "edit_flow", names="strings.prior")
def prior_5_percent_long(parts: StringParts) -> None:
    kernel: Any = parts.kernel
    name = "births" if isinstance(kernel, BirthDeath) else "spread"
    value = getattr(kernel, name)
    mean = 1.05 * value / (1 - value)

    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        changed = copy.copy(kernel)
        changed.__class__ = type("Longer", (type(kernel),), {name: mean / (1 + mean), "abstract": True})
        return type(kernel).prior(changed, rows, **k)

    patched(kernel, "prior", wrap)


@fault("indel", "edit_flow", names="strings.prior strings.declared")
def prior_tokens_are_uniform(parts: StringParts) -> None:
    kernel: Any = parts.kernel

    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        changed = copy.copy(kernel)
        changed._buffers = dict(kernel._buffers)
        changed.law = torch.full_like(kernel.law, 1 / len(kernel.law))
        return type(kernel).prior(changed, rows, **k)

    patched(kernel, "prior", wrap)


@fault("indel", "edit_flow", names="strings.prior")
def prior_ignores_what_is_allowed(parts: StringParts) -> None:
    patched(parts.kernel, "prior", lambda m, rows, **k: m(rows, **(k | {"allowed": None})))


@fault("indel", "edit_flow", names="strings.declared")
def prior_is_wrong_for_large_vocabularies_alone(parts: StringParts) -> None:
    def wrap(m: Any, rows: int, **k: Any) -> Strings:
        found = m(rows, **k)
        if parts.kernel.data_tokens <= 3:
            return found
        real = found.attend & (torch.arange(found.tokens.shape[1]) > 0)
        return dataclasses.replace(found, tokens=torch.where(real & (found.tokens == 4), 5, found.tokens))

    patched(parts.kernel, "prior", wrap)


@fault(
    "delete",
    "indel",
    "edit_flow",
    "flexmdm",
    names="strings.insert strings.transport objective.rate objective.tight objective.wrong sampler.rates",
)
def insertion_rate_5_percent_high(parts: StringParts) -> None:
    """Where targets are divided by the rate, as those of ``indel``, only the steps of the sampler disagree with it."""
    patched(parts.kernel, "weights", scaled(1.05, 0))


@fault(
    "indel",
    "edit_flow",
    "flexmdm",
    names="strings.delete strings.transport objective.rate objective.tight objective.wrong sampler.rates",
)
def second_rate_5_percent_low(parts: StringParts) -> None:
    patched(parts.kernel, "weights", scaled(0.95, 1))


@fault("delete", "flexmdm", names="objective.wrong objective.rate strings.insert strings.gap")
def equal_tokens_are_counted_once(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        found = m(*a, **k)
        return dataclasses.replace(found, missing=found.missing.clamp(max=1.0))

    patched(parts.kernel, "target", wrap)


@fault("delete", "indel", "flexmdm", names="objective.wrong objective.rate strings.insert strings.gap")
def gap_is_off_by_one(parts: StringParts) -> None:
    def wrap(m: Any, *a: Any, **k: Any) -> Any:
        found = m(*a, **k)
        return dataclasses.replace(found, missing=found.missing.roll(1, -1))

    patched(parts.kernel, "target", wrap)


@fault("delete", names="objective.rate objective.wrong objective.training objective.tight")
def targets_wrong_at_high_noise(parts: StringParts) -> None:
    def wrap(m: Any, batch: Any, strings: Any, sigma: Tensor) -> Any:
        found = m(batch, strings, sigma)
        return dataclasses.replace(found, missing=found.missing * torch.where(sigma > 4, 0.9, 1.0)[:, None, None])

    patched(parts.kernel, "target", wrap)


@fault("delete", names="objective.bound objective.tight")
def clock_slope_10_percent_high(parts: StringParts) -> None:
    patched(parts.kernel, "clock", lambda m, u, end: (m(u, end)[0], 1.1 * m(u, end)[1]))
