"""Evaluation of the network on noisy vectors, with or without self-conditioning.

Axes: b batch, l length, d width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel

__all__ = ["FEEDS", "Denoiser"]

FEEDS = (
    Input("x", "float b l d", "noisy vectors x_t", required=True),
    Input("t", "float b", "time, from 0 (clean) to 1 (noise)"),
    Input("sigma", "float b", "total noise at time t"),
    Input("log_snr", "float b", "log signal-to-noise ratio at time t"),
    Input("timestep", "float b", "time on the scale of Diffusion-LM, from 0 (first step) to 1000"),
    Input("attend", "bool b l", "positions that may be attended to; padding may not"),
    Input(
        "estimate", "float b l d", "self-conditioning: an earlier estimate of the clean vectors; 0 where there is none"
    ),
)
"""Inputs of a graph that processes vectors. A graph with the input ``estimate`` is self-conditioned."""


class Denoiser:
    """The network as a function of noisy vectors and time: ``denoiser(x, t, estimate)``.

    Args:
        run: Evaluates the graph: takes its inputs by name, and returns its outputs by name.
        kernel: The kernel.
        schedule: Total noise as a function of time.
        attend: Positions that may be attended to, bool [b, l].
        self_conditioned: True if the graph has the input ``estimate``.

    Attributes:
        evaluations: Number of rows evaluated so far, summed over calls.
    """

    def __init__(
        self,
        run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        kernel: VectorKernel,
        schedule: Schedule,
        attend: Tensor,
        *,
        self_conditioned: bool = False,
    ) -> None:
        self.kernel, self.schedule, self.attend, self.self_conditioned = kernel, schedule, attend, self_conditioned
        self._run = run
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, estimate: Tensor | None = None) -> Estimate:
        """Return the network's estimate of the clean rows.

        Args:
            x: Noisy vectors, [b, l, d].
            t: Times, float64 [b].
            estimate: An earlier estimate of the clean vectors, [b, l, d]; None: zeros. Ignored by a graph that is not
                self-conditioned.
        """
        sigma = self.kernel.sigma(self.schedule, t)
        inputs = self.kernel.inputs(x, t, sigma)
        inputs["attend"] = self.attend
        inputs["estimate"] = torch.zeros_like(x) if estimate is None else estimate.to(x.dtype)
        self.evaluations += len(x)
        return self.kernel.translate(self._run(inputs), x, sigma)

    def refined(self, x: Tensor, t: Tensor, chosen: Tensor | None = None) -> Estimate:
        """Return the estimate conditioned on a first estimate at the same ``x`` and ``t`` (Analog Bits, arXiv 2208.04202).

        The first estimate has no gradient. A graph that is not self-conditioned is evaluated once.

        Args:
            x: Noisy vectors, [b, l, d].
            t: Times, float64 [b].
            chosen: Rows that are conditioned on their first estimate, bool [b]; None: all.
        """
        if not self.self_conditioned:
            return self(x, t)
        with torch.no_grad():
            first = self(x, t).x0
        return self(x, t, first if chosen is None else first * chosen[:, None, None].to(first.dtype))
