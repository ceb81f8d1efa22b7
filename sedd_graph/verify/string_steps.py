"""Verification of the edits of string samplers with networks whose predictions depend on nothing but the noise level.

Their samples have a law in closed form, so that many draws in few steps see small errors: tokens that are drawn at
another temperature than predicted, or edits that are made at other rates.

Axes: b rows, w positions of a padded string, v data tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.strings.kernel import StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringRates, StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.statistics import NEVER, chi_square
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.worst import least, worst

__all__ = ["check_string_steps"]

TOKENS = {"full": 36_000, "quick": 9_000}
"""Number of strings of which the tokens are counted, about five tokens each."""
CONTINUOUS = 4
"""Divisor of the numbers of strings for samplers in continuous time, which evaluate the network more often."""
FEW = 4
"""Number of steps in which these strings are drawn: the law of a token does not depend on it."""
LONGEST = 6
"""Largest number of tokens of these strings."""
RATES = {"full": ((16, 5_000, -0.5), (48, 16_000, 1.5)), "quick": ((10, 1_000, -0.5), (30, 3_000, 1.5))}
"""Numbers of steps and of strings, and weights of their means, of the check of rates."""
EDITS = {"insert": 2.0, "delete": 0.7, "substitute": 0.7}
"""Mean number of edits of one place (a gap, or a token) in the check of rates, for a process that ends at pure noise."""
RESIDUE = 0.02
"""Largest error of the extrapolation to many steps that is accepted without a trial with more, relative; a fifth of it to fail."""
MOST = 8
"""Factor on the number of steps from which on no more are tried."""
LIMIT = 6.0
"""Largest accepted number of standard deviations. By chance alone a normal variable exceeds it once in 500 million."""


def check_string_steps(table: StringTable, parts: StringParts, proof: Proof) -> list[Check]:
    """Verify that a sampler draws tokens with the probabilities, and makes edits at the rates, that a network predicts.

    Args:
        table: Enumeration of short strings, of which only the kernel and the kinds of its outputs are used.
        parts: The components, constructed with the data tokens of the table.
        proof: Strength of the verification.

    Returns:
        A check of tokens; and one of rates, if the table tells the kinds of edits and rates have a meaning, which they
        do not have if each string has one known length.
    """
    checks = [_check_tokens(table, parts, proof)]
    if isinstance(table, EnumeratedTable) and not parts.objective.one_length:
        checks.append(_check_rates(table, parts, proof))
    return checks


def _laws(tokens: int) -> Tensor:
    """Return as many distributions of the data tokens as there are tokens, float32 [v, v]: each is likely once."""
    law = 4.0 ** -torch.arange(tokens)
    return torch.stack([law.roll(k) for k in range(tokens)]) / law.sum()


def _sample(parts: StringParts, rates: StringRates, strings: Strings, longest: int, steps: int | None) -> Strings:
    """Draw strings from given ones, of which nothing is fixed, with a network ``rates``."""
    kernel, schedule, objective, sampler = parts
    fixed = torch.zeros_like(strings.attend)
    fixed[:, 0] = True
    settings = StringSettings(
        fixed=fixed,
        shut=~strings.attend,
        longest=longest,
        one_length=objective.one_length,
        kernel=kernel,
        schedule=schedule,
        generator=torch.Generator().manual_seed(21),
    )

    def denoise(now: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
        return objective.rates(rates(now, sigma), now, longest)

    return sampler.run(denoise, strings, settings, steps=None if sampler.steps is None else steps)


def _start(table: StringTable, rows: int, tokens: int) -> Strings:
    """Return strings of ``tokens`` copies of token 0."""
    row = torch.tensor([table.kernel.start] + tokens * [0])
    return Strings(row.repeat(rows, 1), torch.ones(rows, tokens + 1, dtype=torch.bool))


def _shapes(table: StringTable) -> dict[str, tuple[int, ...]]:
    """Return the shape of each output behind its axes of rows and positions: [v], perhaps with other states, or []."""
    outputs = table.outputs(_start(table, 1, 1), torch.ones(1, dtype=torch.float64))
    return {name: tuple(value.shape[2:]) for name, value in outputs.items()}


def _check_tokens(table: StringTable, parts: StringParts, proof: Proof) -> Check:
    """Verify that inserted tokens have the probabilities that the network predicts, which differ from row to row.

    They are those of each row at every position, time and string, so that all tokens of a string that starts empty are
    independent draws from them, in any number of steps.
    """
    rows = TOKENS[proof] // (CONTINUOUS if parts.sampler.steps is None else 1)
    laws, shapes = _laws(table.kernel.data_tokens), _shapes(table)
    kind = torch.arange(rows) % len(laws)

    def rates(now: Strings, sigma: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, rest in shapes.items():
            if not rest:
                found[name] = torch.full(now.tokens.shape, -1.0 if name == "log_delete" else 0.5)
                continue
            each = torch.full((rows, *rest), -1e6)
            each[:, : laws.shape[1]] = laws[kind].log()
            found[name] = each[:, None].expand(rows, now.tokens.shape[1], *rest)
        return found

    out = _sample(parts, rates, _start(table, rows, 0), LONGEST, FEW)
    real = out.attend.clone()
    real[:, 0] = False
    laws, count, lengths = laws.double(), len(laws), out.lengths
    chances = []
    first, last = torch.zeros_like(real), torch.zeros_like(real)
    first[:, 1:2] = real[:, 1:2]
    last.scatter_(1, lengths[:, None], real.gather(1, lengths[:, None]))
    for where in (real, first, last):
        cell = (kind[:, None] * count + out.tokens.clamp(max=count - 1))[where]
        seen = torch.bincount(cell, minlength=count * count).view(count, count).double()
        chances += [chi_square(n, n.sum() * law) for n, law in zip(seen, laws, strict=True)]
    two = lengths > 1
    cell = (kind * count + out.tokens[:, 1].clamp(max=count - 1)) * count
    if bool(two.any()):
        cell = (cell + out.tokens[:, min(2, out.tokens.shape[1] - 1)].clamp(max=count - 1))[two]
        seen = torch.bincount(cell, minlength=count**3).view(count, -1).double()
        pairs = torch.einsum("ka,kb->kab", laws, laws).flatten(1)
        chances += [chi_square(n, n.sum() * law) for n, law in zip(seen, pairs, strict=True)]
    enough = int(real.sum()) > rows
    chance = least(*chances) if enough else 0.0
    claim = "tokens have the probabilities that the network predicts for them, independently"
    value = f"probability by chance {chance:.1e}" if enough else "hardly any tokens are inserted"
    how = f"chi-square of {int(real.sum()):,} tokens, of the first and last, and of pairs, predictions of each row"
    return Check("sampler.tokens", claim, chance > NEVER, value, how)


def _check_rates(table: EnumeratedTable, parts: StringParts, proof: Proof) -> Check:
    """Verify the mean number of edits of each kind, made alone and at a known rate, of given tokens and of their gaps.

    The network's prediction is such that the rate at which a place is edited, per unit of p = 1 - exp(-sigma), is twice
    p times a number of :data:`EDITS`, whatever the kernel and the schedule.
    """
    largest, values = 0.0, []
    for name, kind in table.kinds.items():
        edit = name.removeprefix("log_") if kind else "insert"
        if name in table.kernel.reads and name not in table.log_probabilities and edit in EDITS:
            off, text = _edits(table, parts, name, edit, proof)
            largest = worst(largest, off)
            values.append(text)
    claim = "edits of each kind are made at the rates that the network predicts"
    how = "mean numbers of insertions, deletions and substitutions, each alone"
    if parts.sampler.steps is not None:
        how += ", " + " and ".join(f"{rows:,} strings in {steps} or more steps" for steps, rows, _ in RATES[proof])
    value = f"{largest:.1f} standard deviations (at most {LIMIT:g}): {'; '.join(values)}"
    return Check("sampler.rates", claim, largest < LIMIT, value, how)


def _alone(table: EnumeratedTable, name: str, edits: float) -> StringRates:
    """Return a network that makes edits of one kind, of the token 0 and behind it, and writes the token 1."""
    kernel, shapes = table.kernel, _shapes(table)

    def rates(now: Strings, sigma: Tensor) -> dict[str, Tensor]:
        sigma = sigma[:1] if bool((sigma == sigma[0]).all()) else sigma
        unit = kernel.weights(sigma.double())[:, table.kinds[name]].double()
        each = (2 * edits * -torch.expm1(-sigma.double()) * torch.exp(-sigma.double()) / unit).log().float()[:, None]
        each = torch.where((now.tokens == 0) | (now.tokens == kernel.start), each, -1e6)
        found = {}
        for output, rest in shapes.items():
            found[output] = value = torch.full((*now.tokens.shape, *rest), -1e6)
            if output in table.log_probabilities:
                value[..., 1] = 0.0
            elif output == name:
                (value[..., 1] if rest else value)[:] = each
        return found

    return rates


def _edits(table: EnumeratedTable, parts: StringParts, name: str, edit: str, proof: Proof) -> tuple[float, str]:
    """Return the deviation of the mean number of edits of one kind, in standard deviations, and a text.

    Where steps are too long for the schedule, up to eight times as many are taken.
    """
    runs: tuple[tuple[int, int, float], ...] = RATES[proof]
    insert = edit == "insert"
    if parts.sampler.steps is None:
        runs = ((0, runs[-1][1] // 2, 1.0),)
    tokens, more = (3, 1) if insert else (6, 2)  # edits of given tokens vary less
    end = float(parts.schedule.sigma(torch.ones(1, dtype=torch.float64)))
    edits = EDITS[edit] * math.expm1(-end) ** 2
    expected = (tokens + 1) * edits if insert else -tokens * math.expm1(-edits)
    while True:
        means, variance, found = list[float](), 0.0, 0.0
        for steps, rows, share in runs:
            start = _start(table, rows if insert else rows // 4, tokens)
            out = _sample(parts, _alone(table, name, EDITS[edit]), start, 64, more * steps)
            done = tokens - out.lengths if edit == "delete" else (out.attend & (out.tokens == 1)).sum(-1)
            means.append(float(done.double().mean()))
            variance += share**2 * float(done.double().var()) / len(done)
            found += share * means[-1]
        # the error of second order, which extrapolation leaves, by the square of that of first order
        residue = 2 * (1.5 * (means[-1] - means[0])) ** 2 / (3 * expected)
        off = worst(0.0, abs(found - expected) - residue) / math.sqrt(variance + 1e-12)
        enough = RESIDUE if off < LIMIT else RESIDUE / 5
        if residue < enough * expected or len(runs) == 1 or more >= MOST:
            text = f"{edit} {found:.4f} against {expected:.4f} +- {residue + math.sqrt(variance):.4f}"
            return off, text
        more *= 2
