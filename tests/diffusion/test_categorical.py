"""Draws: right in law, and without the defect of 32-bit Gumbel races."""

import pytest
import torch

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import categorical, inverse_cdf
from sedd_graph.diffusion.draws import Draws, Where


def test_law_and_zero_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]).expand(40_000, 5)
    found = torch.bincount(categorical(weights, generator=torch.Generator().manual_seed(0)), minlength=5) / 40_000
    assert found[[0, 2, 4]].sum() == 0
    assert found[3].item() == pytest.approx(0.75, abs=0.01)


def test_impossible_rows_are_refused() -> None:
    for bad in ([0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="sums to zero or is not finite"):
            categorical(torch.tensor([bad]), generator=torch.Generator())


def test_the_inverse_cdf_at_its_ends_and_steps() -> None:
    """Five classes of which three have weight zero: the first and last numbers below 1, and those at a step."""
    cdf = torch.tensor([0.0, 0.25, 0.25, 1.0, 1.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.25 - 2**-30, 0.25 + 2**-30, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(cdf, u).tolist() == [1, 1, 3, 3]
    assert inverse_cdf(3 * cdf, u[:, None]).tolist() == [[1], [1], [3], [3]]
    rows = torch.stack([cdf, cdf.new_tensor([1.0, 1.0, 1.0, 1.0, 1.0])])
    assert inverse_cdf(rows, u.expand(2, -1)).tolist() == [[1, 1, 3, 3], [0, 0, 0, 0]]


def test_48_bits_do_not_depend_on_how_a_batch_is_split() -> None:
    def drawn(start: int, rows: int) -> torch.Tensor:
        return Randomness(torch.Generator().manual_seed(0), start=start, total=6).rand48(rows, 1000)

    whole = drawn(0, 6)
    assert whole.dtype == torch.float64
    assert torch.equal(torch.cat([drawn(0, 2), drawn(2, 4)]), whole)
    scaled = whole * 2**48
    assert bool((scaled == scaled.floor()).all())
    assert bool((whole < 1).all())
    assert len(torch.unique(scaled % 2**24)) > 5900  # the low 24 bits are random too


def truncated_gumbel(weights: torch.Tensor, limit: float, draws: int) -> torch.Tensor:
    """A Gumbel race whose noise is cut at ``limit``, as 32-bit noise is at 16.6."""
    u = torch.rand(draws, len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = -torch.log(-torch.log(u * torch.exp(-torch.exp(torch.tensor(-limit, dtype=torch.float64)))))
    return torch.bincount((weights.log() + noise).argmax(-1), minlength=len(weights)) / draws


def test_a_truncated_race_is_biased_as_the_closed_form_says_and_ours_is_not() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    biased = truncated_gumbel(weights, 0.5, 400_000)
    assert biased.tolist() == pytest.approx([0.00262738, 0.08888422, 0.31090235, 0.59758606], abs=3e-3)
    drawn = categorical(weights.float().expand(400_000, 4), generator=torch.Generator().manual_seed(0))
    assert (torch.bincount(drawn) / 400_000).tolist() == pytest.approx(weights.tolist(), abs=3e-3)


def test_rare_tokens_keep_their_rate() -> None:
    """At h = 1e-5 per step a 32-bit race gives a token of 1/1000 about nothing of its due; two stages give it all."""
    rows, h = 200_000, 1e-5
    weights = torch.tensor([0.899, 0.1, 0.001, 0.0])
    generator = torch.Generator().manual_seed(0)
    x = torch.full((rows, 1), 3)
    draws = Draws(generator)

    def jump(move: torch.Tensor) -> torch.Tensor:
        begun = draws.begin_jump(x, move)
        where = Where(*begun.moving.nonzero(as_tuple=True))
        return draws.end_jump(begun, x, where, len(where.row), lambda on: weights.expand(len(on.row), 4), size=rows)

    # condition on jumping, which the first stage has made apart from the second
    moved = jump(torch.ones(rows, 1))
    share = (moved == 2).float().mean().item()
    assert share == pytest.approx(0.001, rel=0.25)
    jumped = sum(int((jump(torch.full(x.shape, h)) != 3).sum()) for _ in range(20))
    assert jumped == pytest.approx(rows * 20 * h, rel=0.6)
    race = torch.log(torch.tensor([0.899 * h, 0.1 * h, 0.001 * h, 1 - h]))
    top = -torch.log(-torch.log(torch.tensor(1 - 2**-24)))  # the largest 32-bit Gumbel
    typical_mask = race[3] + -torch.log(-torch.log(torch.tensor(0.5)))
    assert race[2] + top < typical_mask + 0.5  # such a token hardly ever wins
