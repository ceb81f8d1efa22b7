"""Verification of objectives of token rows: the loss of single draws, the draws, and value and optimum of the bound.

Axes: b rows, l positions, n states, v data tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.objective import Objective, for_each
from sedd_graph.verify.guards import described, raised
from sedd_graph.verify.objective_bound import bound_faults
from sedd_graph.verify.objective_draws import (
    DrawRows,
    Wrong,
    draw_faults,
    least_time,
    many_draws,
    random_batch,
    random_faults,
)
from sedd_graph.verify.objective_findings import Findings, form_check, verdict
from sedd_graph.verify.objective_optimum import optimum_faults
from sedd_graph.verify.objective_positions import position_faults, sums_positions
from sedd_graph.verify.objective_values import (
    POINTWISE,
    compare,
    fit_rest,
    given_draw,
    rest_of,
)
from sedd_graph.verify.toy import PAIR, TRIPLE, Make, Toy, make_toy
from sedd_graph.verify.worst import worst

__all__ = ["prove_objective"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sample sizes of the verification of an objective, one set for each strength.

    Attributes:
        rows: Number of clean rows whose loss is compared with the expected loss, row by row.
        draws: Number of noisy rows whose distribution is tested.
        nodes: Quadrature nodes per interval of time.
        times: Number of times at which the optimum is verified.
        large: True to enumerate both toys (small data sets with known distributions, :mod:`sedd_graph.verify.toy`);
            False to enumerate the smaller one, and verify the other by random draws only.
    """

    rows: int
    draws: int
    nodes: int
    times: int
    large: bool


SIZES = {"full": Sizes(4000, 32_000, 6, 7, True), "quick": Sizes(1000, 8000, 4, 3, False)}


@dataclasses.dataclass(frozen=True)
class View:
    """One of the losses that an objective provides: for training, for the bound on -log p(x_0), or for evaluation.

    Attributes:
        name: Empty for the training loss; otherwise ``bound`` or ``evaluated``, as in the name of its check.
        draw: Function that draws noisy rows for a batch, and returns the objective that computes their loss, and them.
        valued: False for a training loss that differs from the bound in value (:meth:`Objective.differs`), if the bound
            is another objective. The value of such a loss is not verified, only its draws and its optimum.
    """

    name: str
    draw: DrawRows
    valued: bool = True


