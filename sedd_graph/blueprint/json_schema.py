"""JSON Schema (draft 2020-12) of blueprints, for editors, including the Config of every installed component."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pydantic

from sedd_graph.blueprint.load import Sections
from sedd_graph.blueprint.schema import Blueprint
from sedd_graph.component.choice import PLACE
from sedd_graph.component.contract import Contract, size_fields
from sedd_graph.component.fields import add_descriptions
from sedd_graph.component.kinds import KINDS, NODE

__all__ = ["blueprint_schema"]

_REFERENCE = {"type": "string", "pattern": r"\$\{params\.[a-z][a-z0-9_]*\}"}


def _loosened(schema: Any, sizes: frozenset[str] = frozenset()) -> Any:
    """Return ``schema`` extended with ``${params.x}`` for scalars, expressions for sizes, components for places."""
    if isinstance(schema, list):
        return [_loosened(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if PLACE in schema:
        return {"$ref": f"#/$defs/{schema[PLACE]}"}
    out = {k: _loosened(v) for k, v in schema.items() if k not in ("default", "title", "const")}
    if "const" in schema:
        out["const"] = schema["const"]
    for name, inner in schema.get("properties", {}).items():
        bare = _loosened({k: v for k, v in inner.items() if k != "description"})
        out["properties"][name] = bare if name == "op" else _written(bare, size=name in sizes)
        if "description" in inner:
            out["properties"][name]["description"] = inner["description"]
    return out


def _written(schema: dict[str, Any], *, size: bool) -> dict[str, Any]:
    """Return a schema that accepts ``schema`` or a ``${params.x}`` reference, and expressions for sizes."""
    if size and "items" in schema:
        schema = schema | {"items": {"anyOf": [schema["items"], {"type": "string"}]}}
    return {"anyOf": [schema, {"type": "string"} if size else _REFERENCE]}


def _inlined(model: type[pydantic.BaseModel], definitions: dict[str, Any], prefix: str) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True, ref_template=f"#/$defs/{prefix}{{model}}")
    add_descriptions(model, schema)
    for name, inner in schema.pop("$defs", {}).items():
        definitions[f"{prefix}{name}"] = _loosened(inner)
    return schema


def blueprint_schema(contracts: Iterable[Contract], sections: Sections) -> dict[str, Any]:
    """Return the JSON Schema of blueprints as plain data, with keys in a stable order.

    Args:
        contracts: Descriptions of the installed components, one each.
        sections: List of pydantic models for each of the sections ``data``, ``train`` and ``store``, by section name. A
            section is valid if it matches at least one of its models.
    """
    root = Blueprint.model_json_schema(by_alias=True)
    add_descriptions(Blueprint, root)
    definitions: dict[str, Any] = root.pop("$defs")
    at: dict[str, list[Contract]] = {kind.place: [] for kind in KINDS.values()}
    for contract in sorted(contracts, key=lambda c: c.op):
        at[KINDS[contract.kind].place].append(contract)

    def config(contract: Contract) -> dict[str, Any]:
        schema = _inlined(contract.config, definitions, f"{contract.op}.")
        return dict(_loosened(schema, size_fields(contract.config)))

    node = definitions["Node"]
    node["allOf"] = [
        {
            "if": {"properties": {"op": {"enum": [c.name, c.op]}}, "required": ["op"]},
            "then": {"properties": {"with": config(c)}},
        }
        for c in at.pop(NODE)
    ]
    names = sorted(n for then in node["allOf"] for n in then["if"]["properties"]["op"]["enum"])
    node["properties"]["op"] = node["properties"]["op"] | {"anyOf": [{"enum": names}, {"type": "null"}]}
    for place, found in at.items():
        plain = [n for c in found if "." in place and not _needs_keys(c) for n in (c.name, c.op)]
        bare = [{"enum": plain}] if plain and place.partition(".")[0] in sections else []
        definitions[place] = {"anyOf": [_inline_op(c, config(c), at) for c in found] + bare}
        if place in root["properties"]:
            kept = {k: v for k, v in root["properties"][place].items() if k == "description"}
            root["properties"][place] = {"$ref": f"#/$defs/{place}", **kept}
    for key, models in sections.items():
        schemas = [_loosened(_inlined(model, definitions, f"{key}.")) for model in models]
        kept = {k: v for k, v in root["properties"][key].items() if k == "description"}
        root["properties"][key] = (schemas[0] if len(schemas) == 1 else {"anyOf": schemas}) | kept
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


def _needs_keys(contract: Contract) -> bool:
    return any(field.is_required() for field in contract.config.model_fields.values())


def _inline_op(contract: Contract, schema: dict[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """Return the schema of a component written inline: ``op``, its Config keys, and its inner components."""
    out, kind = copy.deepcopy(schema), KINDS[contract.kind]
    out["properties"] = {
        "op": {"enum": [contract.name, contract.op], "description": "Name of the component."},
        **out.get("properties", {}),
    }
    out["required"] = ["op", *out.get("required", [])]
    for place in places:
        outer, _, key = place.partition(".")
        if key and outer == kind.place and _goes_with(place, kind.family):
            out["properties"][key] = {"$ref": f"#/$defs/{place}", "description": f"The {key}."}
    out["description"] = contract.summary
    return out


def _goes_with(place: str, family: str | None) -> bool:
    return any(kind.family in (None, family) for kind in KINDS.values() if kind.place == place)


def _library(root: dict[str, Any]) -> dict[str, Any]:
    keys = ("blueprint", "description", "use", "blocks")
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["blueprint"],
        "properties": {k: copy.deepcopy(root["properties"][k]) for k in keys},
    }
