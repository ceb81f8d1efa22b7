"""What stops a sampling run: network outputs that are no distributions, and numbers of steps that a sampler cannot take."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound
from sedd_graph_registry.strings.birth_death import Indel
from sedd_graph_registry.strings.flexmdm import FlexTau, FlexThinning, MaskDelete
from sedd_graph_registry.strings.samplers import StringFirstHitting, StringTau, StringThinning
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.output_check import OutputCheck
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError
from tests.diffusion.strings import strings
from tests.diffusion.test_samplers import EVERY, L, V, make, perfect, world

NAN, INF = float("nan"), float("inf")


def settings(kernel: Any, rows: int, length: int = L, **more: Any) -> tuple[Tensor, WalkSettings]:
    k, s = world(kernel)
    generator = torch.Generator().manual_seed(0)
    x = k.prior(rows, length, generator=generator, allowed=None)
    more.setdefault("free", torch.ones_like(x).bool())
    return x, WalkSettings(kernel=k, schedule=s, generator=generator, **more)


def spoiled(kernel: Any, value: float, late: float = 2.0) -> Any:
    """The perfect network, one number of the second position of which is ``value`` once t is below ``late``."""
    right = perfect(*world(kernel))

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        out = right(x, t, rows)["log_x0"].clone()
        out[t < late, 1, 0] = value
        return {"log_x0": out if at is None else out.gather(1, at[..., None].expand(-1, -1, out.shape[-1]))}

    return denoise


@pytest.mark.parametrize("value", [NAN, INF, 1.0], ids=str)
@pytest.mark.parametrize("cls", EVERY)
def test_outputs_that_are_no_distribution_stop_every_sampler(cls: Any, value: float) -> None:
    config = {"steps": 4} if "steps" in cls.Config.model_fields else {}
    x, told = settings(Absorb, 40)
    with pytest.raises(UserError, match="NaN or infinite" if value != 1.0 else r"not a distribution: .* sum to 1 \+- "):
        make(cls, **config).run(spoiled(Absorb, value), x, told)


@pytest.mark.parametrize("cls", [c for c in EVERY if c not in (Confidence, EntropyBound) and not c.needs_mask])
def test_a_network_that_fails_late_stops_samplers_without_masks(cls: Any) -> None:
    config = {"steps": 8} if "steps" in cls.Config.model_fields else {}
    x, told = settings(Uniform, 40)
    with pytest.raises(UserError, match="NaN or infinite"):
        make(cls, **config).run(spoiled(Uniform, NAN, late=0.3), x, told)


def test_given_positions_may_hold_anything() -> None:
    free = torch.tensor([[True, False, True]]).expand(40, L)
    for cls in EVERY:
        config = {"steps": 4} if "steps" in cls.Config.model_fields else {}
        x, told = settings(Absorb, 40, free=free)
        out = make(cls, **config).run(spoiled(Absorb, NAN), torch.where(free, x, 1), told)
        assert bool((out < V).all()), cls


def test_nan_stops_rows_that_must_match() -> None:
    pattern = Matching("(a|b|c)+", lambda: [b"a", b"b", b"c", None], torch.device("cpu"))
    for cls in (EVERY[0], EVERY[6]):
        x, told = settings(Absorb, 40, matching=pattern)
        with pytest.raises(UserError, match="NaN or infinite"):
            make(cls).run(spoiled(Absorb, NAN), x, told)


def test_nan_in_a_later_block_stops_a_run_in_blocks() -> None:
    x, told = settings(Absorb, 40, length=2 * L)
    given = {0: perfect(*world(Absorb)), L: spoiled(Absorb, NAN)}
    for cls in EVERY:
        if "steps" in cls.Config.model_fields:
            with pytest.raises(UserError, match="NaN or infinite"):
                write_blocks(make(cls, steps=4), lambda before: given[before.shape[1]], x, told, block=L)


def test_the_flag_is_read_together_with_what_the_host_waits_for() -> None:
    check = OutputCheck(torch.device("cpu"))
    where = torch.tensor([[True, False]])
    check.add({"log_x0": torch.tensor([[0.25, 0.75], [NAN, 2.0]]).log()[None]}, where)
    check.add({"log_insert": torch.full((1, 2, 3), -INF), "log_delete": torch.tensor([[-1.0, NAN]])}, where)
    assert check.read(torch.tensor(True), torch.tensor(7)) == [1.0, 7.0]
    check.add({"log_x0": torch.tensor([[0.25, 0.79], [0.0, 0.0]]).log()[None]}, where)
    with pytest.raises(UserError, match=r"sum to 1 \+- 0.04"):
        check.read()
    check = OutputCheck(torch.device("cpu"))
    check.add({"log_score": torch.tensor([[[0.0, 89.0], [0.0, 0.0]]])}, where)
    with pytest.raises(UserError, match="NaN or infinite"):
        check.read(torch.tensor(False))


# -- strings ---------------------------------------------------------------------------------------------------------


def string_settings() -> tuple[Strings, StringSettings[Any]]:
    kernel = Indel(Indel.Config(frequencies=(0.6, 0.4)), Context({"n": 3}))
    x = strings([[0, 1], [1]] * 20, kernel.start)
    none = torch.zeros_like(x.attend)
    schedule = LogLinear(LogLinear.Config(), Context({}))
    return x, StringSettings(fixed=none, shut=none, longest=4, kernel=kernel, schedule=schedule, generator=torch.Generator().manual_seed(0))  # fmt: skip


def string_rates(name: str = "", value: float = 0.0) -> Any:
    def rates(x: Strings, sigma: Tensor) -> dict[str, Tensor]:
        out = {
            "log_insert": torch.full((*x.tokens.shape, 2), -1.0),
            "log_delete": torch.full(x.tokens.shape, -1.0),
        }
        if name:
            out[name][:, 1] = value
        return out

    return rates


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in ("log_insert", "log_delete") for v in (NAN, INF)])
@pytest.mark.parametrize("cls", [StringTau, StringThinning, StringFirstHitting])
def test_outputs_that_are_not_finite_stop_every_sampler_of_strings(cls: Any, name: str, value: float) -> None:
    x, told = string_settings()
    sampler = cls(cls.Config(), Context({"n": 3}))
    sampler.run(string_rates(), x, told)
    with pytest.raises(UserError, match="NaN or infinite"):
        sampler.run(string_rates(name, value), x, told)


@pytest.mark.parametrize(
    ("name", "value"), [("log_gap", NAN), ("log_gap", INF), ("log_x0", NAN), ("log_x0", INF), ("log_x0", 3.0)]
)
@pytest.mark.parametrize("cls", [FlexTau, FlexThinning])
def test_outputs_that_are_not_finite_stop_samplers_that_insert_masks(cls: Any, name: str, value: float) -> None:
    kernel = MaskDelete(MaskDelete.Config(), Context({"n": 4}))

    def rates(x: Strings, sigma: Tensor) -> dict[str, Tensor]:
        out = {"log_gap": torch.zeros(x.tokens.shape), "log_x0": torch.full((*x.tokens.shape, 3), -math.log(3))}
        out[name][x.tokens == kernel.mask if name == "log_x0" else x.attend] = wrong
        return out

    x, told = string_settings()
    none = torch.zeros(20, 1)
    x = Strings(torch.full((20, 1), kernel.start), none == 0)
    told = dataclasses.replace(told, kernel=kernel, fixed=none > 0, shut=none > 0)
    sampler, wrong = cls(cls.Config(), Context({"n": 4})), -math.log(3) if name == "log_x0" else 0.0
    sampler.run(rates, x, told)
    wrong = value
    with pytest.raises(UserError, match="NaN or infinite" if value != 3.0 else "not a distribution"):
        sampler.run(rates, x, told)


@pytest.mark.parametrize("cls", [StringThinning, StringFirstHitting])
def test_steps_are_refused_by_samplers_of_strings_that_have_none(cls: Any) -> None:
    x, told = string_settings()
    with pytest.raises(UserError, match="takes no number of steps"):
        cls(cls.Config(), Context({"n": 3})).run(string_rates(), x, told, steps=8)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused_rather_than_taken_from_the_config(steps: int) -> None:
    x, told = string_settings()
    with pytest.raises(UserError, match=f"steps must be at least 1, not {steps}"):
        StringTau(StringTau.Config(), Context({"n": 3})).run(string_rates(), x, told, steps=steps)
    rows, walk = settings(Absorb, 4)
    with pytest.raises(UserError, match=f"steps must be at least 1, not {steps}"):
        make(EVERY[0]).run(perfect(*world(Absorb)), rows, walk, steps=steps)
