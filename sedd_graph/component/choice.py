"""Config fields whose value is a component, selected by its name ``op`` from the installed components.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from sedd_graph.component import renamed
from sedd_graph.component.contract import Contract
from sedd_graph.component.declared import Plain
from sedd_graph.component.kinds import kinds_at
from sedd_graph.component.registry import Registry, installed
from sedd_graph.component.strict import branches
from sedd_graph.errors import UserError, suggest

__all__ = ["Choice"]

PLACE = "x-place"
"""Placeholder key in a field's JSON schema. Its value is a dotted blueprint key such as ``data.corpus``; the JSON
schema of blueprints replaces the placeholder by the components that may be the value of that key."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Annotation of a pydantic field whose value is a component: ``Annotated[Corpus, Choice("data.corpus")]``.

    In YAML the field is a mapping such as ``{op: text, files: [...]}``, or only the name of the component, such as
    ``builtin``. Validation passes the keys other than ``op`` to the component's Config and returns an instance of the
    component. The instance is serialised as a mapping whose ``op`` is the name with its version, such as ``text.v1``.
    """

    place: str
    """Dotted key of the field in a blueprint, such as ``data.corpus``, which determines the allowed kinds of component
    (:mod:`sedd_graph.component.kinds`)."""
    default: str | None = None
    """Component name for a mapping without the key ``op``; None if the key is required."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        (base,) = branches(source)
        return core_schema.no_info_plain_validator_function(
            lambda value: self._read(value, base),
            serialization=core_schema.plain_serializer_function_ser_schema(self._written),
            metadata={"pydantic_js_functions": [lambda schema, handler: {PLACE: self.place}]},
        )

    def contracts(self, registry: Registry) -> list[Contract]:
        """Return the descriptions (:class:`Contract`) of the components in ``registry`` that this field allows."""
        return [c for c in registry.contracts() if c.kind in kinds_at(self.place)]

    def config_of(self, value: Any) -> Any:
        """Return the Config class of the component that is named in ``value``, the field as read from YAML.

        Args:
            value: A component name, or a mapping whose key ``op`` is the name (:attr:`default` if the key is missing).

        Returns:
            The class, or None if ``value`` contains no name. The value is not validated.

        Raises:
            UserError: No installed component has this name.
        """
        op = value.get("op", self.default) if isinstance(value, dict) else value
        return installed().component(op).Config if isinstance(op, str) and op else None

    def _read(self, value: Any, base: type) -> Any:
        if isinstance(value, base):
            return value
        keys = {"op": value} if isinstance(value, str) else value
        if not isinstance(keys, dict):
            raise PydanticCustomError("dict_type", "must be a mapping")
        if not isinstance(op := keys.get("op", self.default), str):
            raise PydanticCustomError("union_tag_not_found", "needs the key 'op'", {"discriminator": "'op'"})
        cls = self._component(op)
        if not issubclass(cls, base):
            raise ValueError(f"{op!r} is not of class {base.__name__}")
        return cls(cls.Config.model_validate({k: v for k, v in keys.items() if k != "op"}))

    def _component(self, op: str) -> Any:
        registry, kinds = installed(), kinds_at(self.place)
        if op in renamed.LR_SCHEDULES and "lr_schedule" in kinds:
            raise ValueError(f"op {op!r} is now called {renamed.LR_SCHEDULES[op]!r}")
        found = f"unknown op {op!r}"
        if op.partition(".v")[0] in (*registry.names, *renamed.OPS):
            try:
                kind = registry.contract(op).kind
            except UserError as error:
                raise ValueError(str(error)) from None
            if kind in kinds:
                return registry.component(op)
            found = f"{op!r} is of kind {kind}"
        names = sorted({c.name for c in self.contracts(registry)})
        raise ValueError(f"{found}{suggest(op, names)}; known: {', '.join(names)}")

    def _written(self, component: Plain) -> dict[str, Any]:
        op = installed().op_of(type(component))
        if op is None:
            raise UserError(f"{self.place}: {type(component).__qualname__} is not registered, so it cannot be written")
        return {"op": op, **component.config.model_dump(mode="json")}
