"""Every module of the package imports, documents itself and its public names, and lists them in ``__all__``."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sedd_graph
from tests.conftest import ROOT

PACKAGE = ROOT / "sedd_graph"
MODULES = sorted(
    ["sedd_graph", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "sedd_graph.") if m.name != "sedd_graph.__main__")]
)  # fmt: skip
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


def path_of(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def documented(module: ModuleType, name: str) -> bool:
    """Return True for a name with a docstring; a constant or alias may have a string after it or a comment before it."""
    value = inspect.unwrap(getattr(module, name))  # a cached function is documented where it is defined
    if inspect.ismodule(value):  # sedd_graph.build is both
        return bool(value.__doc__)
    if inspect.isclass(value) or inspect.isfunction(value):
        own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        return bool(own) and not str(own).startswith(
            f"{name}("
        )  # the signature, which a dataclass without a docstring gets
    text = Path(module.__file__ or "").read_text(encoding="utf-8")
    body, lines = ast.parse(text).body, text.splitlines()
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(node, ast.ImportFrom) and node.module and name in {a.name for a in node.names}:
            return documented(importlib.import_module(node.module), name)
        names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        if name in names:
            follows = (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            )
            return follows or lines[node.lineno - 2].startswith("#") or "#" in lines[node.lineno - 1]
    return False


def test_every_module_is_found() -> None:
    assert {path_of(name) for name in MODULES} == {p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_and_have_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    text = path_of(name).read_text(encoding="utf-8")
    assert not text.strip() or (module.__doc__ or "").strip(), "a module needs a docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_complete_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    body = ast.parse(path_of(name).read_text(encoding="utf-8")).body
    if all(isinstance(node, ast.Expr) for node in body):
        return  # a docstring at most
    assert "__all__" in vars(module), "a module needs __all__"
    listed = list(module.__all__)
    assert listed == list(dict.fromkeys(listed))
    for item in listed:
        assert hasattr(module, item), f"{item} is in __all__, but not there"
    assert [item for item in listed if not documented(module, item)] == []


def test_names_of_the_package() -> None:
    assert set(sedd_graph.__all__) >= {"build", "check", "Engine", "Report", "Component", "ComponentConfig", "Context", "SeddGraphError"}  # fmt: skip
    for name in sedd_graph.__all__:
        assert inspect.getdoc(getattr(sedd_graph, name)), name
        assert name in dir(sedd_graph)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sedd_graph.nothing  # noqa: B018
    engine = sedd_graph.Engine
    for method in ("loss", "bound", "sample", "save"):
        assert inspect.getdoc(getattr(engine, method)), method


def test_types_are_distributed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, sedd_graph, sedd_graph.cli.main; assert not {'torch', 'pydantic', 'networkx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
