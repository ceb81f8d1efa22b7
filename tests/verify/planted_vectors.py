"""Processes on vectors with planted faults, and the check that must find each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sedd_graph_registry.noise.schedules_gaussian import Stepwise
from sedd_graph_registry.vectors.kernels import Gaussian
from sedd_graph_registry.vectors.objectives import DiffusionLM
from sedd_graph_registry.vectors.samplers import DDIM, DDPM
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.vectors import gaussian
from sedd_graph.diffusion.vectors.gaussian import along, noise_std, posterior, signal
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.sampler import VectorWalk

__all__ = ["FAULTS", "Fault", "parts"]

TOTAL = 2000


@dataclasses.dataclass(frozen=True)
class Fault:
    """A process on vectors with one fault.

    Attributes:
        name: The fault in words.
        part: The component that has it: kernel, schedule, objective or sampler.
        base: The sound component.
        caught: Suffix of the name of the check that must fail.
        methods: Methods that replace those of ``base``.
        config: Values of the Config.
    """

    name: str
    part: str
    base: Any
    caught: str
    methods: Mapping[str, Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parts(self, vocab: int = 3, width: int = 1) -> VectorParts:
        """Return the components with the fault."""
        return parts(vocab, width, **{self.part: self._made(vocab, width)})

    def _made(self, vocab: int, width: int) -> Any:
        cls: Any = type(f"Planted{self.base.__name__}", (self.base,), dict(self.methods))
        sizes = {"vocab": vocab, "width": width} if self.part == "kernel" else {}
        return cls(cls.Config(**{**sizes, **self.config}), Context({"n": vocab}))


def parts(vocab: int = 3, width: int = 1, **changed: Any) -> VectorParts:
    """Return the components of Diffusion-LM with some of them changed."""
    context = Context({"n": vocab})
    sound = {
        "kernel": lambda: Gaussian(Gaussian.Config(vocab=vocab, width=width), context),
        "schedule": lambda: Stepwise(Stepwise.Config(), context),
        "objective": lambda: DiffusionLM(DiffusionLM.Config(), context),
        "sampler": lambda: DDPM(DDPM.Config(), context),
    }
    return VectorParts(*(changed.get(name) or make() for name, make in sound.items()))


Step = Callable[[VectorWalk, Tensor, Tensor | None], None]


def stepping(step: Step) -> dict[str, Any]:
    """Replace the walk of a sampler by ``step(walk, t, s)`` over the times, with s None in the last step."""

    def walk(self: Any, walk: VectorWalk, times: Tensor) -> None:
        every = [t.expand(len(walk.x)) for t in times]
        for t, s in zip(every, [*every[1:], None], strict=True):
            step(walk, t, s)
            walk.end_step()

    return {"walk": walk}


def ddpm(
    mean: Callable[[VectorWalk, Tensor, Tensor, Tensor], Tensor], noise: Callable[[Tensor], Tensor] = lambda v: v.sqrt()
) -> dict[str, Any]:
    """A step of DDPM with the mean ``mean(walk, x0, sigma_s, sigma_t)`` and the standard deviation ``noise(variance)``."""

    def step(walk: VectorWalk, t: Tensor, s: Tensor | None) -> None:
        x0, sigma = walk.estimate(t).x0, walk.sigma(t)
        if s is None:
            walk.put(x0, torch.zeros_like(t))
            return
        lower = walk.sigma(s)
        deviation = noise(walk.kernel.reverse_variance(lower, sigma, walk.schedule))
        walk.put(mean(walk, x0, lower, sigma) + along(deviation, x0) * walk.normal(), s)

    return stepping(step)


def later(sigma: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Total noise one step later."""
    return lambda self, schedule, t: sigma(self, schedule, torch.where(t > 0, (t + 1 / TOTAL).clamp(max=1.0), t))


def backwards(walk: VectorWalk, x0: Tensor, lower: Tensor, sigma: Tensor) -> Tensor:
    found = posterior(lower, sigma)
    return along(found.start, x0) * x0 - along(found.noisy, x0) * walk.x


