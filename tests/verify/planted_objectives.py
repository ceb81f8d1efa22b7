"""Objectives with planted faults, and the check that must find each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sedd_graph_registry.objectives.block_diffusion import BlockNelbo
from sedd_graph_registry.objectives.bounds import MaskedCount, Nelbo, ScoreEntropy, counted
from sedd_graph_registry.objectives.discrete_time import D3PM
from sedd_graph_registry.objectives.learned import GenMD4
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.objective import Objective

Plain = Callable[..., Any]
Loss = Callable[[Plain, Mapping[str, Tensor], Draw, Batch, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Fault:
    """An objective with one fault.

    Attributes:
        name: The fault in words.
        base: The sound objective.
        kernel: Name of the kernel that it is tried with.
        output: Name of the network's output.
        caught: Suffix of the name of the check that must fail.
        methods: Methods that replace those of ``base``.
        config: Values of the Config.
    """

    name: str
    base: type[Objective]
    kernel: str
    output: str
    caught: str
    methods: Mapping[str, Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def cls(self) -> Any:
        base: Any = self.base

        class Config(base.Config):
            steps: int = base.Config.model_fields["steps"].default if "steps" in base.Config.model_fields else 1

        return type(base)("Planted", (base,), {"Config": Config, **self.methods}, kind="objective")


def by_loss(change: Loss) -> dict[str, Any]:
    """``change(plain, outputs, draw, batch, kernel)``, where ``plain(outputs, draw, batch)`` is the sound loss."""

    def loss(self: Any, outputs: Any, draw: Draw, batch: Batch, kernel: Any, schedule: Any) -> Tensor:
        base = type(self).__mro__[1]

        def plain(outputs: Any = outputs, draw: Draw = draw, batch: Batch = batch) -> Tensor:
            return base.loss(self, outputs, draw, batch, kernel, schedule)

        return change(plain, outputs, draw, batch, kernel)

    return {"loss": loss}


def by_corrupt(change: Callable[..., Draw]) -> dict[str, Any]:
    """``change(plain, batch, kernel, schedule, random, t, xt)``, where ``plain(**changes)`` is the sound draw."""

    def corrupt(
        self: Any, batch: Batch, kernel: Any, schedule: Any, *, random: Any, t: Any = None, xt: Any = None
    ) -> Draw:
        base = type(self).__mro__[1]

        def plain(batch: Batch = batch, random: Any = random, t: Any = t, xt: Any = xt) -> Draw:
            return base.corrupt(self, batch, kernel, schedule, random=random, t=t, xt=xt)

        return change(plain, batch, kernel, schedule, random, t, xt)

    return {"corrupt": corrupt}


def scaled(where: Callable[[Draw, Batch], Tensor], factor: float) -> dict[str, Any]:
    """The loss times ``factor`` in the rows ``where``."""
    return by_loss(lambda plain, o, draw, batch, k: plain() * torch.where(where(draw, batch), factor, 1.0))


def without(where: Callable[[Batch], Tensor]) -> dict[str, Any]:
    """The loss without the positions ``where``."""
    return by_loss(
        lambda plain, o, draw, batch, k: plain(batch=dataclasses.replace(batch, loss=batch.loss & ~where(batch)))
    )


def here(batch: Batch) -> Tensor:
    return torch.arange(batch.width).expand(batch.tokens.shape)


def of_bound(change: Loss) -> dict[str, Any]:
    """A faulty bound of a sound training loss."""
    cls = Fault("", Nelbo, "", "", "", by_loss(change)).cls()
    return {"bound": lambda self: cls(cls.Config(), self.context)}


def noisy(draw: Draw, batch: Batch, kernel: Any, sigma: Tensor, random: Any, u: Callable[[Tensor], Tensor]) -> Draw:
    """Mask by the uniform numbers ``u(numbers)``."""
    hit = u(random.rand(*batch.tokens.shape)) < -torch.expm1(-sigma)[:, None]
    return dataclasses.replace(draw, xt=torch.where(hit & batch.corrupt, kernel.mask, batch.tokens))


def remasked(u: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return by_corrupt(
        lambda plain, batch, kernel, s, random, t, xt: (
            plain() if xt is not None else noisy(plain(), batch, kernel, plain(t=plain().t).sigma, random, u)
        )
    )


def retimed(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Times drawn by another law, with the weights of even ones."""

    def corrupt(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
        if t is not None:
            return plain()
        return dataclasses.replace(
            plain(t=change(1e-4 + 0.9999 * random.rand(len(batch)))), weight=torch.ones(len(batch))
        )

    return by_corrupt(corrupt)


def edited(change: Callable[[Draw, Batch, Any], Draw], *, given: bool = True) -> dict[str, Any]:
    """Draws that are changed, those at given times too if ``given``."""

    def corrupt(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
        draw = plain()
        return draw if not given and t is not None else change(draw, batch, schedule)

    return by_corrupt(corrupt)


def global_noise(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    fresh = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
    return plain(random=Randomness(fresh, start=random.start, total=random.total))


def reseeded(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    return plain(random=Randomness(torch.Generator().manual_seed(1), start=random.start, total=random.total))


def seeds_all(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    torch.manual_seed(0)
    return plain()


def own_rows(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    return plain(random=Randomness(random.generator))


def stateful() -> dict[str, Any]:
    calls: list[int] = []

    def corrupt(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
        calls.append(1)
        if t is None and len(calls) > 20:
            random.generator.manual_seed(len(calls))
        return plain()

    return by_corrupt(corrupt)


def kept_times() -> dict[str, Any]:
    first: dict[int, Tensor] = {}

    def corrupt(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
        if t is None:
            t = first.setdefault(len(batch), plain().t)
            return dataclasses.replace(plain(t=t), weight=torch.full((len(batch),), 1 - 1e-4))
        return plain()

    return by_corrupt(corrupt)


def slowly(plain: Plain, o: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    plain_ = plain()
    return plain_ + 0.5 * (plain_ - plain_.detach())


def smoothed(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    masked = torch.where(draw.xt == kernel.mask, -outputs["log_x0"][..., : kernel.mask].mean(-1), 0.0)
    return 0.9 * plain() + 0.1 * counted(masked, batch)


def penalised(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    squares = torch.where(draw.xt == kernel.mask, outputs["log_x0"][..., : kernel.mask].square().sum(-1), 0.0)
    return plain() + 1e-3 * counted(squares, batch)


def accuracy(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    p = outputs["log_x0"].gather(-1, batch.tokens[..., None])[..., 0].exp()
    return counted(torch.where(draw.xt == kernel.mask, 1 - p, 0.0), batch)


def sharpened(power: float) -> dict[str, Any]:
    def change(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
        return plain(outputs={k: (v * power).log_softmax(-1) for k, v in outputs.items()})

    return by_loss(change)


def extra(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    ce = torch.where(draw.xt == kernel.mask, -outputs["log_x0"].gather(-1, batch.tokens[..., None])[..., 0], 0.0)
    return plain() + 0.1 * counted(ce, batch)


def fed(change: Callable[[dict[str, Any], Draw, Batch], dict[str, Any]]) -> dict[str, Any]:
    def inputs(self: Any, draw: Draw, batch: Batch) -> dict[str, Any]:
        return change(dict(type(self).__mro__[1].inputs(self, draw, batch)), draw, batch)

    return {"inputs": inputs}


def bound_draws(change: Callable[..., Any]) -> dict[str, Any]:
    def bound_draw(self: Any, batch: Batch, kernel: Any, schedule: Any, *, random: Any) -> Any:
        objective = type(self).__mro__[1].evaluated(self, kernel)
        return change(objective, batch, kernel, schedule, random)

    return {"bound_draw": bound_draw}


def halved(objective: Any, batch: Batch, kernel: Any, schedule: Any, random: Any) -> Any:
    draw = objective.corrupt(batch, kernel, schedule, random=random)
    return objective, dataclasses.replace(draw, weight=draw.weight / 2)


def late(objective: Any, batch: Batch, kernel: Any, schedule: Any, random: Any) -> Any:
    draw = objective.corrupt(batch, kernel, schedule, random=random, t=0.5 + 0.5 * random.rand(len(batch)))
    return objective, draw


def first_row(objective: Any, batch: Batch, kernel: Any, schedule: Any, random: Any) -> Any:
    draw = objective.corrupt(batch, kernel, schedule, random=random)
    return objective, dataclasses.replace(draw, t=draw.t[:1].expand(len(batch)))


def noised_prompts(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    if xt is not None:
        return plain()
    return plain(batch=dataclasses.replace(batch, corrupt=torch.ones_like(batch.corrupt)))


def rejoined(plain: Plain, o: Any, draw: Draw, batch: Batch, k: Any) -> Tensor:
    return plain().roll(1)


def swapped_blocks(plain: Plain, o: Any, draw: Draw, batch: Batch, k: Any) -> Tensor:
    return plain(draw=dataclasses.replace(draw, dsigma=draw.dsigma.flip(1), sigma=draw.sigma.flip(1)))


def no_constant(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    score = outputs["log_score"].double()
    zero = kernel.score_entropy(torch.zeros_like(score), draw.xt, batch.tokens, draw.sigma.double())
    return (plain() - draw.weight * draw.dsigma * counted(zero, batch)).float()


def never(which: Callable[[Batch], Tensor]) -> dict[str, Any]:
    """Some tokens are never noised, unless noisy rows are given."""

    def corrupt(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
        draw = plain()
        return (
            draw if xt is not None else dataclasses.replace(draw, xt=torch.where(which(batch), batch.tokens, draw.xt))
        )

    return by_corrupt(corrupt)


def half_noise(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    draw = plain()
    if xt is not None:
        return draw
    return dataclasses.replace(
        draw, xt=kernel.sample(batch.tokens, draw.sigma / 2, random=random, corrupt=batch.corrupt)
    )


def few_masks(plain: Plain, batch: Batch, kernel: Any, schedule: Any, random: Any, t: Any, xt: Any) -> Draw:
    return plain() if xt is not None else plain(t=0.6 * random.rand(len(batch)))


def reversed_kl(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    return plain(outputs={k: v.detach() for k, v in outputs.items()})


def below_off(self: Any, draw: Draw, kernel: Any, schedule: Any) -> Tensor:
    step = (draw.t.double() * self.config.steps).round().long()
    return self.levels((step - 2).clamp(min=0), schedule, kernel)


def never_noise(self: Any, step: Tensor, schedule: Any, kernel: Any) -> Tensor:
    return (0.5 * step / self.config.steps).float()


def decoding(change: Callable[[Tensor, Draw], Tensor]) -> dict[str, Any]:
    """The reconstruction term changed."""

    def reconstruction(self: Any, outputs: Any, draw: Draw, batch: Batch, kernel: Any, schedule: Any) -> Tensor:
        return change(type(self).__mro__[1].reconstruction(self, outputs, draw, batch, kernel, schedule), draw)

    return {"reconstruction": reconstruction}


N, S, M, B, D, G = Nelbo, ScoreEntropy, MaskedCount, BlockNelbo, D3PM, GenMD4
LAST_TOKEN: Callable[[Batch], Tensor] = lambda batch: batch.tokens == 2  # noqa: E731
FOURTH: Callable[[Batch], Tensor] = lambda batch: batch.tokens >= 3  # noqa: E731
X, C = "log_x0", "log_score"

FAULTS = [
    Fault("five percent too large", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: 1.05 * p())),
    Fault("five percent too large, a Config field named steps", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: 1.05 * p()), {"steps": 1}),
    Fault("uniform, one percent too small", N, "uniform", X, "loss", by_loss(lambda p, o, d, b, k: 0.99 * p())),
    Fault("last position not counted", N, "absorb", X, "loss", without(lambda b: here(b) == b.width - 1)),
    Fault("last token not counted", N, "absorb", X, "loss", without(LAST_TOKEN)),
    Fault("last token not counted, scores", S, "uniform", C, "loss", without(LAST_TOKEN)),
    Fault("narrow stretch of t", N, "absorb", X, "loss", scaled(lambda d, b: (d.t > 0.43) & (d.t < 0.44), 1.3)),
    Fault("narrow stretch of t, uniform", N, "uniform", X, "loss", scaled(lambda d, b: (d.t > 0.7) & (d.t < 0.71), 0.5)),
    Fault("low noise ignored", N, "absorb", X, "loss", scaled(lambda d, b: d.sigma < 1e-3, 0.0)),
    Fault("low noise doubled, scores", S, "uniform", C, "loss", scaled(lambda d, b: d.sigma < 1e-3, 2.0)),
    Fault("high noise ignored", N, "absorb", X, "loss", scaled(lambda d, b: d.sigma > 5, 0.0)),
    Fault("high noise ignored, scores", S, "absorb", C, "loss", scaled(lambda d, b: d.sigma > 4, 0.5)),
    Fault("sharpened outputs", N, "absorb", X, "loss", sharpened(1.1)),
    Fault("flattened outputs, uniform", N, "uniform", X, "loss", sharpened(0.95)),
    Fault("label smoothing", N, "absorb", X, "loss", by_loss(smoothed)),
    Fault("penalty on logits", N, "absorb", X, "loss", by_loss(penalised)),
    Fault("one minus accuracy", N, "absorb", X, "loss", by_loss(accuracy)),
    Fault("gradient 1.5 times the right one", N, "absorb", X, "gradient", by_loss(slowly)),
    Fault("no gradient", M, "absorb", X, "gradient", by_loss(lambda p, o, d, b, k: p().detach())),
    Fault("no gradient at the last token", N, "absorb", X, "gradient", by_loss(lambda p, o, d, b, k: p(outputs={"log_x0": torch.where((b.tokens == 2)[..., None], o["log_x0"].detach(), o["log_x0"])}))),
    Fault("losses divided by tokens", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: p() / b.counted.clamp(min=1))),
    Fault("losses of other rows", N, "absorb", X, "loss", by_loss(rejoined)),
    Fault("mean of the batch", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: p().mean().expand(len(b)))),
    Fault("large losses clipped", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: p().clamp(max=8))),
    Fault("weights clipped", S, "uniform", C, "loss", by_loss(lambda p, o, d, b, k: p(draw=dataclasses.replace(d, dsigma=d.dsigma.clamp(max=20))))),
    Fault("NaN at low noise", N, "absorb", X, "loss", scaled(lambda d, b: d.sigma < 3e-4, float("nan"))),
    Fault("0.05 nats a token missing", N, "absorb", X, "loss", by_loss(lambda p, o, d, b, k: p() - 0.05 * b.counted)),
    Fault("0.05 nats a token too much", N, "absorb", X, "tight", by_loss(lambda p, o, d, b, k: p() + 0.05 * b.counted)),
    Fault("constant missing", S, "uniform", C, "loss", by_loss(no_constant)),
    Fault("factor n / (n - 1)", S, "uniform", C, "loss", by_loss(lambda p, o, d, b, k: p() * k.states / (k.states - 1))),
    Fault("counts prompts", N, "absorb", X, "roles", by_loss(lambda p, o, d, b, k: p(batch=dataclasses.replace(b, loss=torch.ones_like(b.loss))))),
    Fault("counts what is not noised", N, "uniform", X, "roles", by_loss(lambda p, o, d, b, k: p(batch=dataclasses.replace(b, corrupt=torch.ones_like(b.corrupt))))),
    Fault("noises prompts", N, "absorb", X, "roles", by_corrupt(noised_prompts)),
    Fault("noises prompts, in counts", M, "absorb", X, "roles", by_corrupt(noised_prompts)),
    Fault("attend without padding", N, "absorb", X, "roles", fed(lambda i, d, b: {**i, "attend": torch.ones_like(b.attend)})),
    Fault("clean tokens given to the network", N, "absorb", X, "roles", fed(lambda i, d, b: {**i, "tokens": b.tokens})),
    Fault("another noise level given to the network", N, "uniform", X, "roles", fed(lambda i, d, b: {**i, "sigma": i["sigma"] * 2})),
    Fault("rows of a batch masked with one number each", N, "absorb", X, "draws", remasked(lambda u: u[:, :1].expand(u.shape))),
    Fault("positions masked alike in all rows", N, "absorb", X, "draws", remasked(lambda u: u[:1].expand(u.shape))),
    Fault("the next row has the same noise", N, "absorb", X, "draws", remasked(lambda u: u[torch.arange(len(u)) // 2 * 2])),
    Fault("last position never noised", N, "absorb", X, "draws", never(lambda b: here(b) == b.width - 1)),
    Fault("last token never noised", N, "uniform", X, "draws", never(LAST_TOKEN)),
    Fault("noise of half the level", N, "absorb", X, "draws", by_corrupt(half_noise)),
    Fault("early times not drawn", N, "absorb", X, "draws", retimed(lambda t: 0.05 + 0.95 * t)),
    Fault("times squared, weights of even ones", N, "uniform", X, "draws", retimed(lambda t: t**2)),
    Fault("a stretch of t never drawn", N, "absorb", X, "draws", retimed(lambda t: torch.where((t > 0.4) & (t < 0.5), t + 0.1, t))),
    Fault("weights five percent off", N, "absorb", X, "draws", edited(lambda d, b, s: dataclasses.replace(d, weight=d.weight * 1.05))),
    Fault("sigma of another time", N, "absorb", X, "draws", edited(lambda d, b, s: dataclasses.replace(d, sigma=s.sigma(d.t**1.01)))),
    Fault("dsigma missing", S, "absorb", C, "draws", edited(lambda d, b, s: dataclasses.replace(d, dsigma=torch.ones_like(d.dsigma)))),
    Fault("never all masks", M, "absorb", X, "draws", by_corrupt(few_masks)),
    Fault("weights L / (k + 1)", M, "absorb", X, "draws", edited(lambda d, b, s: dataclasses.replace(d, weight=d.weight / (1 + d.weight / b.width)))),
    Fault("global generator", N, "absorb", X, "random", by_corrupt(global_noise)),
    Fault("seeds the global generator", N, "absorb", X, "random", by_corrupt(seeds_all)),
    Fault("always the same seed", N, "absorb", X, "random", by_corrupt(reseeded)),
    Fault("each rank draws the first rows", N, "absorb", X, "random", by_corrupt(own_rows)),
    Fault("noise depends on the number of calls", N, "absorb", X, "random", stateful()),
    Fault("times of the first draw for ever", N, "absorb", X, "random", kept_times()),
    Fault("bound five percent off", N, "absorb", X, "bound", of_bound(lambda p, o, d, b, k: 1.05 * p())),
    Fault("bound five percent too low, uniform", N, "uniform", X, "bound", of_bound(lambda p, o, d, b, k: 0.95 * p())),
    Fault("bound without the last position", N, "absorb", X, "bound", of_bound(lambda p, o, d, b, k: p(batch=dataclasses.replace(b, loss=b.loss & (here(b) < b.width - 1))))),
    Fault("an undeclared term in training", N, "absorb", X, "loss", {**by_loss(extra), "bound": lambda self: Nelbo(Nelbo.Config(), self.context)}),
    Fault("declared to differ, and smoothed", N, "absorb", X, "optimum", {**by_loss(smoothed), "differs": lambda self: "smoothed", "bound": lambda self: Nelbo(Nelbo.Config(), self.context)}),
    Fault("declared to differ, and penalised", N, "absorb", X, "optimum", {**by_loss(penalised), "differs": lambda self: "penalised", "bound": lambda self: Nelbo(Nelbo.Config(), self.context)}),
    Fault("declared to differ, and one minus accuracy", N, "absorb", X, "optimum", {**by_loss(accuracy), "differs": lambda self: "other", "bound": lambda self: Nelbo(Nelbo.Config(), self.context)}),
    Fault("reconstruction of the other sign, times five", N, "absorb", X, "tight", decoding(lambda nats, d: -5 * nats)),
    Fault("reconstruction doubled, uniform", N, "uniform", X, "tight", decoding(lambda nats, d: 2 * nats)),
    Fault("reconstruction doubled, scores", S, "uniform", C, "tight", decoding(lambda nats, d: 2 * nats)),
    Fault("reconstruction missing", S, "absorb", C, "tight", decoding(lambda nats, d: 0 * nats)),
    Fault("reconstruction of high noise one percent off", N, "uniform", X, "tight", decoding(lambda nats, d: nats * torch.where(d.t > 0.01, 1.01, 1.0))),
    Fault("declared to differ from itself, and halved", N, "absorb", X, "loss", {**by_loss(lambda p, o, d, b, k: 0.5 * p()), "differs": lambda self: "halved", "evaluated": lambda self, kernel: self}),
    Fault("declared to differ from a bound that is not evaluated, and halved", N, "absorb", X, "evaluated", {**by_loss(lambda p, o, d, b, k: 0.5 * p()), "differs": lambda self: "halved", "bound": lambda self: Nelbo(Nelbo.Config(), self.context), "evaluated": lambda self, kernel: self}),
    Fault("weights of evaluation halved", N, "absorb", X, "evaluated", bound_draws(halved)),
    Fault("evaluation at late times alone", N, "uniform", X, "evaluated", bound_draws(late)),
    Fault("evaluation says another time", N, "uniform", X, "evaluated", bound_draws(first_row)),
    Fault("evaluation of blocks halved", B, "absorb", X, "evaluated", bound_draws(halved), {"block": 2}),
    Fault("last block not counted", B, "absorb", X, "loss", without(lambda b: here(b) >= b.width // 2), {"block": 2}),
    Fault("noise levels of blocks swapped", B, "absorb", X, "loss", by_loss(swapped_blocks), {"block": 2}),
    Fault("blocks see no earlier text", B, "absorb", X, "roles", fed(lambda i, d, b: {**i, "clean": torch.zeros_like(i["clean"])}), {"block": 2}),
    Fault("second position of a block never noised", B, "absorb", X, "draws", never(lambda b: here(b) % 2 == 1), {"block": 2}),
    Fault("steps skipped", D, "absorb", X, "draws", {"below": below_off}, {"steps": 50}),
    Fault("one step too few counted", D, "absorb", X, "draws", edited(lambda d, b, s: dataclasses.replace(d, weight=d.weight - 1)), {"steps": 20}),
    Fault("no gradient in discrete time", D, "uniform", X, "gradient", by_loss(reversed_kl), {"steps": 50}),
    Fault("first step not counted", D, "absorb", X, "loss", scaled(lambda d, b: d.t < 0.03, 0.0), {"steps": 50}),
    Fault("the last step does not reach the prior", D, "absorb", X, "tight", {"levels": never_noise}, {"steps": 50}),
    Fault("the last step does not reach the prior, uniform", D, "uniform", X, "tight", {"levels": never_noise}, {"steps": 50}),
    Fault("auxiliary loss in the bound", D, "absorb", X, "bound", {"bound": lambda self: D3PM(self.config.model_copy(update={"auxiliary": 0.02}), self.context)}, {"steps": 50, "auxiliary": 0.01}),
    Fault("learned rates, loss five percent off", G, "power", X, "loss", by_loss(lambda p, o, d, b, k: 1.05 * p())),
    Fault("a tenth of the loss of pairs missing", G, "power", X, "loss", by_loss(lambda p, o, d, b, k: p() * (1.0 if len(d.xt) == len(b) else 0.9))),
    Fault("raises an error on padding", N, "absorb", X, "runs", by_loss(lambda p, o, d, b, k: p() if bool(b.attend.all()) else p().reshape(3, -1, 7))),
    Fault("right for three tokens alone", N, "absorb", X, "loss", without(FOURTH)),
    Fault("right for three tokens alone, scores", S, "uniform", C, "loss", without(FOURTH)),
    Fault("right for two positions alone", N, "absorb", X, "loss", without(lambda b: here(b) >= 2)),
    Fault("third position never noised", N, "uniform", X, "draws", never(lambda b: here(b) >= 2)),
    Fault("fourth token never noised", M, "absorb", X, "draws", never(FOURTH)),
]  # fmt: skip
