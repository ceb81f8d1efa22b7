"""Interpolating kernels: ``absorb``, ``uniform``, ``unigram`` and ``mixture``.

Each replaces a noised token by a draw from a distribution that does not depend on the token. All extend
:class:`Interpolating`. Axes: b batch, l length, n states.
"""

from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.numerics import log_expm1, take

from ._frequencies import FrequencyConfig, thinned, token_frequencies
from ._interpolating import Interpolating

__all__ = ["Absorb", "Interpolating", "Mixture", "Uniform", "Unigram"]


class Uniform(Interpolating, kind="kernel"):
    """Uniform kernel: replaces a token at rate 1 by a uniform draw from all states (D3PM; SEDD; UDLM)."""

    mask = None
    rate_bound = 1.0

    class Config(ComponentConfig):
        pass

    config: Config

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma.new_full((1, self.states), 1 / self.states), sigma.new_zeros(1, 1)


class Unigram(Interpolating, kind="kernel"):
    """Unigram kernel: replaces a token at rate 1 by a draw from the token frequencies, which are also the prior.

    It is a special case of GIDD (arXiv 2503.04482), whose prior may be any distribution.
    """

    mask = None
    rate_bound = 1.0
    frequencies: Tensor

    class Config(FrequencyConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("frequencies", token_frequencies(self.config, self.states), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        return thinned(config, states)

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.frequencies.to(sigma)[None], sigma.new_zeros(1, 1)


class Mixture(Interpolating, kind="kernel"):
    """Mixture kernel: masks a token or replaces it by a uniform draw (GIDD, arXiv 2503.04482).

    Of the noised tokens at total noise sigma, a share s is drawn uniformly from the data tokens, and the others are the
    mask (the last state). The share is s = ``uniform`` * exp(-``decay`` * sigma), with the parameters of the Config; it
    falls as noise grows if ``decay`` is above 0. A token is replaced by such a draw at rate s * (1 - ``decay`` * (1 -
    exp(-sigma))) per unit of sigma; with ``decay`` above 1 this rate would be negative at large sigma.
    """

    class Config(ComponentConfig):
        uniform: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.2
        """Share of noised tokens that are uniform draws rather than the mask, in the limit sigma = 0; in (0, 1]."""
        decay: Annotated[float, pydantic.Field(ge=0, le=1)] = 1.0
        """Decay rate, in [0, 1] per unit of total noise sigma, of the share of noised tokens that are uniform draws
        rather than the mask: the share is ``uniform`` * exp(-``decay`` * sigma). 0: the share is constant, and the
        prior is a mixture of masks and data tokens. Above 0: the prior is masks alone, so that the schedule must end at
        a total noise at which the share is below 0.01."""

    config: Config

    @property
    def mask(self) -> int:
        return self.states - 1

    @property
    def rate_bound(self) -> float:
        # the rate out of z is at most g_z / ((1 - alpha) pi_z): for a data token at most 1 on that clock; for the mask
        # 1 + decay s (1 - x) / (1 - s) with x = exp(-sigma), s = uniform x^decay, and decay (1 - x) <= 1 - x^decay <= 1 - s
        return 1.0 + self.config.uniform

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        uniform, decay, n = self.config.uniform, self.config.decay, self.data_tokens
        faded = decay * sigma[:, None]
        share = uniform * torch.exp(-faded)
        rest = (1 - uniform) - uniform * torch.expm1(-faded)  # 1 - share would cancel where uniform is 1
        slope = decay * share
        masked = torch.arange(self.states, device=sigma.device) == self.mask
        return torch.where(masked, rest, share / n), torch.where(masked, slope, -slope / n)


class Absorb(Interpolating, kind="kernel"):
    """Absorbing kernel: masks a token at rate 1; a mask (the last state) never changes (D3PM; SEDD; MDLM).

    The formulas are those of :class:`Interpolating` without the terms that are 0 for this kernel. The reverse process
    never changes an unmasked token, so scores at unmasked positions are ignored.
    """

    clamp_safe = True
    masks_evenly = True
    rate_bound = 1.0

    class Config(ComponentConfig):
        pass

    config: Config

    @property
    def mask(self) -> int:
        return self.states - 1

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.arange(self.states, device=sigma.device) == self.mask
        return masked.to(sigma.dtype)[None], sigma.new_zeros(1, 1)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        return torch.where(hit & corrupt, self.mask, x0)

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        log_k = -log_expm1(sigma)[:, None]
        k = log_k.exp()
        masked = xt == self.mask
        # unmasked positions have a constant score here, so that neither it nor its gradient can overflow
        scores = log_score[..., : self.mask].masked_fill(~masked[..., None], 0.0)
        target = take(scores, torch.where(masked, x0, 0))
        entropy = scores.exp().sum(-1) - k * target + k * (log_k - 1)
        return torch.where(masked, entropy, 0.0)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        cross_entropy = torch.where(xt == self.mask, -take(log_x0, x0), 0.0)
        return cross_entropy / torch.expm1(sigma)[:, None]

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        return (log_x0 - log_expm1(sigma)[:, None, None]).scatter(-1, xt[..., None], 0.0)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where((x == self.mask)[..., None], score, 0.0).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (expm(-dQ) s)_y P_d[z, y] at a masked z: expm1(d) s_y for data tokens; staying masked has the remaining probability
        moved = torch.expm1(sigma - sigma_next)[:, None, None] * score
        moved = torch.where((x == self.mask)[..., None], moved, 0.0).scatter(-1, x[..., None], 0.0)
        return moved.scatter(-1, x[..., None], 1 - moved.sum(-1, keepdim=True))

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (alpha_s - alpha_t) / (1 - alpha_t); a prediction may give the mask a probability h, as the logits of D3PM do: the
        # chance of x_t is then 1 - alpha_t + alpha_t h. At h = 0, nothing below differs by a bit from the formula without it
        reveal = torch.exp(-sigma_next) * torch.expm1(sigma_next - sigma) / torch.expm1(-sigma)
        h = x0_probs[..., self.mask]
        reveal = reveal[:, None] / (1 - h * (torch.exp(-sigma) / torch.expm1(-sigma))[:, None])
        masked = x == self.mask
        moved = torch.where(masked[..., None], reveal[..., None] * x0_probs, 0.0)
        return moved.scatter(-1, x[..., None], 1 - torch.where(masked, reveal * (1 - h), 0.0)[..., None])
