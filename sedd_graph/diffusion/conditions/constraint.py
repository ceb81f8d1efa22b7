"""Constraint that whole rows of sampled tokens match a regular expression.

Axes: b batch, r rows of it, l length, n states of a token, s states of an automaton (the last is dead), k kinds of
tokens. Tokens are of the same kind if they cause the same transitions of the automaton.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.allowed import Pieces
from sedd_graph.diffusion.conditions.automaton import compile_pattern
from sedd_graph.diffusion.conditions.pattern import PatternError
from sedd_graph.diffusion.conditions.token_automaton import TokenAutomaton, spell
from sedd_graph.diffusion.numerics import take
from sedd_graph.errors import UserError

__all__ = ["Matching", "Pick"]

Pick = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Type of the functions ``pick(weights, row, position, kind)`` that draw classes from weights, float64 [m, classes]: kinds
of tokens if ``kind`` is None, else tokens of these kinds. Row and position are those of each of the m draws, int64 [m]."""

_CHUNK = 2**23
"""Largest number of automaton transitions in memory at a time; also the limit for the transition table of one row."""

UNLIKELY = -60.0
"""Log of the weight that is spread over the allowed tokens of a hidden position if no matching text has weight.

It is added at every hidden position of a row in which all texts that match the regular expression have weight zero, so
that one of them can be sampled. The tokens' own weights at a position sum to 1.
"""


