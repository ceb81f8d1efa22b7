"""Total variation distance of draws from a distribution."""

import pytest
import torch

from sedd_graph.verify.total_variation import total_variation


def test_it_is_half_the_sum_of_differences_of_frequencies() -> None:
    law = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert total_variation(torch.tensor([0, 0, 1, 2]), law) == 0
    assert total_variation(torch.tensor([0, 0, 0, 0]), law) == pytest.approx(0.5)
    # a state outside the distribution adds nothing, but the others are less frequent
    assert total_variation(torch.tensor([0, 0, 1, 3]), law) == pytest.approx(0.125)
