"""Faults that are planted in string processes, one at a time, each with the checks that must name it.

Those of samplers are here; importing this module registers those of kernels and objectives too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import tests.verify.planted_string_kernels
import tests.verify.planted_string_objectives  # noqa: F401  # registers faults
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringWalk
from sedd_graph.diffusion.strings.strings import Strings
from tests.verify.string_faults import FAULTS, PROCESSES, Fault, fault, patched, prove_faulty

__all__ = ["FAULTS", "PROCESSES", "Fault", "prove_faulty"]


def walking(parts: StringParts, change: Callable[[StringWalk[Any]], object]) -> None:
    """Change the walk of a sampler before it runs."""

    def wrap(m: Any, walk: StringWalk[Any], steps: int) -> None:
        change(walk)
        m(walk, steps)

    patched(parts.sampler, "walk", wrap)


SAMPLED = "sampler.law sampler.moments sampler.tokens sampler.rates"


@fault("delete", "thinning", "indel", "edit_flow", "flexmdm", "flexmdm_thinning", names=SAMPLED)
def temperature(parts: StringParts) -> None:
    """Tokens are drawn at temperature 0.9, with the same total rates."""

    def cooler(outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = dict(outputs)
        for name in ("log_insert", "log_x0", "log_substitute"):
            if name in found:
                x = found[name].clamp(min=-1e4)
                found[name] = (x / 0.9).log_softmax(-1) + x.logsumexp(-1, keepdim=True)
        return found

    walking(parts, lambda walk: patched(walk, "outputs", lambda m, sigma: cooler(m(sigma))))


@fault("delete", "flexmdm", "empty", names=SAMPLED)
def dependence_is_ignored(parts: StringParts) -> None:
    """The network sees whether a position holds a token, and not which."""

    def blind(walk: StringWalk[Any]) -> None:
        rates = walk._rates

        def seeing(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
            tokens = torch.where(strings.tokens < parts.kernel.data_tokens, 0, strings.tokens)
            return rates(dataclasses.replace(strings, tokens=tokens), sigma)

        walk._rates = seeing

    walking(parts, blind)


@fault("delete", "thinning", "edit_flow", names=SAMPLED)
def inserts_one_gap_later(parts: StringParts) -> None:
    def late(walk: StringWalk[Any]) -> None:
        def wrap(m: Any, outputs: Mapping[str, Tensor]) -> Tensor:
            weights = m(outputs)
            return torch.where(walk.strings.attend[..., None], weights.roll(1, 1), 0.0)

        patched(walk, "insertions", wrap)

    walking(parts, late)


@fault("delete", "indel", "edit_flow", "flexmdm", names=SAMPLED)
def half_of_each_step(parts: StringParts) -> None:
    patched(parts.kernel, "leap", lambda m, sigma, after: m(sigma, (sigma + after) / 2))


@fault("delete", "indel", "edit_flow", names=SAMPLED)
def inserts_5_percent_less(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "insertions", lambda m, outputs: 0.95 * m(outputs)))


@fault("indel", "edit_flow", names=SAMPLED)
def never_deletes(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "deletions", lambda m, outputs: 0 * m(outputs)))


@fault("edit_flow", names=SAMPLED)
def never_substitutes(parts: StringParts) -> None:
    walking(parts, lambda walk: patched(walk, "substitutions", lambda m, outputs: 0 * m(outputs)))


@fault("indel", names="sampler.kept")
def fixed_tokens_are_deleted(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.fixed[:, 1:].zero_())


@fault("delete", "indel", "flexmdm", "thinning", names="sampler.kept")
def shut_gaps_are_open(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.shut.zero_() if walk.strings.tokens.shape[1] > 1 else None)


@fault("delete", "indel", "flexmdm", "thinning", names="sampler.kept")
def allowed_is_ignored(parts: StringParts) -> None:
    walking(parts, lambda walk: setattr(walk, "allowed", None))


@fault("delete", "flexmdm", names="sampler.contract")
def sampler_uses_the_global_generator(parts: StringParts) -> None:
    walking(parts, lambda walk: setattr(walk, "generator", torch.default_generator))


@fault("delete", "thinning", names="sampler.contract")
def sampler_has_its_own_seed(parts: StringParts) -> None:
    walking(parts, lambda walk: walk.generator.manual_seed(0))


@fault("dice_tau", names="sampler.clean")
def strings_stay_short(parts: StringParts) -> None:
    """Nothing completes strings that have too few tokens."""
    patched(
        parts.sampler,
        "run",
        lambda m, rates, strings, settings, **k: m(
            rates, strings, dataclasses.replace(settings, one_length=False), **k
        ),
    )