def next_posterior(walk: VectorWalk, t: Tensor, s: Tensor | None) -> None:
    """The posterior of x_t given x_{t+1}, in place of that of x_{t-1} given x_t."""
    x0, above = walk.estimate(t).x0, walk.sigma((t + 1 / TOTAL).clamp(max=1.0))
    if s is None:
        walk.put(x0, torch.zeros_like(t))
        return
    found = posterior(walk.sigma(s + 1 / TOTAL), above.clamp(min=1e-9) + 1e-9)
    walk.put(found.mean(x0, walk.x) + along(found.variance.sqrt(), x0) * walk.normal(), s)


def noisy_end(walk: VectorWalk, t: Tensor, s: Tensor | None) -> None:
    x0, sigma = walk.estimate(t).x0, walk.sigma(t)
    lower = torch.zeros_like(sigma) if s is None else walk.sigma(s)
    deviation = noise_std(sigma - lower)
    walk.put(posterior(lower, sigma).mean(x0, walk.x) + along(deviation, x0) * walk.normal(), t if s is None else s)


def too_much_noise(walk: VectorWalk, t: Tensor, s: Tensor | None) -> None:
    """DDIM whose drawn noise is not taken from the noise that is kept."""
    x0, sigma = walk.estimate(t).x0, walk.sigma(t)
    if s is None:
        walk.put(x0, torch.zeros_like(t))
        return
    lower = walk.sigma(s)
    noise = (walk.x - along(signal(sigma), x0) * x0) / along(noise_std(sigma), x0)
    kept = along(signal(lower), x0) * x0 + along(noise_std(lower), x0) * noise
    walk.put(kept + along(0.5 * noise_std(lower) * noise_std(sigma - lower), x0) * walk.normal(), s)


def global_noise(walk: VectorWalk, t: Tensor, s: Tensor | None) -> None:
    x0, sigma = walk.estimate(t).x0, walk.sigma(t)
    if s is None:
        walk.put(x0, torch.zeros_like(t))
        return
    lower = walk.sigma(s)
    variance = walk.kernel.reverse_variance(lower, sigma, walk.schedule)
    walk.put(posterior(lower, sigma).mean(x0, walk.x) + along(variance.sqrt(), x0) * torch.randn_like(x0), s)


def dot_product(self: Any, x0: Tensor, allowed: Tensor | None = None) -> Tensor:
    found = x0 @ self.table().T
    return (found if allowed is None else found.masked_fill(~allowed, -torch.inf)).argmax(-1)


def earlier_half(self: Any, batch: Any, kernel: Any, schedule: Any, *, random: Any) -> Any:
    draw = DiffusionLM.bound_draw(self, batch, kernel, schedule, random=random)
    return dataclasses.replace(draw, t=((draw.t * TOTAL / 4).ceil().clamp(min=2) / TOTAL))


def doubled_bound(self: Any, *arguments: Any) -> Tensor:
    return 2 * DiffusionLM.bound(self, *arguments)


def bound_of_next(self: Any, denoise: Any, draw: Any, batch: Any, kernel: Any, schedule: Any) -> Tensor:
    moved = dataclasses.replace(draw, t=(draw.t + 0.02).clamp(max=1.0).mul(TOTAL).round() / TOTAL)
    return DiffusionLM.bound(self, denoise, moved, batch, kernel, schedule)


def inputs(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Any]:
    return {"inputs": lambda self, x, t, sigma: change(Gaussian.inputs(self, x, t, sigma))}


