"""The reference pages of training and data list every key with its default."""

import re
from typing import Any

import pydantic
import pytest
import yaml
from sedd_graph_registry.training.optimizers import AdamW, Muon

from sedd_graph.data.config import DataConfig
from sedd_graph.training.config import TrainConfig
from tests.conftest import ROOT
from tests.pages import blocks

PAGES = {name: ROOT / "docs" / "reference" / f"{name}.md" for name in ("training", "data")}
TRAINING = PAGES["training"].read_text(encoding="utf-8")


def table(text: str, first: str) -> dict[str, Any]:
    """Names and defaults of the table whose first heading is ``first``."""
    body = re.search(rf"^\| {first} \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert body is not None
    rows = [re.match(r"\| `(\w+)` \| `([^`]*)` \|", line) for line in body[1].splitlines()]
    return {row[1]: yaml.safe_load(row[2]) for row in rows if row is not None}


def defaults(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    return model().model_dump(mode="json")


def test_every_key_of_train_stands_there_with_its_default() -> None:
    expected = defaults(TrainConfig)
    expected["optimizer"] = {"op": "adamw"}  # its own keys have a table of their own
    expected["schedule"] = {"op": "cosine_decay"}
    assert table(TRAINING, "key") == expected
    assert "sample` | `null` | samples during training: `{every: 1000, rows: 1, steps: 32}`" in TRAINING


@pytest.mark.parametrize(("name", "model"), [("`adamw`", AdamW.Config), ("`muon`", Muon.Config)])
def test_every_key_of_an_optimizer_stands_there(name: str, model: type[pydantic.BaseModel]) -> None:
    expected = defaults(model)
    if "adamw" in expected:
        expected["adamw"] = {"lr": expected["adamw"]["lr"]}
    said = {key: float(value) if isinstance(value, str) else value for key, value in table(TRAINING, name).items()}
    assert said == expected


def test_the_defaults_of_data_stand_there() -> None:
    (shown,) = [yaml.safe_load(b)["data"] for b in blocks(PAGES["data"], "yaml") if "corpus" in b]
    assert DataConfig.model_validate(shown | {"corpus": {"op": "builtin"}}) == DataConfig()
    assert shown.keys() == DataConfig.model_fields.keys()
