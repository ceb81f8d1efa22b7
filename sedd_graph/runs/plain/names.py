"""The global names that exported code reads: imports, constants, and the functions that it calls."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from sedd_graph.component.exported import replacement_of
from sedd_graph.errors import UserError
from sedd_graph.runs.plain.specialise import Scope, Specialiser, literal, tidy

__all__ = ["Names", "NotExportable", "function_tree", "plain_signature", "plain_text"]

ALLOWED = frozenset({"torch", "transformers"}) | sys.stdlib_module_names
_SHAPED = ("Float", "Int", "Bool")


class NotExportable(UserError):
    """A component cannot be written as plain torch code."""


@functools.lru_cache(maxsize=4096)
def _source(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(function))


def function_tree(function: Callable[..., Any], what: str) -> ast.FunctionDef:
    """Return the syntax tree of a function or method. Raises :class:`NotExportable` if its source is not available."""
    try:
        tree = ast.parse(_source(function)).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        raise NotExportable(f"{what} cannot be exported: the source of {function!r} is not available") from None
    if not isinstance(tree, ast.FunctionDef):
        raise NotExportable(f"{what} cannot be exported: {function!r} is not defined by 'def'")
    return tree


def plain_signature(tree: ast.FunctionDef, dropped: Collection[str] = (), given: Collection[str] = ()) -> None:
    """Write the signature of a function without jaxtyping's shapes, in place.

    A function without a docstring gets one with the shapes of its arguments.

    Args:
        tree: The function.
        dropped: Arguments to leave out.
        given: Arguments that lose their default, since they are always given.
    """
    arguments = tree.args
    every = [*arguments.args, *arguments.kwonlyargs, *([arguments.vararg] if arguments.vararg else [])]
    shapes = {a.arg: s for a in every if (s := _shape(a.annotation))}
    out = _shape(tree.returns)
    names = [a.arg for a in arguments.args]
    defaults = dict(zip(names[len(names) - len(arguments.defaults) :], arguments.defaults, strict=True))
    arguments.args = [a for a in arguments.args if a.arg not in dropped]
    arguments.defaults = [defaults[a.arg] for a in arguments.args if a.arg in defaults and a.arg not in given]
    for argument in every:
        argument.annotation = None
    tree.returns, tree.decorator_list = None, [d for d in tree.decorator_list if _is_kind(d)]
    if shapes and out and ast.get_docstring(tree) is None:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if name not in dropped)
        tree.body.insert(0, ast.Expr(ast.Constant(f"Return {out} from {text}.")))
    elif (doc := ast.get_docstring(tree, clean=False)) is not None:
        tree.body[0] = ast.Expr(ast.Constant(_without(doc, dropped)))


def plain_text(text: str) -> str:
    """Return a docstring without Sphinx roles, with the exception that exported code raises."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"``\1``", text).replace("UserError", "ValueError")


def _without(text: str, dropped: Collection[str]) -> str:
    """Return a docstring without the entries of the arguments ``dropped`` and without Sphinx roles."""
    text = plain_text(text)
    if not dropped:
        return text
    names = "|".join(map(re.escape, sorted(dropped)))
    text = re.sub(rf"\n( +)(?:{names}): .*(?:\n\1 +.*)*", "", text)
    return re.sub(r"\n +Args:\n(?= *(?:\n|$))", "\n", text)


def _is_kind(decorator: ast.expr) -> bool:
    names = {n.id for n in ast.walk(decorator) if isinstance(n, ast.Name)}
    return names <= {"staticmethod", "classmethod", "property", "cached_property", "torch"}


def _shape(annotation: ast.expr | None) -> str:
    if annotation is None:
        return ""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _SHAPED:
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            if len(parts) == 2 and isinstance(parts[1], ast.Constant):
                return f"[{', '.join(str(parts[1].value).split())}]"
    return ""


