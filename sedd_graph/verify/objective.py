"""Verification of objectives of token rows: the loss of single draws, the draws, and value and optimum of the bound.

Axes: b rows, l positions, n states, v data tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective, for_each
from sedd_graph.verify.guards import described, raised
from sedd_graph.verify.objective_draws import (
    DrawRows,
    Wrong,
    draw_faults,
    least_time,
    many_draws,
    random_batch,
    random_faults,
)
from sedd_graph.verify.objective_optimum import optimum_faults
from sedd_graph.verify.objective_values import (
    POINTWISE,
    compare,
    decoded,
    fit_rest,
    given_draw,
    pairs,
    prior_cost,
    rest_of,
    value_of,
)
from sedd_graph.verify.toy import PAIR, TRIPLE, Make, Toy, make_toy
from sedd_graph.verify.worst import worst

__all__ = ["prove_objective"]

TIGHT = 5e-4
"""Tolerance of the enumerated bound, nats per sequence, beside the error of the quadrature."""
LATE = 0.3
"""A time at which the reconstruction term has a size, as it has not at the least time."""
DECODED = 1e-3
"""Tolerance of the enumerated reconstruction term, relative."""
ROUNDING = 1e-6
"""Tolerance of the enumerated reconstruction term for rounding in float32, nats per sequence."""
COST = 2e-3
"""Tolerance of the constant that a bound in discrete time adds for each clean token, nats."""
OMITTED = 0.01
"""Largest share of the entropy that a bound may omit or add: noise below the least time, and the prior."""


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


@dataclasses.dataclass
class Findings:
    """Results of the verification of one loss of an objective (:class:`View`).

    Attributes:
        wrong: Deviations beyond the tolerance.
        worst: Largest relative deviation from the expected ``loss`` and from the expected ``gradient``, by these names.
        value: For each enumerated toy, a text with the bound of a perfect network and the entropy, in nats.
        ran: Parts (:attr:`Wrong.part`) that were verified on a toy.
        optimum: Number of times at which the optimum is not verified, by the reason, and of those verified by "".
        missed: Parts that were not verified on a toy, since an earlier part of that toy is wrong or raised an error.
    """

    wrong: list[Wrong] = dataclasses.field(default_factory=list)
    worst: dict[str, float] = dataclasses.field(default_factory=dict)
    value: list[str] = dataclasses.field(default_factory=list)
    ran: set[str] = dataclasses.field(default_factory=set)
    missed: set[str] = dataclasses.field(default_factory=set)
    optimum: dict[str, int] = dataclasses.field(default_factory=dict)

    def not_run(self, parts: Iterable[str]) -> str | None:
        """Return a text if one of ``parts`` was not verified on all toys; None if each was."""
        missed = self.missed.intersection(parts)
        if not missed:
            return None
        return "not run" if not missed & self.ran else "not run on all data sets"


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
    return [*_training_checks(toys[0], found.pop(""), sizes), *(_form_check(k, v) for k, v in found.items())]


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
    parts = {"draws", "random", "roles"}
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
            _value(toy, objective, output, low, cost, sizes, into)
            yield "tight"
    _roles(toy, view, objective, output, low, cost, sizes, into)
    yield "roles"
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
        _note(into, "gradient", float(gradient.nan_to_num(nan=torch.inf).max()))
    off, scale, both = torch.cat(offs), torch.cat(scales), _twice(batch)
    cost = torch.zeros(toy.tokens, dtype=torch.float64)
    if float((off.abs() / scale).max()) > POINTWISE and bool(off.isfinite().all()):
        cost = fit_rest(both, off, scale, toy.tokens)
    _note(into, "loss", float(((off - rest_of(both, cost)).abs() / scale).nan_to_num(nan=torch.inf).max()))
    if not float(cost.min()) >= -1e-6:
        into.wrong.append(
            Wrong("loss", f"{-float(cost.min()):.3g} nats a token are subtracted from the kernel's own loss")
        )
    return cost


def _twice(batch: Batch) -> Batch:
    return Batch(*(torch.cat([getattr(batch, f.name)] * 2) for f in dataclasses.fields(batch)))


_WORDS = {"loss": "the loss of single draws", "gradient": "the gradient of single draws"}


def _note(into: Findings, part: str, gap: float) -> None:
    """Record a relative deviation from the kernel's own loss."""
    into.worst[part] = worst(into.worst.get(part, 0.0), gap)
    if not gap < POINTWISE:
        into.wrong.append(Wrong(part, f"{_WORDS[part]} is {gap:.2g} off"))


