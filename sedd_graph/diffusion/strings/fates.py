"""What a step of noise does to each token of a string, independently: the form in which string kernels declare a step."""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["Fates"]


@dataclasses.dataclass(frozen=True)
class Fates:
    """Probabilities of the fates of the tokens of a string in one step of noise; n states.

    A token survives, becomes the mask, vanishes, or is replaced; then it is followed by newly born tokens. Behind a
    token that is in the noisy string, or the BOS token, one more token is born with probability ``birth``, again and
    again. A token that vanishes has none born behind it. One that is replaced has at least one.

    Attributes:
        survive: float64 [n], probability that each token remains as it is.
        hide: float64 [n], probability that it becomes the mask.
        vanish: float64 [n], probability that it is deleted, and no token is born behind it.
        replace: Probability that it is deleted, and at least one token is born behind it; 0 without births.
        birth: Probability that one more token follows by birth; 0 without births.
        law: float64 [n], distribution of tokens that are born. With births it is the stationary distribution too.
        mask: The mask state; None if no token is ever masked.
    """

    survive: Tensor
    hide: Tensor
    vanish: Tensor
    replace: float
    birth: float
    law: Tensor
    mask: int | None = None
