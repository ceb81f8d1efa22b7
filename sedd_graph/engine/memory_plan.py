"""Choice of what each layer of a network stores, recomputes or reconstructs, so that a step fits into a memory budget.

The layers of a chain of one repeated block cost the same. A choice for a chain is therefore a mode, and the number of its
last layers that store all activations. Over several chains the choices of least time are found exactly, by merging
the choices that no other beats in both memory and time (as in the dynamic program of the knapsack problem).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from sedd_graph.graph.model import Running

__all__ = ["LayerCost", "Option", "choose", "options"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one layer of a chain in a memory mode, measured.

    Attributes:
        seconds: Time of the forward and backward pass of a layer.
        size: Memory that is retained for the backward pass for each layer, bytes.
        fixed: Memory that is retained for the chain, whatever its length, bytes.
    """

    seconds: float
    size: int
    fixed: int = 0


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice for one chain.

    Attributes:
        running: Memory mode, with the number of layers that store all activations.
        size: Largest memory of the activations of the chain, bytes.
        seconds: Time of its forward and backward pass.
    """

    running: Running
    size: int
    seconds: float


def options(costs: Mapping[tuple[str, float], LayerCost], layers: int, *, exact: bool) -> Iterator[Option]:
    """Yield all choices for a chain.

    Args:
        costs: Cost of a layer by memory mode and, for ``store``, the share of the activations that compiled code saves;
            1 for the others.
        layers: Number of layers.
        exact: Whether the chain has exact arithmetic.
    """
    shares = {share: cost for (mode, share), cost in costs.items() if mode == "store"}
    whole = shares[1.0]
    for share, stored in shares.items():
        # the backward pass of a layer that recomputes activations has all of this one layer
        working = 0 if share == 1 else whole.size - stored.size
        size = stored.fixed + layers * stored.size + working
        yield Option(Running("store", exact, share), size, layers * stored.seconds)
    for mode in ("checkpoint", "reversible"):
        if (cost := costs.get((mode, 1.0))) is None:
            continue
        for share, stored in shares.items():
            for count in range(0 if share == 1 else 1, layers):
                others = layers - count
                size = cost.fixed + others * cost.size + max(whole.size, count * stored.size)
                seconds = others * cost.seconds + count * stored.seconds
                yield Option(Running(mode, exact, share, count), size, seconds)


def _best(found: Sequence[tuple[Option, ...]]) -> list[tuple[Option, ...]]:
    """Return the choices that no other beats in both memory and time, by increasing memory."""
    kept: list[tuple[Option, ...]] = []
    for choice in sorted(found, key=lambda choice: (_size(choice), _seconds(choice))):
        if not kept or _seconds(choice) < _seconds(kept[-1]):
            kept.append(choice)
    return kept


def _size(choice: Sequence[Option]) -> int:
    return sum(option.size for option in choice)


def _seconds(choice: Sequence[Option]) -> float:
    return sum(option.seconds for option in choice)


def choose(chains: Sequence[Sequence[Option]], room: int) -> tuple[tuple[Option, ...], bool]:
    """Choose one option for each chain, so that their memory fits into ``room`` bytes and their time is least.

    Returns:
        The choice, and whether it fits; if nothing does, the choice of least memory.
    """
    choices: list[tuple[Option, ...]] = [()]
    for chain in chains:
        choices = _best([(*choice, option) for choice in choices for option in chain])
    fitting = [choice for choice in choices if _size(choice) <= room]
    return (fitting[-1], True) if fitting else (choices[0], False)
