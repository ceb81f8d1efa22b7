"""Every component of the registry, and every field of its Config, has a docstring, and ``self.config`` its own type."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

THEMES = ("network", "bijective", "codes", "noise")
FILES = sorted(path for theme in THEMES for path in (ROOT / "registry" / theme).glob("*.py") if path.stat().st_size)


def is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def annotations(node: ast.ClassDef) -> dict[str, tuple[ast.AnnAssign, ast.stmt | None]]:
    """Return each annotated name of a class body with the statement that follows it."""
    following = [*node.body[1:], None]
    return {
        statement.target.id: (statement, after)
        for statement, after in zip(node.body, following, strict=True)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_components_and_their_fields_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    missing = []
    for node in [n for n in tree.body if isinstance(n, ast.ClassDef)]:
        if not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(f"{node.name}: docstring")
        for config in [n for n in node.body if isinstance(n, ast.ClassDef) and n.name == "Config"]:
            missing += [
                f"{node.name}.Config.{n}" for n, (_, after) in annotations(config).items() if not is_text(after)
            ]
            own = annotations(node).get("config")
            if own is None or ast.unparse(own[0].annotation) != "Config":
                missing.append(f"{node.name}: 'config: Config'")
    assert missing == []
