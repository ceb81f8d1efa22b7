"""Tokens that conditions on samples allow at each position.

Axes: b batch, l length, n states of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.automaton import compile_pattern
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.errors import UserError

__all__ = ["Pieces", "allowed_tokens"]

Pieces = Callable[[], Sequence[bytes | None]]
"""A function that returns the bytes of the token of each state (None: a token without text).

Raises :class:`~sedd_graph.errors.UserError` if the tokenizer's tokens do not stand for bytes.
"""


def allowed_tokens(conditions: Conditions, allowed: Tensor, length: int, pieces: Pieces) -> Tensor:
    """Return the tokens that are allowed at each position under the conditions ``forbid`` and ``allow``.

    Args:
        conditions: Config with the keys ``forbid`` and ``allow``.
        allowed: Tokens allowed before these conditions, bool [n], [l, n] or [b, l, n].
        length: Number of positions, l.
        pieces: Returns the bytes of each token; called only if a condition contains text or a pattern.

    Returns:
        bool [n], [l, n] or [b, l, n].

    Raises:
        UserError: A token or position does not exist, or no token is left at a position.
    """
    states = allowed.shape[-1]
    barred = {i for i in conditions.forbid if isinstance(i, int)}
    if any(i >= states for i in barred):
        raise UserError(f"forbid: there is no token {max(barred)}; ids go up to {states - 1}")
    texts = [text.encode("utf-8", "surrogatepass") for text in conditions.forbid if isinstance(text, str)]
    if texts:
        barred |= {i for i, piece in enumerate(pieces()) if piece and any(t in piece for t in texts)}
    keep = torch.ones(states, dtype=torch.bool)
    keep[list(barred)] = False
    found = allowed & keep.to(allowed.device)
    if conditions.allow:
        found = found.expand(*found.shape[:-2], length, states).clone()
        spelled = pieces()
        for position, pattern in conditions.allow.items():
            if not -length <= position < length:
                raise UserError(f"allow: there is no position {position} in rows of {length} tokens")
            automaton = compile_pattern(pattern)
            fits = [piece is not None and automaton.matches(piece) for piece in spelled]
            found[..., position, :] &= torch.tensor(fits, device=found.device)
    empty = ~found.any(-1)
    if bool(empty.any()):
        where = "any position" if found.dim() == 1 else f"position {int(empty.nonzero()[0, -1])}"
        raise UserError(f"no token is left for {where}: all are forbidden, or none of the allowed ones matches")
    return found