class Names:
    """Collects what the code of one exported file needs at its top: imports, constants and functions.

    Attributes:
        imports: Import statements.
        constants: Constants, as source lines by name.
        functions: Source of functions by name, each after those that it calls.
        classes: Classes that the code constructs, by name; the caller exports them.
        packages: Packages whose functions and classes are exported with the code that uses them: ours, and those of the
            components.
    """

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.constants: dict[str, str] = {}
        self.functions: dict[str, str] = {}
        self.classes: dict[str, type] = {}
        self.packages = {__name__.partition(".")[0]}
        self._objects: dict[str, Any] = {}
        self._also: list[Mapping[str, Any]] = []

    def resolve(
        self, tree: ast.AST, home: Mapping[str, Any], scope: Scope, what: str, bound: Iterable[str] = ()
    ) -> None:
        """Collect the global names that ``tree`` reads, and rename those that would clash, in place.

        Args:
            tree: Specialised code of a function or method.
            home: Globals of the function.
            scope: What is known of the names in the code, for the functions that it calls.
            what: Description of the component, for messages.
            bound: Names that the code binds besides those that ``tree`` shows.

        Raises:
            NotExportable: A name stands for something that needs more than torch, transformers and the standard library.
        """
        local, self._also, others = _local_names(tree) | set(bound), [], self._also
        for node in [n for n in ast.walk(tree) if isinstance(n, ast.Name)]:
            if node.id in local:
                continue
            found = next((place for place in (home, *others) if node.id in place), None)
            if found is not None:
                node.id = self._named(node.id, found, scope, what)
            elif not hasattr(builtins, node.id):
                raise NotExportable(f"{what} cannot be exported: it reads {node.id!r}, which is not defined")

    def __deepcopy__(self, memo: dict[int, Any]) -> Names:
        made = Names()
        made.take(self)
        return made

    def take(self, other: Names) -> None:
        """Take over what ``other``, a copy of this object, has collected since."""
        self.imports |= other.imports
        self.packages |= other.packages
        for own, theirs in (
            (self.constants, other.constants),
            (self.functions, other.functions),
            (self.classes, other.classes),
            (self._objects, other._objects),
        ):
            own.update(theirs)  # type: ignore[arg-type]  # dictionaries of one type each

    def read_by_functions(self) -> set[str]:
        """Return the names of the attributes that the collected functions read, of any object."""
        trees = [ast.parse(text) for text in self.functions.values()]
        return {n.attr for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}

    def also(self, home: Mapping[str, Any]) -> None:
        """Note the globals of a base class's method, whose code becomes part of the method in work."""
        self._also.append(home)

    def function(self, function: Callable[..., Any], scope: Scope) -> str:
        """Add a function, and return its name."""
        return self._function(function.__name__, function, scope, function.__name__)

    def _named(self, name: str, home: Mapping[str, Any], scope: Scope, what: str) -> str:
        found = home[name]
        statement = _imports_of(str(home.get("__name__"))).get(name)
        if statement is not None:
            self.imports.add(statement)
            return name
        if isinstance(found, type) and issubclass(found, Exception):
            return "ValueError"
        if isinstance(found, int | float | str | bool | tuple | frozenset | None):
            self.constants[name] = f"{name} = {ast.unparse(literal(found))}"
            return name
        if isinstance(found, dict) and all(isinstance(v, types.FunctionType) for v in found.values()):
            made = {key: self._function(v.__name__, replacement_of(v), scope, what) for key, v in found.items()}
            self.functions[name] = f"{name} = {{{', '.join(f'{key!r}: {text}' for key, text in made.items())}}}"
            return name
        module = str(getattr(found, "__module__", None) or type(found).__module__)
        ours = module.partition(".")[0] in self.packages
        if isinstance(found, types.FunctionType) and (ours or replacement_of(found) is not found):
            return self._function(name, replacement_of(found), scope, what)
        if ours and isinstance(found, type) and found.__bases__ in ((object,), (tuple,), (torch.autograd.Function,)):
            self.classes[name] = found
            return name
        raise NotExportable(
            f"{what} cannot be exported: it uses {name!r} of {module}, and exported code has torch, transformers and "
            "the standard library alone"
        )

    def _function(self, name: str, function: Callable[..., Any], scope: Scope, what: str) -> str:
        name = name if replacement_of(function) is function and function.__name__ == name else function.__name__
        while name in self._objects and self._objects[name] is not function:
            name += "_"
        if name in self._objects:
            return name
        self._objects[name] = function
        tree = function_tree(function, what)
        tree.name = name
        plain_signature(tree)
        tree.body = tidy(Specialiser(scope, {}).body(tree.body))
        self.resolve(tree, function.__globals__, scope, what)
        self.functions[name] = ast.unparse(ast.fix_missing_locations(tree))
        return name


def _local_names(tree: ast.AST) -> set[str]:
    """Return the names that a function binds: arguments, variables and nested functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ALLOWED and not node.level:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef) and node is not tree:
            names.add(node.name)
    return names


@functools.lru_cache(maxsize=256)
def _imports_of(module: str) -> Mapping[str, str | None]:
    """Return the import statements at the top of a module by the names that they bind; None for other packages."""
    source = sys.modules.get(module)
    found: dict[str, str | None] = {}
    for node in [] if source is None else ast.parse(inspect.getsource(source)).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                found[alias.asname or root] = ast.unparse(ast.Import([alias])) if root in ALLOWED else None
        elif isinstance(node, ast.ImportFrom):
            root = "" if node.level else (node.module or "").partition(".")[0]
            for alias in node.names:
                statement = ast.unparse(ast.ImportFrom(node.module, [alias], 0)) if root in ALLOWED else None
                found[alias.asname or alias.name] = statement
    return found
