"""Random numbers of batches: systematic sampling of rows."""

import math

import pytest
import torch

from sedd_graph.diffusion.batch import Randomness


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_systematic_sampling_chooses_a_share_of_any_successive_rows(share: float) -> None:
    counts = torch.zeros(24)
    for seed in range(400):
        whole = Randomness(torch.Generator().manual_seed(seed)).systematic(24, share)
        part = Randomness(torch.Generator().manual_seed(seed), start=7, total=24).systematic(9, share)
        assert torch.equal(whole[7:16], part)
        assert math.floor(9 * share) <= int(part.sum()) <= math.ceil(9 * share)
        counts += whole
    deviation = math.sqrt(400 * share * (1 - share))
    assert bool(((counts - 400 * share).abs() <= 4.5 * deviation).all())
