"""Source of a class as plain torch code: those of its methods that are used, copied together from it and its bases.

The code is that of the class's own methods, as Python's ``inspect`` returns it: what runs in sedd_graph is what is
exported. Constants are folded, with the branches that they select. Methods that nothing calls are left out.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sedd_graph.component.exported import replacement_of
from sedd_graph.runs.plain.names import Names, NotExportable, function_tree, plain_signature, plain_text
from sedd_graph.runs.plain.specialise import UNKNOWN, Specialiser, dotted, tidy

__all__ = ["ClassSource", "class_text", "other_classes"]


class ClassSource:
    """The exported source of one class.

    Args:
        cls: The class.
        names: Collects what the code reads at the top of its file.
        what: Description of the class, for messages.
        constants: Values that are known of attribute paths, such as ``("self", "weights")``, and of calls, by their text.
        methods: Functions whose source replaces that of methods, by name.
        renamed: Attributes of the class that replace attribute paths, by path.

    Attributes:
        read: Names of the attributes that the code reads, of any object.
        methods: Syntax trees of the exported methods by name.
    """

    bases: tuple[type, ...] = (nn.Module, torch.autograd.Function, object)
    """Classes whose methods are not copied."""

    def __init__(
        self,
        cls: type,
        names: Names,
        *,
        what: str,
        constants: Mapping[tuple[str, ...], Any] | None = None,
        methods: Mapping[str, Callable[..., Any]] | None = None,
        renamed: Mapping[tuple[str, ...], str] | None = None,
    ) -> None:
        self.cls, self.names, self.what = cls, names, what
        self.constants, self._given, self._renamed = dict(constants or {}), dict(methods or {}), dict(renamed or {})
        self.read: set[str] = set()
        self.methods: dict[str, ast.FunctionDef] = {}
        self._method, self._owner = "", cls

    # -- methods ----------------------------------------------------------------------------------------------------

    def add(self, *wanted: str) -> None:
        """Add methods, and those that they call, unless the class has them.

        Raises:
            NotExportable: They need more than torch, transformers and the standard library.
        """
        queue = list(wanted)
        while queue:
            name = queue.pop(0)
            if name not in self.methods:
                owner, function = self._found(name)
                self.methods[name] = self._specialised(name, owner, function)
                queue += self._called(self.methods[name])

    def has_method(self, name: str) -> bool:
        """Return True if the class, or a base class whose methods are copied, defines a method or property ``name``."""
        for owner in self.cls.__mro__:
            if owner in self.bases:
                return False
            if name in owner.__dict__:
                found = owner.__dict__[name]
                return callable(found) or isinstance(found, property | staticmethod | classmethod | cached_property)
        return False

    def _found(self, name: str) -> tuple[type, Callable[..., Any]]:
        """Return the class that defines a method, and the method."""
        if name in self._given:
            return self.cls, self._given[name]
        for owner in self.cls.__mro__:
            if name in owner.__dict__ and owner not in self.bases:
                found: Any = owner.__dict__[name]
                found = found.fget if isinstance(found, property) else found
                found = found.func if isinstance(found, cached_property) else found
                found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
                return owner, inspect.unwrap(replacement_of(found))
        base, _, own = name.lstrip("_").partition("__")
        for owner in self.cls.__mro__:
            if own and owner.__name__ == base:
                return owner, owner.__dict__[own]
        raise NotExportable(f"{self.what} cannot be exported: it uses {name!r}, which exported classes do not have")

    def _specialised(self, name: str, owner: type, function: Callable[..., Any]) -> ast.FunctionDef:
        tree = function_tree(function, self.what)
        tree.name = name
        self._method, self._owner = name, owner
        known, dropped, given = self._arguments(name, {a.arg for a in tree.args.args})
        plain_signature(tree, dropped, given)
        _Paths(self._renamed).visit(tree)
        tree.body = tidy(Specialiser(self, known).body(tree.body)) or [ast.Pass()]
        self.names.resolve(tree, function.__globals__, self, self.what, self._bound())
        return tree

    def _arguments(self, method: str, names: set[str]) -> tuple[dict[str, Any], set[str], set[str]]:
        """Return what is known of a method's arguments: values, arguments to leave out, arguments that lose a default."""
        return {}, set(), set()

    def _bound(self) -> Sequence[str]:
        """Return names that the method in work binds, which its syntax tree does not show."""
        return ()

    def _called(self, tree: ast.AST) -> list[str]:
        """Return the methods and properties of the class that the code uses."""
        found = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self.read.add(node.attr)
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if own and (self.has_method(node.attr) or "__" in node.attr.lstrip("_")):
                    found.append(node.attr)
        return found

    # -- what is known (the interface of Specialiser) -----------------------------------------------------------------

    def constant(self, node: ast.expr) -> Any:
        """Return the value of an attribute path or of a call, or UNKNOWN."""
        return self.constants.get((ast.unparse(node),) if isinstance(node, ast.Call) else dotted(node), UNKNOWN)

    def written(self, node: ast.expr, value: Any) -> ast.expr | None:
        """Return the expression by which a known number or container is written; None to leave it as it is."""
        return None

    def inherited(self, call: ast.Call, *, returned: bool) -> list[ast.stmt] | ast.expr | None:
        """Return what replaces a call of ``super()``: the body of the base class's method, or a method of this class."""
        func = call.func
        if not (isinstance(func, ast.Attribute) and isinstance(func.value, ast.Call)):
            return None
        if dotted(func.value.func) != ("super",) or (func.attr == "__init__" and not call.args):
            return None
        classes = self.cls.__mro__
        below = classes[classes.index(self._owner) + 1 :]
        owner = next((c for c in below if func.attr in c.__dict__), object)
        if owner in self.bases:
            return ast.parse("super().__init__()").body if func.attr == "__init__" else None
        tree = function_tree(replacement_of(owner.__dict__[func.attr]), self.what)
        names = [a.arg for a in tree.args.args[1:]]
        same = not call.keywords and [dotted(a) for a in call.args] == [(n,) for n in names]
        if func.attr == "__init__" or (returned and same):
            self._owner = owner
            self.names.also(owner.__dict__[func.attr].__globals__)
            return tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
        return ast.Attribute(ast.Name("self", ast.Load()), f"_{owner.__name__}__{func.attr}", ast.Load())

    # -- the class --------------------------------------------------------------------------------------------------

    def constructor(self) -> ast.FunctionDef | None:
        """Return the constructor; None if there is nothing to construct."""
        return self.methods.get("__init__")

    def class_source(self, name: str, base: str = "") -> str:
        """Return the source of the class.

        Args:
            name: Name of the class.
            base: Name of its base class; empty for none.
        """
        trees = [self.constructor(), *(tree for key, tree in self.methods.items() if key != "__init__")]
        methods = [ast.unparse(ast.fix_missing_locations(tree)) for tree in trees if tree is not None]
        doc = plain_text(inspect.cleandoc(self.cls.__doc__ or name)).partition("\n\nRaises:")[0]
        return class_text(name, base, doc, methods)


