"""Samplers with planted faults, and the check that must find each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi
from torch import Tensor

from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.draws import Draws, systematic
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Walk

Step = Callable[[Callable[..., None], Walk, Tensor, "Tensor | None"], None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A sampler with one fault.

    Attributes:
        name: The fault in words.
        base: The sound sampler.
        kernel: Name of the kernel that it is tried with.
        caught: Suffix of the name of the check that must fail.
        methods: Methods and attributes that replace those of ``base``.
        full: True if only the full proof is strong enough.
        config: Values of the Config.
    """

    name: str
    base: type[Sampler]
    kernel: str
    caught: str
    methods: Mapping[str, Any]
    full: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def cls(self) -> Any:
        base: Any = self.base
        own = type("Config", (base.Config,), {"__module__": __name__})
        return type(base)("Planted", (base,), {"Config": own, **self.methods}, kind="sampler")


def by_step(change: Step) -> dict[str, Any]:
    """``change(plain, walk, t, s)``, where ``plain(walk, t, s)`` is the sound step."""

    def step(self: Any, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        base = type(self).__mro__[1]
        change(lambda w=walk, t=t, s=s: base.step(self, w, t, s), walk, t, s)

    return {"step": step}


def independent() -> dict[str, Any]:
    """Claims that independent tokens are exact at any number of steps."""
    return {"alone": lambda self, kernel: True}


def one_start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    """Systematic sampling with one start for all rows."""

    def going(x: Tensor, move: Tensor, *, spread: bool = False) -> Tensor:
        start = torch.rand(1, 1, generator=walk.generator, dtype=torch.float64).expand(len(move), 1)
        return systematic(start, move) < move.double()

    walk.draws.going = going
    plain()


def by_walk(change: Callable[[Callable[..., None], Walk, int], None]) -> dict[str, Any]:
    """``change(plain, walk, steps)``, where ``plain(walk, steps)`` is the sound walk."""

    def walk_(self: Any, walk: Walk, steps: int) -> None:
        base = type(self).__mro__[1]
        change(lambda w=walk, n=steps: base.walk(self, w, n), walk, steps)

    return {"walk": walk_}


def network(change: Callable[[dict[str, Tensor], Walk, Tensor], dict[str, Tensor]]) -> dict[str, Any]:
    """The outputs of the network are changed before the sampler reads them."""

    def start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
        denoise = walk._denoise

        def changed(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
            found = dict(denoise(x, t, rows) if at is None else denoise(x, t, rows, at))
            return change(found, walk, t)

        walk._denoise = changed
        plain()

    return by_walk(start)


def hot(temperature: float, when: Callable[[Tensor], Tensor] = lambda t: t >= 0) -> dict[str, Any]:
    """New tokens are drawn at a temperature, at the times ``when``."""

    def start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
        draw, outputs, last = walk.draw, walk.outputs, [torch.zeros(1)]

        def noted(t: Tensor, need: Tensor | None = None) -> Any:
            last[0] = t
            return outputs(t, need)

        def colder(move: Tensor, weights: Any, **more: Any) -> Tensor:
            def changed(v: Tensor) -> Tensor:
                return sharpen(v, temperature=temperature, top_p=1.0) if bool(when(last[0]).all()) else v

            return draw(
                move, changed(weights) if isinstance(weights, Tensor) else lambda m: changed(weights(m)), **more
            )

        seam: Any = walk
        seam.outputs, seam.draw = noted, colder
        plain()

    return by_walk(start)


def weights_of(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Weights of new tokens are changed."""

    def start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
        draw = walk.draw

        def changed(move: Tensor, weights: Any, **more: Any) -> Tensor:
            return draw(move, change(weights) if isinstance(weights, Tensor) else lambda m: change(weights(m)), **more)

        seam: Any = walk
        seam.draw = changed
        plain()

    return by_walk(start)


def moves_of(change: Callable[[Tensor, Walk], Tensor]) -> dict[str, Any]:
    """Probabilities of a change are changed."""

    def start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
        draw = walk.draw

        def changed(move: Tensor, weights: Any, **more: Any) -> Tensor:
            return draw(change(move, walk), weights, **more)

        seam: Any = walk
        seam.draw = changed
        plain()

    return by_walk(start)


def together(dim: int) -> dict[str, Any]:
    """Positions of a row (1), or rows (0), change together."""

    def change(move: Tensor, walk: Walk) -> Tensor:
        u = torch.rand(move.shape, generator=walk.generator, dtype=torch.float64)
        return (u.narrow(dim, 0, 1).expand(move.shape) < move.double()).double()

    return moves_of(change)


def data_only(mean: Tensor) -> Tensor:
    """Log-probabilities of sums [.., n], none for the mask."""
    mean = mean + 1e-6
    mean[..., -1] = 0.0
    return (mean / mean.sum(-1, keepdim=True)).log().clamp(min=-1e6)


def mean_over_rows(found: dict[str, Tensor], walk: Walk, t: Tensor) -> dict[str, Tensor]:
    """Probabilities at masks averaged over rows: no dependence on other tokens."""
    log_x0 = found["log_x0"]
    sure = log_x0.amax(-1, keepdim=True) > -1e-6
    mean = torch.where(sure, 0.0, log_x0.exp()).sum((0, 1), keepdim=True)
    return {"log_x0": torch.where(sure, log_x0, data_only(mean))}


def blind(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    first = walk.outputs(torch.ones(walk.x.shape[0]))
    walk.outputs = lambda t, need=None: first
    plain()


def global_numbers(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    walk.draws = Draws(torch.Generator().manual_seed(int(torch.randint(2**31, (1,)))))
    walk.generator = walk.draws.generator
    plain()


def seeds_all(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    torch.manual_seed(3)
    plain()


def same_seed(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    walk.draws = Draws(torch.Generator().manual_seed(3))
    walk.generator = walk.draws.generator
    plain()


def counting() -> dict[str, Any]:
    calls: list[int] = []

    def start(plain: Callable[..., None], walk: Walk, steps: int) -> None:
        calls.append(1)
        walk.generator.manual_seed(len(calls))
        plain()

    return by_walk(start)


def all_free(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    walk.free = torch.ones_like(walk.free)
    plain()


def prompt_unseen(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    denoise, mask = walk._denoise, walk.kernel.require_mask()
    given = torch.where(walk.free, walk.x, mask)

    def changed(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Any:
        hidden = torch.where(walk.free[rows], x, given[rows])
        return dict(denoise(hidden, t, rows) if at is None else denoise(hidden, t, rows, at))

    walk._denoise = changed
    plain()


def any_token(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    data = torch.arange(walk.kernel.states) != (-1 if walk.kernel.mask is None else walk.kernel.mask)
    walk._allowed = data
    plain()


def leaves_one(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    plain()
    rows = torch.rand(len(walk.x), 1, generator=walk.generator) < 0.01
    last = torch.arange(walk.x.shape[1]) == walk.x.shape[1] - 1
    walk.x = torch.where(rows & last & walk.free, walk.kernel.require_mask(), walk.x)


def silent_end(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    report = walk._on_step
    walk._on_step = None if report is None else lambda i, x: report(i, x) if i < 2 else None
    plain()


def no_end(plain: Callable[..., None], walk: Walk, t: Tensor, s: Tensor | None) -> None:
    if s is not None:
        plain()


def scattered(index: int, source: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Weights [.., n] with entry ``index`` replaced by ``source``."""

    def change(weights: Tensor) -> Tensor:
        out = weights.clone()
        out[..., index] = source(weights)
        return out

    return change


def faster(factor: float) -> dict[str, Any]:
    return moves_of(lambda move, walk: (move * factor).clamp(max=1))


def third_alone(found: dict[str, Tensor], walk: Walk, t: Tensor) -> dict[str, Tensor]:
    """Predictions at the third position ignore the other tokens."""
    log_x0 = found["log_x0"].clone()
    if log_x0.shape[1] > 2:
        sure = log_x0[:, 2].amax(-1, keepdim=True) > -1e-6
        mean = torch.where(sure, 0.0, log_x0[:, 2].exp()).sum(0, keepdim=True)
        log_x0[:, 2] = torch.where(sure, log_x0[:, 2], data_only(mean))
    return {"log_x0": log_x0}


def other_rows(found: dict[str, Tensor], walk: Walk, t: Tensor) -> dict[str, Tensor]:
    log_x0 = found["log_x0"]
    sure = log_x0.amax(-1, keepdim=True) > -1e-6
    rolled = log_x0.roll(1, 0)
    fits = rolled.amax(-1, keepdim=True) < -1e-6
    return {"log_x0": torch.where(~sure & fits, rolled, log_x0)}


def two_at_once(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    while bool((masked := walk.masked).any()):
        keys = walk.uniform(*walk.x.shape).masked_fill(~masked, 2.0)
        walk.reveal((keys.argsort(1).argsort(1) < 2) & masked, torch.full((len(walk.x),), 0.5))
        walk.end_step()


def hasty(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    draw = walk.draw
    walk.draw = lambda move, weights, **more: draw((move > 0).double(), weights, **more)
    plain()


def renoised(plain: Callable[..., None], walk: Walk, t: Tensor, s: Tensor | None) -> None:
    noise = walk.noise
    walk.noise = lambda where, sigma: noise(where, 2 * sigma)
    plain()
    walk.noise = noise


def ahead(plain: Callable[..., None], walk: Walk, t: Tensor, s: Tensor | None) -> None:
    plain(s=s if s is None else (2 * s - t).clamp(min=1e-5))


def behind(plain: Callable[..., None], walk: Walk, t: Tensor, s: Tensor | None) -> None:
    plain(t=t if s is None else (2 * t - s).clamp(max=1.0))


def wrong_end(plain: Callable[..., None], walk: Walk, t: Tensor, s: Tensor | None) -> None:
    if s is None:
        return plain()
    if float(s[0]) < 0.3:  # the last part of the noise is skipped
        return None
    return plain()


def one_step(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    plain(n=1 if steps == 128 else steps)


def as_half(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    plain(n=max(1, steps // 32))


def unigram(plain: Callable[..., None], walk: Walk, steps: int) -> None:
    plain()
    rows = torch.rand(walk.x.shape, generator=walk.generator) < 0.05
    walk.put(torch.where(rows, torch.randint(0, 3, walk.x.shape, generator=walk.generator), walk.x))


def corrected_late(self: Any, walk: Walk, t: Tensor) -> None:
    PredictorCorrector._correct(self, walk, (t + 0.2).clamp(max=1.0))


FAULTS = [
    Fault("temperature 0.8", Analytic, "absorb", "alone", hot(0.8)),
    Fault("temperature 0.8, uniform", Analytic, "uniform", "alone", hot(0.8)),
    Fault("temperature 0.8, one token at a time", FirstHitting, "absorb", "alone", hot(0.8)),
    Fault("temperature 0.97", Analytic, "absorb", "alone", hot(0.97), full=True),
    Fault("temperature 1.03", Ancestral, "absorb", "alone", weights_of(lambda w: w.double() ** (1 / 1.03)), full=True),
    Fault("temperature 0.7 in a narrow stretch of t", Analytic, "absorb", "alone", hot(0.7, lambda t: (t > 0.39) & (t < 0.61)), full=True),
    Fault("nucleus of 0.95", Ancestral, "absorb", "alone", weights_of(lambda w: sharpen(w, temperature=1.0, top_p=0.95))),
    Fault("dependence ignored", Ancestral, "absorb", "law", network(mean_over_rows)),
    Fault("dependence ignored, analytic", Analytic, "absorb", "law", network(mean_over_rows)),
    Fault("right for two positions alone", Analytic, "absorb", "law", network(third_alone)),
    Fault("outputs of the row before", Ancestral, "absorb", "law", network(other_rows)),
    Fault("outputs of the first step", Analytic, "absorb", "law", by_walk(blind)),
    Fault("right for three tokens alone", Ancestral, "absorb", "alone", weights_of(scattered(3, lambda w: 0.5 * w[..., 3]))),
    Fault("last token five percent too often", Ancestral, "absorb", "alone", weights_of(scattered(0, lambda w: 1.08 * w[..., 0])), full=True),
    Fault("noise removal missing", Analytic, "absorb", "clean", by_step(no_end)),
    Fault("a mask is left", FirstHitting, "absorb", "clean", by_walk(leaves_one)),
    Fault("last steps skipped", Analytic, "uniform", "alone", by_step(wrong_end)),
    Fault("noise level one step ahead", Analytic, "uniform", "alone", by_step(ahead)),
    Fault("noise level one step behind", Ancestral, "uniform", "alone", by_step(behind)),
    Fault("positions change together", Analytic, "uniform", "alone", together(1)),
    Fault("rows change together", Analytic, "uniform", "alone", together(0)),
    Fault("systematic positions called independent", Analytic, "uniform", "alone", independent(), full=True, config={"positions": "systematic"}),
    Fault("systematic positions called independent, by token", Ancestral, "power", "alone", independent(), config={"positions": "systematic"}),
    Fault("systematic positions of all rows begin alike", Analytic, "uniform", "alone", by_walk(one_start), config={"positions": "systematic"}),
    Fault("moves ten percent too often", Analytic, "uniform", "alone", faster(1.1)),
    Fault("Euler twenty percent too fast", Euler, "uniform", "alone", faster(1.2), full=True),
    Fault("Euler at half the rate", Euler, "uniform", "alone", faster(0.5)),
    Fault("one step where 128 are declared", Ancestral, "absorb", "law", by_walk(one_step)),
    Fault("a thirty-second of the steps", Ancestral, "absorb", "law", by_walk(as_half)),
    Fault("two tokens at a time, called exact", FirstHitting, "absorb", "law", by_walk(two_at_once)),
    Fault("steps called exact", Analytic, "absorb", "law", {"exact": True}),
    Fault("every candidate accepted", Uniformization, "uniform", "alone", by_walk(hasty)),
    Fault("five percent of tokens drawn anew", FirstHitting, "absorb", "law", by_walk(unigram)),
    Fault("noised to twice the level", Psi, "uniform", "alone", by_step(renoised), config={"kappa": 0.5}),
    Fault("corrected at another level", PredictorCorrector, "uniform", "alone", {"_correct": corrected_late}),
    Fault("global generator", Ancestral, "absorb", "random", by_walk(global_numbers)),
    Fault("seeds the global generator", Ancestral, "absorb", "random", by_walk(seeds_all)),
    Fault("always the same seed", Analytic, "uniform", "random", by_walk(same_seed)),
    Fault("seed by the number of calls", FirstHitting, "absorb", "random", counting()),
    Fault("given tokens changed", Analytic, "uniform", "conditions", by_walk(all_free)),
    Fault("prompt not given to the network", Ancestral, "absorb", "conditions", by_walk(prompt_unseen)),
    Fault("all tokens allowed", FirstHitting, "absorb", "conditions", by_walk(any_token)),
    Fault("all tokens allowed, uniform", Analytic, "uniform", "conditions", by_walk(any_token)),
    Fault("later steps not reported", Ancestral, "absorb", "conditions", by_walk(silent_end)),
]  # fmt: skip
UNSEEN = {
    "remdm masks again twice as often": "tokens that are masked are drawn anew from the right distribution, so samples are right",
    "first_hitting draws wrong event times": "under a kernel that only masks, a perfect network does not depend on time",
    "a temperature of 0.97 in quick": "50,000 tokens are too few; full draws 200,000",
}
"""Faults that are not caught, and why."""
