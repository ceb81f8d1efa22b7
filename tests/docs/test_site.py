"""The site builds strictly, its generated pages follow the code, and the script of the rooms counts every import."""

import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pydantic
import pytest

from sedd_graph.component.registry import discover
from sedd_graph.training.config import TrainConfig
from tests.conftest import ROOT
from tests.pages import DOCS, GENERATED


def script(name: str, path: Path) -> ModuleType:
    """A file of the repository that is no module of a package, loaded."""
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = script("generate", DOCS / "generate.py")
architecture = script("architecture", ROOT / "scripts" / "architecture")


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    options = ("-W", "--keep-going", "-q", "-E", "-d", str(tmp_path / "trees"), "-b", "html")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in GENERATED:
        assert (tmp_path / "html" / "generated" / f"{name}.html").is_file()
    assert "rooms.svg" in (tmp_path / "html" / "explanation" / "architecture.html").read_text(encoding="utf-8")
    pages = {path.stem for path in (tmp_path / "html").rglob("*.html")}
    assert {path.stem for path in DOCS.rglob("*.md") if "_build" not in path.parts} <= pages


def test_the_command_line_has_every_verb_and_option() -> None:
    page = generate.cli_page()
    for name, parser in generate.verbs().items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            for option in action.option_strings:
                assert f"`{option}" in section, (name, option)


def test_every_component_and_each_of_its_keys_is_listed() -> None:
    page = generate.components_page()
    own = [c for c in discover().contracts() if c.distribution.replace("-", "_").startswith("sedd_graph ")]
    assert len(own) > 80
    for contract in own:
        section = page.split(f"\n### {contract.name}\n")[1].split("\n## ")[0].split("\n### ")[0]
        for name in contract.config.model_fields:
            assert f"| `{name}` |" in section, (contract.name, name)


def test_keys_have_type_default_and_meaning() -> None:
    (row,) = [line for line in generate._fields(TrainConfig) if line.startswith("| `warmup` |")]
    key, kind, default, meaning = (cell.strip() for cell in row.strip("|").split(" | "))
    assert (key, default) == ("`warmup`", "`100`")
    assert kind.startswith("integer, ≥ 0")
    assert len(meaning) > 10


class Documented(pydantic.BaseModel):
    first: int = 1
    """Under the
    field."""
    second: float = pydantic.Field(default=0.5, gt=0, description="In the field.")
    third: list[str] | None = None


class Inheriting(Documented):
    fourth: bool = True
    """Its own."""


def test_descriptions_are_read_from_fields_and_from_the_docstrings_below_them() -> None:
    assert generate.descriptions(Inheriting) == {
        "first": "Under the\nfield.",
        "second": "In the field.",
        "fourth": "Its own.",
    }
    assert list(generate._fields(Inheriting))[2:] == [
        "| `first` | integer | `1` | Under the field. |",
        "| `second` | number, > 0 | `0.5` | In the field. |",
        "| `third` | list of text or null | `null` |  |",
        "| `fourth` | true or false | `true` | Its own. |",
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four rooms: low is imported by all; up and side import each other, one lazily and one for types alone."""
    for name, text in {
        "sedd_graph/__init__.py": "",
        "sedd_graph/low.py": "",
        "sedd_graph/up/__init__.py": "",
        "sedd_graph/up/one.py": "from sedd_graph import low\nfrom . import two\ndef f():\n    from sedd_graph.side import g",
        "sedd_graph/up/two.py": "import sedd_graph.low",
        "sedd_graph/side.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sedd_graph.up.one import f",
        "registry/__init__.py": "",
        "registry/part.py": "from sedd_graph.low import anything",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_rooms_floors_arrows_and_circles(tree: Path) -> None:
    between = architecture.files(tree)
    assert between["sedd_graph.up.one"] == {"sedd_graph.low", "sedd_graph.up.two", "sedd_graph.side"}
    arrows = architecture.rooms(between)
    assert arrows == {
        "__init__": set(),
        "low": set(),
        "up": {"low", "side"},
        "side": {"up"},
        "registry": {"low"},
    }
    assert architecture.floors(arrows) == {"__init__": 0, "low": 0, "up": 1, "side": 1, "registry": 1}
    assert architecture.circles(arrows) == [{"up", "side"}]
    assert architecture.circles(between) == [{"sedd_graph.up.one", "sedd_graph.side"}]
    assert "5 rooms on 2 floors, 4 arrows\ncircles between rooms: 1\n  side <-> up" in architecture.listing(between)


def test_an_arrow_that_follows_from_others_is_not_drawn(tree: Path) -> None:
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert architecture.reduced(chain) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert architecture.reduced({"a": {"b", "c"}, "b": {"c"}, "c": {"b"}}) == {"a": {"b", "c"}, "b": {"c"}, "c": {"b"}}
    picture = architecture.svg(architecture.files(tree))
    assert picture.count("<rect") == 6
    assert picture.count("marker-end") == 4


def test_the_rooms_have_no_circle_and_the_root_has_four_modules() -> None:
    between = architecture.files(ROOT)
    arrows = architecture.rooms(between)
    assert architecture.circles(between) == []
    assert architecture.circles(arrows) == []
    assert sum(map(len, arrows.values())) <= 110
    assert {path.stem for path in (ROOT / "sedd_graph").glob("*.py")} == {"__init__", "__main__", "build", "errors"}
    table = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in arrows if f"`{name}`" not in table] == []
