"""Partial evaluation of Python source: constants are folded, and branches that are never taken are removed.

Values that are known before the code runs (the Config of a component, its sizes, inputs that are not connected) are
supplied by a :class:`Scope`. Code is never executed.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["GIVEN", "UNKNOWN", "Scope", "Specialiser", "dotted", "literal", "loaded_names", "tidy"]

UNKNOWN: Any = object()
"""Value of an expression that is not known before the code runs."""
GIVEN: Any = object()
"""Value of an argument of which it is known only that it is not None."""

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.RShift: operator.rshift,
}
_COMPARE: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg}
_TERMINAL = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Scope(Protocol):
    """What is known of the names and attributes in the code."""

    def constant(self, node: ast.expr) -> Any:
        """Return the value of a name, attribute or call, or :data:`UNKNOWN`."""

    def written(self, node: ast.expr, value: Any) -> ast.expr | None:
        """Return the expression by which a known number or container is written; None to leave it as it is."""

    def inherited(self, call: ast.Call, *, returned: bool) -> list[ast.stmt] | ast.expr | None:
        """Return the statements or the expression that replace a call of a method of ``super()``; None for none."""


def dotted(node: ast.AST) -> tuple[str, ...]:
    """Return the names of an attribute path, such as ``("self", "config", "heads")``; empty for other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()


def literal(value: Any) -> ast.expr:
    """Return the expression that is written as the constant ``value``: plain data, sets included."""
    text = repr(value) if not isinstance(value, frozenset) else f"{{{', '.join(map(repr, sorted(value)))}}}"
    return ast.parse(text, mode="eval").body


def loaded_names(nodes: Sequence[ast.AST]) -> set[str]:
    """Return the names that the code reads."""
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _stored(nodes: Sequence[ast.AST]) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


