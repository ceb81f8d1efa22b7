"""Planted faults of what kernels declare for noise with a bitstream: each is caught, by the name of the check made for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Mixture, Uniform, Unigram
from sedd_graph_registry.noise.masking import Power, Spindle
from sedd_graph_registry.noise.rate_matrix import Ordinal
from sedd_graph_registry.strings.birth_death import Delete, Indel
from sedd_graph_registry.strings.edit_flow import EditFlow
from sedd_graph_registry.strings.flexmdm import MaskDelete

from sedd_graph.component.check import Check
from sedd_graph.diffusion.bitstream import laws
from sedd_graph.diffusion.strings.aligned_noise import AlignedNoise
from sedd_graph.diffusion.strings.columns import Columns, align_padded
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.tokens.kernel import Replacement
from sedd_graph.verify.bitstream import check_bitstream, check_string_bitstream
from sedd_graph.verify.noise import check_kernel
from tests.verify.planted import Fault, after, planted
from tests.verify.string_kernels import failing


def kept(by: float) -> Callable[..., Replacement]:
    return lambda self, found, *_: Replacement(found.keep * by, found.target)


def target(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Replacement]:
    def changed(self: Any, found: Replacement, *arguments: float) -> Replacement:
        other = change(found.target)
        return Replacement(found.keep, other / other.sum())

    return changed


def without_start(cls: Any, name: str) -> dict[str, Any]:
    known = getattr(cls, name)
    return {name: lambda self, sigma, start=0.0: known(self, sigma)}


def drifting(self: Any, found: Replacement, *arguments: float) -> Replacement:
    """Each call gives other probabilities, as sums in an order of their own do."""
    self.calls = getattr(self, "calls", 0) + 1
    return Replacement(found.keep * (1 - 1e-7 * self.calls), found.target)


def last_first(found: torch.Tensor) -> torch.Tensor:
    return found.flip(0)


def all_but_last(found: torch.Tensor) -> torch.Tensor:
    return torch.cat([found[:-1], 0 * found[-1:]])


TOKENS = [
    Fault("tokens are kept 1 % too seldom", Uniform, after(Uniform, "replacement", kept(0.99)), ("kernel.bitstream_law",)),
    Fault("masks are never made", Absorb, after(Absorb, "replacement", lambda self, found, *_: Replacement(found.keep**0, found.target)), ("kernel.bitstream_law",)),
    Fault("a step ignores where it starts", Uniform, without_start(Uniform, "replacement"), ("kernel.bitstream_law",)),
    Fault("a step of a masking kernel ignores where it starts", Power, without_start(Power, "replacement"), ("kernel.bitstream_law",)),
    Fault("frequencies in the wrong order", Unigram, after(Unigram, "replacement", target(last_first)), ("kernel.bitstream_law",)),
    Fault("the last token never replaces", Uniform, after(Uniform, "replacement", target(all_but_last)), ("kernel.bitstream_law",)),
    Fault("a mixture without its masks", Mixture, after(Mixture, "replacement", target(all_but_last)), ("kernel.bitstream_law",)),
    Fault("all tokens are masked at one rate", Spindle, after(Spindle, "replacement", lambda self, found, *_: Replacement(torch.cat([found.keep[:-1].mean().expand(len(found.keep) - 1), found.keep[-1:]]), found.target)), ("kernel.bitstream_law",)),
    Fault("probabilities drift between calls", Uniform, after(Uniform, "replacement", drifting), ("kernel.bitstream",)),
]  # fmt: skip


@pytest.mark.parametrize("fault", TOKENS, ids=lambda f: f.name)
def test_a_fault_of_a_token_kernel_is_caught_by_name(fault: Fault) -> None:
    assert set(fault.caught) & failing(check_bitstream(fault.of(), "quick"))


def test_the_checks_are_among_those_of_a_kernel() -> None:
    found = failing(check_kernel(TOKENS[0].of(), end=9.0, proof="quick"))
    assert found == {"kernel.bitstream_law"}


@pytest.mark.parametrize("base", [Absorb, Uniform, Unigram, Mixture, Power, Spindle, Ordinal], ids=lambda b: b.__name__)
def test_sound_kernels_pass(base: Any) -> None:
    checks = check_bitstream(planted(base, {}, {}, 5), "quick")
    assert [c.name for c in checks] == ["kernel.bitstream", "kernel.bitstream_law", "kernel.bitstream_size"]
    assert not failing(checks)


@pytest.mark.parametrize("fault", ["records the step before", "records under other tokens", "records nothing"])
def test_a_fault_of_the_tables_is_caught_by_name(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = laws.token_law

    def token_law(kernel: Any, sigma: float, start: float, reference: Any) -> laws.TokenLaw:
        law = known(kernel, sigma, start, reference)
        if fault == "records the step before":
            return dataclasses.replace(law, record=known(kernel, sigma + 1.0, start, reference).record)
        if fault == "records under other tokens":
            return dataclasses.replace(law, record=known(kernel, sigma, start, reference**0 * [9.0, 1, 1, 1, 1]).record)
        return dataclasses.replace(law, record=law.draw)

    for room in ("sedd_graph.diffusion.bitstream.noise", "sedd_graph.verify.bitstream"):
        monkeypatch.setattr(f"{room}.token_law", token_law)
    caught = {"kernel.bitstream_size"} if fault != "records nothing" else {"kernel.bitstream", "kernel.bitstream_size"}
    assert caught & failing(
        check_bitstream(planted(Unigram if fault != "records nothing" else Absorb, {}, {}, 5), "quick")
    )


def fates(**changes: Callable[[Fates], Any]) -> Callable[..., Fates]:
    def changed(self: Any, found: Fates, *arguments: float) -> Fates:
        return dataclasses.replace(found, **{name: change(found) for name, change in changes.items()})

    return changed


def drifting_fates(self: Any, found: Fates, *arguments: float) -> Fates:
    self.calls = getattr(self, "calls", 0) + 1
    gone = found.survive * 1e-7 * self.calls
    return dataclasses.replace(found, survive=found.survive - gone, vanish=found.vanish + gone)


STRINGS = [
    Fault("tokens die 10 % too often", Delete, after(Delete, "fates", fates(survive=lambda f: 0.9 * f.survive, vanish=lambda f: 1 - 0.9 * f.survive)), ("strings.bitstream_law",)),
    Fault("a step of strings ignores where it starts", Delete, without_start(Delete, "fates"), ("strings.bitstream_law",)),
    Fault("an edit flow ignores where it starts", EditFlow, without_start(EditFlow, "fates"), ("strings.bitstream_law",)),
    Fault("a masking step ignores where it starts", MaskDelete, without_start(MaskDelete, "fates"), ("strings.bitstream_law",)),
    Fault("masks are deleted, and deleted tokens masked", MaskDelete, after(MaskDelete, "fates", fates(hide=lambda f: torch.where(f.hide > 0, f.vanish, 0.0), vanish=lambda f: torch.where(f.hide > 0, f.hide, f.vanish))), ("strings.bitstream_law",)),
    Fault("nothing is born", Indel, after(Indel, "fates", fates(birth=lambda f: 0.0, replace=lambda f: 0.0, vanish=lambda f: 1 - f.survive)), ("strings.bitstream_law",)),
    Fault("tokens are born with the wrong frequencies", Indel, after(Indel, "fates", fates(law=lambda f: torch.cat([f.law[:-1].square(), f.law[-1:]]))), ("strings.bitstream_law",)),
    Fault("no replacement by births", Indel, after(Indel, "fates", fates(vanish=lambda f: f.vanish + f.replace, replace=lambda f: 0.0)), ("strings.bitstream_law",)),
    Fault("fates drift between calls", Delete, after(Delete, "fates", drifting_fates), ("strings.bitstream",)),
]  # fmt: skip


MIXED = {"mean_length": 0.8, "longest": 2}


def mixed(**changes: Callable[[AlignedNoise], Any]) -> Callable[..., AlignedNoise]:
    def changed(self: Any, found: AlignedNoise, *arguments: float) -> AlignedNoise:
        return dataclasses.replace(found, **{name: change(found) for name, change in changes.items()})

    return changed


def scattered(found: AlignedNoise) -> Any:
    """Alignments that differ between two calls."""
    calls = iter(range(10**6))

    def align(noise: torch.Tensor, clean: torch.Tensor) -> Columns:
        columns = found.align(noise, clean)
        return (
            Columns(*(x.roll(1 + noise.shape[1], 1) for x in columns))
            if next(calls) % 2
            else align_padded(noise, clean)
        )

    return align


ALIGNED = [
    Fault("columns are clean 10 % too seldom", EditFlow, after(EditFlow, "aligned_noise", mixed(clean=lambda f: 0.9 * f.clean)), ("strings.bitstream_law",), MIXED),
    Fault("noise strings are too long", EditFlow, after(EditFlow, "aligned_noise", mixed(spread=lambda f: f.spread**0.5)), ("strings.bitstream_law",), MIXED),
    Fault("noise strings are never cut", EditFlow, after(EditFlow, "aligned_noise", mixed(longest=lambda f: None)), ("strings.bitstream_law",), MIXED),
    Fault("noise tokens with the wrong frequencies", EditFlow, after(EditFlow, "aligned_noise", mixed(law=lambda f: f.law.flip(0))), ("strings.bitstream_law",), MIXED),
    Fault("another alignment", EditFlow, after(EditFlow, "aligned_noise", mixed(align=lambda f: align_padded)), ("strings.bitstream_law",), MIXED),
    Fault("alignments differ between two calls", EditFlow, after(EditFlow, "aligned_noise", mixed(align=scattered)), ("strings.bitstream",), MIXED),
]  # fmt: skip


def string_checks(fault: Fault) -> list[Check]:
    kernel = planted(fault.base, fault.methods, fault.config, 4 + (fault.base is MaskDelete))
    return check_string_bitstream(kernel.table(one_length=False), "full")


@pytest.mark.parametrize("fault", [*STRINGS, *ALIGNED], ids=lambda f: f.name)
def test_a_fault_of_a_string_kernel_is_caught_by_name(fault: Fault) -> None:
    assert set(fault.caught) & failing(string_checks(fault))


SOUND = [(Delete, {}), (Indel, {}), (MaskDelete, {}), (EditFlow, {}), (EditFlow, MIXED), (EditFlow, {**MIXED, "alignment": "padded"})]  # fmt: skip


@pytest.mark.parametrize(("base", "config"), SOUND)
def test_sound_string_kernels_pass(base: Any, config: dict[str, Any]) -> None:
    checks = string_checks(Fault("sound", base, {}, (), config))
    assert [c.name for c in checks] == ["strings.bitstream", "strings.bitstream_law"]
    assert not failing(checks)
