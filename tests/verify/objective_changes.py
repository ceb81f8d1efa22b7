"""Changes of methods of objectives, each a fault: the library of ``planted_objectives``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sedd_graph_registry.objectives.bounds import Nelbo, counted
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


def completed(nats: float) -> dict[str, Any]:
    """A reconstruction term of ``nats`` a row, for a loss that counts all noise."""
    return {
        "reconstruction_draw": lambda self, request: self.draw(request),
        "reconstruction": lambda self, outputs, draw, batch, kernel, schedule: torch.full((len(batch),), nats),
    }


def unread(where: Callable[[Draw, Batch], Tensor]) -> dict[str, Any]:
    """The positions ``where`` are declared not to be read."""

    def read_positions(self: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
        read: Tensor = type(self).__mro__[1].read_positions(self, draw, batch, kernel)
        return read & ~where(draw, batch)

    return {"read_positions": read_positions}


def own_weight(plain: Plain, outputs: Any, draw: Draw, batch: Batch, kernel: Any) -> Tensor:
    """The loss with the weight counted in its own rows, which is right for whole rows alone."""
    masks = ((draw.xt == kernel.mask) & batch.corrupt).sum(-1).clamp(min=1)
    return plain(draw=dataclasses.replace(draw, weight=(batch.corrupt.sum(-1) / masks).float()))


def halved_positions() -> dict[str, Any]:
    """Half the loss where it is evaluated at positions."""
    cls = Fault("", Nelbo, "", "", "", by_loss(lambda plain, *_: 0.5 * plain())).cls()
    return {"of_positions": lambda self: cls(cls.Config(), self.context)}
