"""Source of a component as a class of plain torch code, specialised to its Config.

Numbers become arguments of the constructor; strings, switches and inputs that are not connected are folded, with the
branches that they select. Inverses, log-determinants and the rest that sedd_graph alone calls are left out. No component
is known here by its name: third-party components are exported alike.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sedd_graph.component.base import KEY, Component, ComponentConfig, Context
from sedd_graph.runs.plain.class_source import ClassSource
from sedd_graph.runs.plain.names import Names, NotExportable
from sedd_graph.runs.plain.specialise import GIVEN, UNKNOWN, dotted, literal

__all__ = ["ComponentSource"]

_PLAIN = (bool, int, float, str, type(None), tuple, list, dict, frozenset)
MOST_NUMBERS = 2**20
"""Largest number of entries of the tables of a kernel or schedule, which are exported as text."""


class ComponentSource(ClassSource):
    """The class that one component is exported as.

    Args:
        component: The component.
        names: Collects what the class reads at the top of its file.
        what: Description of the component, for messages.
        dropped: Arguments of ``forward`` that are None: ports that are not connected.
        given: Arguments of ``forward`` that are never None.
        bound: Components that the code reads by an attribute path, such as ``("walk", "kernel")``; their constants are
            folded.

    Attributes:
        numbers: Values of the constructor's arguments, by name.
    """

    bases = (Component, nn.Module, object)

    def __init__(
        self,
        component: Component,
        names: Names,
        *,
        what: str,
        dropped: Sequence[str] = (),
        given: Sequence[str] = (),
        bound: Mapping[tuple[str, ...], Component] | None = None,
    ) -> None:
        super().__init__(type(component), names, what=what)
        self.component, self.dropped, self.given = component, {*dropped, KEY}, set(given)
        self._components = dict(bound or {})
        self.numbers: dict[str, int | float] = {}
        names.packages |= {cls.__module__.partition(".")[0] for cls in type(component).__mro__}

    def _arguments(self, method: str, names: set[str]) -> tuple[dict[str, Any], set[str], set[str]]:
        if method == "__init__":
            return {}, {"config", "context"}, set()
        if method != "forward":
            return {}, set(), set()
        given, dropped = self.given & names, self.dropped & names
        return {**dict.fromkeys(dropped), **dict.fromkeys(given, GIVEN)}, dropped, given

    def _bound(self) -> Sequence[str]:
        return tuple(self.numbers) if self._method == "__init__" else ()

    def _called(self, tree: ast.AST) -> list[str]:
        return [name for name in super()._called(tree) if name not in self.numbers]

    # -- what is known ------------------------------------------------------------------------------------------------

    def constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            if dotted(node.func) == ("self", "axis") and node.args and isinstance(node.args[0], ast.Constant):
                return self.component.context.axes.get(str(node.args[0].value), UNKNOWN)
            return UNKNOWN
        inside = self._method == "__init__"
        match dotted(node):
            case ("self", "config", *rest):
                return self._path(self.component.config, rest)
            case ("config", *rest) if inside and rest:
                return self._path(self.component.config, rest)
            case ("self", "context", *rest) if rest:
                return self._path(self.component.context, rest)
            case ("context", *rest) if inside and rest:
                return self._path(self.component.context, rest)
            case ("self", "kv_cache"):
                return None
            case ("self", name):
                return self._attribute(self.component, name)
            case (*path, name) if tuple(path) in self._components:
                return self._attribute(self._components[tuple(path)], name)
        return UNKNOWN

    @staticmethod
    def _path(value: Any, names: Sequence[str]) -> Any:
        for name in names:
            if not isinstance(value, ComponentConfig | Context) or not hasattr(value, name):
                return UNKNOWN
            value = getattr(value, name)
        return value if isinstance(value, _PLAIN) else UNKNOWN

    @staticmethod
    def _attribute(owner: Component, name: str) -> Any:
        """Return a class attribute, a property or a plain attribute of a component, if it is plain data."""
        if name in nn.Module.__dict__ or name in ("training", "config", "context"):
            return UNKNOWN
        static = inspect.getattr_static(owner, name, None)
        if name in owner.__dict__ or not (callable(static) or isinstance(static, staticmethod | classmethod)):
            value = getattr(owner, name, UNKNOWN)
            if value is not UNKNOWN and isinstance(value, _PLAIN):
                return value
        return UNKNOWN

    def written(self, node: ast.expr, value: Any) -> ast.expr | None:
        if isinstance(value, tuple | list | dict | frozenset):
            return literal(value)
        if isinstance(node, ast.Call):
            return self._number(str(node.args[0].value), value) if isinstance(node.args[0], ast.Constant) else None
        path = dotted(node)
        if path[:2] == ("self", "config") or (self._method == "__init__" and path[0] == "config"):
            return self._number(path[-1], value)
        return self._number(path[1], value) if path[0] == "self" and len(path) == 2 else None

    def _number(self, name: str, value: int | float) -> ast.expr:
        taken = {**self.component._modules, **self.component._parameters, **self.component._buffers}
        while hasattr(nn.Module, name) or name in taken or self.numbers.get(name, value) != value:
            name += "_"
        self.numbers[name] = value
        if self._method == "__init__":
            return ast.Name(name, ast.Load())
        return ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())

    # -- state --------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, list[Any]]:
        """Return the parameters and buffers of a kernel or schedule that its methods read, as nested lists of numbers.

        Raises:
            NotExportable: They are too large, or belong to modules within it.
        """
        found = {**self.component._parameters, **self.component._buffers}
        used = {name: tensor for name, tensor in found.items() if tensor is not None and name in self.read}
        if any(name in self.read for name in self.component._modules):
            raise NotExportable(f"{self.what} cannot be exported: it contains modules")
        if (count := sum(t.numel() for t in used.values())) > MOST_NUMBERS:
            raise NotExportable(f"{self.what} cannot be exported: its tables hold {count:,} numbers")
        return {name: tensor.detach().cpu().tolist() for name, tensor in used.items()}

    def fixed(self, wanted: Sequence[str]) -> None:
        """Add constants and methods that other code reads, by name; names that the component does not have are ignored."""
        self._method = ""
        for name in wanted:
            value = self._attribute(self.component, name) if hasattr(self.component, name) else UNKNOWN
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.numbers[name] = value
            elif value is None or isinstance(value, bool | str):
                self.constants[("self", name)] = value
            elif self.has_method(name):
                self.add(name)
            self.read.add(name)

    # -- the class ----------------------------------------------------------------------------------------------------

    def constructor(self) -> ast.FunctionDef | None:
        made = self.methods.get("__init__")
        module = (isinstance(self.component, nn.Module) and made is not None) or "forward" in self.methods
        start = "super().__init__()" if module else ""
        body = list(made.body) if made is not None else list(ast.parse(start).body)
        used = self.read | _read_in(body)
        for name, tree in self.methods.items():
            used |= _read_in(tree.body) if name != "__init__" else set()
        assigned = [f"self.{name} = {name}" for name in self.numbers if name in used]
        assigned += [f"self.{name[1]} = {value!r}" for name, value in self.constants.items()]
        at = next((i for i, s in enumerate(body) if "super().__init__" in ast.unparse(s)), -1) + 1
        body[at:at] = ast.parse("\n".join(assigned)).body
        body = [s for s in body if not _sets_unread(s, used)]
        tensors = {} if module else self.tensors()
        values = {**self.component._parameters, **self.component._buffers}
        for name in tensors:
            dtype = getattr(values[name], "dtype", None)
            text = f"self.{name} = torch.tensor({name}, dtype={dtype}, device=device)"
            body += ast.parse(text).body
        if tensors:
            self.names.imports.add("import torch")
        if not self.numbers and not tensors and len(body) == len(ast.parse(start).body):
            return None
        arguments = ", ".join(["self", *self.numbers, *tensors, *(["device"] if tensors else [])])
        written = ast.parse(f"def __init__({arguments}):\n    pass").body[0]
        if not isinstance(written, ast.FunctionDef):
            raise TypeError(arguments)
        written.body = body
        return written


def _read_in(body: Sequence[ast.stmt]) -> set[str]:
    """Return the attributes of ``self`` that the statements read."""
    return {
        n.attr
        for s in body
        for n in ast.walk(s)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and dotted(n)[:1] == ("self",)
    }


def _sets_unread(statement: ast.stmt, read: set[str]) -> bool:
    """Return True for ``self.name = ...`` of plain data that nothing reads."""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute)):
        return False
    target = statement.targets[0]
    kept = any(
        isinstance(n, ast.Call) and dotted(n.func)[:1] in (("nn",), ("torch",)) for n in ast.walk(statement.value)
    )
    return dotted(target)[:1] == ("self",) and target.attr not in read and not kept