class Matching:
    """A regular expression over a model's tokens, with exact sampling of rows given that they match.

    Sampling is exact by backward sums over the automaton's states. :meth:`between` restricts the constraint to the
    positions between fixed text.

    Args:
        pattern: The regular expression.
        pieces: Returns the bytes of each token.
        device: Device of the rows.

    Raises:
        UserError: The tokens have no text, no text of these tokens matches, or the automaton is too large.
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
        # the state before the first position, [b] or [], the log-weight of each state behind the last, [s] or [b, s], and the
        # number of constrained positions (None: all)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._last = torch.where(accepts, 0.0, -torch.inf).double()
        self._end: int | None = None

    def ahead(self, x: Tensor, hidden: Tensor, allowed: Tensor) -> list[Tensor]:
        """Return, for each position and each state of the automaton before it, the log-probability of a match.

        It is the probability that the tokens from the position on complete a match. Hidden tokens are drawn
        independently and uniformly from the allowed ones. Axes: b rows, l positions, n tokens, s states of the
        automaton.

        Args:
            x: Rows, int64 [b, l].
            hidden: bool [b, l], positions whose tokens are drawn; the tokens of ``x`` at the others are fixed.
            allowed: bool [n], [l, n] or [b, l, n], tokens that may be drawn.

        Returns:
            l + 1 tensors float64 [b, s], nats. Tensor i is for the tokens from position i on, given the state after
            the first i tokens. It is the argument ``behind`` of :meth:`between` for a span that ends before position i.
        """
        may = allowed.expand(*x.shape, -1)[hidden].double()
        even = may / may.sum(-1, keepdim=True).clamp(min=1)
        return self._backward(x, hidden, self._log_weights(x, hidden, even), slice(None))

    def between(self, before: Tensor, behind: Tensor, end: int) -> Matching:
        """Return the constraint on a span of positions, given the tokens before it and the chance of a match after it.

        The methods of the result take rows that begin at the first position of the span.

        Args:
            before: Tokens from the first position of the row to the span, int64 [b, m].
            behind: Log-probability that the tokens behind the span complete a match, given the automaton's state at
                the end of the span, float64 [b, s]: one of the tensors that :meth:`ahead` returns.
            end: Number of positions of the span. Tokens behind it, in the rows passed to the result, are unconstrained.
        """
        part = copy.copy(self)
        part._first, part._last, part._end = self._read(before), behind, end
        return part

    def _read(self, x: Tensor) -> Tensor:
        """Return the state after reading ``x`` [r, l], int64 [r]."""
        state = self._first.expand(len(x))
        for token in x[:, : self._end].T:
            state = self._after[state, self._kind[token]]
        return state

    def feasible(self, x: Tensor, hidden: Tensor, allowed: Tensor) -> None:
        """Verify that each row can be completed to a match of the regular expression.

        Args:
            x: Rows, int64 [r, l].
            hidden: bool [r, l], positions to fill.
            allowed: bool [n], [l, n] or [r, l, n], tokens that may fill them.

        Raises:
            UserError: A row cannot be completed. The message names the nearest lengths, in tokens, that can match.
        """
        may = allowed.expand(*x.shape, -1)[hidden]
        reach = self._backward(x, hidden, self._log_weights(x, hidden, may.double()), slice(None))
        found = self._total(reach, slice(None)) > -torch.inf
        if bool(found.all()):
            return
        length, row = x.shape[1], int((~found).nonzero()[0, 0])
        some = allowed.reshape(-1, allowed.shape[-1]).any(0).cpu().numpy()
        lengths = self._automaton.lengths(2 * length + 32, some)
        whole = f"no text of {length} tokens matches {self.pattern[:60]!r}"
        if length in lengths:
            raise UserError(f"{whole} with what is given and allowed (row {row})")
        below, above = ([n for n in lengths if (n < length) is side] for side in (True, False))
        near = " and ".join(str(n) for n in [*below[-1:], *above[:1]])
        raise UserError(f"{whole}: " + (f"the nearest lengths are {near}" if near else "no length near it does"))

    def matches(self, x: Tensor) -> bool:
        """Return True if every row matches the regular expression.

        Args:
            x: Rows, int64 [r, l].
        """
        return bool((take(self._last.expand(len(x), -1), self._read(x)) > -torch.inf).all())

    def _total(self, reach: list[Tensor], rows: Tensor | slice) -> Tensor:
        """Return the log-weight of all matching texts, float64 [r]."""
        return take(reach[0], self._starts(len(reach[0]), rows))

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
        pick: Pick,
    ) -> Tensor:
        """Sample all hidden tokens jointly, given that each row matches; return the tokens at positions ``going``.

        The sample is exact: backward sums over the automaton's states, then sampling from left to right. In a row where
        all matching texts have weight zero, a matching text with as few tokens of weight zero as possible is sampled.

        Args:
            x: int64 [r, l], the r rows of the batch that ``rows`` selects.
            rows: bool [b], the selected rows.
            hidden: bool [r, l], positions to sample; h of them over all rows.
            weights: float64 [h, n], weights of the tokens at the hidden positions, independent of each other, not
                normalised.
            may: bool [h, n], tokens that are allowed at the hidden positions.
            going: bool [r, l], the hidden positions whose tokens are returned; g of them over all rows.
            pick: Draws classes from weights: kinds of tokens one position after another, then the tokens.

        Returns:
            Tokens, int64 [g], in row-major order of the positions.
        """
        weights, shares, reach = self._possible(x, rows, hidden, weights, may)
        which = torch.arange(len(x), device=x.device)
        state, kinds = self._starts(len(x), rows), torch.empty_like(x)
        end = len(reach) - 1
        for i in range(x.shape[1]):
            if i >= end:
                kinds[:, i] = pick(shares[:, i].exp(), which, torch.full_like(which, i), None)
            elif not bool(hidden[:, i].any()):
                kinds[:, i] = self._kind[x[:, i]]
            else:
                odds = shares[:, i] + reach[i + 1].gather(1, self._after[state])
                peak = odds.amax(-1, keepdim=True)
                kinds[:, i] = pick((odds - peak).exp(), which, torch.full_like(which, i), None)
            state = self._after[state, kinds[:, i]]
        chosen = going[hidden]
        row, at = going.nonzero(as_tuple=True)
        return pick(weights[chosen] * (self._kind == kinds[going][:, None]), row, at, kinds[going])

    def kinds(self, tokens: Tensor) -> Tensor:
        """Return the kind of each token, int64 of the same shape."""
        return self._kind[tokens]

    def completed(
        self, x: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor, may: Tensor, given: Tensor, pick: Pick
    ) -> tuple[Tensor, Tensor]:
        """Sample the hidden tokens given that each row matches, some of them being given.

        Args:
            x: int64 [r, l], rows that have the given tokens at the positions ``given``.
            rows: bool [b], the selected rows.
            hidden: bool [r, l], positions whose tokens :meth:`draw` samples.
            weights: float64 [h, n], as for :meth:`draw`.
            may: bool [h, n], as for :meth:`draw`.
            given: bool [r, l], those of the hidden positions whose tokens are given.
            pick: Draws classes from weights.

        Returns:
            The rows with all hidden tokens, int64 [r, l], and the rows that :meth:`draw` may return with them, bool [r];
            the others have no probability there.
        """
        weights, _, _ = self._possible(torch.where(given, 0, x), rows, hidden, weights, may)
        known, left = given[hidden], hidden & ~given
        mine = weights.gather(1, torch.where(given, x, 0)[hidden][:, None])[:, 0]
        lack = torch.zeros_like(x).masked_scatter(hidden, (known & (mine <= 0)).long()).any(-1)
        possible = ~lack & (self.log_chance(x, rows, left, weights[~known]) > -torch.inf)
        out = x.clone()
        if bool(left.any()):
            out[left] = self.draw(x, rows, left, weights[~known], may[~known], left, pick=pick)
        return out, possible

    def _possible(
        self, x: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor, may: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return normalised weights under which each row can match, the log-weights of kinds, and the backward sums."""
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        shares = self._log_weights(x, hidden, weights)
        reach = self._backward(x, hidden, shares, rows)
        lost = self._total(reach, rows) == -torch.inf
        if bool(lost.any()):
            even = may.double() / may.sum(-1, keepdim=True).clamp(min=1)
            lost_here = lost[:, None].expand_as(x)[hidden]
            weights = torch.where(lost_here[:, None], weights + even * torch.tensor(UNLIKELY).double().exp(), weights)
            shares = self._log_weights(x, hidden, weights)
            reach = self._backward(x, hidden, shares, rows)
        return weights, shares, reach

    def log_chance(self, x: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
        """Return the log-probability that a row matches if its hidden tokens are drawn independently of each other.

        Args:
            x: int64 [r, l], the r rows of the batch that ``rows`` selects.
            rows: bool [b], the selected rows.
            hidden: bool [r, l], positions whose tokens are drawn; h of them over all rows.
            weights: float64 [h, n], weights of the tokens at the hidden positions, not normalised.

        Returns:
            Nats, float64 [r].
        """
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        return self._total(self._backward(x, hidden, self._log_weights(x, hidden, weights), rows), rows)

    def _log_weights(self, x: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
        """Return the log-weight of each kind of token at each position, float64 [r, l, k].

        Weights are sums of ``weights`` [hidden, n] at hidden positions, and one-hot at fixed positions.
        """
        kinds = self._after.shape[1]
        out = torch.nn.functional.one_hot(self._kind[torch.where(hidden, 0, x)], kinds).double()
        out[hidden] = weights.new_zeros(len(weights), kinds).index_add_(1, self._kind, weights)
        return out.log()

    def _backward(self, x: Tensor, hidden: Tensor, shares: Tensor, rows: Tensor | slice) -> list[Tensor]:
        """Return backward sums: after each number of tokens, the log-weight of all matching rests given the state.

        Kinds of tokens are summed over in the rows where a position is hidden; elsewhere the one token is read.

        Returns:
            One float64 [r, s] for each constrained position, and one more.
        """
        reach = [self._last.expand(len(shares), -1) if self._last.dim() == 1 else self._last[rows]]
        at_once = max(1, _CHUNK // self._after.numel())
        end = x.shape[1] if self._end is None else min(self._end, x.shape[1])
        some = hidden[:, :end].any(0).tolist()
        for i in range(end - 1, -1, -1):
            below = reach[-1]
            above = below.gather(1, self._after[:, self._kind[torch.where(hidden[:, i], 0, x[:, i])]].T)
            if some[i]:
                summed = hidden[:, i].nonzero()[:, 0]
                for part in summed.split(at_once):
                    above[part] = (below[part][:, self._after] + shares[part, i][:, None]).logsumexp(-1)
            reach.append(above)
        return reach[::-1]
