"""The enumerated case of distillation on strings (:mod:`sedd_graph.verify.distillation_case`).

Axes: b strings, c clean strings, s strings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.distillation import Distillable, Pair
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringDraw
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.distillation_case import DistillationCase, compared
from sedd_graph.verify.string_table import EnumeratedTable

__all__ = ["string_case"]


def string_case(table: EnumeratedTable, process: Distillable, schedule: Schedule) -> DistillationCase:
    """Return the case of a process on strings.

    Args:
        table: All short strings, each of which may be clean, with a perfect network.
        process: What the process gives to distillation objectives, with the kernel of the table.
        schedule: Total noise as a function of time.
    """

    def number(draw: StringDraw) -> Tensor:
        return table.number(Strings(draw.xt, draw.attend))

    def pairs(batch: Batch, pair: Pair) -> Check:
        below, sigma = (x.sigma[:1].double() for x in (pair.lower, pair.upper))
        chance = table.conditional(below)[0][:, :, None] * table.conditional(sigma - below)[0][None]
        clean = torch.cat([torch.full_like(batch.tokens[:, :1], table.kernel.start), batch.tokens], 1)
        x0 = table.number(Strings(clean, torch.cat([torch.ones_like(batch.attend[:, :1]), batch.attend], 1)))
        count = len(table.strings)
        code = (x0 * count + number(pair.lower)) * count + number(pair.upper)
        counts = torch.bincount(code, minlength=count**3).view(count, count, count)
        return compared(counts.double(), chance, f"{len(x0):,} strings")

    return DistillationCase(
        process,
        schedule.time,
        lambda rows, generator: table.batch(torch.multinomial(table.law, rows, replacement=True, generator=generator)),
        lambda draw, batch: table.outputs(Strings(draw.xt, draw.attend), draw.sigma),
        lambda draw, batch: number(draw)[:, None],
        pairs,
    )
