"""What samplers cost a device: how often the host waits for it, and how much memory outputs of the size of the vocabulary take."""

import dataclasses
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.noise.schedules_steps import StepsTaken
from sedd_graph_registry.noise.steps import Steps
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi, TauLeaping
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sedd_graph.component.base import Context
from sedd_graph.diffusion.tokens import readings
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.engine.peak import PeakMemory

WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
    "_unique2",
    "unique_dim",
}
"""Operations for which the host waits for a device; ``nonzero_static`` is not one."""


class Waits(TorchDispatchMode):
    """Counts the times that the host would wait for a device: operations of unknown size, and copies from and to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._copies = _Copies(self)

    def __enter__(self) -> Any:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in tree_leaves(args[1])
        )
        self.count += name in WAITS or masks
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts copies to the host, and tensors that are made from Python numbers on the host."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        own = name in ("tolist", "cpu", "numpy") or func is torch.tensor
        self._waits.count += own
        return func(*args, **(kwargs or {}))


def test_waits_are_counted() -> None:
    x = torch.arange(6).view(2, 3)
    waiting: list[Any] = [
        lambda: bool((x > 3).any()),
        lambda: int(x.sum()),
        lambda: x[x > 3],
        lambda: x.nonzero(),
        lambda: x.sum().tolist(),
        lambda: torch.where(x > 3),
        lambda: x.clone().index_put_((x > 3,), torch.tensor(0)),
        lambda: torch.tensor([3], device="cpu"),
        lambda: x.unique(),
    ]
    for wait in waiting:
        with Waits() as waits:
            wait()
        assert waits.count >= 1, wait
    with Waits() as waits:
        x.masked_fill(x > 3, 0)
        torch.where(x > 3, x, 0)[torch.arange(2), torch.arange(2)].sort()
        torch.nonzero_static(x, size=5)
    assert waits.count == 0


def network(n: int, width: int = 8, calls: list[int] | None = None, kernel: Any = None) -> StagedDenoise:
    """A network with two stages: hidden vectors at all positions, and a head where outputs are read."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n, width, generator=generator)
    heads = torch.randn(n, width, generator=generator)
    mask = kernel.mask

    def finish(values: Any, groups: Groups) -> dict[str, Tensor]:
        logits = values[0][groups.row[:, None], groups.place] @ heads.T
        if mask is not None:
            logits[..., mask] = -1e6
        return {"log_x0": logits.log_softmax(-1)}

    def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
        if calls is not None:
            calls.append(len(x))
        hidden = table[x]
        return Stage((hidden + hidden.mean(1, keepdim=True) + t[:, None, None],), (True,), finish)

    return StagedDenoise(first)


def process(kernel: Any, n: int, rows: int, length: int) -> tuple[Tensor, WalkSettings]:
    k = kernel(kernel.Config(), Context({"n": n}))
    generator = torch.Generator().manual_seed(1)
    x = k.prior(rows, length, generator=generator, allowed=None)
    schedule = LogLinear(LogLinear.Config(), Context({}))
    return x, WalkSettings(free=torch.ones_like(x).bool(), kernel=k, schedule=schedule, generator=generator)


EACH = [
    (Analytic, {}, Absorb),
    (Analytic, {}, Uniform),
    (Euler, {}, Absorb),
    (Euler, {}, Uniform),
    (TauLeaping, {}, Absorb),
    (TauLeaping, {}, Uniform),
    (Ancestral, {}, Absorb),
    (Ancestral, {}, Uniform),
    (PredictorCorrector, {"corrections": 2}, Absorb),
    (PredictorCorrector, {"sites": 2}, Uniform),
    (Psi, {"kappa": 0.5}, Absorb),
    (Psi, {"kappa": 0.5}, Uniform),
    (ReMDM, {"remask": "cap"}, Absorb),
    (ReMDM, {"remask": "conf", "eta": 1.0}, Absorb),
    (ReMDM, {"remask": "loop"}, Absorb),
    (Confidence, {"by": "probability"}, Absorb),
    (Confidence, {"by": "margin", "block": 4}, Absorb),
    (Confidence, {"by": "entropy"}, Absorb),
    (Confidence, {"by": "random"}, Absorb),
    (EntropyBound, {"gamma": 2.0}, Absorb),
    (FirstHitting, {}, Absorb),
    (Uniformization, {}, Absorb),
    (Uniformization, {}, Uniform),
]


def named(case: Any) -> str:
    return "-".join([case[0].__name__, case[2].__name__, *map(str, case[1].values())])


SET_UP = 7
"""Times that the host may wait in a run besides: for grids of times, and at the end."""


def waits(
    cls: Any, config: dict[str, Any], kernel: Any, *, n: int, rows: int, length: int, timeless: bool
) -> tuple[int, int]:
    """Return the times that the host waits in a run, and the evaluations of the network."""
    if "steps" in cls.Config.model_fields:
        config = {"steps": 12, **config}
    sampler = cls(cls.Config(**config), Context({"n": n}))
    x, settings = process(kernel, n, rows, length)
    calls, frames = list[int](), list[int]()
    denoise = network(n, calls=calls, kernel=settings.kernel)
    told = dataclasses.replace(settings, timeless=timeless, on_step=lambda step, x: frames.append(step))
    with Waits() as counted:
        out = sampler.run(denoise, x, told)
    assert bool((out < settings.kernel.data_tokens).all())
    # an evaluation of which all rows are cached is counted, too
    steps = len(frames) - 1 if cls is Uniformization else 0
    return counted.count, max(len(calls), steps)


