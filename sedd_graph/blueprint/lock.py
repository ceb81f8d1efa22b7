"""The lock file: one self-contained blueprint with everything filled in, that builds the same thing again byte for byte.

Includes are inlined as blocks of its own, overrides applied, the root's parameters resolved, ops pinned to versions,
and every default written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.schema import MAX_NAME, Block, Blueprint, Invertible, Node, OpSpec
from sedd_graph.blueprint.yaml import read_scalar, read_yaml
from sedd_graph.errors import BlueprintError, UserError

__all__ = ["Fill", "dump", "lock"]

Fill = Callable[[str, Mapping[str, Any]], tuple[str, dict[str, Any]]]
"""From an op and its keys to the pinned op and the keys with defaults filled in."""

_HEAD = "# Written by sedd_graph: everything filled in. It builds the same graph again.\n"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")


def lock(loaded: Loaded, fill: Fill) -> str:
    """The text of the lock file. Blocks that no node stands for are left out.

    Raises :class:`UserError` where what is included is too large to stand in one file.
    """
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    writer = _Writer(loaded, fill)
    root = writer.body(loaded, blueprint)
    out: dict[str, Any] = {"blueprint": 1, "name": blueprint.name, "description": blueprint.description or None}
    out |= {"params": loaded.params, "axes": dict(blueprint.axes)}
    out |= {"inputs": root["inputs"], "outputs": root["outputs"], "blocks": writer.blocks, "nodes": root["nodes"]}
    if blueprint.process is not None:
        out["process"] = {**writer.op(blueprint.process), "schedule": writer.op(blueprint.process.schedule)}
    if blueprint.objective is not None:
        out["objective"] = writer.op(blueprint.objective)
    if blueprint.sample is not None:
        out["sample"] = writer.op(blueprint.sample)
        if blueprint.sample.classifier is not None:
            out["sample"]["classifier"] = writer.op(blueprint.sample.classifier)
    out |= {key: model.model_dump(mode="json") for key, model in loaded.sections.items()}
    text = _HEAD + dump({k: v for k, v in out.items() if v not in ({}, None)})
    try:
        read_yaml(text.encode(), name="lock file")
    except BlueprintError as error:
        raise UserError(f"{loaded.file}: with all it includes it cannot be kept as one file: {error}") from None
    return text


class _Writer:
    """Gathers the blocks that are used, in the order of their first use, each under a name of its own."""

    def __init__(self, loaded: Loaded, fill: Fill) -> None:
        self.fill = fill
        self.blocks: dict[str, Any] = {}
        self.names = {(loaded.file, block): block for block in loaded.blueprint.blocks}
        self.prefixes = {loaded.file: ""}
        """Of each file, what its blocks' names begin with: the alias under which it was first used."""

    def body(self, home: Loaded, item: Block | Blueprint) -> dict[str, Any]:
        nodes = {name: self.node(home, node) for name, node in item.nodes.items()}
        return {"inputs": dict(item.inputs), "outputs": dict(item.outputs), "nodes": nodes}

    def node(self, home: Loaded, item: Node) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if item.op is not None:
            out["op"], keys = self.fill(item.op, item.with_)
        else:
            out["block"], keys = self.block(home, item.block or ""), dict(item.with_)
        for key, value in (
            ("in", item.in_),
            ("out", item.out),
            ("with", keys),
            ("repeat", item.repeat),
            ("memory", item.memory),
            ("arithmetic", item.arithmetic),
        ):
            if value is not None and value != {}:
                out[key] = value
        if item.save is not None:
            out["save"] = item.save.model_dump(mode="json", exclude_none=True)
        return out

    def block(self, home: Loaded, text: str) -> str:
        """The name in the lock file of the block that ``text`` means within ``home``."""
        alias, dot, block = text.rpartition(".")
        target = home.libraries[alias] if dot else home
        prefix = self.prefixes.setdefault(target.file, f"{alias}_")
        name = self.names.setdefault((target.file, block), self.free(prefix + block))
        if name not in self.blocks:
            self.blocks[name] = {}  # its place, before those that it uses
            item = target.blueprint.blocks[block]
            claim = (
                item.invertible.model_dump(mode="json") if isinstance(item.invertible, Invertible) else item.invertible
            )
            head = {"description": item.description, "params": dict(item.params), "invertible": claim}
            self.blocks[name] = {k: v for k, v in head.items() if v} | self.body(target, item)
        return name

    def free(self, wish: str) -> str:
        """``wish``, shortened and numbered until it is a name that no other block has."""
        name, number, taken = wish[:MAX_NAME], 2, set(self.names.values())
        while name in taken:
            name, number = f"{wish[: MAX_NAME - len(str(number)) - 1]}_{number}", number + 1
        return name

    def op(self, spec: OpSpec) -> dict[str, Any]:
        pinned, keys = self.fill(spec.op, spec.config)
        return {"op": pinned, **keys}


def dump(data: Mapping[str, Any]) -> str:
    """YAML that :mod:`sedd_graph.blueprint.yaml` reads back as the same data; the same data gives the same bytes."""
    lines: list[str] = []

    def walk(value: Mapping[str, Any], indent: int) -> None:
        for key, item in value.items():
            flat = _flow(item)
            if isinstance(item, dict) and item and ((indent < 4 and len(flat) > 60) or len(flat) > 100):
                lines.append(f"{' ' * indent}{_string(key)}:")
                walk(item, indent + 2)
            else:
                lines.append(f"{' ' * indent}{_string(key)}: {flat}")

    walk(data, 0)
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_string(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    """Plain where it reads back as the same string, else in double quotes with YAML's escapes."""
    try:
        plain = _PLAIN.fullmatch(text) is not None and isinstance(read_scalar(text), str)
    except ValueError:  # such as nan
        plain = False
    if plain:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in text) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    if char in '"\\':
        return "\\" + char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
