"""Deterministic finite automata over bytes, and the automaton of what several of them accept. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sedd_graph.diffusion.conditions.pattern import PatternError

__all__ = ["Automaton", "intersection"]


@dataclasses.dataclass(frozen=True)
class Automaton:
    """A deterministic finite automaton over bytes. State 0 is the start; the last state is dead: no match can follow.

    Attributes:
        after: Transition table, int32 [states + 1, 256]: the state after reading a byte. The last row is the dead
            state.
        accepts: bool [states + 1], True for accepting states.
    """

    after: npt.NDArray[np.int32]
    accepts: npt.NDArray[np.bool_]

    def matches(self, text: bytes) -> bool:
        """Return True if the automaton accepts the whole of ``text``."""
        state = 0
        for byte in text:
            state = int(self.after[state, byte])
        return bool(self.accepts[state])


def intersection(automata: Sequence[Automaton], *, most: int, spend: Callable[[int], None]) -> Automaton:
    """Return the smallest automaton of the byte strings that all of ``automata`` accept, by the product construction.

    Args:
        automata: Automata that start in state 0. Their last states may accept.
        most: Largest number of states of the product.
        spend: Called with numbers of examined transitions; it raises if they are too many.

    Raises:
        PatternError: The product has more than ``most`` states.
    """
    automata = [_minimal(automaton) for automaton in automata]
    columns = np.concatenate([automaton.after for automaton in automata])  # equal columns: bytes of one class
    _, first, kind = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    moves = [automaton.after[:, first].tolist() for automaton in automata]
    useful = [_useful(automaton).tolist() for automaton in automata]
    begin = (0,) * len(automata)
    known, order = {begin: 0}, [begin]
    rows: list[list[int]] = []
    while len(rows) < len(order):
        row = []
        spend(len(first) * len(automata))
        for target in zip(*(move[state] for move, state in zip(moves, order[len(rows)], strict=True)), strict=True):
            if not all(fine[state] for fine, state in zip(useful, target, strict=True)):
                row.append(-1)
                continue
            if target not in known:
                if len(order) >= most:
                    raise PatternError(f"its automaton has more than {most:,} states; take a simpler one")
                known[target] = len(order)
                order.append(target)
            row.append(known[target])
        rows.append(row)
    after = np.array([*rows, [-1] * len(first)], np.int32)
    after[after < 0] = len(rows)
    accepts = np.logical_and.reduce([a.accepts[s] for a, s in zip(automata, np.array(order).T, strict=True)])
    return _minimal(Automaton(after[:, kind.ravel()], np.append(accepts, False)))


def _useful(automaton: Automaton) -> npt.NDArray[np.bool_]:
    """Return the states from which an accepting one can be reached, bool [states + 1]."""
    found = automaton.accepts
    while not np.array_equal(more := found | found[automaton.after].any(1), found):
        found = more
    return found


def _minimal(automaton: Automaton) -> Automaton:
    """Return the automaton with states merged that accept the same rests, by Moore's partition refinement.

    States keep the order of their first members, and the last one stays the last.
    """
    _, first, kind = np.unique(automaton.after, axis=1, return_index=True, return_inverse=True)
    moves, part, count = automaton.after[:, first], automaton.accepts.astype(np.int64), 0
    while int(part.max()) + 1 > count:
        count = int(part.max()) + 1
        _, part = np.unique(np.column_stack([part, part[moves]]), axis=0, return_inverse=True)
        part = part.ravel()
    _, member = np.unique(part, return_index=True)
    last = part[-1]
    order = [*(p for p in np.argsort(member, kind="stable").tolist() if p != last), last]
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    rows = member[order]
    return Automaton(number[part[moves[rows]]][:, kind.ravel()], automaton.accepts[rows])
