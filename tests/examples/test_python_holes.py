"""The example of Python source: which holes it makes, and what fills them under a regular expression."""

import ast
import re
from pathlib import Path

import pytest

from sedd_graph.cli.main import run
from sedd_graph.engine.samples import TextWithHoles
from sedd_graph.errors import UserError
from sedd_graph.runs.open import open_run
from sedd_graph.runs.prompts import hole_pattern
from tests.examples.scripts import script

MODULE = '''
class Box:
    def area(self, scale):
        """Text."""
        total = self.width * scale
        return round(total, 2)

    def name(self):
        return self.title

    def none(self):
        pass

def pair(a, b):
    return a, b
'''


def test_the_pattern_of_holes_quotes_what_is_given() -> None:
    """Against Python's ``re``, for which the pattern is written the same."""
    pattern = hole_pattern(TextWithHoles(text="f(x)[[3]] + [a]\n[[2]]*"), ["[0-9]+", "a|bb"])
    for text, good in [
        ("f(x)123 + [a]\na*", True),
        ("f(x)1 + [a]\nbb*", True),
        ("f(x)1 + a\nbb*", False),
        ("f(x)1 + [a]\nb*", False),
    ]:
        assert (re.fullmatch(pattern, text) is not None) is good, text
    assert hole_pattern(TextWithHoles(prefix="a.", suffix="?"), ["b"]) == r"a\.(?:b)\?"
    assert hole_pattern(TextWithHoles(text="[[1]] [[1]]"), ["b|c"]) == r"(?:b|c)\ (?:b|c)"
    with pytest.raises(UserError, match="2 expressions for 1 holes"):
        hole_pattern(TextWithHoles(text="[[1]]"), ["b", "c"])


def test_holes_are_what_functions_return(tmp_path: Path) -> None:
    module = script("python/holes.py")
    found = dict(module.returned(MODULE))
    assert sorted(found.values()) == ["round(total, 2)", "self.title"]
    assert all(module.parses(text + value) and not module.parses(text + "f(") for text, value in found.items())
    for name, size in (("a.py", 700), ("b.py", 200), ("c.py", 100)):
        (tmp_path / name).write_text("#" * size)
    assert [path.name for path in module.heldout(tmp_path, 0.35)] == ["b.py", "c.py"]


def test_what_fills_a_hole_matches_and_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an untrained model, whose free answers are noise."""
    module = script("python/holes.py")
    monkeypatch.chdir(tmp_path)
    assert run(["init", "python-tiny"]) == 0
    (tmp_path / "a.py").write_text(MODULE * 40)
    small = ["params.dim=16", "params.heads=2", "params.depth=1", "params.tokens=300", "data.length=32"]
    words = ["--proof", "quick", "--device", "cpu", "--path-to", "run"]
    assert run(["build", "python-tiny.yaml", *small, *words]) == 0
    opened = open_run((tmp_path / "run").read_text().strip(), device="cpu", compile="off", weights="fresh")
    known = re.compile(module.EXPRESSION)
    for seed, (text, value) in enumerate([*module.returned(MODULE)] * 2):
        done = module.fill(opened, text, value, constrained=True, seed=seed)
        assert done.startswith(text)
        assert done.endswith("\n")
        assert known.fullmatch(done.removeprefix(text).removesuffix("\n"))
        tree = ast.parse(done)
        assert isinstance(tree.body[0], ast.FunctionDef)
        assert not module.parses(module.fill(opened, text, value, constrained=False, seed=seed))