class _Renamed(ast.NodeTransformer):
    """Replaces names that are read by expressions."""

    def __init__(self, names: Mapping[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.names[node.id]) if node.id in self.names else node


class Specialiser(ast.NodeTransformer):
    """Specialises the body of one function.

    Args:
        scope: What is known before the code runs.
        known: Values of arguments that are known, by name; the caller removes them from the signature.
    """

    def __init__(self, scope: Scope, known: Mapping[str, Any]) -> None:
        self.scope, self.known = scope, dict(known)
        self._aliases: dict[str, ast.expr] = {}

    # -- values -----------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression, or :data:`UNKNOWN`."""
        try:
            return self._value(node)
        except (TypeError, ValueError, ZeroDivisionError, KeyError, IndexError):
            return UNKNOWN

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.known[node.id] if node.id in self.known else self.scope.constant(node)
            case ast.Attribute():
                return self.scope.constant(node)
            case ast.Call():
                return self._called(node)
            case ast.UnaryOp() if type(node.op) in _UNARY:
                value = self._value(node.operand)
                return value if value is UNKNOWN else _UNARY[type(node.op)](value)
            case ast.BinOp() if type(node.op) in _BINARY:
                left, right = self._value(node.left), self._value(node.right)
                return UNKNOWN if UNKNOWN in (left, right) else _BINARY[type(node.op)](left, right)
            case ast.BoolOp():
                return self._junction(node)
            case ast.Compare():
                return self._compared(node)
            case ast.IfExp():
                test = self._value(node.test)
                return UNKNOWN if test is UNKNOWN else self._value(node.body if test else node.orelse)
            case ast.Tuple() | ast.Set() | ast.List():
                values = [self._value(element) for element in node.elts]
                kind = {ast.Tuple: tuple, ast.Set: frozenset, ast.List: list}[type(node)]
                return UNKNOWN if any(v is UNKNOWN for v in values) else kind(values)
            case ast.Subscript():
                value, index = self._value(node.value), self._value(node.slice)
                return UNKNOWN if UNKNOWN in (value, index) else value[index]
        return UNKNOWN

    def _called(self, node: ast.Call) -> Any:
        if dotted(node.func) == ("torch", "compiler", "is_compiling"):
            return False
        if dotted(node.func) == ("len",) and len(node.args) == 1:
            value = self._value(node.args[0])
            return value if value is UNKNOWN else len(value)
        return self.scope.constant(node)

    def _junction(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)
        value: Any = UNKNOWN
        for part in node.values:
            value = self._value(part)
            if value is UNKNOWN or bool(value) == stops:
                return value
        return value

    def _compared(self, node: ast.Compare) -> Any:
        values = [self._value(part) for part in (node.left, *node.comparators)]
        if any(v is UNKNOWN for v in values) or any(type(op) not in _COMPARE for op in node.ops):
            return UNKNOWN
        if any(v is GIVEN for v in values) and not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            return UNKNOWN
        return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False))

    # -- expressions ------------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            value = self.value(node)
            if value is None or isinstance(value, bool | str):
                return ast.copy_location(ast.Constant(value), node)
            if value not in (UNKNOWN, GIVEN) and isinstance(node, ast.Attribute | ast.Call | ast.Name):
                found = self.scope.written(node, value)
                if found is not None:
                    return ast.copy_location(found, node)
        return super().visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        test = self.value(node.test)
        return self.generic_visit(node) if test is UNKNOWN else self.visit(node.body if test else node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        stops, parts = isinstance(node.op, ast.Or), []
        for index, part in enumerate(node.values):
            value = self.value(part)
            if value is not UNKNOWN and bool(value) != stops and index < len(node.values) - 1:
                continue
            parts.append(self.visit(part))
            if value is not UNKNOWN and bool(value) == stops:
                break
        return parts[0] if len(parts) == 1 else ast.BoolOp(node.op, parts)

    def visit_Call(self, node: ast.Call) -> Any:
        found = self.scope.inherited(node, returned=False)
        if isinstance(found, ast.expr):
            node = ast.Call(found, node.args, node.keywords)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "register_buffer":
            # in the state dict, since the values of others are lost when a model is loaded
            node.keywords = [k for k in node.keywords if k.arg != "persistent"]
        return self.generic_visit(node)

    def _hidden(self, names: set[str], node: ast.AST) -> Any:
        before = self.known
        self.known = {k: v for k, v in before.items() if k not in names}
        found = self.generic_visit(node)
        self.known = before
        return found

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return self._hidden({a.arg for a in node.args.args}, node)

    def _comprehension(self, node: Any) -> Any:
        return self._hidden(_stored(node.generators), node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    # -- statements -------------------------------------------------------------------------------------------------

    def body(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Return the specialised statements; those after a return are dropped."""
        out: list[ast.stmt] = []
        for statement in statements:
            out += self._statement(_Renamed(self._aliases).visit(copy.deepcopy(statement)))
            if out and isinstance(out[-1], _TERMINAL):
                break
        return out

    def _forget(self, nodes: Sequence[ast.AST]) -> None:
        for name in _stored(nodes):
            self.known.pop(name, None)

    def _branch(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        before = dict(self.known)
        out = self.body(statements)
        self.known = before
        return out

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        match node:
            case ast.Expr(value=ast.Constant()):
                return [node]
            case ast.Expr(value=ast.Call() as call) | ast.Return(value=ast.Call() as call):
                found = self.scope.inherited(call, returned=isinstance(node, ast.Return))
                if isinstance(found, list):
                    return self.body(found)
            case ast.If():
                return self._if(node)
            case ast.Match():
                return self._match(node)
            case ast.For() | ast.While():
                self._forget([node])
                if isinstance(node, ast.While):
                    node.test = self.visit(node.test)
                else:
                    node.iter = self.visit(node.iter)
                node.body = self._branch(node.body)
                return [node]
            case ast.With():
                node.items = [self.visit(item) for item in node.items]
                node.body = self.body(node.body)
                return [node]
            case ast.AnnAssign():
                if node.value is None:
                    return []
                return self._assign(ast.Assign([node.target], node.value, lineno=node.lineno))
            case ast.Assign():
                return self._assign(node)
            case ast.FunctionDef():
                own = {a.arg for a in node.args.args}
                before = self.known
                self.known = {k: v for k, v in before.items() if k not in own}
                node.body, node.returns = self.body(node.body), None
                for argument in node.args.args:
                    argument.annotation = None
                self.known = before
                return [node]
        self._forget([node])
        return [self.visit(node)]

    def _if(self, node: ast.If) -> list[ast.stmt]:
        test = self.value(node.test)
        if test is not UNKNOWN:
            return self.body(node.body if test else node.orelse)
        node.test = self.visit(node.test)
        node.body, node.orelse = self._branch(node.body), self._branch(node.orelse)
        self._forget([node])
        if not node.body:
            if not node.orelse:
                return []
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        return [node]

    def _match(self, node: ast.Match) -> list[ast.stmt]:
        subject = self.value(node.subject)
        for case in node.cases:
            pattern = case.pattern
            if subject is UNKNOWN or case.guard is not None:
                break
            if isinstance(pattern, ast.MatchValue) and self.value(pattern.value) == subject:
                return self.body(case.body)
            if isinstance(pattern, ast.MatchAs) and pattern.pattern is None:
                return self.body(case.body)
            if not isinstance(pattern, ast.MatchValue):
                break
        else:
            return []
        self._forget([node])
        node.subject = self.visit(node.subject)
        for case in node.cases:
            case.body = self._branch(case.body)
        return [node]

    def _assign(self, node: ast.Assign) -> list[ast.stmt]:
        value, target = self.value(node.value), node.targets[0]
        name = target.id if isinstance(target, ast.Name) and len(node.targets) == 1 else None
        if name is not None and dotted(node.value) == ("self", "config"):
            self._aliases[name] = node.value
            return []
        node.value = self.visit(node.value)
        node.targets = [self.visit(t) for t in node.targets]
        self._forget([node])
        if name is not None and value is not UNKNOWN and not isinstance(value, list | dict):  # which may be changed
            self.known[name] = value
        if name is not None and isinstance(node.value, ast.Name) and node.value.id == name:
            return []
        return [node]


def tidy(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return statements without assignments that nothing reads, and with ``x = ...; return x`` joined."""
    while True:
        read = loaded_names(body)
        kept = [s for s in body if not _is_dead(s, read)]
        if len(kept) == len(body):
            break
        body = kept
    if len(body) > 1 and isinstance(last := body[-1], ast.Return) and isinstance(before := body[-2], ast.Assign):
        target = before.targets[0]
        if isinstance(target, ast.Name) and isinstance(last.value, ast.Name) and last.value.id == target.id:
            body = [*body[:-2], ast.Return(before.value)]
    return body


def _is_dead(statement: ast.stmt, read: set[str]) -> bool:
    if isinstance(statement, ast.FunctionDef):
        return statement.name not in read
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target, value = statement.targets[0], statement.value
    return (
        isinstance(target, ast.Name)
        and target.id not in read
        and not any(isinstance(n, ast.Call) for n in ast.walk(value))
    )
