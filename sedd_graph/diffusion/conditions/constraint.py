"""Constraints on what may come out: allowed tokens by position, and texts that match a regular expression.

Axes: b batch, r rows, l length, n states, s states of an automaton (and its dead one, the last), k kinds of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.conditions.automaton import PatternError, TokenAutomaton, compile_pattern, spell
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.tokens.process import Kernel
from sedd_graph.errors import UserError

__all__ = ["Matching", "Pieces", "allowed_tokens", "lacks"]

Pieces = Callable[[], Sequence[bytes | None]]
"""Gives the bytes that each state stands for (None: no text), or raises :class:`UserError` where there are none to give."""

_CHUNK = 2**23
"""Moves between states held at a time, and at most for one row."""

UNLIKELY = -60.0
"""log of the share that any allowed token gets where the predictions leave no text that matches."""


def lacks(conditions: Conditions, kernel: Kernel) -> str | None:
    """What kind of kernel ``conditions`` need, where ``kernel`` is not one of them."""
    if kernel.clamp_safe and kernel.mask is not None:
        if conditions.observed == "renoise":
            return "a kernel under which tokens that are seen change, for observed: renoise"
        return None
    if conditions.matching is not None:
        return "a kernel under which tokens that are seen stay, for matching"
    if conditions.guidance != 1:
        return "a kernel with a mask under which tokens that are seen stay, for guidance"
    return None


def allowed_tokens(conditions: Conditions, allowed: Tensor, length: int, pieces: Pieces) -> Tensor:
    """``allowed`` bool [n], [l, n] or [b, l, n], less what ``conditions`` forbid, bool of one of these shapes.

    Raises :class:`UserError` where a position has no token left.
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