@torch.no_grad()
def prove_objective(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify the three losses of an objective: for training, for the bound on -log p(x_0), and for evaluation.

    On two small data sets with known distributions (toys):

    - The distribution of times and noisy rows is tested, and the use of random numbers.
    - The loss of each draw, and its gradient, are compared with the kernel's own loss at random network outputs.
    - All pairs of clean and noisy rows are enumerated. With a perfect network the bound must equal the entropy of the
      data (in discrete time, where the bound is not tight, the kernel's own loss), and the expected loss must be at its
      minimum.
    - Prompts and padding must be neither noised nor counted.
    - The loss of a row must be the sum over the positions that are read, if it is declared to be one.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that the objective reads: ``log_score`` or ``log_x0``.
        proof: Strength of the verification; ``quick`` uses fewer rows, and enumerates only the smaller toy.

    Returns:
        The results of the checks. A part that was not verified, since an earlier one is wrong, neither holds nor fails.
    """
    try:
        toys = [make_toy(make, law) for law in (TRIPLE, PAIR)]
        return _prove(toys, output, SIZES[proof])
    except Exception as error:  # a third-party component may raise anything
        return [raised("objective", error)]


def _prove(toys: list[Toy], output: str, sizes: Sizes) -> list[Check]:
    """Verify the forms of the objective of a process on the larger and the smaller of two toys."""
    found = dict[str, Findings]()
    for toy, enumerated in zip(toys, (sizes.large, True), strict=True):
        for view in _views(toy):
            into, ran = found.setdefault(view.name, Findings()), set[str]()
            try:
                for part in _verify(toy, view, output, sizes, into, enumerated=enumerated):
                    ran.add(part)
            except Exception as error:  # a third-party objective may raise anything
                into.wrong.append(Wrong("runs", described(error)))
            into.ran |= ran
            into.missed |= _parts(view, enumerated=enumerated) - ran
    return [*_training_checks(toys[0], found.pop(""), sizes), *(form_check(k, v) for k, v in found.items())]


def _views(toy: Toy) -> list[View]:
    """Return the forms of the objective of a process that differ."""
    kernel, schedule, objective = toy.parts.kernel, toy.parts.schedule, toy.parts.objective

    def drawn(of: Objective) -> DrawRows:
        return lambda batch, random: (of, of.corrupt(batch, kernel, schedule, random=random))

    bound, valued = objective.bound(), _valued(objective)
    views = [View("", drawn(objective), valued)]
    if bound is not objective:
        views.append(View("bound", drawn(bound)))
    own = objective.evaluated(kernel) is objective and type(objective).bound_draw is Objective.bound_draw
    if own and valued:
        return views  # what is evaluated is the training loss itself, and its value is verified
    evaluated: DrawRows = lambda batch, random: objective.bound_draw(batch, kernel, schedule, random=random)  # noqa: E731
    return [*views, View("evaluated", evaluated)]


def _valued(objective: Objective) -> bool:
    """Return False if the value of the training loss is not verified: it differs from a bound that is another objective."""
    return objective.differs() is None or objective.bound() is objective


def _parts(view: View, *, enumerated: bool) -> set[str]:
    """Return the parts of the verification of one form of the objective, the value and the optimum if ``enumerated``."""
    parts = {"draws", "random", "roles", "positions"}
    if view.valued:
        parts |= {"loss", "gradient", "tight"} if enumerated else {"loss", "gradient"}
    return parts | {"optimum"} if enumerated else parts


def _verify(toy: Toy, view: View, output: str, sizes: Sizes, into: Findings, *, enumerated: bool) -> Iterator[str]:
    """Verify one form of the objective on one toy, value and optimum only if ``enumerated``; yield each part when done."""
    objective, draw, batch = many_draws(toy, view.draw, sizes.draws, seed=3)
    wrong = draw_faults(toy, objective, draw, batch)
    into.wrong += wrong
    yield "draws"
    into.wrong += random_faults(toy, view.draw)
    yield "random"
    if wrong:  # noise levels or rows that are wrong make all that follows wrong
        return
    low = least_time(draw) if objective.measure == "time" else 0.0
    cost = torch.zeros(toy.tokens, dtype=torch.float64)
    if view.valued:
        cost = _losses(toy, view, objective, output, low, sizes, into)
        yield from ("loss", "gradient")
        if any(w.part == "loss" for w in into.wrong):
            return
        if enumerated:
            text, faults = bound_faults(toy, objective, output, low, cost, sizes.nodes)
            into.value.append(text)
            into.wrong += faults
            yield "tight"
    _roles(toy, view, objective, output, low, cost, sizes, into)
    yield "roles"
    into.wrong += _positions(toy, view, objective, output, low, sizes)
    yield "positions"
    if enumerated:
        faults, reasons = optimum_faults(toy, objective, output, low, sizes.times)
        into.wrong += faults
        into.optimum = reasons
        yield "optimum"


def _times(objective: Objective, low: float, rows: int, generator: torch.Generator) -> Tensor:
    """Return times in [low, 1], in random order: an even grid, with more at both ends, float32 [rows]."""
    even = torch.linspace(0, 1, rows - 2 * (rows // 8), dtype=torch.float64)
    ends = torch.logspace(-5, -1, rows // 8, dtype=torch.float64)
    shares = torch.cat([even, ends, 1 - ends])[torch.randperm(rows, generator=generator)]
    return (low + (1 - low) * shares).clamp(1e-6, 1 - 1e-6).float()


def _losses(
    toy: Toy, view: View, objective: Objective, output: str, low: float, sizes: Sizes, into: Findings
) -> Tensor:
    """Compare losses of drawn and of given noisy rows with the kernel's own; return the costs per token, float64 [v]."""
    generator = torch.Generator().manual_seed(21)
    batch = random_batch(toy, sizes.rows, generator)
    t = _times(objective, low, sizes.rows, generator)
    given = given_draw(toy, objective, batch, t, generator)
    if objective.measure == "time" and not float((given.t.reshape(len(t), -1) - t[:, None]).abs().max()) <= 1e-6:
        into.wrong.append(Wrong("draws", "corrupt(t=...) does not use the given times"))
    own, drawn = view.draw(batch, Randomness(generator))
    offs, scales = [], []
    for of, draw in ((objective, given), (own, drawn)):
        off, scale, gradient = compare(toy, of, draw, batch, output, generator)
        offs.append(off)
        scales.append(scale)
        into.note("gradient", float(gradient.nan_to_num(nan=torch.inf).max()))
    off, scale, both = torch.cat(offs), torch.cat(scales), _twice(batch)
    cost = torch.zeros(toy.tokens, dtype=torch.float64)
    if float((off.abs() / scale).max()) > POINTWISE and bool(off.isfinite().all()):
        cost = fit_rest(both, off, scale, toy.tokens)
    into.note("loss", float(((off - rest_of(both, cost)).abs() / scale).nan_to_num(nan=torch.inf).max()))
    if not float(cost.min()) >= -1e-6:
        into.wrong.append(
            Wrong("loss", f"{-float(cost.min()):.3g} nats a token are subtracted from the kernel's own loss")
        )
    return cost


def _twice(batch: Batch) -> Batch:
    return Batch(*(torch.cat([getattr(batch, f.name)] * 2) for f in dataclasses.fields(batch)))


def _roles(
    toy: Toy, view: View, objective: Objective, output: str, low: float, cost: Tensor, sizes: Sizes, into: Findings
) -> None:
    """Verify that prompts and padding are neither noised nor counted, and that the network is given the right inputs."""
    generator = torch.Generator().manual_seed(22)
    batch = random_batch(toy, max(200, sizes.rows // 4), generator, roles=True)
    own, drawn = view.draw(batch, Randomness(generator))
    given = given_draw(toy, objective, batch, _times(objective, low, len(batch), generator), generator)
    for of, draw in ((own, drawn), (objective, given)):
        x0, fixed = for_each(draw, batch.tokens), ~for_each(draw, batch.corrupt)
        if bool((draw.xt != x0)[fixed].any()):
            into.wrong.append(Wrong("roles", "positions are noised where 'corrupt' is False"))
            return
        inputs = of.inputs(draw, batch)
        pieces = {"tokens": draw.xt, "attend": for_each(draw, batch.attend), "clean": for_each(draw, batch.tokens)}
        wrong = [k for k, v in pieces.items() if k in inputs and not torch.equal(inputs[k], v)]
        if of.block is None:
            wrong += [k for k in ("sigma", "t") if k in inputs and not torch.equal(inputs[k], getattr(draw, k))]
        if wrong:
            into.wrong.append(Wrong("roles", f"the network's input {wrong[0]!r} is not that of the draw"))
        if not view.valued:
            continue
        off, scale, gradient = compare(toy, of, draw, batch, output, generator)
        gap = float(((off - rest_of(batch, cost)).abs() / scale).nan_to_num(nan=torch.inf).max())
        steep = float(gradient.nan_to_num(nan=torch.inf).max())
        if not worst(gap, steep) < POINTWISE:
            text = f"with prompts and padding the loss is {gap:.2g} off and its gradient {steep:.2g}"
            into.wrong.append(Wrong("roles", text))


def _positions(toy: Toy, view: View, objective: Objective, output: str, low: float, sizes: Sizes) -> list[Wrong]:
    """Compare losses with sums over the positions that are read, if the objective declares that they are equal."""
    generator = torch.Generator().manual_seed(23)
    batch = random_batch(toy, max(200, sizes.rows // 8), generator, roles=True)
    own, drawn = view.draw(batch, Randomness(generator))
    given = given_draw(toy, objective, batch, _times(objective, low, len(batch), generator), generator)
    found: list[Wrong] = []
    for of, draw in ((own, drawn), (objective, given)):
        if sums_positions(of, draw, batch):
            texts = position_faults(toy, of, draw, batch, output, generator)
            found += [Wrong("positions", text) for text in texts]
    return found


def _training_checks(toy: Toy, found: Findings, sizes: Sizes) -> list[Check]:
    """Return the checks of the training loss."""
    objective = toy.parts.objective
    own = {"time": "dsigma times the kernel's loss", "masked": "the cross-entropy times L / masks"}
    claims = {
        "draws": (
            "times and noisy rows are drawn as declared",
            f"{sizes.draws:,} draws, chi-square and Kolmogorov-Smirnov",
        ),
        "loss": (
            f"the loss of every draw is {own.get(objective.measure, 'the divergence of its step')}",
            "random outputs and times, relative",
        ),
        "gradient": ("so is its gradient in the outputs", "the same draws, autograd, relative"),
        "tight": ("with a perfect network the bound is the entropy of the data", "all clean and noisy rows"),
        "optimum": ("the loss is least at the true posterior", f"all clean and noisy rows at {sizes.times} times"),
        "roles": ("prompts and padding are neither noised nor counted", "random masks"),
        "positions": (
            "the loss of a row is the sum over the positions that are read",
            "random outputs, masks and times",
        ),
        "random": ("draws depend on the seed and the row alone", "seeds, ranks and earlier draws"),
    }
    checks = []
    for part, (claim, how) in claims.items():
        if part == "positions" and not objective.sums_positions:
            continue
        if part in ("loss", "gradient", "tight") and not _valued(objective):
            continue
        wrong = [w.text for w in found.wrong if w.part == part]
        value = (
            f"{found.worst[part]:.1e}"
            if part in found.worst
            else "; ".join(found.value)
            if part == "tight"
            else "none wrong"
        )
        holds, value = verdict(wrong, found.not_run([part]), value)
        if part == "optimum" and holds and (reasons := [f"{n} times: {r}" for r, n in found.optimum.items() if r]):
            holds, value = found.optimum.get("", 0) > 0 or None, f"none wrong; not verified at {'; '.join(reasons)}"
        checks.append(Check(f"objective.{part}", claim, holds, value, how))
    if errors := [w.text for w in found.wrong if w.part == "runs"]:
        checks.append(Check("objective.runs", "the objective raises no error", False, errors[0], "draws and losses"))
    if (reason := objective.differs()) is not None:
        claim = f"the training loss is not the bound: {reason}"
        value = "only its optimum is verified"
        if _valued(objective):
            value = "its value is verified: no other objective is its bound"
        checks.append(Check("objective.differs", claim, None, value, "declared"))
    return checks
