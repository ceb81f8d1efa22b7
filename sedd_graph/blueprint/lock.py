"""Writer of the lock file: a self-contained copy of a blueprint, from which the same graph can be built again.

The lock file of a lock file is identical to it. Blocks of included files are copied in, overrides are applied, the
root's parameters are resolved, component names are written with their versions, and every default is written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sedd_graph.blueprint.location import Loaded
from sedd_graph.blueprint.schema import MAX_NAME, Block, Blueprint, ConfigKeys, Node, OpSpec
from sedd_graph.blueprint.yaml import read_scalar, read_yaml
from sedd_graph.errors import BlueprintError, UserError

__all__ = ["LOCK", "Fill", "dump", "lock"]

LOCK = "blueprint.lock.yaml"
"""File name of the lock file in a run folder."""
Fill = Callable[[str, ConfigKeys], tuple[str, ConfigKeys]]
"""Function from a component name and its Config keys to the name with its version and the keys with all defaults."""

_HEAD = "# Written by sedd_graph: everything filled in. It builds the same graph again.\n"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")


def lock(loaded: Loaded, fill: Fill) -> str:
    """Return the text of the lock file of a blueprint, in YAML. Blocks that no node uses are omitted.

    Args:
        loaded: The blueprint and its included files.
        fill: Function ``fill(name, keys)`` that returns the component's name with its version, and its Config keys
            with all defaults.

    Raises:
        UserError: The lock file, which contains all included blocks, would exceed the size limits of one file.
    """
    blueprint, writer = loaded.blueprint, _Writer(loaded, fill)
    root = writer.body(loaded, blueprint)
    specs = {"process": blueprint.process, "objective": blueprint.objective, "sample": blueprint.sample}
    specs["distill"] = blueprint.distill
    out: dict[str, Any] = {"blueprint": 1, "name": blueprint.name, "description": blueprint.description or None}
    out |= {"params": loaded.params, "axes": dict(blueprint.axes)}
    out |= {"inputs": root["inputs"], "outputs": root["outputs"], "blocks": writer.blocks, "nodes": root["nodes"]}
    out |= {key: writer.op(spec) for key, spec in specs.items() if spec is not None}
    if blueprint.memory is not None:
        out["memory"] = blueprint.memory.model_dump(mode="json")
    out |= {key: model.model_dump(mode="json") for key, model in loaded.sections.items()}
    text = _HEAD + dump({k: v for k, v in out.items() if v not in ({}, None)})
    try:
        read_yaml(text.encode(), name="lock file")
    except BlueprintError as error:
        raise UserError(f"{loaded.file}: with all it includes it cannot be kept as one file: {error}") from None
    return text


class _Writer:
    """Collects the blocks that are used, in the order of their first use, each under a name of its own."""

    def __init__(self, loaded: Loaded, fill: Fill) -> None:
        self.fill = fill
        self.blocks: dict[str, Any] = {}
        self.names = {(loaded.file, block): block for block in loaded.library.blocks}
        self.prefixes = {loaded.file: ""}
        """By file, the prefix of its blocks' names: the alias under which it was first used."""

    def body(self, home: Loaded, item: Block | Blueprint) -> dict[str, Any]:
        nodes = {name: self.node(home, node) for name, node in item.nodes.items()}
        return {"inputs": dict(item.inputs), "outputs": dict(item.outputs), "nodes": nodes}

    def node(self, home: Loaded, item: Node) -> dict[str, Any]:
        out = item.model_dump(mode="json", by_alias=True, exclude_none=True)
        if item.op is not None:
            out["op"], out["with"] = self.fill(item.op, item.with_)
        else:
            out["block"], out["with"] = self.block(home, item.block or ""), dict(item.with_)
        return {k: v for k, v in out.items() if v != {}}

    def block(self, home: Loaded, text: str) -> str:
        """Return the name in the lock file of the block that ``text`` refers to within ``home``."""
        alias, dot, block = text.rpartition(".")
        target = home.libraries[alias] if dot else home
        prefix = self.prefixes.setdefault(target.file, f"{alias}_")
        name = self.names.setdefault((target.file, block), self.free(prefix + block))
        if name not in self.blocks:
            self.blocks[name] = {}  # its entry, before those of the blocks that it uses
            item = target.library.blocks[block]
            head = item.model_dump(mode="json", include={"description", "params", "invertible"})
            self.blocks[name] = {k: v for k, v in head.items() if v} | self.body(target, item)
        return name

    def free(self, wish: str) -> str:
        """Return ``wish``, shortened and numbered until no other block has the name."""
        name, number, taken = wish[:MAX_NAME], 2, set(self.names.values())
        while name in taken:
            name, number = f"{wish[: MAX_NAME - len(str(number)) - 1]}_{number}", number + 1
        return name

    def op(self, spec: OpSpec) -> dict[str, Any]:
        pinned, keys = self.fill(spec.op, spec.config)
        return {"op": pinned, **keys, **{name: self.op(inner) for name, inner in spec if isinstance(inner, OpSpec)}}


def dump(data: Mapping[str, Any]) -> str:
    """Return ``data`` as deterministic YAML text, from which ``read_yaml`` reads equal data."""
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
    """Return a value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_string(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    """Return a string, plain where it reads back as the same string, else in double quotes with YAML's escapes."""
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