@pytest.mark.parametrize("timeless", [False, True], ids=["timed", "timeless"])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "apart"])
@pytest.mark.parametrize("case", EACH, ids=named)
def test_the_host_waits_once_in_an_evaluation(
    case: Any, apart: bool, timeless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With outputs that are computed for all rows at once, and for a few positions at a time."""
    if apart:
        monkeypatch.setattr(readings, "NUMBERS", 300)
    length = 4 if case[0] is Uniformization else 24
    found, evaluations = waits(*case, n=20, rows=3, length=length, timeless=timeless)
    assert evaluations >= 4
    assert found <= evaluations + SET_UP


@pytest.mark.parametrize("steps", [6, 24])
def test_the_host_waits_once_in_a_step_of_a_kernel_in_discrete_time(steps: int) -> None:
    """Steps that skip some of the kernel's take products of its matrices, which are computed once."""
    kernel = Steps(Steps.Config(steps=24, beta_last=0.5), Context({"n": 8}))
    sampler, calls = Ancestral(Ancestral.Config(steps=steps), Context({"n": 8})), list[int]()
    x, settings = process(Uniform, 8, 3, 8)
    schedule = StepsTaken(StepsTaken.Config(steps=24), Context({}))
    told = dataclasses.replace(settings, kernel=kernel, schedule=schedule)
    with Waits() as counted:
        out = sampler.run(network(8, calls=calls, kernel=kernel), x, told)
    assert len(calls) == steps
    assert counted.count <= steps + SET_UP
    assert out.shape == x.shape


@pytest.mark.parametrize("case", [c for c in EACH if c[0] is not Uniformization], ids=named)
def test_the_host_waits_once_in_an_evaluation_of_a_block(case: Any) -> None:
    """Blocks are drawn one after another, each by a run of the sampler."""
    cls, config, kernel = case
    config = {"steps": 6, **config} if "steps" in cls.Config.model_fields else config
    sampler, calls = cls(cls.Config(**config), Context({"n": 20})), list[int]()
    x, settings = process(kernel, 20, 3, 32)
    denoise = network(20, calls=calls, kernel=settings.kernel)
    with Waits() as counted:
        write_blocks(sampler, lambda before: denoise, x, settings, block=8)
    assert counted.count <= len(calls) + 4 * (SET_UP + 1)


STATES, ROWS, LENGTH = 50_258, 2, 64
ALL = ROWS * LENGTH * STATES * 4
"""Bytes of one float32 tensor of outputs at all positions."""
QUICK = {(Analytic, Absorb), (Analytic, Uniform), (Ancestral, Uniform), (Confidence, Absorb)}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, marks=[] if (c[0], c[2]) in QUICK and c[1] in ({}, {"by": "entropy"}) else pytest.mark.slow, id=named(c)
        )
        for c in EACH
        if c[0] is not Uniformization
    ],
)
def test_outputs_at_50257_tokens_take_little_memory(case: Any) -> None:
    """At most two tensors of the outputs at all positions are alive; without chunks there were seven to eleven."""
    cls, config, kernel = case
    config = {"steps": 1, **config} if "steps" in cls.Config.model_fields else config
    sampler = cls(cls.Config(**config), Context({"n": STATES}))
    x, settings = process(kernel, STATES, ROWS, LENGTH)
    if cls is FirstHitting:
        x = torch.where(torch.arange(LENGTH) < 2, x, 0)
    denoise = network(STATES, kernel=settings.kernel)
    peak = PeakMemory()
    with peak:
        sampler.run(denoise, x, settings)
    assert peak.peak <= 2 * ALL


@pytest.mark.parametrize("case", [(Analytic, Uniform), (Analytic, Absorb), (Ancestral, Uniform)])
@pytest.mark.parametrize("steps", [2, 64])
def test_outputs_are_computed_once_where_many_positions_change(
    case: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of all positions are held where many change; the drawn tokens are those of weights computed again."""
    monkeypatch.setattr(readings, "NUMBERS", 300)
    cls, kernel = case
    sampler = cls(cls.Config(steps=steps), Context({"n": 20}))

    def run(held: int) -> tuple[Tensor, int, int]:
        x, settings = process(kernel, 20, 3, 24)
        inner, evaluations, positions = network(20, kernel=settings.kernel), list[int](), list[int]()

        def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
            evaluations.append(x.numel())
            stage = inner.begin(x, t, rows)

            def finish(values: Any, groups: Groups) -> Any:
                positions.append(groups.place.numel())
                return stage.finish(values, groups)

            return dataclasses.replace(stage, finish=finish)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readings, "HELD", held)
            out = sampler.run(StagedDenoise(first), x, settings)
        return out, sum(positions), sum(evaluations)

    out, positions, every = run(2**30)
    again, more, _ = run(0)
    assert torch.equal(out, again)
    if steps == 2:
        assert positions <= every  # of an absorbing kernel, only the masks
        assert more > 1.3 * positions
    else:
        assert positions <= more
