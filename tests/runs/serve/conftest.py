"""Served models, each of which is built once."""

from collections.abc import Callable

import pytest

from sedd_graph.runs.serve.model import ServedModel
from tests.conftest import SMALL
from tests.runs.serve.served import model_of


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ServedModel]:
    """``served(name)``: a shipped blueprint with four steps; ``padded`` is a blueprint whose graph has the input attend."""
    folder, made = tmp_path_factory.mktemp("served"), dict[str, ServedModel]()
    (folder / "padded.yaml").write_text(SMALL)

    def model(name: str) -> ServedModel:
        if name not in made:
            steps = () if name == "bd3lm-tiny" else ("sample.steps=4",)  # its sampler takes no number of steps
            made[name] = model_of(folder / name, str(folder / "padded.yaml") if name == "padded" else name, *steps)
        return made[name]

    return model
