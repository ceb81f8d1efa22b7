"""docs/reference/blueprint.md is true: its blueprints build, its limits are those of the code, its keys are those of the schema."""

import re
from pathlib import Path

import pytest

from sedd_graph.blueprint import interpolate, load, overrides, schema, yaml
from sedd_graph.component.axes import MAX_SIZE
from sedd_graph.diffusion.tokens.block_diffusion import BLOCK_FEEDS
from sedd_graph.diffusion.tokens.objective import FEEDS
from sedd_graph.errors import MAX_PROBLEMS, BlueprintError
from sedd_graph.graph import blocks, expand
from sedd_graph.runs.check import check, lock_text
from sedd_graph.store.config import StoreConfig
from tests.conftest import ROOT, SMALL
from tests.pages import blueprints

PAGE = ROOT / "docs" / "reference" / "blueprint.md"
TEXT = PAGE.read_text(encoding="utf-8")
SNIPPETS = blueprints(PAGE)


@pytest.mark.parametrize("text", SNIPPETS.values(), ids=SNIPPETS)
def test_every_complete_blueprint_builds(text: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.yaml").write_text(text, encoding="utf-8")
    report = check(tmp_path / "snippet.yaml")
    assert report.parameters > 0
    (tmp_path / "lock.yaml").write_text(lock_text(report), encoding="utf-8")
    assert lock_text(check(tmp_path / "lock.yaml")) == lock_text(report)


def test_there_are_such_snippets_and_no_other_yaml() -> None:
    assert len(SNIPPETS) == TEXT.count("```yaml") >= 5


def test_the_quoted_message_is_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL.replace("heads: 2", "heads: 3"), encoding="utf-8")
    with pytest.raises(BlueprintError) as error:
        check(tmp_path / "small.yaml")
    assert str(error.value).replace(f"{tmp_path}/", "") in " ".join(TEXT.split())


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_key_is_explained() -> None:
    for name, field in schema.Blueprint.model_fields.items():
        assert f"`{field.alias or name}`" in TEXT.split("\n## Types")[0], name
    for model, title in ((schema.Node, "Nodes"), (schema.Block, "Blocks"), (schema.SaveSpec, "Saving values"), (schema.Invertible, "Blocks"), (StoreConfig, "Saving values")):  # fmt: skip
        for name, field in model.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", section(title)), (model.__name__, name)
    for name, text in {f.name: f.type for f in (*FEEDS, *BLOCK_FEEDS)}.items():
        assert f"`{name}: {text}`" in section("The noise process")
    for op in ("memory", "arithmetic"):
        for choice in re.findall(r"'(\w+)'", str(schema.Node.model_fields[op].annotation)):
            assert choice in section("Blocks")


def test_limits_are_those_of_the_code() -> None:
    table = section("What is read, and its limits")
    for row in (
        f"{yaml.MAX_BYTES // 1024} KiB, nested {yaml.MAX_DEPTH} deep, {yaml.MAX_NODES:,} values",
        f"{yaml.MAX_KEY}, {schema.MAX_NAME}, {yaml.MAX_SCALAR:,} characters",
        f"| {load.MAX_FILES}, {load.MAX_INCLUDE_DEPTH} |",
        f"| {interpolate.MAX_PARAMS}, {interpolate.MAX_REFERENCES}, {interpolate.MAX_TEXT:,} characters |",
        f"below 2^{MAX_SIZE.bit_length() - 1}",
        f"| {expand.MAX_BLOCK_DEPTH}, {blocks.MAX_REPEAT:,} |",
        f"| {blocks.MAX_NODES:,}; {expand.MAX_STEPS:,} |",
    ):
        assert row in table
    assert MAX_PROBLEMS == 100
    for key in ("train", "params", "nodes", "data"):
        assert key in overrides._TOP