def other_classes(names: Names, reads: Iterable[str] = (), *, done: Collection[str] = ()) -> dict[str, str]:
    """Return the source of the classes that collected code constructs, by name.

    Args:
        names: What the code reads at the top of its file; what the classes read is added.
        reads: Names of the methods that are exported, besides those that the collected functions read; a class of
            autograd is exported whole.
        done: Names of classes that the caller exports.
    """
    made: dict[str, str] = {}
    while left := [n for n in names.classes if n not in made and n not in done]:
        for name in left:
            cls = names.classes[name]
            made[name] = ""
            wanted = {*reads, *names.read_by_functions(), *(v for text in made.values() for v in _read(text))}
            if issubclass(cls, torch.autograd.Function):
                wanted = {k for k, v in cls.__dict__.items() if isinstance(v, staticmethod)}
            made[name] = _whole(cls, names, wanted)
    return made


def _read(text: str) -> set[str]:
    return {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}


def _whole(cls: type, names: Names, wanted: Collection[str]) -> str:
    """Return the source of a class with its fields, decorators and bases, and those of its methods that are wanted."""
    source = ClassSource(cls, names, what=cls.__name__)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    if not isinstance(tree, ast.ClassDef):
        raise NotExportable(f"{cls.__name__} cannot be exported: it is not defined by 'class'")
    home = sys.modules[cls.__module__].__dict__
    body: list[ast.stmt] = []
    for statement in tree.body:
        match statement:
            case ast.FunctionDef(name=name):
                try:  # all methods: what reads them may be exported later
                    source.add(name)
                    body.append(source.methods[name])
                except NotExportable:
                    if name in wanted or name.startswith("__"):
                        raise
                continue
            case ast.Expr(value=ast.Constant(value=str() as text)):
                statement = ast.Expr(ast.Constant(plain_text(text)))
            case ast.AnnAssign():
                statement.annotation = ast.Name("object", ast.Load())
                names.resolve(statement, home, source, cls.__name__)
            case _:
                names.resolve(statement, home, source, cls.__name__)
        body.append(statement)
    tree.body = []
    names.resolve(tree, home, source, cls.__name__)
    tree.body = body
    return ast.unparse(ast.fix_missing_locations(tree))


class _Paths(ast.NodeTransformer):
    """Replaces attribute paths by attributes of ``self``."""

    def __init__(self, renamed: Mapping[tuple[str, ...], str]) -> None:
        self.renamed = renamed

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        name = self.renamed.get(dotted(node))
        return self.generic_visit(node) if name is None else ast.Attribute(ast.Name("self", ast.Load()), name, node.ctx)


def class_text(name: str, base: str, doc: str, methods: Sequence[str]) -> str:
    """Return the source of a class with a docstring and methods; the methods are not indented."""
    text = ast.unparse(ast.Module([ast.Expr(ast.Constant(f"{doc}\n" if "\n" in doc else doc))], []))
    body = textwrap.indent("\n\n".join([text, *methods]), "    ", lambda line: bool(line.strip()))
    return f"class {name}({base}):\n{body}" if base else f"class {name}:\n{body}"
