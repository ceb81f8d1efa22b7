"""Processes on contextual vectors with planted faults, and the check that must find each."""

import dataclasses
from typing import Any

import torch
from sedd_graph_registry.noise.schedules_logit_normal import LogitNormal
from sedd_graph_registry.vectors.elf import Elf
from sedd_graph_registry.vectors.encoded import EncodedGaussian
from sedd_graph_registry.vectors.ode import Ode
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.vectors.contextual import ContextualKernel
from sedd_graph.diffusion.vectors.gaussian import log_snr
from sedd_graph.diffusion.vectors.objective import counted
from sedd_graph.diffusion.vectors.parts import VectorParts

__all__ = ["FAULTS", "ContextFault", "parts"]


def parts(kernel: type = EncodedGaussian, objective: type = Elf) -> VectorParts:
    """Return the components of ELF with three tokens."""
    context = Context({"n": 3})
    return VectorParts(
        kernel(EncodedGaussian.Config(vocab=3, width=2), context),
        LogitNormal(LogitNormal.Config(), context),
        objective(Elf.Config(), context),
        Ode(Ode.Config(spacing="both"), context),
    )


@dataclasses.dataclass(frozen=True)
class ContextFault:
    """A process with one fault.

    Attributes:
        name: The fault in words.
        part: ``kernel`` or ``objective``.
        caught: Suffix of the name of the check that must fail.
        methods: Methods that replace those of the sound class.
    """

    name: str
    part: str
    caught: str
    methods: dict[str, Any]

    def parts(self) -> VectorParts:
        """Return the components with the fault."""
        base = EncodedGaussian if self.part == "kernel" else Elf
        return parts(**{self.part: type("Planted", (base,), self.methods)})


def leaking(self: Any, tokens: Tensor, attend: Any = None, given: Any = None) -> Tensor:
    return ContextualKernel.embed(self, tokens, attend)


def padding(self: Any, tokens: Tensor, attend: Tensor) -> Tensor:
    return EncodedGaussian.encode(self, tokens, torch.ones_like(attend))


def alone(self: Any, tokens: Tensor, attend: Tensor) -> Tensor:
    found: Tensor = self.places[tokens]
    return found


def random(self: Any, tokens: Tensor, attend: Tensor) -> Tensor:
    found = EncodedGaussian.encode(self, tokens, attend)
    return found + 0.01 * torch.randn_like(found)


def batched(self: Any, tokens: Tensor, attend: Tensor) -> Tensor:
    found = EncodedGaussian.encode(self, tokens, attend)
    return found - found.mean((0, 1))


def always(self: Any, denoise: Any, draw: Any, batch: Any, kernel: Any, schedule: Any) -> Tensor:
    told = dataclasses.replace(draw, decoded=torch.zeros_like(draw.decoded))
    found = denoise(draw.noisy, draw.seen, decode=told.decoded)
    nats = torch.nn.functional.cross_entropy(found.logits.movedim(-1, 1), batch.tokens, reduction="none")
    error = (draw.clean - found.x0).square().mean(-1)
    weight = self.emphasis(log_snr(kernel.sigma(schedule, draw.t))).to(error.dtype)
    return counted(torch.where(draw.decoded[:, None], nats, weight[:, None] * error), batch)


def summed(self: Any, *args: Any) -> Tensor:
    draw = args[1]
    return Elf.loss(self, *args) * torch.where(draw.decoded, 1.0, args[3].width)


def swapped(self: Any, *args: Any, **named: Any) -> Any:
    draw = Elf.draw(self, *args, **named)
    return dataclasses.replace(draw, noisy=torch.where(draw.decoded[:, None, None], draw.clean, draw.noisy))


def halved(self: Any, *args: Any, **named: Any) -> Any:
    draw = Elf.bound_draw(self, *args, **named)
    return dataclasses.replace(draw, weight=draw.weight / 2)


FAULTS = (
    ContextFault("a prompt is encoded with what follows", "kernel", "context", {"embed": leaking}),
    ContextFault("padding is encoded", "kernel", "context", {"encode": padding}),
    ContextFault("vectors of single tokens", "kernel", "context", {"encode": alone}),
    ContextFault("an encoder with dropout", "kernel", "context", {"encode": random}),
    ContextFault("vectors are centred over the batch", "kernel", "context", {"encode": batched}),
    ContextFault("the mode is not told", "objective", "loss", {"loss": always}),
    ContextFault("the error is summed over the width", "objective", "loss", {"loss": summed}),
    ContextFault("tokens are read from vectors without noise", "objective", "loss", {"draw": swapped}),
    ContextFault("half of the bound's integral", "objective", "bound_above", {"bound_draw": halved}),
)
"""The faults."""
