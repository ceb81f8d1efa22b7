"""The fuzzer, in short and at length."""

import random
import resource
import shutil
import sys
from pathlib import Path

import pytest

from sedd_graph.errors import SeddGraphError
from sedd_graph.runs.check import check
from tests.blueprint.fuzz import mutant, overrides, run
from tests.conftest import BLUEPRINTS, ROOT, SMALL
from tests.graph.nested import MAIN, write_nested


def sources(folder: Path) -> list[str]:
    """What is mutated; the files that it includes are put into ``folder``."""
    shutil.copytree(ROOT / "blueprints" / "blocks", folder / "blocks")
    write_nested(folder)
    return [SMALL, MAIN, MAIN, *(p.read_text() for p in BLUEPRINTS if "medium" not in p.name)]


def reaching(folder: Path) -> list[str]:
    """Two of :func:`sources`, which have every construct between them: a shipped blueprint more leaves this list as it is."""
    return sources(folder)[:2]


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_only_blueprint_errors_come_out(tmp_path: Path, count: int) -> None:
    before = peak()
    outcome = run(sources(tmp_path), tmp_path, count=count, seed=count)
    assert outcome["refused"] > count / 3
    assert outcome["accepted"] > count / 30
    assert peak() - before < 500


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def test_the_mutations_reach_every_stage(tmp_path: Path) -> None:
    """Messages of the reader, the overrides, the schema, interpolation, includes, expansion, unification and process."""
    texts, rng = reaching(tmp_path), random.Random(5)
    parts = ("not YAML", "duplicate key", "tags are not", "nested deeper", "points to nothing", "override ", "unknown key", "must be", "unknown parameter", "the only interpolation", "outside the project", "no such file", "unknown op", "unknown axis", "no node or input is called", "feeds no output", "expects", "is of kind", "is missing")  # fmt: skip
    seen = ""
    for _ in range(8000):
        source = rng.choice(texts)
        (tmp_path / "mutant.yaml").write_bytes(mutant(source, rng))
        try:
            check(tmp_path / "mutant.yaml", overrides(source, rng))
        except SeddGraphError as error:
            seen += str(error)
            if all(part in seen for part in parts):
                return
    assert [part for part in parts if part not in seen] == []


def test_every_shipped_blueprint_has_the_header_that_editors_read() -> None:
    for path in BLUEPRINTS:
        assert path.read_text().startswith("# yaml-language-server: $schema=../schema/blueprint.v1.json\n")


def test_the_committed_schema_is_the_present_one_and_fits() -> None:
    import json

    import jsonschema

    from sedd_graph.blueprint.yaml import read_yaml
    from sedd_graph.runs.check import schema_text

    text = (ROOT / "schema" / "blueprint.v1.json").read_text()
    assert text == schema_text()
    validator = jsonschema.Draft202012Validator(json.loads(text))
    for path in [*BLUEPRINTS, *sorted((ROOT / "blueprints" / "blocks").glob("*.yaml"))]:
        data = read_yaml(path).data
        assert [e.message for e in validator.iter_errors(data)] == [], path.name
        assert not validator.is_valid({**data, "nonsense": 1})
