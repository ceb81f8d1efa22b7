"""The values that pass between a graph and its process: outputs that a process reads and inputs that it feeds. No torch."""

from __future__ import annotations

import dataclasses

__all__ = ["LOG_SCORE", "LOG_X0", "Input", "Output"]


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the graph that a process reads.

    ``type`` is a port type over ``b``, ``l`` and ``v``, such as ``float b l v``. ``gives`` is the name of the standard output
    that the kernel's ``translate`` makes of it, and empty where it is read as it is.
    """

    name: str
    type: str
    meaning: str
    gives: str = ""

    @property
    def read_as(self) -> str:
        """The name under which objectives and samplers read it."""
        return self.gives or self.name


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of the graph that a process feeds. A ``required`` input must be there."""

    name: str
    type: str
    meaning: str
    required: bool = False


LOG_SCORE = Output("log_score", "float b l v", "log p_t(x with state v at l) - log p_t(x), 0 at the current state")
"""The standard output of score entropy (SEDD, arXiv 2310.16834)."""
LOG_X0 = Output("log_x0", "float b l v", "log probability of the clean token given all other positions")
"""The standard output of x_0 prediction (MDLM, arXiv 2406.07524)."""