FAULTS = [
    Fault(
        "wrong sigma_0: the variance as standard deviation",
        "kernel",
        Gaussian,
        "start",
        {"start": lambda self, tokens, schedule, noise: self.embed(tokens) + self.start_variance(schedule) * noise},
    ),
    Fault(
        "wrong sigma_0: the standard deviation as variance",
        "kernel",
        Gaussian,
        "start",
        {"start_variance": lambda self, schedule: self.declared_start(schedule)},
    ),
    Fault("schedule off by a step", "kernel", Gaussian, "noise", {"sigma": later(Gaussian.sigma)}),
    Fault(
        "variance as standard deviation of the noise",
        "kernel",
        Gaussian,
        "noise",
        {
            "noised": lambda self, x0, sigma, noise: (
                along(signal(sigma), x0) * x0 + along(noise_std(sigma).square(), x0) * noise
            )
        },
    ),
    Fault(
        "alpha_bar in place of its square root",
        "kernel",
        Gaussian,
        "noise",
        {
            "noised": lambda self, x0, sigma, noise: (
                along(torch.exp(-sigma), x0) * x0 + along(noise_std(sigma), x0) * noise
            )
        },
    ),
    Fault("log-SNR with the wrong sign", "kernel", Gaussian, "noise", inputs(lambda v: v | {"log_snr": -v["log_snr"]})),
    Fault("rounding to the wrong norm", "kernel", Gaussian, "nearest", {"nearest": dot_product}),
    Fault(
        "forbidden tokens are nearest",
        "kernel",
        Gaussian,
        "nearest",
        {"nearest": lambda self, x0, allowed=None: Gaussian.nearest(self, x0)},
    ),
    Fault(
        "the head of the next token",
        "kernel",
        Gaussian,
        "rounding",
        {"logits": lambda self, x0: Gaussian.logits(self, x0).roll(1, -1)},
    ),
    Fault(
        "embeddings of another token",
        "kernel",
        Gaussian,
        "table",
        {"embed": lambda self, t: self.table().roll(1, 0)[t]},
    ),
    Fault("missing anchor", "objective", DiffusionLM, "optimum", {"target": staticmethod(lambda clean, x0, t, k: x0)}),
    Fault(
        "anchored at every step",
        "objective",
        DiffusionLM,
        "optimum",
        {"target": staticmethod(lambda clean, x0, t, k: clean)},
    ),
    Fault(
        "missing tT term",
        "objective",
        DiffusionLM,
        "loss",
        {"last": staticmethod(lambda x0, kernel, schedule: torch.zeros_like(x0[..., 0]))},
    ),
    Fault(
        "missing rounding term",
        "objective",
        DiffusionLM,
        "loss",
        {"rounding": staticmethod(lambda x0, batch, kernel: torch.zeros_like(x0[..., 0]))},
    ),
    Fault("bound of half the steps", "objective", DiffusionLM, "bound_above", {"bound_draw": earlier_half}),
    Fault("bound counted twice", "objective", DiffusionLM, "bound", {"bound": doubled_bound}),
    Fault(
        "missing prior term",
        "objective",
        DiffusionLM,
        "bound",
        {"prior": staticmethod(lambda clean, kernel, schedule: torch.zeros_like(clean[..., 0]))},
    ),
    Fault("sign of the drift", "sampler", DDPM, "step", ddpm(backwards)),
    Fault("posterior of t + 1", "sampler", DDPM, "step", stepping(next_posterior)),
    Fault(
        "the estimate in place of the posterior mean", "sampler", DDPM, "step", ddpm(lambda walk, x0, lower, sigma: x0)
    ),
    Fault(
        "variance as standard deviation in a step",
        "sampler",
        DDPM,
        "step",
        ddpm(lambda walk, x0, lower, sigma: posterior(lower, sigma).mean(x0, walk.x), lambda v: v),
    ),
    Fault("noise in the last step", "sampler", DDPM, "step", stepping(noisy_end)),
    Fault("implicit step with too much noise", "sampler", DDIM, "step", stepping(too_much_noise)),
    Fault("global generator", "sampler", DDPM, "conditions", stepping(global_noise)),
    Fault(
        "reverse variance twice",
        "kernel",
        Gaussian,
        "variance",
        {"reverse_variance": lambda self, lower, sigma, schedule: -2 * torch.expm1(lower - sigma)},
    ),
]

GAUSSIAN: dict[str, Any] = {
    "coefficients of the posterior swapped": lambda lower, sigma, variance=0.0: (
        lambda p: gaussian.Posterior(p.noisy, p.start, p.variance)
    )(posterior(lower, sigma, variance)),
    "posterior without the variance of x_0": lambda lower, sigma, variance=0.0: posterior(lower, sigma),
    "posterior with the variance of the forward step": lambda lower, sigma, variance=0.0: posterior(
        lower, sigma, variance
    )._replace(variance=-torch.expm1(lower - sigma)),
}
"""Faults of the shared algebra: replacements of :func:`sedd_graph.diffusion.vectors.gaussian.posterior`."""
