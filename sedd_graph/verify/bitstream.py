"""Verification of noise with a bitstream: it is a bijection, and its draws have the distribution of the kernel.

Axes: b rows, l positions, n states, m data tokens, s strings of a table, c clean strings.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.coder import Integers
from sedd_graph.diffusion.bitstream.laws import TokenLaw, reference_of, token_law
from sedd_graph.diffusion.bitstream.noise import denoise_step, noise_step
from sedd_graph.diffusion.bitstream.strings import denoise_string_step, noise_string_step
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError
from sedd_graph.verify.statistics import NEVER, chi_square, deviation
from sedd_graph.verify.string_draws import LIMIT
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.worst import worst

__all__ = ["check_bitstream", "check_string_bitstream"]

LEVELS = (0.4, 1.5)
"""Total noise after each of two steps."""
ROWS = {"full": 512, "quick": 256}
STRINGS = {"full": 8_192, "quick": 2_048}
LANES = 512
TABLE = 1e-6
"""Largest difference between a probability of the bitstream's tables and that of the transition matrix, with few states."""
SIZE = 1.05
"""Largest accepted ratio of the mean size of a record to the entropy of what noise erased."""
BIJECTION = "noise with a bitstream is a bijection: denoising recovers the tokens and returns the bitstream as it was"
LAW = "noise with a bitstream has the distribution of the kernel"


