"""The fuzzer, in short and at length."""

import shutil
from pathlib import Path

import pytest

from tests.blueprint.fuzz import run
from tests.conftest import BLUEPRINTS, ROOT, SMALL


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_only_blueprint_errors_come_out(tmp_path: Path, count: int) -> None:
    shutil.copytree(ROOT / "blueprints" / "blocks", tmp_path / "blocks")
    sources = [SMALL, *(p.read_text() for p in BLUEPRINTS if "medium" not in p.name)]
    outcome = run(sources, tmp_path, count=count, seed=count)
    assert outcome["refused"] > count / 3
    assert outcome["accepted"] > 0


def test_every_shipped_blueprint_has_the_header_that_editors_read() -> None:
    for path in BLUEPRINTS:
        assert path.read_text().startswith("# yaml-language-server: $schema=../schema/blueprint.v1.json\n")


def test_the_committed_schema_is_the_present_one_and_fits() -> None:
    import json

    import jsonschema

    from sedd_graph.api import schema_text
    from sedd_graph.blueprint.yaml import read_yaml

    text = (ROOT / "schema" / "blueprint.v1.json").read_text()
    assert text == schema_text()
    validator = jsonschema.Draft202012Validator(json.loads(text))
    for path in [*BLUEPRINTS, *sorted((ROOT / "blueprints" / "blocks").glob("*.yaml"))]:
        data = read_yaml(path).data
        assert [e.message for e in validator.iter_errors(data)] == [], path.name
        assert not validator.is_valid({**data, "nonsense": 1})
