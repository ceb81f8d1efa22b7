"""Initialisation of a network of which this process holds one part, without ever holding the whole.

Components are constructed one after another, with all random numbers, as for a whole network. But of the parameters of each
only the rows of this process are retained, before the next component is constructed; the parameters themselves become
``meta`` tensors. So the weights are those of one process with the same seed, and memory is that of the part and of the largest
component.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

__all__ = ["ShardInit", "fill_shards"]


@dataclasses.dataclass(frozen=True)
class ShardInit:
    """Initial weights of one part of a network.

    Args:
        index: Index of the part, in [0, count).
        count: Number of parts. Each parameter is divided along its first axis, as ``torch.chunk`` does.
    """

    index: int
    count: int
    _rows: dict[nn.Parameter, Tensor] = dataclasses.field(default_factory=dict, init=False)

    def take(self, component: nn.Module) -> None:
        """Retain the rows of this process of the parameters of a component, and give it ``meta`` parameters instead."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in component.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta or not parameter.dim():
                    continue
                if parameter not in made:
                    rows = parameter.detach().chunk(self.count)
                    own = rows[self.index] if self.index < len(rows) else parameter.detach()[:0]
                    empty = torch.empty_like(parameter, device="meta")
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    self._rows[made[parameter]] = own.clone()
                module._parameters[name] = made[parameter]

    def named(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the rows of this process by name of the parameter in ``module``, and forget them.

        To be called before the module is sharded, which replaces its parameters.
        """
        found = {name: self._rows[p] for name, p in module.named_parameters() if p in self._rows}
        self._rows.clear()
        return found


def fill_shards(module: nn.Module, rows: dict[str, Tensor], device: torch.device) -> None:
    """Give a sharded module storage on a device, and the rows that :meth:`ShardInit.named` returned, each of which is freed."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if (own := rows.pop(name, None)) is not None:
                parameter.to_local().copy_(own)  # type: ignore[attr-defined]  # a DTensor