def _value(toy: Toy, objective: Objective, output: str, low: float, cost: Tensor, sizes: Sizes, into: Findings) -> None:
    """Compare the enumerated value of the bound with the entropy of the data."""
    value = value_of(toy, objective, output, low, cost, sizes.nodes)
    added = float((cost[toy.sequences].sum(-1) * toy.law).sum())
    total, gap = value.nats + added, abs(value.nats - value.expected)
    text = f"{total:.4f} against {toy.entropy:.4f} nats"
    into.value.append(text)
    if not gap < TIGHT + value.error:
        into.wrong.append(Wrong("tight", f"{text}: {gap:.2g} off the enumerated value ({value.how})"))
        return
    if objective.measure == "steps":
        # a step of all positions is drawn position by position, so that few steps give a loose bound: its end is verified
        row, random = Batch.of(toy.sequences[:1]), Randomness(torch.Generator())
        draw = objective.corrupt(row, toy.parts.kernel, toy.parts.schedule, random=random, t=torch.ones(1))
        last = float(draw.sigma.reshape(-1)[0])
        prior = prior_cost(toy, last)
        if bool((cost.abs() > COST).any()) and not bool(((cost - prior).abs() < COST * (1 + prior)).all()):
            text = f"the cost of a token is {float(cost.max()):.3g} nats, and its divergence from the prior {float(prior.max()):.3g}"
            into.wrong.append(Wrong("tight", text))
            return
        kept = toy.entropy - toy.entropy_given(last)
        if not kept <= OMITTED * toy.entropy:
            text = f"{text}: the last step does not start at the prior, and {kept:.2g} nats of the data are left in it"
            into.wrong.append(Wrong("tight", text))
        return
    if objective.measure == "time":
        left, wrong = _left_out(toy, objective, output)
        if wrong is not None:
            into.wrong.append(wrong)
            return
        total += left
        text = into.value[-1] = f"{total:.4f} against {toy.entropy:.4f} nats"
    if objective.slack > OMITTED:
        into.value[-1] += f" (declared slack {objective.slack:.0%})"
    limit, side = (OMITTED, "omitted") if total < toy.entropy else (max(OMITTED, objective.slack), "added")
    if not abs(total - toy.entropy) <= limit * toy.entropy:
        into.wrong.append(Wrong("tight", f"{text}: {abs(total - toy.entropy):.2g} nats are {side}"))


def _left_out(toy: Toy, objective: Objective, output: str) -> tuple[float, Wrong | None]:
    """Return the mean of what evaluation adds to the loss, :meth:`Objective.reconstruction`, and what is wrong with it.

    With a perfect network it is the mean of -log p(x_0 | x_t), in nats per sequence, at the least time and at any other.
    """
    kernel, schedule = toy.parts.kernel, toy.parts.schedule
    batch = random_batch(toy, 8, torch.Generator().manual_seed(1))
    probe = objective.reconstruction_draw(DrawRequest(batch, kernel, schedule, Randomness(torch.Generator())))
    if probe is None:
        return 0.0, None
    values = []
    for t in (probe.t.reshape(-1)[:1].double(), torch.tensor([LATE], dtype=torch.float64)):
        draw, batch, chance, _ = pairs(toy, objective, t)
        outputs = toy.outputs_for(draw, batch, output)
        nats = objective.reconstruction(outputs, draw, batch, kernel, schedule).double()
        found, expected = (float((v * chance).sum()) for v in (nats, decoded(toy, draw, batch)))
        if not abs(found - expected) < DECODED * expected + ROUNDING:
            text = f"the reconstruction term at t = {float(t):.3g} is {found:.4g} and must be {expected:.4g} nats"
            return 0.0, Wrong("tight", text)
        values.append(found)
    return values[0], None


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
        "random": ("draws depend on the seed and the row alone", "seeds, ranks and earlier draws"),
    }
    checks = []
    for part, (claim, how) in claims.items():
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
        holds, value = _verdict(wrong, found.not_run([part]), value)
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


def _form_check(name: str, found: Findings) -> Check:
    """Return the check of the bound, or of its evaluation."""
    claim = {
        "bound": "the bound of the objective passes the same checks",
        "evaluated": "so does the form for evaluation",
    }
    wrong = [f"{w.part}: {w.text}" for w in found.wrong]
    holds, value = _verdict(wrong, found.not_run(found.missed), "; ".join(found.value))
    return Check(f"objective.{name}", claim[name], holds, value, "loss, gradient, draws, value, optimum, roles")


def _verdict(wrong: list[str], not_run: str | None, value: str) -> tuple[bool | None, str]:
    """Return :attr:`Check.holds` and :attr:`Check.value`: False if anything is wrong, None if a part was not run."""
    return (False, wrong[0]) if wrong else (None, not_run) if not_run is not None else (True, value)
