"""Finite automata over the tokens of a model, derived from automata over bytes. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.diffusion.conditions.intersection import Automaton
from sedd_graph.diffusion.conditions.pattern import PatternError

__all__ = ["TokenAutomaton", "spell"]

MAX_TABLE = 2**26
"""Largest number of entries (states times tokens) of a transition table."""


@dataclasses.dataclass(frozen=True)
class TokenAutomaton:
    """A deterministic finite automaton over a model's tokens. State 0 is the start; the last state is dead.

    Every other state is reachable from the start, and an accepting state is reachable from it. Tokens with equal
    transitions from every state share one column of the transition table, their kind.

    Attributes:
        kind: int64 [n], the column of each of the n tokens.
        after: Transition table, int64 [states + 1, kinds]: the state after reading a token of a kind.
        accepts: bool [states + 1], True for accepting states.
    """

    kind: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    accepts: npt.NDArray[np.bool_]

    def lengths(self, most: int, allowed: npt.NDArray[np.bool_]) -> list[int]:
        """Return the lengths, in tokens, of the texts that match.

        Args:
            most: Largest length to consider.
            allowed: bool [n], tokens that a text may contain.

        Returns:
            Lengths from 0 to ``most``, ascending.
        """
        kinds = np.unique(self.kind[allowed])
        here, found = np.zeros(len(self.accepts), bool), []
        here[0] = True
        for length in range(most + 1):
            if bool((here & self.accepts).any()):
                found.append(length)
            there = np.zeros_like(here)
            there[self.after[here][:, kinds]] = True
            there[-1] = False
            here = there
        return found


def spell(automaton: Automaton, pieces: Sequence[bytes | None]) -> TokenAutomaton:
    """Convert an automaton over bytes to one over tokens.

    Args:
        automaton: An automaton over bytes.
        pieces: The bytes of each token; None for a token without text, which no match can contain.

    Raises:
        PatternError: The transition table would be too large, or no text of these tokens matches.
    """
    dead, count = len(automaton.after) - 1, len(pieces)
    if (dead + 1) * count > MAX_TABLE:
        raise PatternError(
            f"its automaton has {dead:,} states, too many for {count:,} tokens (at most {MAX_TABLE // count:,}); "
            "take a simpler one"
        )
    table = np.tile(np.arange(dead + 1, dtype=np.int32)[:, None], (1, count))
    table[:, [i for i, piece in enumerate(pieces) if piece is None]] = dead
    longest_first = sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: -len(pieces[i] or b""))
    spelled = [pieces[i] or b"" for i in longest_first]
    for place in range(len(spelled[0]) if spelled else 0):
        while len(spelled[-1]) <= place:
            spelled.pop()
        live = longest_first[: len(spelled)]
        table[:, live] = automaton.after[table[:, live], np.array([piece[place] for piece in spelled])]
    return _trimmed(table, automaton.accepts)


def _trimmed(table: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_]) -> TokenAutomaton:
    """Return the automaton of ``table`` [states + 1, tokens] without useless states, with equal columns merged."""
    rng = np.random.default_rng(0)
    mix = rng.integers(2**63, size=len(table), dtype=np.int64)
    sums = np.zeros(table.shape[1], np.int64)
    for weight, row in zip(mix, table, strict=True):
        sums += weight * (row.astype(np.int64) + 1)  # wraps around: a hash of the column
    _, first, kind = np.unique(sums, return_index=True, return_inverse=True)
    after = table[:, first]
    if not np.array_equal(after[:, kind], table):  # a collision: different columns have one hash
        kind, after = np.arange(table.shape[1]), table
    dead = len(after) - 1
    start = np.arange(dead + 1) == 0
    reached = _fixed_point(start, lambda found: np.bincount(after[found].ravel(), minlength=dead + 1) > 0)
    ends = _fixed_point(accepts, lambda found: np.logical_or.reduce(found[after], axis=1))
    kept = reached & ends
    kept[dead] = False
    if not kept[0]:
        raise PatternError("no text of this model's tokens matches it")
    number = np.full(dead + 1, int(kept.sum()))
    number[kept] = np.arange(int(kept.sum()))
    order = [*np.flatnonzero(kept), dead]
    return TokenAutomaton(kind.astype(np.int64), number[after[order]].astype(np.int64), accepts[order])


def _fixed_point(
    found: npt.NDArray[np.bool_], step: Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]
) -> npt.NDArray[np.bool_]:
    """Return the smallest set of states that holds ``found`` and, with a set, what ``step`` gives for it."""
    while not np.array_equal(more := found | step(found), found):
        found = more
    return found
