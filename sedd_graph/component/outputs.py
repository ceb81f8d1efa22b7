"""Descriptions of the network outputs that a diffusion process reads, and of the network inputs that it supplies.

Imports no torch.
"""

from __future__ import annotations

import dataclasses

__all__ = ["LOG_SCORE", "LOG_X0", "TOKEN_LOGITS", "VECTOR_X0", "Input", "Output"]


@dataclasses.dataclass(frozen=True)
class Output:
    """Description of a network output that a diffusion process reads, such as log scores."""

    name: str
    type: str
    """Port type, such as ``float b l v``, over the axes b (batch), l (length) and v (vocabulary of the network's
    output: data tokens, and the mask if the kernel has one)."""
    meaning: str
    """The quantity as a phrase, for documentation and messages."""
    gives: str = ""
    """Name of the quantity (``log_score`` or ``log_x0``) to which the kernel's method ``translate`` converts this
    output before objectives and samplers read it; empty if they read the output itself."""

    @property
    def read_as(self) -> str:
        """Name under which objectives and samplers read this output: ``gives`` if it is set, else ``name``."""
        return self.gives or self.name


@dataclasses.dataclass(frozen=True)
class Input:
    """Description of a network input that a diffusion process supplies, such as the noisy tokens.

    ``type`` is the port type, such as ``int b l``; ``meaning`` describes the quantity as a phrase.
    """

    name: str
    type: str
    meaning: str
    required: bool = False
    """True if every graph must have this input."""


LOG_SCORE = Output("log_score", "float b l v", "log p_t(x with state v at l) - log p_t(x), 0 at the current state")
"""Standard output of score entropy (SEDD, arXiv 2310.16834): log p_t(y) - log p_t(x), nats, float [b, l, v] (b batch).
Here p_t is the marginal of noisy rows, and y is the noisy row x with its state at position l replaced by v."""
LOG_X0 = Output("log_x0", "float b l v", "log probability of the clean token given all other positions")
"""Standard output of x_0 prediction (MDLM, arXiv 2406.07524): log probability of each state v as the clean token at
position l, given the noisy tokens at all other positions, nats, float [b, l, v] (b batch)."""
VECTOR_X0 = Output("x0", "float b l d", "estimate of the clean vectors, E[x_0 | x_t]")
"""Output of a network that predicts clean vectors (x_0-prediction of Diffusion-LM, arXiv 2205.14217)."""
TOKEN_LOGITS = Output(
    "logits", "float b l v", "unnormalised log probability of each clean token given the noisy vectors"
)
"""Output of a network that predicts tokens from noisy vectors; the estimate of the clean vector is then the mean of the
tokens' embeddings under these probabilities."""
