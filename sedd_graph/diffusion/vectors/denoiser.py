"""Evaluation of the network on noisy vectors, with or without self-conditioning.

Axes: b batch, l length, d width of a vector.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.component.outputs import Input
from sedd_graph.diffusion.batch import taken
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel

__all__ = ["FEEDS", "LEAST", "Denoiser", "first_time"]

LEAST = 1e-5
"""Time of the lowest noise, for a schedule without noise at t = 0."""

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
    Input("decode", "float b", "1 if tokens are read from the vectors, by the output logits; 0 if x0 is estimated"),
)
"""Inputs of a graph that processes vectors. A graph with the input ``estimate`` is self-conditioned."""


_FIRST: weakref.WeakKeyDictionary[Schedule, float] = weakref.WeakKeyDictionary()
"""Time of the lowest noise of each schedule that was asked for."""


def first_time(schedule: Schedule) -> float:
    """Return the time of the lowest noise: 0, or a small one for a schedule whose total noise is 0 at t = 0."""
    if schedule not in _FIRST:  # read once, which waits for a GPU
        tensor = next(itertools.chain(schedule.parameters(), schedule.buffers()), None)
        start = torch.zeros(1, dtype=torch.float64, device=None if tensor is None else tensor.device)
        _FIRST[schedule] = 0.0 if float(schedule.sigma(start)) > 0 else LEAST
    return _FIRST[schedule]


class Denoiser:
    """The network as a function of noisy vectors and time: ``denoiser(x, t, estimate)``.

    Args:
        run: Evaluates the graph: takes its inputs by name and, in training, the dropout keys of the rows; returns its outputs
            by name.
        kernel: The kernel.
        schedule: Total noise as a function of time.
        attend: Positions that may be attended to, bool [b, l].
        self_conditioned: True if the graph has the input ``estimate``.
        key: Dropout key of each row, int32 [b]; None: no dropout.

    Attributes:
        evaluations: Number of rows evaluated so far, summed over calls.
    """

    def __init__(
        self,
        run: Callable[..., Mapping[str, Tensor]],
        kernel: VectorKernel,
        schedule: Schedule,
        attend: Tensor,
        *,
        self_conditioned: bool = False,
        key: Tensor | None = None,
    ) -> None:
        self.kernel, self.schedule, self.attend, self.self_conditioned = kernel, schedule, attend, self_conditioned
        self._run, self._key = run, key
        self.evaluations = 0

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        estimate: Tensor | None = None,
        rows: Tensor | None = None,
        decode: Tensor | None = None,
    ) -> Estimate:
        """Return the network's estimate of the clean rows.

        Args:
            x: Noisy vectors, [b, l, d].
            t: Times, float64 [b].
            estimate: An earlier estimate of the clean vectors, [b, l, d]; None: zeros. Ignored by a graph that is not
                self-conditioned.
            rows: Indices of the rows to evaluate, int64 [r], for the other arguments [r, ...]; None: all rows.
            decode: Rows whose tokens are read, bool [b]; the result then has the output ``logits``. None: no row.
        """
        key = self._key if self._key is None or rows is None else self._key[rows]
        sigma = self.kernel.sigma(self.schedule, t)
        inputs = self.kernel.inputs(x, t, sigma)
        inputs["attend"] = self.attend if rows is None else taken(self.attend, rows)
        inputs["estimate"] = torch.zeros_like(x) if estimate is None else estimate.to(x.dtype)
        inputs["decode"] = torch.zeros_like(x[:, 0, 0]) if decode is None else decode.to(x.dtype)
        self.evaluations += len(x)
        outputs = self._run(inputs) if key is None else self._run(inputs, key)
        found = self.kernel.translate(outputs, x, sigma)
        return found if decode is None else found._replace(logits=outputs["logits"].float())

    def decode(self, x: Tensor) -> Tensor:
        """Return unnormalised log p(token | vectors) of vectors at the lowest noise, float32 [b, l, v].

        A contextual kernel's tokens are read by the network, others by the kernel.

        Args:
            x: Clean vectors or those of the lowest noise, [b, l, d].
        """
        if not self.kernel.contextual:
            return self.kernel.logits(x)
        t = torch.full((len(x),), first_time(self.schedule), dtype=torch.float64, device=x.device)
        logits = self(x, t, decode=torch.ones_like(t, dtype=torch.bool)).logits
        if logits is None:
            raise ValueError("the network predicts no logits")
        return logits

    def round(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the most likely token at each clean vector, int64 [b, l].

        Args:
            x: Clean vectors, [b, l, d].
            allowed: Tokens that may be returned, bool [v], [l, v] or [b, l, v]; None: all.
        """
        if not self.kernel.contextual:
            return self.kernel.round(x, allowed)
        found = self.decode(x)
        return (found if allowed is None else found.masked_fill(~allowed, -torch.inf)).argmax(-1)

    def refined(
        self,
        x: Tensor,
        t: Tensor,
        chosen: Tensor | None = None,
        share: float = 1.0,
        decode: Tensor | None = None,
    ) -> Estimate:
        """Return the estimate conditioned on a first estimate at the same ``x`` and ``t`` (Analog Bits, arXiv 2208.04202).

        The first estimate has no gradient. A graph that is not self-conditioned is evaluated once.

        Args:
            x: Noisy vectors, [b, l, d].
            t: Times, float64 [b].
            chosen: Rows that are conditioned on their first estimate, bool [b]; None: all.
            share: Largest share of ``chosen`` rows, rounded up to whole rows; only so many have a first evaluation.
            decode: Rows whose tokens are read, bool [b]; None: no row.
        """
        most = math.ceil(len(x) * share)
        if not self.self_conditioned or not most:
            return self(x, t, decode=decode)
        with torch.no_grad():
            if chosen is None:
                chosen = torch.ones(len(x), dtype=torch.bool, device=x.device)
            rows = chosen.int().argsort(descending=True, stable=True)[:most]  # static in number: some may not be chosen
            first = self(x[rows], t[rows], rows=rows).x0 * chosen[rows, None, None]
            estimate = first.new_zeros(x.shape).index_copy(0, rows, first)
        return self(x, t, estimate, decode=decode)
