"""JSON Schema (2020-12) of a blueprint, for editors: every installed component's Config folded in under its op."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pydantic

from sedd_graph.blueprint.load import Sections
from sedd_graph.blueprint.schema import Blueprint
from sedd_graph.component.contract import Contract, size_fields
from sedd_graph.component.kinds import KINDS

__all__ = ["blueprint_schema"]

_REFERENCE = {"type": "string", "pattern": r"\$\{params\.[a-z][a-z0-9_]*\}"}


def _loosened(schema: Any, sizes: frozenset[str] = frozenset()) -> Any:
    """Any scalar may be written as ``${params.x}``, and a size as an expression."""
    if isinstance(schema, list):
        return [_loosened(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: _loosened(v) for k, v in schema.items() if k not in ("default", "title", "const")}
    if "const" in schema:
        out["const"] = schema["const"]
    if "properties" in schema:
        out["properties"] = {
            name: _loosened(inner) if name == "op" else _written(_loosened(inner), size=name in sizes)
            for name, inner in schema["properties"].items()
        }
        for name, inner in out["properties"].items():
            if "description" in schema["properties"][name]:
                inner["description"] = schema["properties"][name]["description"]
    return out


def _written(schema: dict[str, Any], *, size: bool) -> dict[str, Any]:
    """What may be written where ``schema`` is meant; of a list of sizes, each may be an expression."""
    if size and "items" in schema:
        schema = schema | {"items": {"anyOf": [schema["items"], {"type": "string"}]}}
    return {"anyOf": [schema, {"type": "string"} if size else _REFERENCE]}


def _inlined(model: type[pydantic.BaseModel], definitions: dict[str, Any], prefix: str) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True, ref_template=f"#/$defs/{prefix}{{model}}")
    for name, inner in schema.pop("$defs", {}).items():
        definitions[f"{prefix}{name}"] = _loosened(inner)
    return schema


def blueprint_schema(contracts: Iterable[Contract], sections: Sections) -> dict[str, Any]:
    """The schema as plain data, in a stable order. ``sections`` gives the models of data, train and store."""
    definitions: dict[str, Any] = {}
    root = Blueprint.model_json_schema(by_alias=True)
    definitions.update(root.pop("$defs"))
    by_kind: dict[str, list[Contract]] = {}
    for contract in sorted(contracts, key=lambda c: c.op):
        by_kind.setdefault("node" if KINDS[contract.kind].is_node else contract.kind, []).append(contract)

    def config(contract: Contract) -> dict[str, Any]:
        schema = _inlined(contract.config, definitions, f"{contract.op}.")
        return dict(_loosened(schema, size_fields(contract.config)))

    node = definitions["Node"]
    node["allOf"] = [
        {
            "if": {"properties": {"op": {"enum": [c.name, c.op]}}, "required": ["op"]},
            "then": {"properties": {"with": config(c)}},
        }
        for c in by_kind.get("node", [])
    ]
    names = sorted({n for c in by_kind.get("node", []) for n in (c.name, c.op)})
    node["properties"]["op"] = {"anyOf": [{"enum": [*names]}, {"type": "null"}]}
    kinds = {
        "process": ("kernel", "string_kernel"),
        "objective": ("objective", "likelihood", "string_objective"),
        "sample": ("sampler", "string_sampler"),
    }
    inner = {"kernel": "schedule", "string_kernel": "schedule", "sampler": "classifier"}
    for key, fitting in kinds.items():
        root["properties"][key] = {
            "anyOf": [
                _inline_op(c, config(c), inner=inner.get(kind)) for kind in fitting for c in by_kind.get(kind, [])
            ]
        }
    for kind in ("schedule", "classifier"):
        definitions[kind.title()] = {"anyOf": [_inline_op(c, config(c)) for c in by_kind.get(kind, [])]}
    for key, models in sections.items():
        schemas = [_loosened(_inlined(model, definitions, f"{key}.")) for model in models]
        root["properties"][key] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    for name in ("OpSpec", "ProcessSpec", "SampleSpec"):
        definitions.pop(name, None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sedd_graph blueprint, version 1",
        # a file of blocks alone is a library: it has neither a name nor nodes
        "if": {"required": ["nodes"]},
        "then": {**root, "$defs": {}},
        "else": {"$ref": "#/$defs/Library"},
        "$defs": {**definitions, "Library": _library(root)},
    }


def _inline_op(contract: Contract, schema: dict[str, Any], *, inner: str | None = None) -> dict[str, Any]:
    """``inner`` is the key under which another component stands in it; a schedule must, a classifier may."""
    out = copy.deepcopy(schema)
    out.setdefault("properties", {})
    out["properties"] = {"op": {"enum": [contract.name, contract.op]}, **out["properties"]}
    out["required"] = ["op", *out.get("required", [])]
    if inner is not None:
        out["properties"][inner] = {"$ref": f"#/$defs/{inner.title()}"}
    if inner == "schedule":
        out["required"].append("schedule")
    out["description"] = contract.summary
    return out


def _library(root: dict[str, Any]) -> dict[str, Any]:
    keys = ("blueprint", "description", "use", "blocks")
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["blueprint"],
        "properties": {k: copy.deepcopy(root["properties"][k]) for k in keys},
    }
