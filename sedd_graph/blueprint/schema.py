"""The shape of a blueprint, as frozen pydantic models: what may be written, before it is known what it means.

Component configs (``with:``) and the ``data``, ``train`` and ``store`` sections are held to their own models elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["MAX_NAME", "Block", "Blueprint", "Invertible", "Library", "Node", "OpSpec", "SaveSpec"]

MAX_NAME = 64
"""Characters that a name may have."""

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=MAX_NAME)]
Title = Annotated[str, pydantic.Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=MAX_NAME)]
Ref = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$", max_length=130)]
OpName = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.v[1-9][0-9]{0,3})?$", max_length=80)]
TypeText = Annotated[str, pydantic.Field(max_length=256)]
Scalar = bool | int | float | str


class Frozen(Strict):
    model_config = pydantic.ConfigDict(populate_by_name=True, hide_input_in_errors=True)


class SaveSpec(Frozen):
    """Ports of a node that are streamed to ``activations.zarr`` while training."""

    ports: Annotated[list[Name], pydantic.Field(min_length=1, max_length=16)]
    every: Annotated[int, pydantic.Field(ge=1, le=10**9)] = 100
    """Steps from one record to the next."""
    dtype: Literal["float32", "float16"] = "float32"
    rows: Annotated[int, pydantic.Field(ge=1, le=65536)] | None = None
    """How many rows of the batch are kept (all, where absent)."""
    chunk: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Steps per chunk of the array."""


class Node(Frozen):
    """One node: exactly one of ``op`` (a registered component) or ``block``."""

    op: OpName | None = None
    block: Ref | None = None
    in_: Ref | list[Ref] | dict[Name, Ref | list[Ref]] | None = pydantic.Field(default=None, alias="in")
    out: TypeText | dict[Name, TypeText] | None = None
    with_: dict[Name, Any] = pydantic.Field(default_factory=dict, alias="with")
    repeat: int | Annotated[str, pydantic.Field(max_length=256)] | None = None
    memory: Literal["auto", "store", "checkpoint", "reversible"] | None = None
    """Of a block: what is kept for the backward pass. ``store``: all activations; ``checkpoint``: the inputs of each repeat;
    ``reversible``: the outputs alone (the block must claim to be invertible); ``auto`` (the default): ``reversible`` where
    the block claims it, else ``store``."""
    arithmetic: Literal["float", "exact"] | None = None
    """Of an invertible block: ``exact`` rounds its streams to a grid, so that what is rebuilt is equal to the last bit."""
    save: SaveSpec | None = None

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Node:
        if (self.op is None) == (self.block is None):
            raise ValueError("give exactly one of 'op' and 'block'")
        if self.op is not None and self.repeat is not None:
            raise ValueError("'repeat' is for blocks: put the op into a block of its own")
        if self.op is not None and (self.memory or self.arithmetic):
            raise ValueError("'memory' and 'arithmetic' are for blocks: put the op into a block of its own")
        return self


class Invertible(Frozen):
    """A block's claim that its inputs can be had back from its outputs. The builder derives how, or says why not."""

    given: Annotated[list[Name], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=list)
    """Inputs that are known at inversion too, such as conditioning."""
    level: Literal["injective", "bijective", "volume_preserving"] = "injective"
    on_failure: Literal["error", "checkpoint"] = "error"
    """Where the derived inverse does not hold in numbers: ``build`` refuses, or warns and has the block checkpointed."""


class Block(Frozen):
    """A graph with typed inputs and outputs that nodes can stand for; its axis names are bound by what is fed in."""

    description: str = ""
    params: dict[Name, Scalar | None] = pydantic.Field(default_factory=dict)
    """Defaults; a parameter whose default is null must be given by the node that uses the block."""
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    invertible: bool | Invertible | None = None


class OpSpec(pydantic.BaseModel):
    """A process component written inline: ``op`` and its Config keys side by side."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)
    op: OpName

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class ProcessSpec(OpSpec):
    """The noise process: a kernel, its Config keys, and its ``schedule``."""

    schedule: OpSpec


class SampleSpec(OpSpec):
    """How text is drawn: a sampler, its Config keys, and a ``classifier`` that it is drawn towards a label of."""

    classifier: OpSpec | None = None


class Library(Frozen):
    """A file that only holds blocks for others to use."""

    blueprint: Literal[1]
    description: str = ""
    use: Annotated[dict[Name, Annotated[str, pydantic.Field(max_length=1024)]], pydantic.Field(max_length=64)] = (
        pydantic.Field(default_factory=dict)
    )
    blocks: Annotated[dict[Name, Block], pydantic.Field(max_length=1024)] = pydantic.Field(default_factory=dict)


class Blueprint(Library):
    """A whole model: its graph, its noise process, and how it is trained, sampled and stored."""

    name: Title
    params: dict[Name, Scalar] = pydantic.Field(default_factory=dict)
    axes: Annotated[dict[Name, int | TypeText], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=dict)
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    process: ProcessSpec | None = None
    objective: OpSpec | None = None
    sample: SampleSpec | None = None
    data: dict[Name, Any] | None = None
    train: dict[Name, Any] | None = None
    store: dict[Name, Any] | None = None