def check_bitstream(kernel: Kernel, proof: Proof) -> list[Check]:
    """Verify noise with a bitstream, for a token kernel with few states.

    Args:
        kernel: Kernel with few states.
        proof: Strength of the verification.
    """
    m, n, rows, levels = kernel.data_tokens, kernel.states, ROWS[proof], _levels(kernel)
    x = torch.arange(max(1, 12 // m) * m).remainder(m).expand(rows, -1).contiguous()
    corrupt = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.9
    try:
        y, bitstream = x, Bitstream.new(7, *x.shape, lanes=LANES)
        for start, sigma in itertools.pairwise((0.0, *levels)):
            y, bitstream = noise_step(kernel, sigma, start, y, bitstream, corrupt=corrupt)
        z, back = y, bitstream
        for sigma, start in itertools.pairwise((*levels[::-1], 0.0)):
            z, back = denoise_step(kernel, sigma, start, z, back, corrupt=corrupt)
    except UserError as error:
        return [_bijection("kernel.bitstream", str(error), x.numel())]
    lost = int((z != x).sum() + (y != x)[~corrupt].sum())
    wrong = f"{lost} tokens are wrong" if lost else "" if back.pristine else "the bitstream is another one"
    p = kernel.transition_matrix(torch.tensor([levels[-1]], dtype=torch.float64))[0].detach()
    counts = torch.zeros(m, n, dtype=torch.float64)
    counts.index_put_((x[corrupt], y[corrupt]), torch.ones((), dtype=torch.float64), accumulate=True)
    chance = chi_square(counts, counts.sum(-1, keepdim=True) * p[:, :m].T.clamp(min=0))
    off, ratio = _tables(kernel, levels)
    return [
        _bijection("kernel.bitstream", wrong, x.numel()),
        Check(
            "kernel.bitstream_law",
            LAW,
            chance > NEVER and off < TABLE,
            f"probability by chance {chance:.1e}; frequencies off by {off:.1e}",
            f"chi-square of {int(corrupt.sum()):,} draws in two steps; frequency tables against the transition matrix",
        ),
        Check.below(
            "kernel.bitstream_size",
            "the record of a bitstream is as long as the entropy of what noise erased",
            ratio,
            SIZE,
            "mean size for tokens of the reference distribution over their entropy given the noise, in two steps",
            digits=".4f",
        ),
    ]


def _levels(kernel: Kernel) -> tuple[float, ...]:
    """Return total noise after each step of noise; in discrete time, a third and two thirds of the steps."""
    if kernel.steps is None:
        return LEVELS
    return tuple(float(x) for x in sorted({math.ceil(kernel.steps / 3), math.ceil(2 * kernel.steps / 3)}))


def _bijection(name: str, wrong: str, many: int, steps: int = 2) -> Check:
    how = f"{many:,} tokens, {'two steps' if steps == 2 else 'one step'}, there and back"
    return Check(name, BIJECTION, not wrong, wrong or "every bit", how)


def _tables(kernel: Kernel, levels: tuple[float, ...]) -> tuple[float, float]:
    """Compare the tables of two steps with the transition matrix.

    Returns:
        The largest difference of a probability, and the largest ratio of the mean size of a record to the entropy.
    """
    n, off, ratio = kernel.states, 0.0, 1.0
    reference = reference_of(kernel, None)
    old, new = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    for start, sigma in itertools.pairwise((0.0, *levels)):
        law = token_law(kernel, sigma, start, reference)
        p = kernel.transition_matrix(sigma, start).detach().double().numpy().T.clip(min=0)
        before = reference if not start else kernel.transition_matrix(start).detach().double().numpy() @ reference
        before = before.clip(min=0)
        off = worst(off, float(np.abs(_chances(law, old, new).reshape(n, n) - p).max()))
        joint = before[:, None] * p
        entropy = float(-(joint * np.log2(joint / joint.sum(0).clip(min=1e-300), where=joint > 0, out=0 * joint)).sum())
        bits = law.record.bits(new, old).reshape(n, n)
        if entropy > 1e-3:
            ratio = worst(ratio, float((joint * bits).sum() / entropy))
    return off, ratio


def _chances(law: TokenLaw, old: Integers, new: Integers) -> np.ndarray:
    bits = law.draw.bits(old, new)
    found: np.ndarray = np.where(bits >= 28, 0.0, 2.0**-bits)
    return found


def check_string_bitstream(table: EnumeratedTable, proof: Proof) -> list[Check]:
    """Verify noise with a bitstream, for a string kernel with few tokens.

    Args:
        table: Enumeration of all short strings, with the distribution of noisy strings given each clean string.
        proof: Strength of the verification.

    Returns:
        Two checks; none if the kernel declares no reversible noise.
    """
    kernel = table.kernel
    whole = kernel.fates(LEVELS[0]) is not None
    if not whole and kernel.aligned_noise(LEVELS[0]) is None:
        return []
    levels = LEVELS if whole else LEVELS[:1]  # aligned noise is drawn in one step
    rows = STRINGS[proof]
    chosen = torch.multinomial(table.law, rows, replacement=True, generator=torch.Generator().manual_seed(4))
    x = table.rows(chosen)
    try:
        y, bitstream = x, Bitstream.new(9, *x.tokens.shape, lanes=LANES)
        for start, sigma in itertools.pairwise((0.0, *levels)):
            y, bitstream = noise_string_step(kernel, sigma, start, y, bitstream)
        z, back = y, bitstream
        for sigma, start in itertools.pairwise((*levels[::-1], 0.0)):
            z, back = denoise_string_step(kernel, sigma, start, z, back)
    except UserError as error:
        return [_bijection("strings.bitstream", str(error), int(x.lengths.sum()), len(levels))]
    steps = "two steps" if whole else "one step"
    lost = int((table.number(z) != chosen).sum())
    wrong = f"{lost} strings are wrong" if lost else "" if back.pristine else "the bitstream is another one"
    off, apart = _deviation(table, chosen, y, levels[-1]), _fates_error(table) if whole else 0.0
    return [
        _bijection("strings.bitstream", wrong, int(x.lengths.sum()), len(levels)),
        Check(
            "strings.bitstream_law",
            LAW,
            off < LIMIT and apart < table.rounding,
            f"{off:.1f} standard deviations (at most {LIMIT:g})"
            + (f"; fates off by {apart:.1e} (below {table.rounding:.0e})" if whole else ""),
            f"chi-square of {rows:,} strings in {steps}"
            + ("; fates against the enumeration, in one step and in two" if whole else ""),
        ),
    ]


def _fates_error(table: EnumeratedTable) -> float:
    """Return the largest difference of a noisy string's probability by :meth:`StringKernel.fates` from the table's."""
    law = table.conditional(torch.tensor(LEVELS, dtype=torch.float64)).transpose(1, 2)  # [level, s, c]
    first, last = (_string_law(table, table.kernel.fates(sigma)) for sigma in LEVELS)
    then = _string_law(table, table.kernel.fates(LEVELS[1], LEVELS[0]))
    clean = table.clean_strings
    found = (first[:, clean] - law[0], last[:, clean] - law[1], then @ first[:, clean] - law[1])
    return worst(*(float(x.abs().max()) for x in found))


def _string_law(table: EnumeratedTable, fates: Fates | None) -> torch.Tensor:
    """Return the probability of each noisy string given each string, float64 [s, s], by the pair HMM of the fates.

    ``live`` sums over the ways to have made j new tokens of i old ones such that one more may be born, ``done`` over
    those in which none may.
    """
    if fates is None:
        raise UserError("the kernel declares fates for some steps and none for others")
    rows = table.rows(torch.arange(len(table.strings)))
    y, lengths = rows.tokens[:, 1:], rows.lengths
    born = fates.birth * fates.law[y]  # [s, w]
    swap = fates.replace * fates.law[y]
    size, zero = y.shape[1], torch.zeros(len(y), len(y), dtype=torch.float64)
    done, found = list[torch.Tensor](), zero.clone()
    for i in range(size + 1):
        live_before, before, live, done = zero, done, zero, []
        for j in range(size + 1):
            live = torch.ones_like(zero) if i == j == 0 else live_before * born[:, j - 1, None] if j else zero
            if i and j:
                old, new = y[None, :, i - 1], y[:, j - 1, None]
                hidden = fates.hide[old] * (new == fates.mask) if fates.mask is not None else 0.0
                live = live + before[j - 1] * (fates.survive[old] * (old == new) + hidden + swap[:, j - 1, None])
            ended = (1 - fates.birth) * live
            done.append(ended + fates.vanish[y[None, :, i - 1]] * before[j] if i else ended)
            live_before = live
            found = torch.where((lengths[:, None] == j) & (lengths[None] == i), done[j], found)
    return found


def _deviation(table: EnumeratedTable, chosen: torch.Tensor, noisy: Strings, sigma: float) -> float:
    """Return how improbable strings noised to ``sigma`` are given their clean strings ``chosen`` [b].

    Returns:
        Standard deviations of a chi-square statistic.
    """
    number, count, clean = table.number(noisy), len(table.strings), table.clean_strings
    law = table.conditional(torch.tensor([sigma], dtype=torch.float64))[0].clamp(min=0)
    row = torch.searchsorted(clean, chosen)
    cells = torch.bincount(row * (count + 1) + number, minlength=len(clean) * (count + 1)).view(len(clean), count + 1)
    many = torch.bincount(row, minlength=len(clean)).double()[:, None]
    beyond = (1 - law.sum(-1, keepdim=True)).clamp(min=0) + 1e-9
    return deviation(cells.double().flatten(), (many * torch.cat([law, beyond], 1)).flatten())
