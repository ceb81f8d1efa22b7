"""Arguments of the Python functions that a user may well get wrong, or give as text."""

from collections.abc import Callable
from pathlib import Path

import pytest

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.runs.open import open_run


@pytest.mark.parametrize("function", [sedd_graph.check, sedd_graph.build])
def test_one_string_of_overrides_is_one_clear_error(
    small: Callable[..., Path], function: Callable[..., object]
) -> None:
    with pytest.raises(UserError) as error:
        function(small(), "params.dim=32")
    assert str(error.value) == "overrides are a list of strings, such as ['params.dim=32'], not one string"


def test_a_run_is_opened_by_the_text_of_its_path(small: Callable[..., Path], tmp_path: Path) -> None:
    assert cli.run(["build", str(small()), "--runs", str(tmp_path / "runs"), "--device", "cpu"]) == 0
    (folder,) = (tmp_path / "runs" / "small").iterdir()
    run = open_run(str(folder), device="cpu", compile="off")
    assert (run.path, run.weights) == (folder, "fresh")
    assert len(run.decode(run.engine.sample(2, 8, seed=1))) == 2