class Matching:
    """A regular expression over a model's tokens, and draws of whole rows that match it, or of a part given what is around it.

    Raises :class:`UserError` where the tokens have no text, or can spell none that matches.
    """

    def __init__(self, pattern: str, pieces: Pieces, device: torch.device) -> None:
        try:
            self._automaton: TokenAutomaton = spell(compile_pattern(pattern), pieces())
        except PatternError as error:
            raise UserError(f"matching: {pattern[:60]!r}: {error}") from None
        states, kinds = self._automaton.after.shape
        if states * kinds > _CHUNK:
            raise UserError(
                f"matching: {pattern[:60]!r}: its {states:,} states and {kinds:,} kinds of tokens are too many; take a simpler one"
            )
        self.pattern = pattern
        self._kind = torch.from_numpy(self._automaton.kind).to(device)
        self._after = torch.from_numpy(self._automaton.after).to(device)
        accepts = torch.from_numpy(self._automaton.accepts).to(device)
        # what rows begin with, [b] (or for all), the log of the weight of what ends them, by state, and where they do
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._last = torch.where(accepts, 0.0, -torch.inf).double()
        self._end: int | None = None

    def ahead(self, x: Tensor, hidden: Tensor, allowed: Tensor) -> list[Tensor]:
        """For each number of tokens read, log of the share of what can follow that matches, given the state: l + 1 times
        float64 [b, s]. The ``hidden`` positions bool [b, l] of ``x`` are drawn evenly from ``allowed``."""
        may = allowed.expand(*x.shape, -1)[hidden].double()
        even = may / may.sum(-1, keepdim=True).clamp(min=1)
        return self._backward(self._log_weights(x, hidden, even), slice(None))

    def between(self, before: Tensor, behind: Tensor, end: int) -> Matching:
        """The same for positions between ``before`` int64 [b, m] and what follows with the log weights ``behind`` [b, s]; those from
        ``end`` on may hold anything."""
        part = copy.copy(self)
        part._first, part._last, part._end = self._read(before), behind, end
        return part

    def _read(self, x: Tensor) -> Tensor:
        """The state after ``x`` [r, l], int64 [r]."""
        state = self._first.expand(len(x))
        for token in x[:, : self._end].T:
            state = self._after[state, self._kind[token]]
        return state

    def feasible(self, x: Tensor, hidden: Tensor, allowed: Tensor) -> None:
        """Raises :class:`UserError` unless the ``hidden`` positions bool [r, l] of each row of ``x`` [r, l] can be filled with
        ``allowed`` tokens, bool [n], [l, n] or [b, l, n], so that it matches."""
        may = allowed.expand(*x.shape, -1)[hidden]
        reach = self._backward(self._log_weights(x, hidden, may.double()), slice(None))
        found = self._begun(reach, slice(None)) > -torch.inf
        if bool(found.all()):
            return
        length, row = x.shape[1], int((~found).nonzero()[0, 0])
        some = allowed.reshape(-1, allowed.shape[-1]).any(0).cpu().numpy()
        lengths = self._automaton.lengths(2 * length + 32, some)
        whole = f"no text of {length} tokens matches {self.pattern[:60]!r}"
        if length in lengths:
            raise UserError(f"{whole} with what is given and allowed (row {row})")
        below, above = ([n for n in lengths if (n < length) is side] for side in (True, False))
        near = [str(n) for n in ([*below[-1:], *above[:1]])]
        raise UserError(
            f"{whole}: " + (f"the nearest lengths are {' and '.join(near)}" if near else "nor any other near")
        )

    def matches(self, x: Tensor) -> bool:
        """Whether every row of ``x`` [r, l] does."""
        return bool((self._last.expand(len(x), -1).gather(1, self._read(x)[:, None]) > -torch.inf).all())

    def _begun(self, reach: list[Tensor], rows: Tensor | slice) -> Tensor:
        """log of the weight of all that matches, float64 [r]."""
        whole = reach[0]
        return whole.gather(1, self._starts(len(whole), rows)[:, None])[:, 0]

    def _starts(self, count: int, rows: Tensor | slice) -> Tensor:
        return self._first.expand(count) if self._first.dim() == 0 else self._first[rows]

    def draw(
        self,
        x: Tensor,
        rows: Tensor,
        hidden: Tensor,
        weights: Tensor,
        may: Tensor,
        going: Tensor,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """int64 [going]: tokens for the ``going`` positions bool [r, l], some of the ``hidden`` ones, in order. ``x`` int64 [r, l]
        are those that ``rows`` bool [b] marks.

        All hidden positions are drawn together from the product of their ``weights`` float64 [hidden, n] given that the row
        matches (backward sums, then draws from left to right), and those that are going are told. Where no text that
        matches has any weight, one with as few unlikely tokens as can be is drawn from those that ``may`` bool [hidden, n] come.
        """
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        shares = self._log_weights(x, hidden, weights)
        reach = self._backward(shares, rows)
        lost = self._begun(reach, rows) == -torch.inf
        if bool(lost.any()):
            even = may.double() / may.sum(-1, keepdim=True).clamp(min=1)
            lost_here = lost[:, None].expand_as(x)[hidden]
            weights = torch.where(lost_here[:, None], weights + even * torch.tensor(UNLIKELY).double().exp(), weights)
            shares = self._log_weights(x, hidden, weights)
            reach = self._backward(shares, rows)
        state, kinds = self._starts(len(x), rows), torch.empty_like(x)
        end = len(reach) - 1
        for i in range(x.shape[1]):
            if i >= end:
                kinds[:, i] = categorical(shares[:, i].exp(), generator=generator)
            elif not bool(hidden[:, i].any()):
                kinds[:, i] = self._kind[x[:, i]]
            else:
                odds = shares[:, i] + reach[i + 1].gather(1, self._after[state])
                peak = odds.amax(-1, keepdim=True)
                kinds[:, i] = categorical((odds - peak).exp(), generator=generator)
            state = self._after[state, kinds[:, i]]
        told = going[hidden]
        return categorical(weights[told] * (self._kind == kinds[going][:, None]), generator=generator)

    def _log_weights(self, x: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
        """log of the weight of each kind, float64 [r, l, k]: of ``weights`` [hidden, n], and at other positions of x alone."""
        kinds = self._after.shape[1]
        out = torch.nn.functional.one_hot(self._kind[torch.where(hidden, 0, x)], kinds).double()
        out[hidden] = weights.new_zeros(len(weights), kinds).index_add_(1, self._kind, weights)
        return out.log()

    def _backward(self, shares: Tensor, rows: Tensor | slice) -> list[Tensor]:
        """For each number of tokens read, log of the weight of the rest, given the state: float64 [r, s], as often as there are
        positions that count, and once more."""
        last = self._last.expand(len(shares), -1) if self._last.dim() == 1 else self._last[rows]
        reach = [last]
        at_once = max(1, _CHUNK // self._after.numel())
        for share in shares[:, : self._end].unbind(1)[::-1]:
            pairs = zip(reach[-1].split(at_once), share.split(at_once), strict=True)
            reach.append(torch.cat([(below[:, self._after] + here[:, None]).logsumexp(-1) for below, here in pairs]))
        return reach[::-1]
