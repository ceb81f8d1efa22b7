"""Descriptions of the graph's outputs that a process reads and of the inputs that it feeds. No torch."""

from __future__ import annotations

import dataclasses

__all__ = ["LOG_SCORE", "LOG_X0", "Input", "Output"]


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the graph that a process reads."""

    name: str
    type: str
    """Port type over ``b``, ``l`` and ``v``, such as ``float b l v``."""
    meaning: str
    """The quantity, in a phrase for documentation and messages."""
    gives: str = ""
    """Name of the standard output that the kernel's ``translate`` computes from it; empty where it is read unchanged."""

    @property
    def read_as(self) -> str:
        """Name under which objectives and samplers read it."""
        return self.gives or self.name


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the graph that a process feeds. ``type`` and ``meaning`` are as in :class:`Output`."""

    name: str
    type: str
    meaning: str
    required: bool = False
    """True if a graph without this input is an error."""


LOG_SCORE = Output("log_score", "float b l v", "log p_t(x with state v at l) - log p_t(x), 0 at the current state")
"""The standard output of score entropy (SEDD, arXiv 2310.16834)."""
LOG_X0 = Output("log_x0", "float b l v", "log probability of the clean token given all other positions")
"""The standard output of x_0 prediction (MDLM, arXiv 2406.07524)."""
