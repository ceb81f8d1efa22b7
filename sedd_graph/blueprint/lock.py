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
from sedd_graph.blueprint.schema import Block, Blueprint, Node, OpSpec, ProcessSpec
from sedd_graph.blueprint.yaml import read_scalar

__all__ = ["Fill", "dump", "lock"]

Fill = Callable[[str, Mapping[str, Any]], tuple[str, dict[str, Any]]]
"""From an op and its keys to the pinned op and the keys with defaults filled in."""

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")


def lock(loaded: Loaded, fill: Fill) -> str:
    """The text of the lock file."""
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    names: dict[tuple[str, str], str] = {}
    blocks: dict[str, Any] = {}

    def name_of(home: Loaded, block: str, wish: str) -> str:
        key = (home.file, block)
        if key not in names:
            taken, name, number = set(names.values()), wish, 2
            while name in taken:
                name, number = f"{wish}_{number}", number + 1
            names[key] = name
        return names[key]

    def reference(home: Loaded, text: str) -> tuple[Loaded, str, str]:
        alias, dot, block = text.rpartition(".")
        return (home.libraries[alias], block, f"{alias}_{block}") if dot else (home, block, block)

    def node(home: Loaded, item: Node) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if item.op is not None:
            out["op"], keys = fill(item.op, item.with_)
        else:
            target, block, wish = reference(home, item.block or "")
            if home is not loaded and target is home:
                wish = f"{names[home.file, '']}_{block}"
            known = (target.file, block) in names
            out["block"] = name_of(target, block, wish)
            if not known:
                names.setdefault((target.file, ""), wish.removesuffix(f"_{block}") or block)
                add(target, block)
            keys = dict(item.with_)
        for key, value in (("in", item.in_), ("out", item.out), ("with", keys), ("repeat", item.repeat)):
            if value is not None and value != {}:
                out[key] = value
        if item.save is not None:
            out["save"] = item.save.model_dump(mode="json", exclude_none=True)
        return out

    def body(home: Loaded, item: Block | Blueprint) -> dict[str, Any]:
        return {
            "inputs": dict(item.inputs),
            "outputs": dict(item.outputs),
            "nodes": {n: node(home, v) for n, v in item.nodes.items()},
        }

    def add(home: Loaded, block: str) -> None:
        item = home.blueprint.blocks[block]
        name = names[home.file, block]
        blocks[name] = {}  # its place, before those that it uses
        head = {"description": item.description} if item.description else {}
        params = {"params": dict(item.params)} if item.params else {}
        claim = item.invertible if isinstance(item.invertible, bool | None) else item.invertible.model_dump(mode="json")
        claimed = {"invertible": claim} if claim else {}
        blocks[name] = {**head, **params, **claimed, **body(home, item)}

    def op(spec: OpSpec) -> dict[str, Any]:
        pinned, keys = fill(spec.op, spec.config)
        return {"op": pinned, **keys}

    names[loaded.file, ""] = ""
    for block in blueprint.blocks:
        names[loaded.file, block] = block
    for block in blueprint.blocks:
        add(loaded, block)
    root = body(loaded, blueprint)
    out: dict[str, Any] = {"blueprint": 1, "name": blueprint.name}
    if blueprint.description:
        out["description"] = blueprint.description
    out |= {"params": loaded.params, "axes": dict(blueprint.axes)}
    out |= {"inputs": root["inputs"], "outputs": root["outputs"], "blocks": blocks, "nodes": root["nodes"]}
    if blueprint.process is not None:
        process: ProcessSpec = blueprint.process
        out["process"] = {**op(OpSpec(op=process.op, **process.config)), "schedule": op(process.schedule)}
    if blueprint.objective is not None:
        out["objective"] = op(blueprint.objective)
    if blueprint.sample is not None:
        out["sample"] = op(blueprint.sample)
    for key in ("data", "train", "store"):
        if key in loaded.sections:
            out[key] = loaded.sections[key].model_dump(mode="json")
    return "# Written by sedd_graph: everything filled in. It builds the same graph again.\n" + dump(
        {k: v for k, v in out.items() if v not in ({}, None)}
    )


def dump(data: Any) -> str:
    """YAML that :mod:`sedd_graph.blueprint.yaml` reads back as the same data; the same data gives the same bytes."""
    lines: list[str] = []

    def leaf(value: Any) -> str:
        if isinstance(value, str):
            plain = _PLAIN.fullmatch(value) is not None
            try:
                plain = plain and read_scalar(value) == value and isinstance(read_scalar(value), str)
            except ValueError:
                plain = False
            return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {leaf(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(leaf(v) for v in value) + "]"
        return "null" if value is None else json.dumps(value)

    def walk(value: dict[str, Any], indent: int) -> None:
        for key, item in value.items():
            flat = leaf(item)
            if isinstance(item, dict) and item and ((indent < 4 and len(flat) > 60) or len(flat) > 100):
                lines.append(f"{' ' * indent}{key}:")
                walk(item, indent + 2)
            else:
                lines.append(f"{' ' * indent}{key}: {flat}")

    walk(data, 0)
    return "\n".join(lines) + "\n"
